"""Where the time of a single token's layers goes on a GPU, host and device: python -m benchmarks.gpu_profile --models F

For layers that are captured and for those that are read back: the time a layer, the functions and operators it goes
into, the device's kernels; and what single calls of torch and of our own cost the host. All figures are microseconds a
layer, or a call. The small model of `gpu_tier` is written to the folder `--models` unless it lies there.
"""

import argparse
import cProfile
import functools
import pstats
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_models import MODELS, Models
from benchmarks.gpu_tier import WAYS, engine_with, most_experts
from greenroom.device import Device, find_gpu
from greenroom.packed import PackedModel

PROMPT = 60
"""Tokens; with all that follow they stay within one room for keys and values."""
REPEATS = 200
"""Of a single call: as many as a device's queue takes without letting the host wait."""


class Decoding:
    """An engine with every expert on the device, and a conversation that goes one way through the layers."""

    def __init__(self, packed: PackedModel, device: Device, way: str) -> None:
        self.engine = engine_with(packed, device, most_experts(packed))
        self.device, self.layers = device, len(packed.manifest.experts)
        assert self.engine.steps is not None
        self.engine.steps.ahead, self.engine.steps.graphs = WAYS[way]
        self._number = 0
        with torch.no_grad():
            ids = torch.arange(PROMPT, device=device.place)[None] % self.engine.model.config.vocab_size
            self._cache = self.engine.model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def tokens(self, count: int) -> None:
        """Launch so many."""
        with torch.no_grad():
            for _ in range(count):
                given = torch.tensor([[self._number]], device=self.device.place)
                self.engine.model(given, past_key_values=self._cache, use_cache=True)
                self._number += 1

    def wait(self) -> None:
        """Until all that was launched is computed."""
        self.device.synchronise(self.device.mark())

    def per_layer(self, count: int) -> float:
        """Microseconds a layer in a second of `count` tokens."""
        return 1e6 / count / self.layers


