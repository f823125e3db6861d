"""`greenroom eval MODEL --grid`: size and quality by bits of attention and experts, beside the paper's Table 1."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from greenroom.cli import options as shared
from greenroom.errors import ConfigError
from greenroom.sizes import format_bytes

if TYPE_CHECKING:
    from greenroom.evaluate.grid import Cell
    from greenroom.original import Text

_GIB = 1 << 30

PAPER: "dict[tuple[int, int], tuple[float, float]]" = {
    (16, 16): (86.99, 3.59), (16, 4): (25.82, 3.67), (16, 3): (23.21, 3.96), (16, 2): (19.33, 4.52),
    (4, 16): (85.16, 3.68), (4, 4): (23.99, 3.76), (4, 3): (21.37, 4.05), (4, 2): (17.54, 4.61),
    (3, 16): (85.08, 3.99), (3, 4): (23.92, 4.06), (3, 3): (21.31, 4.34), (3, 2): (17.46, 4.90),
    (2, 16): (84.96, 4.98), (2, 4): (23.79, 5.08), (2, 3): (21.18, 5.36), (2, 2): (17.30, 5.97),
}  # fmt: skip
"""Bits of attention and of experts → GiB and WikiText-2 perplexity of Mixtral-8x7B, arXiv:2312.17238, Table 1."""
_PAPERS_MODEL = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_local_experts": 8,
}  # fmt: skip


def check(options: argparse.Namespace) -> None:
    """Raise ConfigError for flags that mean nothing here."""
    for flag in ("expert_bits", "attention_bits", "stride"):
        if getattr(options, flag) is not None:
            raise ConfigError(f"--{flag.replace('_', '-')} has no meaning with --grid: leave it away")
    for flag in ("token_by_token", "no_original", "receipt"):
        if getattr(options, flag):
            raise ConfigError(f"--{flag.replace('_', '-')} has no meaning with --grid: leave it away")


def execute(options: argparse.Namespace, text: "Text", original: "Path | None") -> int:
    """Measure and print; `original` is the checkpoint's folder."""
    from greenroom.checkpoint import Checkpoint
    from greenroom.evaluate.cells import Cells
    from greenroom.evaluate.evaluation import room_for, windows_of
    from greenroom.evaluate.grid import measure

    assert original is not None  # --no-original is refused
    windows = windows_of(original, text, options.context, None, options.windows)
    head_bits = options.head_bits or 8
    checkpoint = Checkpoint(original, dense_too=True)
    with checkpoint.shards:
        source, shape = checkpoint.fingerprint(), checkpoint.config.to_dict()
    subject = {
        "source": source, "text": text.sha256, "context": len(windows[0].ids), "head_bits": head_bits,
        "group_size": options.group_size,
    }  # fmt: skip
    room, _ = room_for(shared.settings_of(options, context=1))
    kept = Cells(Path(options.cells) if options.cells else None, subject)
    cells = measure(original, windows, room, head_bits=head_bits, group_size=options.group_size, cells=kept)
    papers = all(shape.get(name) == value for name, value in _PAPERS_MODEL.items())
    tokens = cells[0].summary.tokens
    print(f"{options.model}: {text.name}, {len(windows)} windows of {len(windows[0].ids)} tokens, {tokens} scored")
    print(table(cells, PAPER if papers else {}))
    if options.json:
        report = {
            **subject, "model": str(options.model), "text": {"name": text.name, "sha256": text.sha256},
            "windows": len(windows), "cells": [dataclasses.asdict(cell) for cell in cells],
        }  # fmt: skip
        shared.print_json(report)
    return 0


def table(cells: "list[Cell]", paper: "dict[tuple[int, int], tuple[float, float]]") -> str:
    """The grid in Markdown, a line for each cell; `paper`: GiB and perplexity to put beside, where it has them."""
    header = ["attention", "experts", "size", "perplexity", "KL (nats per token)", "same first choice"]
    rows = [header + (["the paper's GiB", "its perplexity"] if paper else [])]
    for cell in sorted(cells, key=lambda cell: (-cell.attention_bits, -cell.expert_bits)):
        rows.append(_row(cell) + _of_paper(cell, paper))
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(cell: "Cell") -> "list[str]":
    summary = cell.summary
    perplexity = f"{summary.perplexity.value:.5g}"
    assert summary.kl is not None and summary.top1_agreement is not None  # a grid has an original
    kl, agreement = summary.kl.text(3), summary.top1_agreement.text(3, scale=100.0)
    size = f"{cell.nbytes / _GIB:.2f} GiB" if cell.nbytes >= 10 * _GIB else format_bytes(cell.nbytes)
    return [str(cell.attention_bits), str(cell.expert_bits), size, perplexity, kl, f"{agreement} %"]


def _of_paper(cell: "Cell", paper: "dict[tuple[int, int], tuple[float, float]]") -> "list[str]":
    if not paper:
        return []
    gib, perplexity = paper.get((cell.attention_bits, cell.expert_bits), (None, None))
    return ["–", "–"] if gib is None else [f"{gib:.2f}", f"{perplexity:.2f}"]
