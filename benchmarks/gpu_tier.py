"""The device tier on a GPU, over a synthetic model of true shape: the paper's rows, layers launched ahead against
reading back and as graphs, prompts beside the slower of link and kernels: python -m benchmarks.gpu_tier --out F

Its models, 4.5 GB, are written to the folder `--models` unless they lie there; without --out that is all.
"""

import argparse
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable
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
SMALL = {"layers": 24, "hidden": 256, "intermediate": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 600}
"""A shape whose layers take a device no time, so that what is measured is the host."""
WAYS = {"read back": (False, False), "ahead": (True, False), "graphs": (True, True)}
"""How single tokens pass the layers: launched ahead, captured."""
Result = dict[str, Any]


def models(folder: Path, full: "Shape | None" = None) -> "tuple[PackedModel, PackedModel]":
    """(small, full): what is measured, written where it is not there yet; with a shape of its own `full` is both."""
    large = full or dataclasses.replace(SHAPES["mixtral-8x7b-4"], layers=8)
    small = full or dataclasses.replace(large, **SMALL)
    return _model(folder / "small", small), _model(folder / "full", large)


def measure(
    result: Result,
    folder: Path,
    shape: "Shape | None" = None,
    device: "Device | None" = None,
    keep: "Callable[[], None]" = lambda: None,
) -> None:
    """Adds `tier`: link, host, tokens, rows and prompt; 2-bit experts. `keep` is called after each; what fails leaves a
    line in `failed`."""
    device = device or find_gpu()
    tier = result.setdefault("tier", {"failed": []})
    small, packed = models(folder, shape)
    tier["link_bytes_per_s"] = paper.link_bandwidth(device)
    _part(tier, keep, "host", lambda: host(small, device))
    _part(tier, keep, "tokens", lambda: {way: decode(packed, device, way)[0] for way in WAYS})
    options = _options("--tokens", "24", "--trials", "2")
    for name in paper.ROWS:
        _part(tier, keep, "rows", lambda name=name: row(name, packed, device, options, tier["link_bytes_per_s"]))
    _part(tier, keep, "prompt", lambda: prompt(packed, device, tier["link_bytes_per_s"]))


def _part(tier: Result, keep: "Callable[[], None]", name: str, measured: "Callable[[], Any]") -> None:
    start_s = time.monotonic()
    try:
        found = measured()
        tier[name] = [*tier.get(name, []), *found] if isinstance(found, list) else found
    except Exception:  # the others still have something to say
        tier["failed"].append({"part": name, "error": traceback.format_exc()[-3000:]})
    print(f"tier, {name}: {time.monotonic() - start_s:.0f} s", file=sys.stderr, flush=True)
    keep()


def _model(path: Path, shape: Shape) -> PackedModel:
    if not path.exists():
        synthetic.write(path, shape, PAIRINGS["2"])
    return PackedModel(path)


def row(name: str, packed: PackedModel, device: Device, options: argparse.Namespace, link: float) -> "list[Result]":
    """One of the paper's rows."""
    return [dataclasses.asdict(paper.measure(name, packed, device, options, 2, link))]


def _options(*arguments: str) -> argparse.Namespace:
    """What `greenroom bench` would be given."""
    parser = argparse.ArgumentParser()
    bench.add(parser.add_subparsers())
    return parser.parse_args(["bench", "-", "--vram", str(VRAM), *arguments])


def host(packed: PackedModel, device: Device) -> Result:
    """Microseconds a layer of each way, and whether graphs give the same bits."""
    found = {way: decode(packed, device, way) for way in WAYS}
    layers = len(packed.manifest.experts)
    return {
        "us_per_layer": {way: seconds / layers * 1e6 for way, (seconds, _, _) in found.items()},
        "same_bits": all(torch.equal(logits, found["ahead"][1]) for _, logits, _ in found.values()),
        "captured": found["graphs"][2],
    }


def decode(packed: PackedModel, device: Device, way: str, tokens: int = 24) -> "tuple[float, torch.Tensor, str]":
    """Seconds a token with every expert on the device, the last token's logits, and what was captured."""
    paper.let_go(device)  # of the engine before
    most = max(entry.num_experts for entry in packed.manifest.experts)
    engine = Engine(packed, EngineSettings(vram=VRAM, experts_per_layer=most, cpu_experts=False), device=device)
    try:
        assert engine.steps is not None
        engine.steps.ahead, engine.steps.graphs = WAYS[way]
        with torch.no_grad():
            ids = torch.arange(200, device=device.place)[None] % engine.model.config.vocab_size
            out = engine.model(ids, use_cache=True, logits_to_keep=1)  # every expert comes
            for number in range(2 * tokens):
                if number == tokens:
                    device.synchronise(device.mark())
                    start_s = device.clock()
                given = torch.tensor([[number]], device=device.place)
                out = engine.model(given, past_key_values=out.past_key_values, use_cache=True)
            device.synchronise(device.mark())
        return (device.clock() - start_s) / tokens, out.logits.cpu(), str(engine.steps)
    finally:
        engine.close(remember=False)


def prompt(packed: PackedModel, device: Device, link_bytes_per_s: float, tokens: int = 512) -> "dict[str, float]":
    """Seconds of a chunk with no expert kept on the device, with all of them there, and over the link alone."""
    found = {}
    most = max(entry.num_experts for entry in packed.manifest.experts)
    for name, slots in (("streamed_s", 0), ("resident_s", most)):
        paper.let_go(device)
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


def main() -> int:
    """Measure, and write after each part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--models", type=Path, required=True, help="a folder for the models")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.out is None:
        models(options.models)
        return 0
    result = Result()
    measure(result, options.models, keep=lambda: print(options.out.write_text(json.dumps(result)), file=sys.stderr))
    return 1 if result["tier"]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
