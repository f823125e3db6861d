"""All that a GPU has to show, in one call of under nine minutes: python -m benchmarks.gpu_suite [--out F] [--seconds N]

What the kernels get wrong (nothing) comes first, in processes beside one another; then floors, the kernels' shares of
them, the device tier, compute-sanitizer over a small check, and peers. Parts that fail or find no time say so in the
result, and the others go on. Writes benchmarks/results/<gpu>.json; a short table comes last. Without a GPU it ends with
status 2 and one line.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks import gpu_kernels, gpu_models, gpu_peers, gpu_tier
from benchmarks.gpu_clock import Clock, GpuClock
from benchmarks.kernels import MODELS
from greenroom.kernels import device
from greenroom.quant import Format

SECONDS = 480
ROOT = Path(__file__).parent.parent
Result = dict[str, Any]


@dataclasses.dataclass
class Box:
    """The device, its clock, and when to stop; `result` grows from part to part."""

    on: torch.device
    clock: Clock
    ends: float
    result: Result
    now: "Callable[[], float]" = time.monotonic
    seconds: float = SECONDS
    """for everything"""
    keep: "Callable[[Result], None]" = lambda result: None
    """called after each part"""
    folder: Path = Path(tempfile.gettempdir())
    """for the tier's models"""
    models: "gpu_models.Models | None" = None

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - self.now()

    def late(self, part: str, share: float) -> bool:
        """Whether less than a share of all the time is left, which the result then says of `part`."""
        if self.left >= share * self.seconds:
            return False
        self.result[f"{part}_cut"] = True
        return True

    def lines(self, part: str) -> "list[Result]":
        """The table that a part fills."""
        made: list[Result] = self.result.setdefault(part, [])
        return made


Part = tuple[str, Callable[[Box], None]]


def floors(box: Box) -> None:
    """What everything else is a share of."""
    box.result["floors"] = gpu_kernels.floors(box.clock, box.on)


def models(box: Box) -> None:
    """Starts to write the tier's models, which asks nothing of the GPU."""
    box.models = gpu_models.Models(box.folder, gpu_models.MODELS)
    box.models.start(list(gpu_models.MODELS))


def correctness(box: Box) -> None:
    """All formats, dtypes and sizes, in a few processes: a fault there spoils nothing here, and what they compile lies
    in Triton's cache for what follows."""
    parts = max(1, (os.cpu_count() or 2) - 2)
    ends = box.now() + min(0.35 * box.seconds, box.left)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = []
        for part in range(parts):
            out, errors = (stack.enter_context((folder / f"{part}.{end}").open("w+")) for end in ("out", "err"))
            command = [sys.executable, "-m", "benchmarks.gpu_check", "--part", f"{part}/{parts}"]
            done = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=errors, env=environment)
            running.append((done, out, errors))
        for done, out, errors in running:
            _collect(box, done, out, errors, ends - box.now())


def _collect(box: Box, done: "subprocess.Popen[bytes]", out: TextIO, errors: TextIO, seconds: float) -> None:
    """The lines of a process that checks; it is stopped where it takes longer than so many seconds."""
    try:
        status = done.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        done.kill()
        status = done.wait()
        box.result["check_cut"] = True
    else:
        if status not in (0, 1):
            errors.seek(0)
            box.lines("failed").append({"part": "correctness", "error": errors.read()[-3000:] or f"status {status}"})
    out.seek(0)
    box.lines("check").extend(json.loads(line) for line in out if line.endswith("}\n"))


def decode(box: Box) -> None:
    """1, 4 and 16 tokens, then variants to choose constants by."""
    for model, format, tokens, variant in gpu_kernels.cases():
        if box.late("decode", 0.5):
            return
        layers = 2
        line = gpu_kernels.decode(box.clock, box.on, _rate(box), model, format, tokens, layers, variant)
        box.lines("decode").append(line)
        torch.cuda.empty_cache()


def prompts(box: Box) -> None:
    """A chunk of 512 tokens through all experts of a layer."""
    rate = box.result["floors"]["matmul_tflops"]
    for model in MODELS:
        for format in gpu_kernels.FORMATS:
            if box.late("prompt", 0.42):
                return
            experts = gpu_kernels.EXPERTS[model.name]
            box.lines("prompt").append(gpu_kernels.prompt(box.clock, box.on, rate, model, format, 512, experts))


def peers(box: Box) -> None:
    """One dense matrix of Mixtral's size, and the same with others' kernels."""
    if box.late("linear", 0.02):
        return
    box.lines("linear").append(gpu_kernels.linear(box.clock, box.on, _rate(box), 28672, 4096, Format.of(4)))
    for line in gpu_peers.lines(box.clock, box.on, _rate(box), 28672, 4096):
        box.lines("linear").append(line)


def sanitizer(box: Box) -> None:
    """compute-sanitizer's memcheck over a small check, in a process of its own."""
    tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if tool is None:
        box.result["sanitizer"] = "compute-sanitizer is not installed"
        return
    if box.late("sanitizer", 0.06):
        return
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_check", "--small"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=0.7 * box.left)
    except subprocess.TimeoutExpired:
        box.result["sanitizer"] = "not finished in time"
        return
    clean = done.returncode == 0
    box.result["sanitizer"] = "clean" if clean else f"status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"


