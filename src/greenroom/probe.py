"""Measure this machine's disk and kernels on a model's own shapes, and predict tokens per second from them."""

import mmap
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from greenroom import kernels
from greenroom.buffers import open_direct
from greenroom.footprint import experts_per_token
from greenroom.machine import median_s
from greenroom.packed import ExpertsEntry, Manifest
from greenroom.planner import Plan

_READ_NBYTES = 2 << 20
_READERS = 4


def measure(manifest: Manifest, weights: Path) -> "dict[str, float]":
    """This machine's rates for the model: `disk_bytes_per_s`, `kernel_bytes_per_s`."""
    return {
        "disk_bytes_per_s": disk_bandwidth(weights),
        "kernel_bytes_per_s": kernel_bandwidth(manifest.experts[0]),
    }


def predict(plan: Plan, manifest: Manifest, config: Any, rates: "dict[str, float]", hit_rate: float) -> float:
    """Tokens per second: all touched bytes over the kernels' rate, then missed bytes over the disk's."""
    top_k = experts_per_token(config)
    touched = sum(min(top_k, entry.num_experts) * entry.record_nbytes for entry in manifest.experts)
    compute_s = (touched + plan.dense) / rates["kernel_bytes_per_s"]
    return 1 / (compute_s + touched * (1 - hit_rate) / rates["disk_bytes_per_s"])


def kernel_bandwidth(entry: ExpertsEntry) -> float:
    """Packed bytes per second of one expert of `entry`'s shape on one token."""
    record = torch.zeros(entry.record_nbytes, dtype=torch.uint8)
    x = torch.zeros(1, entry.tensors[0].cols, dtype=torch.float32)
    half = entry.tensors[1].cols
    activation = kernels.Activation(gate=lambda hidden: hidden[:, :half])
    task = kernels.ExpertTask(record, torch.zeros(1, dtype=torch.int64))
    return entry.record_nbytes / median_s(lambda: kernels.experts(x, [task], entry.tensors, activation), trials=5)


def disk_bandwidth(path: Path, budget_s: float = 0.5) -> float:
    """Bytes per second of direct reads at random places of `path`, several in flight, for about `budget_s`."""
    size = path.stat().st_size
    places = range(0, max(size - _READ_NBYTES, 1), 4096)
    file, _ = open_direct(path)
    deadline, done = time.perf_counter() + budget_s, [0] * _READERS

    def read(reader: int) -> None:
        rng = random.Random(reader)
        with mmap.mmap(-1, _READ_NBYTES) as buffer:
            while time.perf_counter() < deadline:
                done[reader] += os.preadv(file, [buffer], rng.choice(places))

    start = time.perf_counter()
    try:
        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(read, range(_READERS)))
    finally:
        os.close(file)
    return sum(done) / (time.perf_counter() - start)
