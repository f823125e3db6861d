"""`greenroom trace MODEL --prompts FILE --out T`: record routing while generating, or import other people's arrays."""

import argparse
import json
from pathlib import Path
from typing import Any

from greenroom.cli import options as shared
from greenroom.errors import ConfigError
from greenroom.sizes import format_bytes


def add(commands: Any) -> None:
    """Register the command."""
    parser: argparse.ArgumentParser = commands.add_parser("trace", help="record which experts are chosen")
    parser.add_argument("model", nargs="?", help=shared.MODEL_HELP)
    parser.add_argument("--prompts", metavar="FILE", help="a prompt a line, or JSON lines with a field prompt")
    parser.add_argument(
        "--import", dest="source", metavar="FILE.npz", help="read plain arrays instead of running a model"
    )
    parser.add_argument("--out", metavar="T", required=True, help="the trace to write (npz)")
    parser.add_argument("--guess-layers", type=int, default=3, metavar="D", help="layers ahead to guess (default 3)")
    parser.add_argument("--no-probabilities", action="store_true", help="leave the router's probabilities out")
    parser.add_argument(
        "--num-experts", type=int, metavar="E", help="with --import: experts a layer, if not all are used"
    )
    shared.add_sampling(parser, max_new_tokens=256)
    shared.add_memory(parser)
    shared.add_bits(parser)
    shared.add_common(parser)
    parser.set_defaults(execute=execute, default_of=parser.get_default)


def execute(options: argparse.Namespace) -> int:
    """Record or import, and say what is in the file."""
    _check(options)
    report = _import(options) if options.source is not None else _record(options)
    print(
        f"{options.out}: {report['prompts']} prompts, {report['prompt_tokens']} tokens read and "
        f"{report['decode_tokens']} generated, {format_bytes(report['nbytes'])}"
    )
    if options.json:
        shared.print_json(report)
    return 0


_OF_AN_IMPORT = {"source", "out", "num_experts", "json", "verbose"}
_OF_NO_FLAG = {"command", "model", "execute", "default_of"}


def _check(options: argparse.Namespace) -> None:
    from greenroom.trace import check_place

    if (options.source is None) == (options.model is None):
        raise ConfigError("give a model and --prompts, or --import with a file of arrays")
    if options.source is None and options.prompts is None:
        raise ConfigError("--prompts is missing: give a file with a prompt a line")
    if options.source is None and options.num_experts is not None:
        raise ConfigError("--num-experts is for arrays, a model says its own: leave it out, or give --import")
    if options.source is not None:
        _check_import(options)
    if options.guess_layers < 0:
        raise ConfigError(f"--guess-layers must be at least 0, not {options.guess_layers}")
    if options.num_experts is not None and not 1 <= options.num_experts <= 65535:
        raise ConfigError(f"--num-experts must be from 1 to 65535, not {options.num_experts}")
    if not Path(options.out).absolute().parent.is_dir():
        raise ConfigError(f"the folder of {options.out} does not exist: make it first")
    check_place(options.out)  # before what takes long


def _check_import(options: argparse.Namespace) -> None:
    """Refuse what is for running a model."""
    for name, value in vars(options).items():
        if name not in _OF_AN_IMPORT | _OF_NO_FLAG and value != options.default_of(name):
            raise ConfigError(f"--{name.replace('_', '-')} is for running a model: leave it out with --import")


def _import(options: argparse.Namespace) -> "dict[str, Any]":
    from greenroom.trace import import_arrays, write_trace

    trace = import_arrays(options.source, options.num_experts)
    write_trace(options.out, trace)
    return _report(options.out, len(trace.offsets) - 1, int(trace.prompt.sum()), trace.tokens)


def _record(options: argparse.Namespace) -> "dict[str, Any]":
    from greenroom import footprint, library
    from greenroom.cli import generation
    from greenroom.model import routers
    from greenroom.progress import Progress
    from greenroom.tokenizer import tokenizer_of
    from greenroom.trace.recorder import Recorder

    generation.check_sampling(options)
    if options.vram is not None:
        raise ConfigError("trace records on the CPU: leave --vram out, routing is the same there")
    prompts = read_prompts(Path(options.prompts))
    shared.check_memory(options)
    folder = library.find(options.model, **shared.bits_of(options))
    tokenizer = tokenizer_of(folder)
    if tokenizer is None:
        raise ConfigError(f"{options.model} has no tokenizer: add its tokenizer files to the checkpoint and pack again")
    inputs = [generation.encode(tokenizer, _messages(options, prompt)) for prompt in prompts]
    context = max(one["input_ids"].shape[1] for one in inputs) + options.max_new_tokens
    engine = library.start(options.model, folder, shared.settings_of(options, context))
    try:
        experts = max(engine.plan.experts)
        recorder = Recorder(
            options.out,
            routers(engine.model, engine.packed),
            experts,
            lookahead=options.guess_layers,
            ranked=max(8, 4 * footprint.experts_per_token(engine.model.config)),
            probabilities=not options.no_probabilities,
            model=str(options.model),
        )
        engine.runner.observer = recorder
        with recorder, Progress("recording", len(inputs), unit="prompts") as progress:
            for one in inputs:
                recorder.begin(one["input_ids"].shape[1])
                sampling = generation.sampling_of(options)
                engine.model.generate(**one, **sampling, max_new_tokens=options.max_new_tokens, num_beams=1)
                progress.advance(1)
    finally:
        engine.close()
    return _report(options.out, len(inputs), recorder.prompt_tokens, recorder.tokens)


def _messages(options: argparse.Namespace, prompt: str) -> "list[dict[str, str]]":
    system = [{"role": "system", "content": options.system}] if options.system else []
    return [*system, {"role": "user", "content": prompt}]


def read_prompts(path: Path) -> "list[str]":
    """A prompt a line, blank ones left out; or, where the first line is a JSON object, the field `prompt` of each."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the prompts in {path} ({error}): give a text file") from None
    lines = {number: line for number, line in enumerate(text.splitlines(), start=1) if line.strip()}
    if not lines:
        raise ConfigError(f"{path} holds no prompt: write one a line")
    if not next(iter(lines.values())).lstrip().startswith("{"):
        return list(lines.values())
    return [_prompt_of(f"{path}, line {number}", line) for number, line in lines.items()]


def _prompt_of(place: str, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise ConfigError(f"{place}: {line[:40]!r} is no JSON object with a text in the field prompt: give it one")
    return prompt


def _report(path: str, prompts: int, prompt_tokens: int, tokens: int) -> "dict[str, Any]":
    return {
        "trace": path,
        "prompts": prompts,
        "prompt_tokens": prompt_tokens,
        "decode_tokens": tokens - prompt_tokens,
        "nbytes": Path(path).stat().st_size,
    }
