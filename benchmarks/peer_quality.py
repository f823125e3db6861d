"""Quality beside bytes against llama.cpp's own formats: `python -m benchmarks.peer_quality MODEL TEXT --out FILE`.

The protocol is that of `greenroom eval --grid`: the same windows of the text, the original streamed with its weights
rounded, KL divergence paired with the original. Experts alone are rounded, then attention in the same format, too; all
else stays as it is. Formats that end in "+" see another text, `--calibrate`: experts then get the codes of `pack
--calibrate`, llama.cpp's an importance matrix of the same inputs; the others see none. Formats that FILE holds already
are not measured again. `peer_rounding` says what rounds how, `peer_quality_page` makes the tables of docs/quality.md.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import peer as peers
from benchmarks.peer_rounding import Way, peer, way
from greenroom import library, seam
from greenroom.calibration import Calibration
from greenroom.calibration import windows_of as calibration_windows
from greenroom.checkpoint import resolve
from greenroom.errors import ConfigError, GreenroomError
from greenroom.evaluate import score, summarise, windows_of
from greenroom.evaluate.rounding import SharesLinear
from greenroom.machine import available_memory
from greenroom.original import Original, StatesFile, Text, Window, stream

FORMATS = (
    "8g64", "4g32", "4g64", "4g128", "3g32", "3g64", "3g128", "2g16", "2g32", "2g64",
    "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K", "IQ3_S", "Q2_K",
    "Q4_K/Q5_0", "Q3_K/Q4_0", "Q2_K/Q4_0",
)  # fmt: skip


class Judge:
    """The original and its final states of every window."""

    def __init__(self, folder: Path, windows: "list[Window]", reference: Original, states: StatesFile) -> None:
        self._folder, self._windows, self._reference, self._states = folder, windows, reference, states

    def measure(self, one: Way) -> "dict[str, Any]":
        """A format's row: with experts rounded, and with attention rounded as well."""
        with self._rounded(one) as original:
            ids = torch.stack([window.ids for window in self._windows]).repeat(2, 1)
            states = iter(original.states(ids))
            found = {part: self._figures(original, states) for part in ("experts", "all")}
            for part, shapes in (("experts", _experts(original)), ("all", _experts(original) + _attention(original))):
                nbytes, weights = sum(one.nbytes(*shape) for shape in shapes), sum(rows * cols for rows, cols in shapes)
                found[part] |= {"nbytes": nbytes, "bits_per_weight": 8 * nbytes / weights}
        return {"name": one.name, "greenrooms": one.greenrooms, **found}

    def _figures(self, original: Original, states: "Iterator[torch.Tensor]") -> "dict[str, Any]":
        scores = [
            score(window, window.predicting(next(states)), original.head, self._states.get(n), self._reference.head)
            for n, window in enumerate(self._windows)
        ]
        return dataclasses.asdict(summarise(scores, True))

    @contextlib.contextmanager
    def _rounded(self, one: Way) -> "Iterator[Original]":
        """The model with experts rounded `one` way; half of a batch goes through attention that is rounded, too."""
        with Original(self._folder, of_expert=one.of_expert) as original:
            for path in _attention_paths(original):
                linear = original.model.get_submodule(path)
                seam.replace(original.model, path, SharesLinear(linear, [torch.Tensor.float, one.round]))
            yield original


def _attention_paths(original: Original) -> "list[str]":
    linears = seam.packable_linears(original.model, list(original.checkpoint.experts))
    return [path for path in linears if seam.in_attention(path)]


def _attention(original: Original) -> "list[tuple[int, int]]":
    """(rows, columns) of the matrices that make queries, keys, values and outputs."""
    linears = [original.model.get_submodule(path) for path in _attention_paths(original)]
    return [(linear.out_features, linear.in_features) for linear in linears]


def _experts(original: Original) -> "list[tuple[int, int]]":
    """(rows, columns) of every expert's matrices."""
    modules = original.checkpoint.experts
    return [(p.rows, p.cols) for module in modules for p in module.parameters for _ in range(module.num_experts)]


def measure(options: argparse.Namespace) -> None:
    """Measure what is missing in the file of results, and keep it there format by format."""
    folder = library.demo_checkpoint() if library.is_demo(options.model) else resolve(options.model)
    text = Text.read(options.text)
    windows = windows_of(folder, text, options.context, None, options.windows)
    subject = {
        "model": Path(options.model).name, "text": {"name": text.name, "sha256": text.sha256},
        "context": len(windows[0].ids), "windows": len(windows),
    }  # fmt: skip
    report = json.loads(options.out.read_text()) if options.out.exists() else {**subject, "rows": []}
    if any(report[key] != value for key, value in subject.items()):
        raise ConfigError(f"{options.out} holds figures of another model or text: give another --out")
    done = {row["name"] for row in report["rows"]}
    with contextlib.ExitStack() as stack:
        reference = stack.enter_context(Original(folder))
        states = stack.enter_context(contextlib.closing(stream(reference, windows, available_memory() // 2)))
        process = stack.enter_context(peer(options.peer))
        judge = Judge(folder, windows, reference, states)
        calibration = _calibration(stack, folder, options.calibrate)
        for name in options.formats:
            if name in done:
                continue
            report["engine"] = process.engine
            report["rows"].append(judge.measure(way(name, process, calibration)))
            options.out.write_text(json.dumps(report, indent=1) + "\n")
            print(_line(report["rows"][-1]), flush=True)


def _calibration(stack: contextlib.ExitStack, folder: Path, text: "Path | None") -> "Calibration | None":
    if text is None:
        return None
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    windows = calibration_windows(folder, Text.read(text))
    return stack.enter_context(Calibration(folder, windows, scratch, available_memory() // 2))


def _line(row: "dict[str, Any]") -> str:
    parts = [
        f"{row[part]['bits_per_weight']:.3f} bits, KL {row[part]['kl']['value']:.4g} ± {row[part]['kl']['se']:.1g}"
        for part in ("experts", "all")
    ]
    return f"{row['name']}: experts {parts[0]}; with attention {parts[1]}"


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_quality", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint with experts, or demo")
    parser.add_argument("text", type=Path)
    parser.add_argument("formats", nargs="*", default=FORMATS, help="such as 4g64, Q4_K or Q4_K/Q5_0 (default: many)")
    parser.add_argument("--out", type=Path, required=True, help="the results, in JSON")
    parser.add_argument("--calibrate", type=Path, metavar="TEXT", help="another text, for formats that end in +")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--peer", type=Path, help="an interpreter that has llama_cpp (default: `benchmarks.peer`'s)")
    options = parser.parse_args()
    try:
        options.peer = options.peer or peers.python_of(peers.default_folder())
        peers.check(options.peer)
        measure(options)
    except GreenroomError as error:
        print(f"benchmarks.peer_quality: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
