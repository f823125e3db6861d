"""One cell of the tables: a shape, a pairing, what fits and how tokens route; and how it is measured.

Engines take turns, round after round, so that the drift of a shared machine falls on all alike. Beside every trial the
memory's and under a limit the disk's read bandwidth is probed, in this process, while the worker waits.
"""

import contextlib
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import gguf_file, limits, routing
from benchmarks.shapes import Pairing, Shape
from benchmarks.turns import Worker
from benchmarks.work import Work, size_of
from greenroom import machine, probe
from greenroom.packed import PackedModel

READAHEAD_NBYTES = 128 << 10
"""llama.cpp reads missing weights by page faults; of the settings tried this one made it fastest, by up to 10 times."""
RAM_SHARE = 0.9
"""greenroom's --ram under a limit: it takes as much of what is free where it is not told."""
_BESIDE = Path(__file__).parent
_WARM = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """What is measured. `fits`: 1.0 without a limit, else the limit as a share of the larger of the two models."""

    shape: Shape
    pairing: Pairing
    fits: float
    routing: str
    prompt: int
    tokens: int

    def sequence(self, number: int) -> "dict[str, list[int]]":
        """The token ids of the trial `number`."""
        count = self.prompt + _WARM + self.tokens
        ids = routing.token_ids(self.routing, self.shape.vocab, 4096 + number * count, count)
        return {"prompt": ids[: self.prompt], "warm": ids[self.prompt : -self.tokens], "timed": ids[-self.tokens :]}

    @property
    def first(self) -> "list[int]":
        """Tokens that touch every expert, so that a model that fits is there before it is timed."""
        count = 10 * self.shape.experts // self.shape.top_k  # leaves one expert in 20 000 out
        return routing.token_ids("uniform", self.shape.vocab, 0, count) if self.fits == 1 else [1]

    def __str__(self) -> str:
        fits = "in RAM" if self.fits == 1 else f"{self.fits:.0%} fits, {self.routing}"
        return f"{self.shape.name}, {self.pairing.ours} and {self.pairing.peer}, {fits}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """How cells are measured."""

    work: Work
    peer: "Path | None"
    """the interpreter that has llama.cpp"""
    rounds: int
    threads: int
    prefix: "list[str]"
    """what every worker's command starts with, such as taskset"""

    def measure(self, cell: Cell) -> "dict[str, Any]":
        """All rounds of a cell."""
        ours, theirs = self.work.models(cell.shape, cell.pairing, self.peer is not None)
        nbytes = {"greenroom": size_of(ours), **({"llama.cpp": size_of(theirs)} if theirs else {})}
        limit = None if cell.fits == 1 else int(cell.fits * max(nbytes.values()))
        touched = {"greenroom": _touched(ours, cell.shape)}
        if theirs:
            touched["llama.cpp"] = gguf_file.bytes_per_token(theirs, cell.shape)
        turns = self._turns(cell, ours, theirs, limit)
        trials: dict[str, list[dict[str, Any]]] = {name: [] for name in turns}
        for number in range(self.rounds):
            for name, turn in turns.items():
                trials[name].append(turn(number))
                _tell(cell, name, trials[name][-1])
        return {
            "shape": cell.shape.name,
            "pairing": cell.pairing.name,
            "formats": {"greenroom": cell.pairing.ours, "llama.cpp": cell.pairing.peer},
            "fits": cell.fits,
            "limit": limit,
            "routing": cell.routing,
            "prompt": cell.prompt,
            "tokens": cell.tokens,
            "nbytes": nbytes,
            "touched_per_token": touched,
            "trials": trials,
            "medians": {name: _medians(found) for name, found in trials.items()},
        }

    def _turns(
        self, cell: Cell, ours: Path, theirs: "Path | None", limit: "int | None"
    ) -> "dict[str, Callable[[int], dict[str, Any]]]":
        context = cell.prompt + _WARM + cell.tokens
        job = {"threads": self.threads, "context": max(context, 512), "first": cell.first}
        command = [*self.prefix, sys.executable, "-m", "benchmarks.greenroom_worker"]
        ram = None if limit is None else int(RAM_SHARE * limit)
        own = [*command, json.dumps({**job, "model": str(ours), "ram": ram})]
        turns = {"greenroom": lambda number: self._turn("greenroom", own, cell, number, limit, ours)}
        for name, repack in {"llama.cpp": True, "llama.cpp, mapped": False}.items():
            if theirs is None or (repack and limit is not None):  # repacked weights are a second copy, not mapped
                continue
            told = json.dumps({**job, "model": str(theirs), "repack": repack})
            peer = [*self.prefix, str(self.peer), str(_BESIDE / "llama_worker.py"), told]
            turns[name] = lambda number, name=name, peer=peer: self._turn(name, peer, cell, number, limit, theirs)
        return turns

    def _turn(
        self, name: str, command: "list[str]", cell: Cell, number: int, limit: "int | None", model: Path
    ) -> "dict[str, Any]":
        with contextlib.ExitStack() as stack:
            group = None
            if limit is not None:
                limits.drop_pages(model)  # pages count where they were first read: let that be in the group
                stack.enter_context(limits.readahead(model, READAHEAD_NBYTES))
                group = stack.enter_context(limits.Limit(limit))
            worker = stack.enter_context(Worker(name, command, group))
            before = floors(model, limited=limit is not None)
            found = worker.trial(cell.sequence(number))
            after = floors(model, limited=limit is not None)
            beside = {f"{what}_bytes_per_s": (before[what] + after[what]) / 2 for what in before}
            return {**worker.about, **found, **beside}


def floors(model: Path, limited: bool = True) -> "dict[str, float]":
    """Bytes per second of this machine's memory and, where it is `limited`, of the disk that holds the model."""
    found = {"ram": machine.ram_bandwidth()}
    if limited:
        file = max(model.iterdir(), key=lambda file: file.stat().st_size) if model.is_dir() else model
        found["disk"] = probe.disk_bandwidth(file, budget_s=1.0)
    return found


def _touched(packed: Path, shape: Shape) -> int:
    """Weight bytes that one token touches: all but the embedding, and of the experts the share that is routed to."""
    manifest = PackedModel(packed).manifest
    dense = sum(entry.nbytes for entry in manifest.linears)
    dense += sum(entry.nbytes for entry in manifest.tensors if not entry.mappable)
    return dense + sum(shape.top_k * entry.record_nbytes for entry in manifest.experts)


def _medians(trials: "list[dict[str, Any]]") -> "dict[str, float]":
    keys = [key for key, value in trials[0].items() if isinstance(value, int | float)]
    return {key: statistics.median(trial[key] for trial in trials) for key in keys}


def _tell(cell: Cell, name: str, trial: "dict[str, Any]") -> None:
    extra = f", hits {trial['hit_rate']:.1%}" if "hit_rate" in trial else ""
    disk = f", disk {trial['disk_bytes_per_s'] / 1e9:.2f} GB/s" if "disk_bytes_per_s" in trial else ""
    print(
        f"{cell}: {name} {trial['tokens_per_s']:.2f} tokens/s, prompt {trial['prompt_tokens_per_s']:.0f}, "
        f"{trial['bytes_read_per_token'] / 1e6:.1f} MB read a token{extra}, "
        f"RAM {trial['ram_bytes_per_s'] / 1e9:.0f} GB/s{disk}",
        file=sys.stderr,
        flush=True,
    )
