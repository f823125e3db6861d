"""Other kernels for 4-bit weights in groups of 64, on the same clock: torch's tinygemm, and gemlite where it is there.

Both read layouts of their own and float scales, so their weights here are random; only the time counts.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu_clock import Clock

GROUP = 64
Line = dict[str, Any]


def lines(clock: Clock, on: torch.device, rate: float, rows: int, cols: int, count: int = 8) -> "Iterator[Line]":
    """One token through [rows, cols] with each peer; what cannot run says why. rate: the copy's, in GB/s."""
    for name, prepare in (("tinygemm", _tinygemm), ("gemlite", _gemlite)):
        try:
            calls = [prepare(on, rows, cols) for _ in range(count)]
            seconds = clock.seconds(calls)
        except Exception as error:  # a peer that fails is a line of the table, not the end of it
            yield {
                "kernel": name,
                "absent": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            }
            continue
        nbytes = rows * cols / 2 + 2 * 2 * rows * cols / GROUP
        yield {
            "kernel": name, "rows": rows, "cols": cols, "us": seconds * 1e6,
            "gb_per_s": nbytes / seconds / 1e9, "share": nbytes / seconds / 1e9 / rate,
        }  # fmt: skip


def _tinygemm(on: torch.device, rows: int, cols: int) -> "Callable[[], Any]":
    codes = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, device=on)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(cols // GROUP, rows, 2, device=on).to(torch.bfloat16)
    x = torch.randn(1, cols, device=on).to(torch.bfloat16)
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)


def _gemlite(on: torch.device, rows: int, cols: int) -> "Callable[[], Any]":
    helper = importlib.import_module("gemlite.helper")
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.uint8, device=on)
    scales, zeros = (torch.rand(rows * cols // GROUP, 1, device=on).to(torch.float16) for _ in range(2))
    module = helper.A16Wn(device=str(on)).from_weights(codes, scales, 8 * zeros, 4, GROUP)
    x = torch.randn(1, cols, device=on).to(torch.float16)
    return lambda: module(x)
