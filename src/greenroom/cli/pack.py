"""`greenroom pack SRC DST`: quantise and pack."""

import argparse
from typing import Any

from greenroom.cli import options as shared
from greenroom.sizes import format_bytes


def add(commands: Any) -> None:
    """Register the command."""
    parser: argparse.ArgumentParser = commands.add_parser("pack", help="quantise and pack a checkpoint")
    parser.add_argument("source", help="a Hugging Face folder, a hub id, or demo")
    parser.add_argument("target", help="the folder to write; a killed run resumes")
    shared.add_bits(parser)
    shared.add_common(parser)
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Pack."""
    from greenroom import library
    from greenroom.packing import pack

    given = {name: value for name, value in shared.bits_of(options).items() if value is not None}
    bits = {**library.default_bits(options.source), **given}
    source = library.demo_checkpoint() if library.is_demo(options.source) else options.source
    packed = pack(source, options.target, **bits)
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
    if options.json:
        shared.print_json(report)
    return 0
