"""The device tier on a GPU, over a synthetic model of true shape: the paper's rows, layers launched ahead against
reading back, and prompts beside the slower of link and kernels. `measure` fills a dictionary for the GPU suite.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import synthetic
from benchmarks.shapes import PAIRINGS, SHAPES, Shape
from greenroom.cli import bench, paper
from greenroom.config import EngineSettings
from greenroom.device import Device, find_gpu
from greenroom.engine import Engine
from greenroom.packed import PackedModel

VRAM = 12 << 30


def measure(result: "dict[str, Any]", shape: "Shape | None" = None, device: "Device | None" = None) -> None:
    """Adds `tier`: floor, rows, ahead and prompt, each as soon as it is measured; 2-bit experts."""
    device = device or find_gpu()
    tier = result.setdefault("tier", {})
    tier["link_bytes_per_s"] = paper.link_bandwidth(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        synthetic.write(path, shape or dataclasses.replace(SHAPES["mixtral-8x7b-4"], layers=8), PAIRINGS["2"])
        packed = PackedModel(path)
        options = _options("--tokens", "24", "--trials", "2")
        tier["rows"] = []
        for name in paper.ROWS:
            tier["rows"].append(
                dataclasses.asdict(paper.measure(name, packed, device, options, 2, tier["link_bytes_per_s"]))
            )
        tier["ahead"] = {str(ahead): decode_s(packed, device, ahead) for ahead in (False, True)}
        tier["prompt"] = prompt(packed, device, tier["link_bytes_per_s"])


def _options(*arguments: str) -> argparse.Namespace:
    """What `greenroom bench` would be given."""
    parser = argparse.ArgumentParser()
    bench.add(parser.add_subparsers())
    return parser.parse_args(["bench", "-", "--vram", str(VRAM), *arguments])


def decode_s(packed: PackedModel, device: Device, ahead: bool, tokens: int = 24) -> float:
    """Seconds a token with every expert on the device, layers launched ahead or read back."""
    most = max(entry.num_experts for entry in packed.manifest.experts)
    engine = Engine(packed, EngineSettings(vram=VRAM, experts_per_layer=most, cpu_experts=False), device=device)
    try:
        assert engine.steps is not None
        engine.steps.ahead = ahead
        with torch.no_grad():
            ids = torch.arange(512, device=device.place)[None] % engine.model.config.vocab_size
            out = engine.model(ids, use_cache=True, logits_to_keep=1)  # every expert comes
            for number in range(2 * tokens):
                if number == tokens:
                    device.synchronise(device.mark())
                    start_s = device.clock()
                given = torch.tensor([[number]], device=device.place)
                out = engine.model(given, past_key_values=out.past_key_values, use_cache=True)
            device.synchronise(device.mark())
        return (device.clock() - start_s) / tokens
    finally:
        engine.close(remember=False)


def prompt(packed: PackedModel, device: Device, link_bytes_per_s: float, tokens: int = 512) -> "dict[str, float]":
    """Seconds of a chunk with no expert kept on the device, with all of them there, and over the link alone."""
    found = {}
    most = max(entry.num_experts for entry in packed.manifest.experts)
    for name, slots in (("streamed_s", 0), ("resident_s", most)):
        settings = EngineSettings(vram=VRAM, experts_per_layer=slots, cpu_experts=False)
        engine = Engine(packed, settings, device=device)
        try:
            ids = torch.arange(tokens, device=device.place)[None] % engine.model.config.vocab_size
            with torch.no_grad():
                for _ in range(2):  # the first reads from disk and compiles
                    device.synchronise(device.mark())
                    start_s, before = device.clock(), engine.metrics()
                    engine.model(ids, logits_to_keep=1)
                    device.synchronise(device.mark())
            found[name] = device.clock() - start_s
            if not slots:
                found["link_s"] = (engine.metrics() - before).bytes_up / link_bytes_per_s
        finally:
            engine.close(remember=False)
    bound_s = max(found["link_s"], found["resident_s"])
    return {**found, "of_the_bound": found["streamed_s"] / bound_s if bound_s else 1.0}
