"""Quality and size by bits of attention and experts: Table 1 of Eliseev & Mazur 2023 (arXiv:2312.17238), of any model.

No model is packed: the original is streamed with every weight rounded as packing would, all widths of attention in one
pass per width of experts (see `rounding`). Bytes are those of the manifest that packing would write. Of a dense model
the MLPs count as its experts.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from greenroom import seam
from greenroom.checkpoint import Checkpoint
from greenroom.evaluate.cells import Cells
from greenroom.evaluate.rounding import Rounding, SharesLinear, differing, rounded
from greenroom.evaluate.score import Summary, WindowScore, score, scoring_nbytes, summarise
from greenroom.original import Original, Window
from greenroom.original.states import StatesFile, batches, stream, windows_at_a_time
from greenroom.packed import Manifest
from greenroom.packing import preview
from greenroom.progress import Progress

WIDTHS = (16, 8, 4, 3, 2)
_ROWS = 20
"""Windows, over all widths of attention, that pass through the layers together, where memory allows: experts are
rounded once for each time, which costs as much as a few windows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One line-up of bits: bytes of its packed files, and what it computes against the original."""

    attention_bits: int
    expert_bits: int
    nbytes: int
    summary: Summary


def manifest_of(
    checkpoint: Checkpoint, attention_bits: int, expert_bits: int, head_bits: int, group_size: "int | None"
) -> Manifest:
    """What packing with these bits would write; `group_size` None takes the default of each width."""
    return preview(
        checkpoint,
        {
            "attention_bits": attention_bits,
            "expert_bits": expert_bits,
            "head_bits": head_bits,
            "group_size": group_size if expert_bits < 16 else None,
        },
    )


def measure(
    folder: Path,
    windows: "list[Window]",
    room: int,
    *,
    head_bits: int = 8,
    group_size: "int | None" = None,
    widths: "Sequence[int]" = WIDTHS,
    cells: "Cells | None" = None,
) -> "list[Cell]":
    """Every pair of `widths` for the checkpoint in `folder`, measured on `windows`; experts' widths vary slowest.

    `room`: bytes that weights and activations may take. `cells` holds what an earlier run measured and takes what this
    one does. Raises BudgetError where one window does not fit.
    """
    cells = cells if cells is not None else Cells(None, {})
    checkpoint = Checkpoint(folder, dense_too=True)
    with checkpoint.shards:
        manifests = {
            (attention, expert): manifest_of(checkpoint, attention, expert, head_bits, group_size)
            for expert in widths
            for attention in widths
        }
    room -= scoring_nbytes(int(checkpoint.config.get_text_config().vocab_size))
    if any(not cells.complete(cell, len(windows)) for cell in manifests):
        with Original(folder) as reference, contextlib.closing(stream(reference, windows, room)) as states:
            reference.drop_outer()
            for expert in widths:
                row = {attention: manifests[attention, expert] for attention in widths}
                _Row(folder, expert, row, reference, states, room).run(windows, cells)
    return [
        Cell(
            attention_bits=attention,
            expert_bits=expert,
            nbytes=sum(file.nbytes for file in manifest.files.values()),
            summary=summarise([cells.get((attention, expert), n) for n in range(len(windows))], True),
        )
        for (attention, expert), manifest in manifests.items()
    ]


class _Row:
    """All widths of attention for one width of experts."""

    def __init__(
        self,
        folder: Path,
        expert: int,
        manifests: "dict[int, Manifest]",
        reference: Original,
        states: StatesFile,
        room: int,
    ) -> None:
        self._folder, self._expert, self._manifests = folder, expert, manifests
        self._reference, self._states, self._room = reference, states, room

    def run(self, windows: "list[Window]", cells: Cells) -> None:
        """Measure what `cells` does not hold."""
        with self._original() as original:
            tokens, widths = len(windows[0].ids), len(self._manifests)
            most = windows_at_a_time(original, widths * tokens, self._room, most=max(1, _ROWS // widths))
            number = 0
            total = len(windows) * len(self._manifests) * original.layers
            with Progress(f"experts {self._expert} bits", total, unit="layers") as progress:
                for batch in batches(windows, most):
                    numbers = range(number, number + len(batch))
                    number += len(batch)
                    if all(cells.has((a, self._expert), n) for a in self._manifests for n in numbers):
                        progress.skip(len(batch) * len(self._manifests) * original.layers)
                        continue
                    original.on_layer = functools.partial(progress.advance, len(batch) * len(self._manifests))
                    for attention, n, found in self._scores(original, batch, numbers):
                        cells.put((attention, self._expert), n, found)

    def _scores(
        self, original: Original, batch: "list[Window]", numbers: range
    ) -> "Iterator[tuple[int, int, WindowScore]]":
        ids = torch.stack([window.ids for window in batch]).repeat(len(self._manifests), 1)
        states = iter(original.states(ids))
        for attention in self._manifests:
            for window, n in zip(batch, numbers, strict=True):
                own = window.predicting(next(states))
                yield attention, n, score(window, own, original.head, self._states.get(n), self._reference.head)

    @contextlib.contextmanager
    def _original(self) -> "Iterator[Original]":
        manifests = list(self._manifests.values())
        several = differing(manifests)
        rounding = Rounding(manifests[0], set(several))
        with Original(self._folder, rounding, rounding.of_expert) as original:
            for path, formats in several.items():
                linear: Any = original.model.get_submodule(path)
                ways = [functools.partial(rounded, format=format) for format in formats]
                seam.replace(original.model, path, SharesLinear(linear, ways))
            yield original
