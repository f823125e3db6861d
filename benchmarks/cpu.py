"""greenroom and llama.cpp in turns on this machine's CPU: `python -m benchmarks.cpu --quick`.

Synthetic models of true shapes and the demo with more experts, all in RAM and under memory limits that count page
cache. Prints the machine's floors first, then tables of medians; the last line is one JSON object.
docs/performance.md says how to read it.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import gguf_file, limits, report, routing, shapes
from benchmarks import peer as llama
from benchmarks.cells import Bench, Cell, floors
from benchmarks.demo import DEMO
from benchmarks.shapes import PAIRINGS, named
from benchmarks.turns import TurnError
from benchmarks.work import Work
from greenroom import environment
from greenroom.errors import ConfigError, GreenroomError

SHAPES = {shape.name: shape for shape in (*shapes.SHAPES.values(), DEMO) if shape.family in gguf_file.ARCHITECTURES}
"""Those that both engines run."""
_BITS = ("4", "3", "2")
"""Of each shape where none are asked for, as far as it has them."""
_FULL: "dict[str, Any]" = {"shapes": list(SHAPES), "fits": [0.5, 0.25], "rounds": 3}
_QUICK: "dict[str, Any]" = {"shapes": ["qwen3-30b-a3b-12"], "bits": ["4"], "fits": [0.5], "rounds": 2}


def main(arguments: "list[str] | None" = None) -> int:
    """Measure, or say in one line why not."""
    try:
        return _run(_options(arguments))
    except GreenroomError as error:
        print(f"benchmarks.cpu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.cpu: interrupted; the models built so far are kept", file=sys.stderr)
        return 130


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def _options(arguments: "list[str] | None") -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="12 layers of Qwen3-30B-A3B at 4 bits, within 10 minutes")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--bits", nargs="+", metavar="BITS", help=", ".join(PAIRINGS))
    parser.add_argument("--only", choices=["ram", "limits"], help="only what fits, or only what does not")
    parser.add_argument("--fits", nargs="+", type=float, metavar="SHARE", help="of the model under a limit")
    parser.add_argument("--routings", nargs="+", default=list(routing.ROUTINGS), choices=routing.ROUTINGS)
    parser.add_argument("--rounds", type=int, help="turns of each engine (default 3; 2 with --quick)")
    parser.add_argument("--prompt", type=int, help="tokens before the timed ones (default 512; 128 under a limit)")
    parser.add_argument("--tokens", type=int, help="timed tokens (default 64; 32 under a limit)")
    parser.add_argument("--kv-bits", type=int, choices=(16, 8), default=16, help="of keys and values in both engines")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peer", type=Path, metavar="PYTHON", help="an interpreter that has llama_cpp")
    parser.add_argument("--work", type=Path, default=environment.cache_folder() / "benchmarks", help="for the models")
    parser.add_argument("--clean", action="store_true", help="remove the models from --work, and end")
    parser.add_argument("--prefix", default="", metavar="COMMAND", help='before each engine, such as "taskset -c 0,1"')
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the JSON object here")
    options = parser.parse_args(arguments)
    for name, value in {**_FULL, **(_QUICK if options.quick else {})}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _run(options: argparse.Namespace) -> int:
    for name in ("rounds", "threads", "prompt", "tokens"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, not {value}")
    if not all(0 < share < 1 for share in options.fits):
        raise ConfigError("--fits takes shares between 0 and 1, such as 0.5")
    if options.json and not options.json.absolute().parent.is_dir():
        raise ConfigError(f"{options.json} lies in no folder: make it first")
    work = Work(options.work)
    if options.clean:
        work.clean()
        return 0
    cells = _cells(options)
    bench = Bench(
        work=work,
        peer=_peer(options.peer),
        rounds=options.rounds,
        threads=options.threads,
        prefix=shlex.split(options.prefix),
        kv_bits=options.kv_bits,
    )
    found = _measure(bench, cells)
    print(report.tables(found["cells"]), flush=True)
    for line in report.mispredicted(found["cells"]):
        print(f"bytes read are not what the cache core predicts: {line}")
    for line in report.disturbed(found["cells"]):
        print(f"disturbed: {line}")
    for line in found["failed"]:
        print(f"failed: {line}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return 2 if found["failed"] else 0


def _measure(bench: Bench, cells: "list[Cell]") -> "dict[str, Any]":
    """Floors, printed at once, and all cells."""
    ours, _ = bench.work.models(cells[0].shape, cells[0].pairing, bench.peer is not None)
    machine = floors(ours)
    print(report.floors_line(machine), flush=True)
    measured, failed = [], []
    for cell in cells:
        try:
            measured.append(bench.measure(cell))
        except TurnError as error:  # hours may lie behind it and before it
            failed.append(f"{cell}: {error}")
            print(failed[-1], file=sys.stderr, flush=True)
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "threads": bench.threads,
        "kv_bits": bench.kv_bits,
        "rounds": bench.rounds,
        "floors": machine,
        "cells": measured,
        "failed": failed,
    }


def _cells(options: argparse.Namespace) -> "list[Cell]":
    """What to measure, shape by shape so that models are built once."""
    settings = [] if options.only == "limits" else [(1.0, "uniform")]
    if options.only != "ram":
        settings += [(fits, kind) for fits in options.fits for kind in options.routings]
    if any(fits < 1 for fits, _ in settings) and (reason := limits.why_not()):
        if options.only == "limits":
            raise ConfigError(reason)
        print(f"benchmarks.cpu: nothing is limited: {reason}", file=sys.stderr)
        settings = [(fits, kind) for fits, kind in settings if fits == 1]
    wanted = [named(SHAPES, shape, "shape") for shape in options.shapes]
    return [
        Cell(
            shape=shape,
            pairing=named(shape.pairings, bits, f"width of {shape.name}"),
            fits=fits,
            routing=kind,
            prompt=options.prompt or (512 if fits == 1 else 128),
            tokens=options.tokens or (64 if fits == 1 else 32),
        )
        for shape in wanted
        for bits in options.bits or [bits for bits in _BITS if bits in shape.pairings]
        for fits, kind in settings
    ]


def _peer(given: "Path | None") -> "Path | None":
    """The interpreter that has llama.cpp: the one given or built before, else none and a line that says so."""
    python = given or llama.python_of(llama.default_folder())
    if given is None and not python.exists():
        print(f"benchmarks.cpu: greenroom alone, llama.cpp is not there: {llama.how()}", file=sys.stderr)
        return None
    llama.check(python)
    return python


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({len(os.sched_getaffinity(0))} threads)"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)  # by way of every `finally`: the disk's readahead is put back
    sys.exit(main())