def lines(packed: PackedModel, device: Device, tokens: int = 24, most: int = 25) -> "Iterator[str]":
    """The report; of each ranking the first `most`. What fails leaves a line."""
    for way in ("graphs", "read back"):
        going = Decoding(packed, device, way)
        try:
            going.tokens(tokens)
            yield f"== {way}, {device.title()}"
            parts: list[Callable[[], list[str]]] = [
                functools.partial(_timed, going, tokens),
                functools.partial(_functions, going, max(tokens // 4, 1), most),
                functools.partial(_operators, going, max(tokens // 12, 1), most),
                functools.partial(_graphs if way == "graphs" else _calls, going),
            ]
            for part in parts:
                yield from _tried(part)
        finally:
            going.engine.close(remember=False)


def _tried(part: "Callable[[], list[str]]") -> "list[str]":
    try:
        return part()
    except Exception:  # the others still have something to say
        return [f"failed: {traceback.format_exc().strip().splitlines()[-1]}"]


def _timed(going: Decoding, count: int) -> "list[str]":
    """The time of tokens, and of it that in the layers' own calls: the rest is the model around them."""
    going.wait()
    start_s = time.perf_counter()
    going.tokens(count)
    launched_s = time.perf_counter() - start_s
    going.wait()
    whole_s, each = time.perf_counter() - start_s, going.per_layer(count)
    within_s = _within(going, count)
    return [
        f"{whole_s * each:.0f} a layer, {launched_s * each:.0f} until the last call returned; of as many again "
        f"{within_s * each:.0f} in layers"
    ]


def _within(going: Decoding, count: int) -> float:
    """Seconds in the model's layers, called one by one or repeated together, while `count` tokens pass."""
    steps, spent = going.engine.steps, [0.0]
    assert steps is not None

    def timed(function: "Callable[..., Any]", *args: Any, **kwargs: Any) -> Any:
        start_s = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - start_s

    calls: list[tuple[Any, str]] = [(steps, "repeat"), *((layer, "forward") for layer in steps.layers)]
    before = [getattr(owner, name) for owner, name in calls]
    for (owner, name), function in zip(calls, before, strict=True):
        setattr(owner, name, functools.partial(timed, function))
    try:
        going.tokens(count)
    finally:
        for (owner, name), function in zip(calls, before, strict=True):
            setattr(owner, name, function)
    return spent[0]


def _functions(going: Decoding, count: int, most: int) -> "list[str]":
    """Python's functions under its profiler, which makes them slower: their share and number is what it says."""
    profiler = cProfile.Profile()
    profiler.enable()
    going.tokens(count)
    going.wait()
    profiler.disable()
    stats: Any = pstats.Stats(profiler).strip_dirs()
    each, rows = going.per_layer(count), stats.stats.items()
    calls, whole_s = (sum(row[at] for _, row in rows) for at in (1, 2))
    found = [f"cProfile: {calls * each / 1e6:.0f} calls and {whole_s * each:.0f} a layer; calls, own time, whole time"]
    for name, at in (("own", 2), ("whole", 3)):
        found.append(f"- by {name} time")
        for (file, line, function), row in sorted(rows, key=lambda item: -item[1][at])[:most]:
            place = function if file == "~" else f"{file}:{line} {function}"
            found.append(f"{row[1] * each / 1e6:6.2f} {row[2] * each:6.1f} {row[3] * each:6.1f} {place[:60]}")
    return found


def _operators(going: Decoding, count: int, most: int) -> "list[str]":
    """torch's operators and the device's kernels under torch's profiler."""
    activities = [ProfilerActivity.CPU]
    if going.device.place.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    going.wait()
    with profile(activities=activities) as profiler:
        going.tokens(count)
        going.wait()
    each = going.per_layer(count) / 1e6
    events: list[Any] = [event for event in profiler.events() if event.device_type != DeviceType.CPU]
    found = [*_kernels(events, each, most), "- operators: number, own time of the host"]
    ranked = sorted(profiler.key_averages(), key=lambda one: -one.self_cpu_time_total)
    found += [f"{one.count * each:6.2f} {one.self_cpu_time_total * each:7.2f} {one.key[:60]}" for one in ranked[:most]]
    return found


def _kernels(events: "Sequence[Any]", each: float, most: int) -> "list[str]":
    if not events:
        return []
    times: dict[str, list[float]] = {}
    for event in events:
        times.setdefault(event.name, []).append(event.time_range.elapsed_us())
    busy_us, end_us = 0.0, 0.0
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in events):
        busy_us += max(end - max(start, end_us), 0.0)
        end_us = max(end, end_us)
    span_us = end_us - min(event.time_range.start for event in events)
    found = [f"device: {len(events) * each:.1f} kernels a layer, busy for {busy_us * each:.0f} of {span_us * each:.0f}"]
    for name, spent in sorted(times.items(), key=lambda item: -sum(item[1]))[:most]:
        found.append(f"{len(spent) * each:6.2f} {sum(spent) * each:7.2f} {name[:80]}")
    return found


def _graphs(going: Decoding) -> "list[str]":
    """All layers' graphs one after another, without the host in between."""
    assert going.engine.steps is not None
    graphs = [graph.captured for graph in going.engine.steps.captured if graph is not None]
    going.wait()
    start_s = time.perf_counter()
    for graph in graphs:
        graph.replay()
    launched_s = time.perf_counter() - start_s
    going.wait()
    whole_s, each = time.perf_counter() - start_s, 1e6 / max(len(graphs), 1)
    return [f"{len(graphs)} graphs in a row: {whole_s * each:.1f} each, {launched_s * each:.1f} of it launching"]


def _calls(going: Decoding) -> "list[str]":
    """What single calls cost the host, and in parentheses with the device's part where they are many in a row."""
    device, model = going.device, going.engine.model
    layer, place = model.model.layers[0], device.place
    hidden = torch.zeros(1, 1, model.config.hidden_size, device=place, dtype=next(layer.parameters()).dtype)
    few = torch.zeros(3, 1, 2, dtype=torch.int32, device=place)
    calls: dict[str, Callable[[], Any]] = {
        "add": lambda: hidden + 1,
        "empty": lambda: torch.empty_like(hidden),
        "mark": device.mark,
        "mark, synchronise": lambda: device.synchronise(device.mark()),
        "send_back": lambda: device.send_back(few),
        "fetch": lambda: device.fetch(few),
        "norm": lambda: layer.input_layernorm(hidden),
        "q_proj": lambda: layer.self_attn.q_proj(hidden),
        "router": lambda: layer.mlp.gate(hidden[0]),
        **(_launches() if place.type == "cuda" else {}),
    }
    with torch.no_grad():
        return [f"{_call_us(going, call)} {name}" for name, call in calls.items()]


def _launches() -> "dict[str, Callable[[], Any]]":
    """A kernel that does nothing much, launched as Triton does it and once its arguments are bound."""
    from greenroom.kernels.gpu import pairs

    index, table = torch.zeros(1, 2, dtype=torch.int64, device="cuda"), torch.zeros(9, dtype=torch.int32, device="cuda")
    slots, missing = (torch.zeros(size, dtype=torch.int32, device="cuda") for size in (2, 3))
    arguments = (table, index, slots, missing, 9, 2)
    bound = pairs.lookup[(1,)](*arguments, BLOCK=2)
    event, stream = torch.cuda.Event(), torch.cuda.current_stream()
    return {
        "triton": lambda: pairs.lookup[(1,)](*arguments, BLOCK=2),
        "triton, bound": lambda: bound[(1, 1, 1)](*arguments, 2),
        "pinned": lambda: torch.empty(64, dtype=torch.uint8, pin_memory=True),
        "a new event": lambda: torch.cuda.Event().record(stream),
        "an event again": event.record,
        "the current stream": torch.cuda.current_stream,
    }


def _call_us(going: Decoding, call: "Callable[[], Any]") -> str:
    for _ in range(10):
        call()
    going.wait()
    start_s = time.perf_counter()
    for _ in range(REPEATS):
        call()
    launched_s = time.perf_counter() - start_s
    going.wait()
    whole_s, each = time.perf_counter() - start_s, 1e6 / REPEATS
    return f"{launched_s * each:7.1f} ({whole_s * each:.1f})"


def main() -> int:
    """Print, and write where it is wanted."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--models", type=Path, required=True, help="a folder for the model")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = []
    for line in lines(Models(options.models, MODELS)("small"), find_gpu()):
        print(line, flush=True)  # whoever stops this keeps what was found
        report.append(line)
    if options.out is not None:
        options.out.write_text("\n".join(report) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