def tier(box: Box) -> None:
    """The device tier over synthetic models in `box.folder`, in a process of its own that may be stopped."""
    if box.late("tier", 0.15):
        return
    if box.models is not None:
        box.models.wait(list(gpu_models.MODELS), 0.2 * box.left)
    with contextlib.suppress(RuntimeError):  # a kernel that faulted has taken this process's context with it
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        out, seconds = Path(folder) / "tier.json", box.left - 0.12 * box.seconds
        command = [sys.executable, "-m", "benchmarks.gpu_tier", "--models", str(box.folder)]
        command += ["--seconds", f"{max(1.0, seconds - 15):.0f}", "--out", str(out)]
        try:  # its stderr is this one's, so that it shows where it is
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=max(1.0, seconds))
            error = "" if done.returncode in (0, gpu_tier.SOME_FAILED) else f"status {done.returncode}"
        except subprocess.TimeoutExpired:
            error = f"stopped after {seconds:.0f} s"
        if out.is_file():
            box.result |= json.loads(out.read_text())
    for one in box.result.get("tier", {}).get("failed", []):
        box.lines("failed").append({"part": f"tier, {one['part']}", "error": one["error"]})
    if error or "tier" not in box.result:
        raise RuntimeError(error or "it wrote nothing")


def profile(box: Box) -> None:
    """Where the host's time goes in a token's layers, in a process of its own."""
    if box.late("profile", 0.25):
        return
    if box.models is not None:
        box.models.wait(["small"], 0.1 * box.left)
    command = [sys.executable, "-m", "benchmarks.gpu_profile", "--models", str(box.folder)]
    with tempfile.TemporaryFile("w+") as out:  # what it found until it was stopped is worth keeping
        try:
            subprocess.run(command, cwd=ROOT, stdout=out, timeout=0.25 * box.left, check=True)
        finally:
            out.seek(0)
            box.result["profile"] = out.read().splitlines()


PARTS: list[Part] = [
    ("models", models),
    ("correctness", correctness),
    ("floors", floors),
    ("decode", decode),
    ("prompts", prompts),
    ("profile", profile),
    ("tier", tier),
    ("sanitizer", sanitizer),
    ("peers", peers),
]
"""Name and function of every part, in order."""


def _rate(box: Box) -> float:
    """What kernels that read are a share of."""
    return float(box.result["floors"]["read_gb_per_s"])


def run(box: Box, parts: "Sequence[Part]" = PARTS) -> Result:
    """All parts into box.result; one that fails leaves its error there."""
    for name, part in parts:
        start = box.now()
        try:
            if box.left > 0:
                part(box)
            else:
                box.lines("failed").append({"part": name, "error": "no time left"})
        except Exception as error:  # the others still have something to say
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            box.lines("failed").append({"part": name, "error": traceback.format_exc()[-3000:].replace(f"{ROOT}/", "")})
        box.result.setdefault("seconds", {})[name] = round(box.now() - start, 1)
        print(f"{name}: {box.now() - start:.0f} s", file=sys.stderr, flush=True)
        box.keep(box.result)
    return box.result


def table(result: Result) -> str:
    """A screenful."""
    rows = ["floors  " + "  ".join(f"{name} {value:.0f}" for name, value in result.get("floors", {}).items())]
    checked = result.get("check", [])
    wrong = [
        f"{one['kernel']} {one['model']} {one['format']} {one['dtype']} {one['error']:.1e}"
        for one in checked
        if not one["right"]
    ]
    rows.append(f"checks  {len(checked)}, wrong {len(wrong)} {'; '.join(wrong[:4])}")
    for line in result.get("decode", []):
        rows.append(
            f"decode  {line['model']:14} {line['format']:10} {line['tokens']:3} tokens {line['variant']:9}"
            f"{line['us']:8.1f} us {line['gb_per_s']:6.0f} GB/s  share {line['share']:.2f}"
        )
    for line in result.get("prompt", []):
        rows.append(
            f"prompt  {line['model']:14} {line['format']:10} {line['each']:3} tokens an expert "
            f"{line['ms']:8.2f} ms {line['tflops']:6.0f} TFLOP/s  share {line['share']:.2f}"
        )
    rows += gpu_tier.table(result.get("tier", {}))
    for line in result.get("linear", []):
        measured = f"{line['us']:8.1f} us  share {line['share']:.2f}" if "us" in line else line["absent"]
        rows.append(f"linear  {line['kernel']:14} {measured}")
    missing = [name.removesuffix("_cut") for name in result if name.endswith("_cut")]
    rows += [f"cut     {', '.join(missing)}: no time left"] if missing else []
    rows.append(f"sanitizer  {str(result.get('sanitizer', 'not run')).splitlines()[0]}")
    rows += [f"failed  {one['part']}: {one['error'].strip().splitlines()[-1]}" for one in result.get("failed", [])]
    return "\n".join(rows)


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>.json")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="start nothing new after so long")
    options = parser.parse_args()
    if reason := device.unusable():
        print(f"the GPU suite cannot run here: {reason}; run it on a machine with an NVIDIA GPU", file=sys.stderr)
        return 2
    on = torch.device("cuda")
    name = torch.cuda.get_device_name(on)
    out = options.out or ROOT / "benchmarks" / "results" / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    box = Box(on, GpuClock(), time.monotonic() + options.seconds, {"gpu": name, "kernels": device.describe(on)})
    box.seconds = options.seconds
    box.keep = lambda result: print(out.write_text(json.dumps(result, indent=1) + "\n"), file=sys.stderr)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        box.folder = Path(folder)
        result = run(box)
        print(table(result))  # before the folder goes, in which a model may still be being written
    return 1 if result.get("failed") or any(not one["right"] for one in result.get("check", [])) else 0


if __name__ == "__main__":
    sys.exit(main())
