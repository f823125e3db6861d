"""`greenroom eval MODEL --text FILE`: perplexity, and how far the packed model is from its original."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greenroom.cli import grid, receipt
from greenroom.cli import options as shared
from greenroom.errors import ConfigError
from greenroom.sizes import format_bytes

if TYPE_CHECKING:
    from greenroom.evaluate import Evaluation
    from greenroom.original import Text


def add(commands: Any) -> None:
    """Register the command."""
    parser: argparse.ArgumentParser = commands.add_parser("eval", help="measure quality on a text or on tasks")
    parser.add_argument("model", help=shared.MODEL_HELP)
    parser.add_argument("--text", metavar="FILE", help="a UTF-8 text, e.g. WikiText-2's test part")
    add_protocol(parser)
    parser.add_argument("--token-by-token", action="store_true", help="measure what decoding computes, with a KV cache")
    parser.add_argument(
        "--original", metavar="DIR_OR_ID", help="the checkpoint a packed MODEL was made from, to compare with"
    )
    parser.add_argument("--no-original", action="store_true", help="perplexity alone, compared with nothing")
    parser.add_argument("--tasks", metavar="T,T,…", help="instead of a text: tasks of lm-eval, or local .jsonl files")
    parser.add_argument("--include-path", metavar="DIR", help="with --tasks: a folder of lm-eval task files")
    parser.add_argument("--limit", type=int, metavar="N", help="with --tasks: the first N questions of each")
    parser.add_argument("--receipt", action="store_true", help="keep the figures in the packed model's manifest")
    parser.add_argument(
        "--grid", action="store_true", help="attention and experts in 16 to 2 bits each, as the paper's Table 1"
    )
    parser.add_argument("--cells", metavar="FILE", help="with --grid: keep scores here, and go on where a run stopped")
    shared.add_memory(parser)
    shared.add_bits(parser)
    shared.add_common(parser)
    parser.set_defaults(execute=execute)


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """How a text is scored."""
    parser.add_argument("--stride", type=int, metavar="N", help="windows begin N tokens apart (default: no overlap)")
    parser.add_argument("--windows", type=int, metavar="N", help="score the first N windows (default: all)")


def execute(options: argparse.Namespace) -> int:
    """Measure and print."""
    if options.vram is not None:
        raise ConfigError("eval computes on the CPU: leave --vram out")
    if options.tasks is not None:
        return _tasks(options)
    from greenroom import library
    from greenroom.evaluate import evaluate
    from greenroom.packed import PackedModel

    for flag in ("limit", "include_path"):
        if getattr(options, flag) is not None:
            raise ConfigError(f"--{flag.replace('_', '-')} is for tasks: add --tasks, or leave it out")
    if options.text is None:
        raise ConfigError("--text is missing: give a text file to measure on, or --tasks")
    if options.no_original and (options.receipt or options.original is not None):
        raise ConfigError("--no-original goes with neither --original nor --receipt: leave it out")
    if options.cells is not None and not options.grid:
        raise ConfigError("--cells keeps the scores of a grid: add --grid")
    for name in ("activation_bits", "kv_bits"):
        if getattr(options, name) != 16 and (options.grid or options.receipt):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} tells nothing of weights: leave it out with --grid and --receipt")
    if options.dtype not in (None, "float32") and (options.grid or options.receipt):
        raise ConfigError("--dtype is of activations, not of weights: leave it out with --grid and --receipt")
    if options.grid:
        grid.check(options)
    settings = shared.settings_of(options, context=1)
    text = read_text(options.text)
    original = original_of(options)
    if options.grid:
        return grid.execute(options, text, original)
    folder = library.find(options.model, **shared.bits_of(options))
    result = evaluate(
        options.model,
        folder,
        text,
        settings,
        original=original,
        context=options.context,
        stride=options.stride,
        most=options.windows,
        token_by_token=options.token_by_token,
        only_source=options.receipt,
    )
    print(table(options.model, result))
    if options.receipt:
        receipt.keep(PackedModel(folder), result.receipt())
    if options.json:
        shared.print_json({"model": str(options.model), **result.report()})
    return 0


def _tasks(options: argparse.Namespace) -> int:
    """Run lm-eval's tasks and print their figures."""
    from greenroom.evaluate import tasks

    for flag in ("text", "stride", "windows", "token_by_token", "original", "no_original", "receipt", "grid", "cells"):
        if getattr(options, flag):
            raise ConfigError(f"--{flag.replace('_', '-')} measures a text: leave it out with --tasks")
    context = {} if options.context is None else {"context": options.context}
    found = tasks.run(
        options.model,
        [name for name in options.tasks.split(",") if name],
        include=options.include_path,
        limit=options.limit,
        **{name: getattr(options, name) for name in _MEMORY},
        **{name: value for name, value in shared.bits_of(options).items() if value is not None},
        **context,
    )
    for name, result in found.items():
        for metric, figure in result["metrics"].items():
            se = "" if figure["se"] is None else f" ± {figure['se']:.2g}"
            print(f"{name}: {metric} {figure['value']:.4g}{se}, {result['questions']} questions")
    if options.json:
        shared.print_json({"model": str(options.model), "tasks": found})
    return 0


_MEMORY = ("ram", "experts_per_layer", "policy", "prefetch", "lookahead", "activation_bits", "kv_bits", "dtype")


def read_text(path: str) -> "Text":
    """The text to measure on; says so on stderr where it is cut."""
    from greenroom.original import Text

    text = Text.read(Path(path))
    if text.truncated:
        print(f"greenroom: {path} is long, its first {format_bytes(text.nbytes)} are used", file=sys.stderr)
    return text


def original_of(options: argparse.Namespace) -> "Path | None":
    """The folder of the checkpoint to compare with, or None where none is wanted."""
    from greenroom import library
    from greenroom.checkpoint import resolve

    if options.no_original:
        return None
    named = options.original or options.model
    if library.is_demo(named):
        return library.demo_checkpoint()
    if (Path(named).expanduser() / "greenroom.json").is_file():
        raise ConfigError(
            f"{named} is packed: name the checkpoint it was packed from with --original, or give --no-original"
        )
    return resolve(named)


def table(model: str, result: "Evaluation") -> str:
    """The figures for people."""
    summary, settings, protocol = result.summary, result.settings, result.protocol
    of = "" if result.original_nbytes is None else f" of the original's {format_bytes(result.original_nbytes)}"
    bits = ", ".join(f"{name} {settings[f'{key}_bits']}" for name, key in _PARTS.items())
    overlap = "no overlap" if protocol.stride is None else f"stride {protocol.stride}"
    lines = [
        f"{model}: {bits} bits, {format_bytes(result.nbytes)}{of}",
        f"{result.text.name}: {summary.windows} windows of {protocol.context} tokens, {overlap}, "
        f"{summary.tokens} tokens scored, {protocol.mode}",
    ]
    rows = [
        ("perplexity", summary.perplexity, 1.0, ""),
        ("of the original", summary.original_perplexity, 1.0, ""),
        ("ratio", summary.perplexity_ratio, 1.0, ""),
        ("KL divergence", summary.kl, 1.0, " nats per token, original ‖ packed"),
        ("same first choice", summary.top1_agreement, 100.0, " % of tokens"),
    ]
    lines += [f"  {name:<18} {value.text(6, 2, scale)}{unit}" for name, value, scale, unit in rows if value is not None]
    return "\n".join(lines)


_PARTS = {"experts": "expert", "attention": "attention", "head": "head"}
