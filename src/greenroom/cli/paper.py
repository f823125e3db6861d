"""`greenroom bench MODEL --paper`: the rows of the paper's Table 2 on this machine, each beside its floor."""

import argparse
import dataclasses
import gc
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greenroom.cli import options as shared
from greenroom.sizes import format_bytes, parse_bytes

if TYPE_CHECKING:
    from greenroom.device import Device
    from greenroom.packed import PackedModel

PAPER_GPUS = ("A100", "RTX 3080 Mobile", "RTX 3060", "T4")
PAPER: "dict[tuple[str, int], tuple[float, ...]]" = {
    ("full", 2): (3.061, 2.655, 2.278, 2.092),
    ("full", 3): (2.845, 2.475, 2.038, 1.603),
    ("without prefetch", 2): (2.918, 2.227, 2.051, 1.567),
    ("without prefetch", 3): (2.683, 2.024, 1.857, 1.365),
    ("without cache and prefetch", 2): (2.265, 1.758, 1.547, 1.168),
    ("without cache and prefetch", 3): (2.055, 1.595, 1.346, 1.061),
    ("naive", 2): (1.392, 1.059, 0.919, 0.661),
    ("naive", 3): (1.246, 0.914, 0.79, 0.580),
}
"""arXiv 2312.17238, Table 2: Mixtral-8x7B, tokens per second by experts' bits."""

DEFAULTS = "greenroom's defaults"
ROWS: "dict[str, dict[str, Any]]" = {
    "full": {"prefetch": 1},
    "without prefetch": {},
    "without cache and prefetch": {"experts_per_layer": 0},
    "naive": {},
    DEFAULTS: {"experts_per_layer": None, "policy": "learned", "cpu_experts": True},
}
"""What each row changes of an LRU cache of k slots per layer that moves every miss."""

BUDGETS = {2: 12 * 10**9, 4: 16 * 10**9}
"""Slots per layer → bytes of the GPU's memory: the paper's k on GPUs of 12 and 16 GB."""

WARM_UP = 16
"""Tokens before the first that is timed."""

WARM_UP_PROMPT = 256
"""Ids of the prompt before these, spread over the vocabulary: enough to bring nearly all experts from disk to RAM."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One measured row."""

    name: str
    vram: "int | None"
    """bytes of the device's memory that it may take; None for naive, which takes no more than a layer at a time"""
    slots: float
    """per layer, on average, as the engine had them in the end"""
    tokens_per_s: float
    hit_rate: float
    bytes_up_per_token: float
    bytes_read_per_token: float
    """from disk: none where RAM holds all experts"""
    floor_tokens_per_s: float
    """no faster than the missed bytes cross the link; infinite where nothing was missed"""
    paper: "tuple[float, ...]"
    reason: str
    """what was decided on the way, and why"""


def execute(options: argparse.Namespace) -> int:
    """Measure all rows for 2 and 4 slots per layer, or for --experts-per-layer."""
    from greenroom import library
    from greenroom.device import find_gpu
    from greenroom.packed import PackedModel

    device = find_gpu()
    folder: Path = library.find(options.model, **shared.bits_of(options))
    packed = PackedModel(folder)
    link = link_bandwidth(device)
    bits = packed.manifest.settings["expert_bits"]
    print(f"{options.model}: {packed.manifest.architecture}, {bits}-bit experts, on {device.title()}")
    print(f"floor: the link carries {link / 1e9:.1f} GB/s; tokens are consecutive ids (see docs/cli.md)", flush=True)
    rows = []
    for name, slots, vram in cases(options, device.memory()[0]):
        rows.append(measure(name, packed, device, options, slots, vram, link))
        print(line(rows[-1]), flush=True)
    if options.json:
        report = [dataclasses.asdict(row) for row in rows]
        shared.print_json({"link_bytes_per_s": link, "expert_bits": bits, "paper_gpus": PAPER_GPUS, "rows": report})
    return 0


def cases(options: argparse.Namespace, free: int) -> "list[tuple[str, int, int]]":
    """(row, slots per layer, bytes of the device's memory) of all that is measured where so many bytes are free.

    Without --vram the paper's k have its GPUs' memory, as far as that is free. greenroom's defaults fill a budget,
    whatever the k, so each budget is measured once.
    """
    counts = list(BUDGETS) if options.experts_per_layer is None else [options.experts_per_layer]
    given = None if options.vram is None else parse_bytes(options.vram)
    budgets = [(k, given or min(BUDGETS.get(k, free), free)) for k in counts]
    found = []
    for name in ROWS:
        if name in ("naive", "without cache and prefetch"):
            chosen = budgets[:1]
        elif name == DEFAULTS:
            chosen = list({vram: (k, vram) for k, vram in reversed(budgets)}.values())[::-1]
        else:
            chosen = budgets
        found += [(name, *one) for one in chosen]
    return found


def link_bandwidth(device: "Device", nbytes: int = 64 << 20) -> float:
    """Bytes per second from pinned RAM to the device: median of five copies."""
    import torch

    source, target = torch.zeros(nbytes, dtype=torch.uint8), device.allocate(nbytes)
    device.pin(source)
    times = []
    for _ in range(6):
        event = device.upload(target, source, [])
        device.synchronise(event)
        times.append(device.seconds(event))
    return nbytes / statistics.median(times[1:])


