"""`greenroom run MODEL PROMPT`: stream one answer."""

import argparse
import sys
from typing import Any

from greenroom.cli import options as shared
from greenroom.cli import receipt
from greenroom.errors import ConfigError


def add(commands: Any) -> None:
    """Register the command."""
    parser: argparse.ArgumentParser = commands.add_parser("run", help="stream an answer")
    parser.add_argument("model", help=shared.MODEL_HELP)
    parser.add_argument("prompt", help="the question; - reads it from stdin")
    parser.add_argument("--stats", action="store_true", help="print speed, hit rate, bytes, stall and memory to stderr")
    shared.add_sampling(parser, max_new_tokens=256)
    shared.add_memory(parser)
    shared.add_bits(parser)
    shared.add_common(parser)
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Answer the prompt."""
    from greenroom import library
    from greenroom.cli import generation
    from greenroom.tokenizer import tokenizer_of

    prompt = options.prompt
    if prompt == "-":
        with generation.reading_stdin():
            prompt = sys.stdin.read()
    if not prompt.strip():
        raise ConfigError("the prompt is empty")
    generation.check_text(prompt)
    generation.check_sampling(options)
    shared.check_memory(options)
    folder = library.find(options.model, options.vram, **shared.bits_of(options))
    tokenizer = tokenizer_of(folder)
    if tokenizer is None:
        raise ConfigError(f"{options.model} has no tokenizer: add its tokenizer files to the checkpoint and pack again")
    system = [{"role": "system", "content": options.system}] if options.system else []
    inputs = generation.encode(tokenizer, [*system, {"role": "user", "content": prompt}])
    context = inputs["input_ids"].shape[1] + options.max_new_tokens
    engine = library.start(options.model, folder, shared.settings_of(options, context))
    try:
        answer = generation.answer(engine, tokenizer, inputs, options)
        report = answer.report()
    finally:
        engine.close()
    generation.tell_if_cut(answer)
    report["receipt"] = receipt.fields(engine.packed.manifest.receipt)
    if options.stats:
        generation.show_stats(report)
        receipt.show(engine.packed)
    if options.json:
        shared.print_json(report)
    return 0
