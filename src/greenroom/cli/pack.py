"""`greenroom pack SRC DST`: quantise and pack."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greenroom.cli import options as shared
from greenroom.cli import receipt
from greenroom.cli.eval import read_text, table
from greenroom.errors import ConfigError
from greenroom.sizes import format_bytes

if TYPE_CHECKING:
    from greenroom.original import Text
    from greenroom.packed import PackedModel


def add(commands: Any) -> None:
    """Register the command."""
    parser: argparse.ArgumentParser = commands.add_parser("pack", help="quantise and pack a checkpoint")
    parser.add_argument("source", help="a Hugging Face folder, a hub id, or demo")
    parser.add_argument("target", help="the folder to write; a killed run resumes")
    parser.add_argument("--receipt", metavar="TEXT", help="measure the packed model on this file and keep the figures")
    parser.add_argument("--windows", type=int, metavar="N", help="with --receipt: the first N windows (default: all)")
    parser.add_argument(
        "--calibrate",
        metavar="TEXT",
        type=Path,
        help="round experts for the inputs that they get on this text: smaller divergence in the same bytes",
    )
    shared.add_bits(parser)
    shared.add_common(parser)
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Pack."""
    from greenroom import library
    from greenroom.checkpoint import resolve
    from greenroom.config import PackSettings
    from greenroom.evaluate import windows_of
    from greenroom.packing import pack

    if options.windows is not None and options.receipt is None:
        raise ConfigError("--windows goes with --receipt: give a text to measure on")
    bits = library.settled_bits(options.source, shared.bits_of(options))
    text = None if options.receipt is None else read_text(options.receipt)
    if options.calibrate is not None:
        read_text(options.calibrate)  # refuses what cannot be read before hours of fetching
    if library.is_demo(options.source):
        source = library.demo_checkpoint()
    else:
        source = resolve(options.source, Path(options.target), PackSettings(**bits).bits_per_weight)
    if text is not None:
        windows_of(source, text, most=options.windows)  # refuses what cannot be measured before hours of packing
    packed = pack(source, options.target, **bits, calibrate=options.calibrate)
    manifest = packed.manifest
    report: dict[str, Any] = {
        "target": str(packed.folder),
        "nbytes": packed.nbytes,
        "settings": manifest.settings,
        "moe_layers": len(manifest.experts),
        "experts": sum(entry.num_experts for entry in manifest.experts),
        "record_nbytes": max(entry.record_nbytes for entry in manifest.experts),
    }
    print(
        f"{packed.folder}: {manifest.architecture}, {report['moe_layers']} MoE layers, {report['experts']} experts of "
        f"{format_bytes(report['record_nbytes'])}, {format_bytes(packed.nbytes)} in all"
    )
    if text is not None:
        packed = _measure(packed, source, text, options.windows)
        report["receipt"] = receipt.fields(packed.manifest.receipt)
    if options.json:
        shared.print_json(report)
    return 0


def _measure(packed: "PackedModel", original: Path, text: "Text", most: "int | None") -> "PackedModel":
    """Compare with the checkpoint just packed, and keep the receipt."""
    from greenroom.config import EngineSettings
    from greenroom.evaluate import evaluate

    result = evaluate(packed.folder, packed.folder, text, EngineSettings(), original=original, most=most)
    print(table(str(packed.folder), result))
    receipt.keep(packed, result.receipt())
    return packed
