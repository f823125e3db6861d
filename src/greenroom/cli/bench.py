"""`greenroom bench MODEL`: the floor first, then timed trials, then how far they are apart."""

import argparse
import statistics
from pathlib import Path
from typing import Any

from greenroom.cli import generation, paper
from greenroom.cli import options as shared
from greenroom.errors import ConfigError
from greenroom.sizes import format_bytes


def add(commands: Any) -> None:
    """Register the command."""
    parser: argparse.ArgumentParser = commands.add_parser("bench", help="floor, then timed trials")
    parser.add_argument("model", help=shared.MODEL_HELP)
    parser.add_argument("--tokens", type=int, default=32, help="tokens per trial (default 32)")
    parser.add_argument("--trials", type=int, default=3, help="trials after one warm-up (default 3)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="length of a random prompt (default 64)")
    parser.add_argument("--prompt", metavar="TEXT", help="a prompt to answer instead: routing as text has it")
    parser.add_argument("--paper", action="store_true", help="the rows of the paper's Table 2, on a GPU")
    shared.add_memory(parser)
    shared.add_bits(parser)
    shared.add_common(parser)
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Measure."""
    from greenroom import library, probe
    from greenroom.machine import ram_bandwidth

    for name in ("tokens", "trials", "prompt_tokens"):
        if getattr(options, name) < (2 if name == "tokens" else 1):
            raise ConfigError(f"--{name.replace('_', '-')} is too small")
    shared.check_memory(options)
    if options.paper:
        return paper.execute(options)
    folder = library.find(options.model, options.vram, **shared.bits_of(options))
    prompt = _prompt(options, folder)
    context = prompt.shape[1] + options.tokens
    engine = library.start(options.model, folder, shared.settings_of(options, context))
    try:
        manifest = engine.packed.manifest
        floor = {"ram": ram_bandwidth(), "disk": probe.disk_bandwidth(folder / manifest.experts[0].file)}
        if engine.device is not None:
            floor["link"] = paper.link_bandwidth(engine.device)
        link = f", link {floor['link'] / 1e9:.1f} GB/s" if "link" in floor else ""
        print(f"floor: RAM {floor['ram'] / 1e9:.1f} GB/s, disk {floor['disk'] / 1e9:.2f} GB/s{link}", flush=True)
        print(f"kernel: {engine.kernel}", flush=True)
        trials = [_trial(engine, prompt, options.tokens) for _ in range(options.trials + 1)][1:]
    finally:
        engine.close(remember=False)  # tokens of no text say nothing of the next run's
    report = _report(engine, trials, floor)
    for number, trial in enumerate(trials, start=1):
        print(
            f"trial {number}: {trial['tokens_per_s']:.2f} tokens/s, "
            f"prompt {trial['prompt_tokens_per_s']:.1f} tokens/s, hit rate {trial['hit_rate']:.1%}, "
            f"{format_bytes(trial['bytes_read_per_token'])} per token, "
            f"stall {trial['stall_share']:.0%}"
        )
    of = report["floor_tokens_per_s"]
    ratio = f"{of:.2f} (ratio {report['ratio_to_floor']:.3f})" if of else "nothing: all of them were there"
    print(f"median {report['tokens_per_s']:.2f} tokens/s; the floor for these bytes is {ratio}")
    if options.json:
        shared.print_json(report)
    return 0


def _prompt(options: argparse.Namespace, folder: Path) -> Any:
    """Token ids [1, n]: of the text given, or random ones."""
    import torch

    from greenroom import seam
    from greenroom.tokenizer import tokenizer_of

    if options.prompt is None:
        vocabulary = seam.load_config(folder).get_text_config().vocab_size
        return torch.randint(vocabulary, (1, options.prompt_tokens), generator=torch.Generator().manual_seed(0))
    tokenizer = tokenizer_of(folder)
    if tokenizer is None:
        raise ConfigError(f"{options.model} has no tokenizer: leave --prompt out")
    ids = generation.encode(tokenizer, [{"role": "user", "content": options.prompt}])["input_ids"]
    if not ids.shape[1]:
        raise ConfigError("--prompt has no tokens: give a text")
    return ids


def _trial(engine: Any, prompt: Any, tokens: int) -> "dict[str, float]":
    """The prompt and `tokens` greedy tokens, fed by hand so that the end token does not end it."""
    import time

    import torch

    model, prompt = engine.model, prompt.to(engine.model.device)
    before, start_s = engine.metrics(), time.perf_counter()
    with torch.no_grad():
        out = model(prompt, use_cache=True, logits_to_keep=1)
        middle, middle_s = engine.metrics(), time.perf_counter()
        for _ in range(tokens):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
    decode, decode_s = engine.metrics() - middle, time.perf_counter() - middle_s
    return {
        "tokens_per_s": tokens / decode_s,
        "prompt_tokens_per_s": prompt.shape[1] / (middle_s - start_s),
        "hit_rate": decode.hit_rate,
        "bytes_read_per_token": decode.bytes_read / tokens,
        "bytes_up_per_token": decode.bytes_up / tokens,
        "prompt_bytes_read": float((middle - before).bytes_read),
        "stall_share": decode.stall_s / decode_s,
        "experts_share": decode.compute_s / decode_s,
        "dense_share": decode.dense_s / decode_s,
    }


def _report(engine: Any, trials: "list[dict[str, float]]", floor: "dict[str, float]") -> "dict[str, Any]":
    """Medians, and the floor: a token's packed bytes over the RAM's rate (on a GPU what was sent over the link's), or
    its missed bytes over the disk's."""
    from greenroom import footprint

    medians = {name: statistics.median(trial[name] for trial in trials) for name in trials[0]}
    manifest, top_k = engine.packed.manifest, footprint.experts_per_token(engine.model.config)
    touched = engine.plan.dense + sum(min(top_k, e.num_experts) * e.record_nbytes for e in manifest.experts)
    link_s = medians["bytes_up_per_token"] / floor["link"] if "link" in floor else touched / floor["ram"]
    floor_s = max(link_s, medians["bytes_read_per_token"] / floor["disk"])
    return {
        **medians,
        "trials": trials,
        "ram_bytes_per_s": floor["ram"],
        "disk_bytes_per_s": floor["disk"],
        "touched_bytes_per_token": touched,
        **({"link_bytes_per_s": floor["link"]} if "link" in floor else {}),
        "floor_tokens_per_s": 1 / floor_s if floor_s else None,
        "ratio_to_floor": medians["tokens_per_s"] * floor_s,
        "kernel": engine.kernel,
        "decoder": str(engine.decode),
        "slots": engine.plan.slots,
        "experts": sum(engine.plan.experts),
    }
