"""The device tier on a GPU, over synthetic models of true shape: python -m benchmarks.gpu_tier --models F [--out F]

What a layer costs the host, on a shape that costs the device nothing; then Mixtral-8x7B's 32 layers at 2 bits: the
paper's rows and greenroom's defaults in 12 and 16 GB, and a prompt beside the slower of link and kernels; then
Qwen3-30B-A3B's 48 layers and gpt-oss-20b's 24 in 8 GB, and Mixtral at 3 bits. What matters comes first, every part
says on stderr at once what it found and how long it took, and none begins that would not end within `--seconds`. The
models, 21 GB, are written to the folder `--models` unless they lie there, in processes beside one another and beside
the first part; without --out that is all.
"""

import argparse
import dataclasses
import faulthandler
import functools
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_models import MODELS, Models, say
from greenroom.cli import bench, paper
from greenroom.config import EngineSettings
from greenroom.device import Device, find_gpu
from greenroom.engine import Engine
from greenroom.packed import PackedModel, replace_text

Result = dict[str, Any]

GB = 10**9
ALL_VRAM = 24 * GB
"""Holds every expert of Mixtral at 2 bits."""
SOME_FAILED = 3
"""The exit status where some part failed and the others were measured; 1 is what a process gives that broke off."""
Case = tuple[str, int, int]
"""(row, slots per layer, bytes of the device's memory)"""


def _beside_naive(slots: int, vram: int) -> "list[Case]":
    """The paper's way, greenroom's own, and what both are compared with."""
    return [(name, slots, vram) for name in ("full", paper.DEFAULTS, "naive")]


_PAPER_ROWS = [
    *_beside_naive(2, 12 * GB),
    *(("full", 4, 16 * GB), (paper.DEFAULTS, 4, 16 * GB)),
    *(("without prefetch", 2, 12 * GB), ("without prefetch", 4, 16 * GB), ("without cache and prefetch", 2, 12 * GB)),
]
ROWS = {
    "mixtral-8x7b-2bit": _PAPER_ROWS,
    "qwen3-30b-a3b-4bit": _beside_naive(48, 8 * GB),
    "gpt-oss-20b-4bit": _beside_naive(18, 8 * GB),
    "mixtral-8x7b-3bit": _PAPER_ROWS,
}
"""Model → what is measured, what matters most first."""

USUAL_S = {"host": 20.0, "row": 14.0, "naive": 30.0, "prompt": 35.0}
"""A part of each kind takes about so long, until one has been timed."""
TAKEN = {"row": {"--tokens": "32", "--trials": "2"}, "naive": {"--tokens": "16", "--trials": "1"}}
"""What a row of each kind is measured by."""
WAYS = {"read back": (False, False), "ahead": (True, False), "graphs": (True, True)}
"""How single tokens pass the layers: launched ahead, captured."""


class Tier:
    """What has been found, by part, and until when another may begin; `keep` is called after each."""

    def __init__(
        self,
        found: Result,
        seconds: float,
        keep: "Callable[[], None]" = lambda: None,
        now: "Callable[[], float]" = time.monotonic,
    ) -> None:
        self.found, self._keep, self._now = found, keep, now
        self._ends = now() + seconds
        self._usual_s = dict(USUAL_S)
        found.update({"failed": [], "cut": [], "seconds": []})

    def part(self, kind: str, name: str, measured: "Callable[[], Result]") -> "Result | None":
        """What one part finds; None where it fails or is not begun, of which the result has a line."""
        start_s = self._now()
        if self._ends - start_s < self._usual_s[kind]:
            self.found["cut"].append(name)
            say(f"{name}: {self._ends - start_s:.0f} s are left, too few")
            return None
        result = None
        try:
            result = measured()
        except Exception as error:  # the others still have something to say
            error_text = traceback.format_exc()[-3000:].replace(f"{Path(__file__).parent.parent}/", "")
            self.found["failed"].append({"part": name, "error": error_text})
            say(f"{name}: {type(error).__name__}: {error}")
        took_s = self._now() - start_s
        if result is not None:
            self._usual_s[kind] = took_s
        self.found["seconds"].append({"part": name, "seconds": round(took_s, 1)})
        say(f"{name}: {took_s:.1f} s")
        return result

    def put(self, kind: str, result: "Result | None") -> None:
        """Keep a part's result: rows in a list, others by their kind."""
        if result is not None and kind == "rows":
            self.found.setdefault("rows", []).append(result)
        elif result is not None:
            self.found[kind] = result
        self._keep()


