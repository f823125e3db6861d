"""`greenroom verify MODEL`: check every record against its checksum."""

import argparse
import sys
from pathlib import Path
from typing import Any

from greenroom.cli import options as shared
from greenroom.sizes import format_bytes


def add(commands: Any) -> None:
    """Register the command."""
    parser: argparse.ArgumentParser = commands.add_parser("verify", help="check every record of a packed model")
    parser.add_argument("model", help="a packed folder, or what was packed to the cache")
    shared.add_bits(parser)
    shared.add_common(parser)
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Read everything; exit code 2 and a line per damaged record if anything is wrong."""
    from greenroom.packed import PackedModel
    from greenroom.progress import Progress

    folder = _folder(options)
    packed = PackedModel(folder)
    with Progress("verifying", packed.nbytes) as progress:
        damaged = packed.verify(progress)
    for line in damaged:
        print(f"greenroom: {line}", file=sys.stderr)
    records = sum(entry.num_experts for entry in packed.manifest.experts)
    if not damaged:
        print(f"{folder}: {records} experts and {format_bytes(packed.nbytes)} are what was packed")
    if options.json:
        shared.print_json({"ok": not damaged, "damaged": damaged, "experts": records, "nbytes": packed.nbytes})
    return 2 if damaged else 0


def _folder(options: argparse.Namespace) -> Path:
    """The packed folder that is named, or what a checkpoint's folder, a hub id or the demo is packed to."""
    from greenroom import library

    path, bits = Path(options.model).expanduser(), shared.bits_of(options)
    if not path.is_dir():
        return library.find(options.model, **bits)
    if not (path / "greenroom.json").is_file():
        cached, _ = library.place(path, bits)
        return cached if (cached / "greenroom.json").is_file() else path
    return path
