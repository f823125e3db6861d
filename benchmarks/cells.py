"""One cell of the tables: a shape, a pairing, what fits and how tokens route; and how it is measured.

Engines take turns, round after round, so that the drift of a shared machine falls on all alike. Beside every trial,
while the worker waits, this process probes the memory's and under a limit the disk's read bandwidth, and counts what
other processes take from the cores: an engine whose threads wait for each other by spinning suffers most.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import gguf_file, limits
from benchmarks.report import EIGHT_BITS
from benchmarks.shapes import Pairing, Shape
from benchmarks.turns import Worker
from benchmarks.work import Work, size_of
from greenroom import machine, probe
from greenroom.packed import PackedModel

READAHEAD_NBYTES = 128 << 10
"""llama.cpp reads missing weights by page faults; of the settings tried this one made it fastest, by up to 10 times."""
RAM_SHARE = 0.95
"""greenroom's --ram under a limit, which counts what libraries have mapped, too; llama.cpp has all of it."""
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
        ids = self.shape.token_ids(self.routing, 4096 + number * count, count)
        return {"prompt": ids[: self.prompt], "warm": ids[self.prompt : -self.tokens], "timed": ids[-self.tokens :]}

    @property
    def first(self) -> "list[int]":
        """Tokens that touch every expert, so that a model that fits is there before it is timed."""
        count = 10 * self.shape.experts // self.shape.top_k  # leaves one expert in 20 000 out
        return self.shape.token_ids("uniform", 0, count) if self.fits == 1 else [1]

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
    kv_bits: int = 16
    """of cached keys and values in every engine"""

    def measure(self, cell: Cell) -> "dict[str, Any]":
        """All rounds of a cell."""
        ours, theirs = self.work.models(cell.shape, cell.pairing, self.peer is not None)
        nbytes = {"greenroom": size_of(ours), **({"llama.cpp": size_of(theirs)} if theirs else {})}
        limit = None if cell.fits == 1 else int(cell.fits * max(nbytes.values()))
        engines = [self._greenroom("greenroom", cell, ours, limit)]
        if limit is None:
            engines.append(self._greenroom(EIGHT_BITS, cell, ours, None, activation_bits=8))
        if theirs is not None:  # repacked weights are a second copy, not mapped: under a limit that is death
            variants = [("llama.cpp", True), ("llama.cpp, mapped", False)]
            engines += [self._llama(name, cell, theirs, repack) for name, repack in variants if not (limit and repack)]
        trials: dict[str, list[dict[str, Any]]] = {engine.name: [] for engine in engines}
        for number in range(self.rounds):
            for engine in engines:
                trials[engine.name].append(_turn(engine, cell, number, limit))
                _tell(cell, engine.name, trials[engine.name][-1])
        return {
            "shape": cell.shape.name,
            "pairing": cell.pairing.name,
            "formats": {"greenroom": cell.pairing.ours, "llama.cpp": cell.pairing.peer},
            "fits": cell.fits,
            "limit": limit,
            "routing": cell.routing,
            "sequence": cell.shape.sequences[cell.routing],
            "prompt": cell.prompt,
            "tokens": cell.tokens,
            "nbytes": nbytes,
            "touched_per_token": _touched(ours, theirs, cell.shape),
            "trials": trials,
            "medians": {name: _medians(found) for name, found in trials.items()},
        }

    def _greenroom(
        self, name: str, cell: Cell, model: Path, limit: "int | None", activation_bits: int = 16
    ) -> "_Engine":
        ram = None if limit is None else int(RAM_SHARE * limit)
        job = self._job(cell, model, ram=ram, activation_bits=activation_bits)
        command = [*self.prefix, sys.executable, "-m", "benchmarks.greenroom_worker", job]
        return _Engine(name, model, command)

    def _llama(self, name: str, cell: Cell, model: Path, repack: bool) -> "_Engine":
        command = [*self.prefix, str(self.peer), str(_BESIDE / "llama_worker.py")]
        return _Engine(name, model, [*command, self._job(cell, model, repack=repack, cold=cell.fits < 1)])

    def _job(self, cell: Cell, model: Path, **more: "int | None") -> str:
        """What a worker loads and how, as JSON."""
        context = max(cell.prompt + _WARM + cell.tokens, 512)
        job = {"model": str(model), "threads": self.threads, "context": context, "first": cell.first}
        return json.dumps({**job, "kv_bits": self.kv_bits, **more})