def measure(tier: Tier, models: Models, device: Device, rows: "dict[str, list[Case]]" = ROWS) -> None:
    """All parts: link, host, rows and prompt."""
    link = tier.found["link_bytes_per_s"] = paper.link_bandwidth(device)
    say(f"the link carries {link / 1e9:.1f} GB/s")
    models.start(list(rows))
    tier.put("host", tier.part("host", "host", lambda: host(models("small"), device)))
    for number, (name, cases) in enumerate(rows.items()):
        models.wait([name])
        for case in cases:
            kind = "naive" if case[0] == "naive" else "row"
            one = functools.partial(row, name, models, device, case, link)
            tier.put("rows", tier.part(kind, _title(name, *case), one))
        if number == 0:
            one = functools.partial(prompt, name, models, device, link)
            tier.put("prompt", tier.part("prompt", "prompt", one))


def _title(model: str, name: str, slots: int, vram: int) -> str:
    return f"{model}, {name}" + {"naive": "", paper.DEFAULTS: f", {vram / GB:.3g} GB"}.get(name, f", k = {slots}")


def row(model: str, models: Models, device: Device, case: Case, link: float) -> Result:
    """One row of one model."""
    name, slots, vram = case
    packed, start_s = models(model), time.monotonic()

    def note(what: str) -> None:
        say(f"  {what} after {time.monotonic() - start_s:.1f} s")

    paper.let_go(device)
    options, vram = _options(TAKEN["naive" if name == "naive" else "row"]), min(vram, device.memory()[0])
    found = paper.measure(name, packed, device, options, slots, vram, link, note)
    say(f"{model}, {paper.line(found)}")
    return {"model": model, **dataclasses.asdict(found)}


def _options(flags: "dict[str, str]") -> argparse.Namespace:
    """What `greenroom bench` would be given."""
    parser = argparse.ArgumentParser()
    bench.add(parser.add_subparsers())
    return parser.parse_args(["bench", "-", *itertools.chain(*flags.items())])


def engine_with(packed: PackedModel, device: Device, slots: int) -> Engine:
    """With so many slots per layer, in memory that is enough; every miss is moved."""
    paper.let_go(device)  # of the engine before
    vram = min(ALL_VRAM, device.memory()[0])
    return Engine(packed, EngineSettings(vram=vram, experts_per_layer=slots, cpu_experts=False), device=device)


def most_experts(packed: PackedModel) -> int:
    """Of a layer."""
    return max(entry.num_experts for entry in packed.manifest.experts)


def host(packed: PackedModel, device: Device) -> Result:
    """Microseconds a layer of each way with every expert on the device, and whether graphs give the same bits."""
    engine = engine_with(packed, device, most_experts(packed))
    try:
        found = {way: decode(engine, device, way) for way in WAYS}
        captured = str(engine.steps)
    finally:
        engine.close(remember=False)
    layers = len(packed.manifest.experts)
    return {
        "us_per_layer": {way: seconds / layers * 1e6 for way, (seconds, _) in found.items()},
        "same_bits": all(torch.equal(logits, found["ahead"][1]) for _, logits in found.values()),
        "captured": captured,
    }