def measure(
    name: str,
    packed: "PackedModel",
    device: "Device",
    options: argparse.Namespace,
    slots: int,
    vram: int,
    link: float,
    note: "Callable[[str], None]" = lambda done: None,
) -> Row:
    """One row within `vram` bytes: a prompt and tokens to warm up, then `options.tokens` tokens timed, of naive
    offloading a quarter; the median of the trials. `note` is told what has been done."""
    naive = name == "naive"
    tokens = min(options.tokens, max(4, options.tokens // 4)) if naive else options.tokens
    settings = {"experts_per_layer": slots, "policy": "lru", "cpu_experts": False, "vram": vram, **ROWS[name]}
    running: Any = _Naive(packed, device) if naive else _Ours(packed, device, options, settings)
    try:
        note("started")
        _warm_up(running, device, 1 if naive else WARM_UP)
        note("warm")
        starts = [WARM_UP + number * tokens for number in range(options.trials)]
        trials = [_advance(running, device, range(start, start + 8 + tokens), prompt=8) for start in starts]
        note("timed")
        used, reason = running.slots(), running.reason()
    finally:
        running.close()
        del running
        let_go(device)
    seconds = statistics.median(trial[0] for trial in trials)
    hits, requests, sent, read = (sum(counts) for counts in zip(*(trial[1] for trial in trials), strict=True))
    per_token = sent / (tokens * options.trials)
    return Row(
        name=name,
        vram=None if naive else vram,
        slots=used,
        tokens_per_s=tokens / seconds if seconds else float("inf"),
        hit_rate=hits / requests if requests else 0.0,
        bytes_up_per_token=per_token,
        bytes_read_per_token=read / (tokens * options.trials),
        floor_tokens_per_s=link / per_token if per_token else float("inf"),
        paper=PAPER.get((name, packed.manifest.settings["expert_bits"]), ()),
        reason=reason,
    )


def let_go(device: "Device") -> None:
    """Free what nobody uses any more: a model and its engine hold each other until Python looks for such cycles, and
    with them weights and keys on the device and RAM that the next engine wants."""
    gc.collect()
    device.trim()


class _Ours:
    """An engine to take tokens one by one."""

    def __init__(
        self, packed: "PackedModel", device: "Device", options: argparse.Namespace, settings: "dict[str, Any]"
    ) -> None:
        from greenroom.engine import Engine

        wanted = dataclasses.replace(shared.settings_of(options, context=2048), **settings)
        self._engine = Engine(packed, wanted, device=device)
        self.model = self._engine.model

    def counts(self) -> "tuple[int, int, int, int]":
        """(hits, requests, bytes sent, bytes read from disk) so far."""
        metrics = self._engine.metrics()
        return metrics.hits, metrics.requests, metrics.bytes_up, metrics.bytes_read

    def slots(self) -> float:
        """Per layer, on average."""
        plan = self._engine.plan
        return plan.slots / len(plan.experts)

    def reason(self) -> str:
        """What was decided."""
        return self._engine.placement()

    def close(self) -> None:
        """Stop."""
        self._engine.close(remember=False)


class _Naive:
    """The same for whole layers moved by accelerate."""

    def __init__(self, packed: "PackedModel", device: "Device") -> None:
        from greenroom.naive import NaiveModel

        self._naive = NaiveModel(packed, device)
        self.model = self._naive.model

    def counts(self) -> "tuple[int, int, int, int]":
        """Nothing hits, and all was read before."""
        return 0, 0, self._naive.bytes_up, 0

    def slots(self) -> float:
        """Nothing is kept."""
        return 0.0

    def reason(self) -> str:
        """Nothing is decided."""
        return "whole layers, by accelerate"

    def close(self) -> None:
        """Let go of the model."""
        del self._naive, self.model


def _warm_up(running: Any, device: "Device", count: int) -> None:
    """A prompt that wants nearly every expert, so that what is timed does not wait for the disk, and `count` tokens."""
    vocabulary = running.model.config.get_text_config().vocab_size
    spread = [number * vocabulary // WARM_UP_PROMPT for number in range(WARM_UP_PROMPT)]
    _advance(running, device, [*spread, *range(count)], prompt=WARM_UP_PROMPT)


def _advance(running: Any, device: "Device", ids: "Sequence[int]", prompt: int) -> "tuple[float, list[int]]":
    """(seconds, what `counts` added) for tokens one by one, after the first `prompt` of them, which are left out."""
    import torch

    wrapped = torch.tensor(ids) % running.model.config.get_text_config().vocab_size
    with torch.no_grad():
        out = running.model(wrapped[None, :prompt].to(device.place), use_cache=True, logits_to_keep=1)
        device.synchronise(device.mark())
        start_s, before = device.clock(), running.counts()
        for token in wrapped[prompt:].tolist():
            given = torch.tensor([[token]], device=device.place)
            out = running.model(given, past_key_values=out.past_key_values, use_cache=True)
        device.synchronise(device.mark())
    added = [after - earlier for after, earlier in zip(running.counts(), before, strict=True)]
    return device.clock() - start_s, added


def line(row: Row) -> str:
    """A row for people."""
    ratio = row.floor_tokens_per_s / row.tokens_per_s if row.tokens_per_s else float("inf")
    name = row.name if row.vram is None else f"{row.name}, k = {row.slots:.3g} in {row.vram / 1e9:.3g} GB"
    paper = f"; the paper's {PAPER_GPUS[0]} {row.paper[0]}, {PAPER_GPUS[-1]} {row.paper[-1]}" if row.paper else ""
    read = f", {format_bytes(row.bytes_read_per_token)} from disk" if row.bytes_read_per_token else ""
    return (
        f"{name}: {row.tokens_per_s:.2f} tokens/s, {row.hit_rate:.0%} hits, "
        f"{format_bytes(row.bytes_up_per_token)} per token{read}, {ratio:.2f} times the floor's time{paper}"
        + (f" ({row.reason})" if row.reason else "")
    )