@dataclasses.dataclass(frozen=True)
class _Engine:
    """One column: a model and the command of the worker that runs it."""

    name: str
    model: Path
    command: "list[str]"


def _turn(engine: _Engine, cell: Cell, number: int, limit: "int | None") -> "dict[str, Any]":
    """One trial in a process of its own, with the floors beside it."""
    with contextlib.ExitStack() as stack:
        group = None
        if limit is not None:
            stack.enter_context(limits.readahead(engine.model, READAHEAD_NBYTES))
            group = stack.enter_context(limits.Limit(limit))
        worker = stack.enter_context(Worker(engine.name, engine.command, group))
        before = floors(engine.model, limited=limit is not None)
        busy_s, start_s = _busy_s(), time.perf_counter()
        found = worker.trial(cell.sequence(number))
        found["others_cores"] = (_busy_s() - busy_s - found["cpu_s"]) / (time.perf_counter() - start_s)
        after = floors(engine.model, limited=limit is not None)
        beside = {f"{what}_bytes_per_s": (before[what] + after[what]) / 2 for what in before}
        return {**worker.about, **found, **beside}


def _busy_s() -> float:
    """Seconds that all cores together have not been idle, nor waiting for a disk, since the machine started."""
    spent = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(spent) - spent[3] - spent[4]) / os.sysconf("SC_CLK_TCK")


def floors(model: Path, limited: bool = True) -> "dict[str, float]":
    """Bytes per second of this machine's memory and, where it is `limited`, of the disk that holds the model."""
    found = {"ram": machine.ram_bandwidth()}
    if limited:
        file = max(model.iterdir(), key=lambda file: file.stat().st_size) if model.is_dir() else model
        found["disk"] = probe.disk_bandwidth(file, budget_s=1.0)
    return found


def _touched(ours: Path, theirs: "Path | None", shape: Shape) -> "dict[str, int]":
    """Weight bytes that one token touches: all but the embedding, and of the experts the share that is routed to."""
    manifest = PackedModel(ours).manifest
    dense = sum(entry.nbytes for entry in manifest.linears)
    dense += sum(entry.nbytes for entry in manifest.tensors if not entry.mappable)
    found = {"greenroom": dense + sum(shape.top_k * entry.record_nbytes for entry in manifest.experts)}
    return found if theirs is None else {**found, "llama.cpp": gguf_file.bytes_per_token(theirs, shape)}


def _medians(trials: "list[dict[str, Any]]") -> "dict[str, float]":
    keys = [key for key, value in trials[0].items() if isinstance(value, int | float)]
    return {key: statistics.median(trial[key] for trial in trials) for key in keys}


def _tell(cell: Cell, name: str, trial: "dict[str, Any]") -> None:
    extra = f", hits {trial['hit_rate']:.1%}" if "hit_rate" in trial else ""
    disk = f", disk {trial['disk_bytes_per_s'] / 1e9:.2f} GB/s" if "disk_bytes_per_s" in trial else ""
    print(
        f"{cell}: {name} {trial['tokens_per_s']:.2f} tokens/s, prompt {trial['prompt_tokens_per_s']:.0f}, "
        f"{trial['bytes_read_per_token'] / 1e6:.1f} MB read a token{extra}, "
        f"RAM {trial['ram_bytes_per_s'] / 1e9:.0f} GB/s{disk}, "
        f"others busy on {trial['others_cores']:.1f} cores",
        file=sys.stderr,
        flush=True,
    )
