"""Flags shared by commands, and what they become."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from greenroom.library import engine_settings

if TYPE_CHECKING:
    from greenroom.config import EngineSettings

MODEL_HELP = "a packed folder, a Hugging Face folder, a hub id, or demo"


def add_common(parser: argparse.ArgumentParser) -> None:
    """Flags of every command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")


def add_bits(parser: argparse.ArgumentParser) -> None:
    """How a model is packed."""
    group = parser.add_argument_group("packing (defaults: experts 4, attention 8, head 8; demo: groups of 32)")
    group.add_argument("--expert-bits", type=int, choices=(2, 3, 4, 8, 16), help="bits of an expert's weights")
    group.add_argument("--attention-bits", type=int, choices=(2, 3, 4, 8, 16), help="bits of the other dense linears")
    group.add_argument("--head-bits", type=int, choices=(2, 3, 4, 8, 16), help="bits of the output head")
    group.add_argument("--group-size", type=int, help="weights per scale in experts (default 64, at 2 bits 16)")


def bits_of(options: argparse.Namespace) -> "dict[str, int | None]":
    """The packing flags as keyword arguments; None where not given."""
    return {name: getattr(options, name) for name in ("expert_bits", "attention_bits", "head_bits", "group_size")}


def add_memory(parser: argparse.ArgumentParser) -> None:
    """What a running model may use; the same everywhere."""
    group = parser.add_argument_group("memory and cache")
    group.add_argument("--ram", metavar="SIZE", help="what the process may hold, e.g. 8GiB (default: what is free)")
    group.add_argument("--vram", metavar="SIZE", help="GPU memory to use, e.g. 12GiB (default: compute on the CPU)")
    group.add_argument("--no-cpu-experts", action="store_true", help="with --vram: move every missed expert to the GPU")
    group.add_argument("--experts-per-layer", type=int, metavar="K", help="slots per layer, the paper's k, instead")
    group.add_argument(
        "--policy",
        default="learned",
        help="learned (default), lru (the paper's), lfu, s3fifo, frequency-age or probability; with -shared, one pool",
    )
    group.add_argument(
        "--prefetch",
        type=int,
        metavar="N",
        help="experts guessed at most per layer ahead; 0 guesses none (default: as many as pay, none on a GPU)",
    )
    group.add_argument("--lookahead", type=int, default=1, metavar="D", help="layers to guess ahead (default 1)")
    group.add_argument(
        "--activation-bits",
        type=int,
        choices=(16, 8),
        default=16,
        help="of a prompt's activations on the CPU: 8 reads prompts up to 1.6 times as fast, slightly less exactly",
    )
    group.add_argument(
        "--kv-bits",
        type=int,
        choices=(16, 8),
        default=16,
        help="of cached keys and values on the CPU: 8 takes half of their memory, and of the time to read them",
    )
    group.add_argument("--context", type=int, default=None, metavar="TOKENS", help="tokens of KV cache to reserve")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of activations (default: float32; on a GPU bfloat16, or float16 where it has none)",
    )


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """How text is generated."""
    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N")
    group.add_argument("--temperature", type=float, default=0.0, help="0 (the default) takes the likeliest token")
    group.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total")
    group.add_argument("--seed", type=int, default=0, help="makes sampling repeatable (default 0)")
    group.add_argument("--system", metavar="TEXT", help="system message, where the chat template has one")


def settings_of(options: argparse.Namespace, context: int) -> "EngineSettings":
    """The memory flags for the engine, with room for `context` tokens unless --context says otherwise. Raises
    ConfigError for what cannot be."""
    return engine_settings(
        ram=options.ram,
        vram=options.vram,
        experts_per_layer=options.experts_per_layer,
        policy=options.policy,
        cpu_experts=not options.no_cpu_experts,
        prefetch=options.prefetch,
        lookahead=options.lookahead,
        activation_bits=options.activation_bits,
        kv_bits=options.kv_bits,
        dtype=options.dtype,
        context=context if options.context is None else options.context,
    )


def check_memory(options: argparse.Namespace) -> None:
    """Raise ConfigError for memory flags that cannot be: now, and not after hours of fetching and packing."""
    settings_of(options, context=1)


def print_json(body: "dict[str, Any]") -> None:
    """The one JSON object on the last line of stdout."""
    print(json.dumps(body, ensure_ascii=False), flush=True)