def decode(engine: Engine, device: Device, way: str, tokens: int = 16) -> "tuple[float, torch.Tensor]":
    """Seconds a token after as many to warm up, and the last token's logits."""
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
    return (device.clock() - start_s) / tokens, out.logits.cpu()


def prompt(model: str, models: Models, device: Device, link: float, tokens: int = 512) -> "dict[str, float]":
    """Seconds of a chunk with no expert kept on the device, with all of them there, and over the link alone; and
    tokens/s with all of them there."""
    packed, found = models(model), {}
    for name, slots in (("streamed_s", 0), ("resident_s", most_experts(packed))):
        engine = engine_with(packed, device, slots)
        try:
            found[name], sent = _chunk(engine, device, tokens)
            if slots:
                found["resident_tokens_per_s"] = 1 / max(decode(engine, device, "graphs")[0], 1e-9)
            else:
                found["link_s"] = sent / link
        finally:
            engine.close(remember=False)
            del engine
    bound_s = max(found["link_s"], found["resident_s"])
    say(f"prompt of {tokens} tokens: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return {**found, "of_the_bound": found["streamed_s"] / bound_s if bound_s else 1.0}


def _chunk(engine: Engine, device: Device, tokens: int) -> "tuple[float, int]":
    """(seconds, bytes sent) of a prompt."""
    ids = torch.arange(tokens, device=device.place)[None] % engine.model.config.vocab_size
    with torch.no_grad():
        for _ in range(2):  # the first reads from disk and compiles
            device.synchronise(device.mark())
            start_s, before = device.clock(), engine.metrics()
            engine.model(ids, logits_to_keep=1)
            device.synchronise(device.mark())
    return device.clock() - start_s, (engine.metrics() - before).bytes_up


def table(found: Result) -> "list[str]":
    """A line for each row, with what it is of naive offloading in the same run, and for what else was found."""
    rows = found.get("rows", [])
    naive = {one["model"]: one["tokens_per_s"] for one in rows if one["name"] == "naive"}
    lines = [_row_line(one, naive.get(one["model"])) for one in rows]
    for name, value in found.get("prompt", {}).items():
        lines.append(f"prompt  {name:22} {value:8.3f}")
    for way, us in found.get("host", {}).get("us_per_layer", {}).items():
        lines.append(f"host    {way:10} {us:8.0f} us a layer")
    return lines + ([f"cut     tier: {'; '.join(found['cut'])}: no time left"] if found.get("cut") else [])


def _row_line(one: Result, naive: "float | None") -> str:
    vram = "" if one["vram"] is None else f"{one['vram'] / GB:.3g} GB"
    floor = one["floor_tokens_per_s"] / one["tokens_per_s"] if one["tokens_per_s"] else float("inf")
    return (
        f"tier    {one['model']:20} {one['name']:27} {vram:6} k {one['slots']:5.2f} "
        f"{one['tokens_per_s']:8.2f} tokens/s  {floor:5.2f} of the floor's time  hits {one['hit_rate']:4.0%}"
        + (f"  {one['tokens_per_s'] / naive:5.1f} x naive" if naive else "")
        + (f"  {paper.PAPER_GPUS[0]} {one['paper'][0]:.2f}" if one["paper"] else "")
    )


def main() -> int:
    """Measure, and write after each part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--models", type=Path, required=True, help="a folder for the models")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=300, help="begin nothing that would not end within so long")
    options = parser.parse_args()
    models = Models(options.models, MODELS)
    if options.out is None:
        models.start(list(MODELS))
        models.wait(list(MODELS))
        return 0
    faulthandler.dump_traceback_later(options.seconds + 10, exit=True)  # where it hangs, if it does
    result: Result = {"tier": {}}

    def keep() -> None:
        replace_text(options.out, json.dumps(result))

    tier = Tier(result["tier"], options.seconds, keep)
    measure(tier, models, find_gpu())
    print("\n".join(table(tier.found)))
    return SOME_FAILED if tier.found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
