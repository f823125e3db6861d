"""Generate and stream an answer, with the figures that `--stats` and `--json` show."""

import argparse
import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from greenroom.errors import ConfigError, PackedModelError
from greenroom.metrics import Metrics, process_memory
from greenroom.sizes import format_bytes

if TYPE_CHECKING:
    from greenroom.engine import Engine


def step_nbytes(experts_nbytes: float) -> float:
    """More and less memory whose effect is told: 2 GiB, or an eighth of all experts where that is less."""
    return min(2 << 30, experts_nbytes / 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What was generated and what it cost. Times in seconds; `decode` counts from the first token on."""

    text: str
    prompt_tokens: int
    token_ids: "list[int]"
    cut_at: "int | None"
    """--max-new-tokens, where the answer ended for them alone"""
    ttft_s: float
    decode_s: float
    kernel: str
    decoder: str
    placement: str
    slots_per_layer: float
    slots_nbytes: int
    lru_hit_rates: "list[float]"
    """with 0, 1, … slots per layer"""
    cache: Any
    """the KV cache of all tokens but the last, which was not fed"""
    prompt: Metrics
    decode: Metrics

    @property
    def new_tokens(self) -> int:
        """Tokens generated, the end token included."""
        return len(self.token_ids)

    def report(self) -> "dict[str, Any]":
        """The figures for people and machines. Rates are of decoding: the first token is the prompt's."""
        steps = self.new_tokens - 1
        memory = process_memory()
        report: dict[str, Any] = {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "tokens_per_s": steps / self.decode_s if steps > 0 and self.decode_s > 0 else 0.0,
            "ttft_s": self.ttft_s,
            "hit_rate": self.decode.hit_rate,
            "prefetch_rate": (self.decode.prefetched + self.decode.late) / max(self.decode.requests, 1),
            "bytes_read_per_token": self.decode.bytes_read / steps if steps > 0 else 0.0,
            "bytes_up_per_token": self.decode.bytes_up / steps if steps > 0 else 0.0,
            "prompt_bytes_read": self.prompt.bytes_read,
            "stall_s": self.decode.stall_s,
            "prompt_stall_s": self.prompt.stall_s,
            "expert_compute_s": self.decode.compute_s,
            "dense_compute_s": self.decode.dense_s,
            "decode_s": self.decode_s,
            "peak_memory_bytes": memory["peak"],
            "kernel": self.kernel,
            "decoder": self.decoder,
            "placement": self.placement,
            "slots_per_layer": self.slots_per_layer,
            "slots_nbytes": self.slots_nbytes,
            "lru_hit_rates": self.lru_hit_rates,
        }
        return {**report, "what_if": what_if(report)}


def answer(
    engine: "Engine", tokenizer: Any, inputs: "dict[str, Any]", options: argparse.Namespace, **extra: Any
) -> Answer:
    """Generate from tokenised `inputs`, streaming text to stdout."""
    check_sampling(options)
    streamer = _streamer(tokenizer, engine)
    sampling = sampling_of(options)
    inputs = {name: value.to(engine.model.device) for name, value in inputs.items()}
    prompt_tokens = int(inputs["input_ids"].shape[1])
    before, start_s = engine.metrics(), time.perf_counter()
    out = engine.model.generate(
        **inputs,
        **sampling,
        **extra,
        max_new_tokens=options.max_new_tokens,
        streamer=streamer,
        return_dict_in_generate=True,
        logits_processor=[functools.partial(_numbers, engine.model.dtype)],
        num_beams=1,
    )
    end_s, after = time.perf_counter(), engine.metrics()
    ids = out.sequences[0, prompt_tokens:].tolist()
    first_s = streamer.first_s if streamer.first_s is not None else end_s
    middle = streamer.first_metrics if streamer.first_metrics is not None else after
    return Answer(
        text=tokenizer.decode(ids, skip_special_tokens=True),
        prompt_tokens=prompt_tokens,
        token_ids=ids,
        cut_at=options.max_new_tokens if _is_cut(engine, ids, options.max_new_tokens) else None,
        ttft_s=first_s - start_s,
        decode_s=end_s - first_s,
        kernel=engine.kernel,
        decoder=str(engine.decode),
        placement=engine.placement(),
        slots_per_layer=engine.plan.slots / len(engine.plan.experts),
        slots_nbytes=engine.plan.slots_nbytes,
        lru_hit_rates=engine.lru_hit_rates(),
        cache=out.past_key_values,
        prompt=middle - before,
        decode=after - middle,
    )


def _is_cut(engine: "Engine", ids: "list[int]", most: int) -> bool:
    """Whether there are as many tokens as were allowed and the last of them ends nothing."""
    ends = engine.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return len(ids) >= most and ids[-1] not in ends


def tell_if_cut(answer: Answer) -> None:
    """Say on stderr that there would have been more."""
    if answer.cut_at is not None:
        print(f"greenroom: the answer was cut at --max-new-tokens {answer.cut_at}", file=sys.stderr)


def check_text(text: str) -> None:
    """Refuse a prompt with bytes that are no text, which Python passes on as lone surrogates. Raises ConfigError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError("the prompt is no UTF-8: convert it, e.g. with iconv") from None


@contextlib.contextmanager
def reading_stdin() -> "Iterator[None]":
    """Raises ConfigError where stdin is no text."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(f"stdin is no {error.encoding} ({error.reason}): convert it, e.g. with iconv") from None


def sampling_of(options: argparse.Namespace) -> "dict[str, Any]":
    """What `generate` is told of how to choose tokens; seeds torch where it draws."""
    import torch

    if options.temperature <= 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    torch.manual_seed(options.seed)
    return {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}


def check_sampling(options: argparse.Namespace) -> None:
    """Refuse settings that cannot be."""
    if not -(1 << 63) <= options.seed < 1 << 64:
        raise ConfigError(f"--seed must be from -2^63 to 2^64 - 1, not {options.seed}")
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be at least 1, not {options.max_new_tokens}")
    if options.temperature < 0:
        raise ConfigError(f"--temperature must be 0 or more, not {options.temperature}")
    if not 0 < options.top_p <= 1:
        raise ConfigError(f"--top-p must be above 0 and at most 1, not {options.top_p}")


def _numbers(dtype: Any, _: Any, scores: Any) -> Any:
    """`scores`, if they are numbers. Models that were trained in bfloat16 may exceed what float16 holds."""
    if not scores.isnan().any():
        return scores
    if str(dtype) == "torch.float32":
        raise PackedModelError(
            "the model's scores are not numbers, even in float32: greenroom verify tells whether its files are damaged"
        )
    raise ConfigError(
        f"the model's scores are not numbers in {str(dtype).removeprefix('torch.')}: give --dtype float32, which is "
        "slower and takes more memory"
    )


def _streamer(tokenizer: Any, engine: "Engine") -> Any:
    """A TextStreamer that also notes when the first token came and what had been counted by then."""
    import transformers

    class Streamer(transformers.TextStreamer):  # type: ignore[misc]
        first_s: "float | None" = None
        first_metrics: "Metrics | None" = None
        prompt_seen = False

        def put(self, value: Any) -> None:
            if not self.prompt_seen:
                self.prompt_seen = True
            elif self.first_s is None:
                self.first_s, self.first_metrics = time.perf_counter(), engine.metrics()
            super().put(value)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def show_stats(report: "dict[str, Any]") -> None:
    """The figures on stderr, a line each."""
    lines = [
        f"{report['tokens_per_s']:.2f} tokens/s, first token after {report['ttft_s']:.2f} s "
        f"({report['prompt_tokens']} prompt tokens, {report['new_tokens']} new)",
        f"hit rate {report['hit_rate']:.1%}, prefetched {report['prefetch_rate']:.1%}, "
        f"{format_bytes(report['bytes_read_per_token'])} read per token",
        f"of {report['decode_s']:.2f} s decoding: {report['stall_s']:.2f} s stalled on reads, "
        f"{report['expert_compute_s']:.2f} s in experts, {report['dense_compute_s']:.2f} s in other linears",
        *_outlook(report["what_if"]),
        *_choices(report),
        f"peak memory {format_bytes(report['peak_memory_bytes'])}",
        f"kernel: {report['kernel']}; tokens are decoded by: {report['decoder']}",
    ]
    print("\n".join(lines), file=sys.stderr)


def _outlook(others: "list[dict[str, float]]") -> "list[str]":
    """What less and more memory would do, in one line."""
    parts = [
        f"with {format_bytes(abs(other['more_nbytes']))} {'more' if other['more_nbytes'] > 0 else 'less'} "
        f"{other['hit_rate']:.0%} hits and {other['tokens_per_s']:.1f} tokens/s"
        for other in others
    ]
    return ["estimated: " + ", ".join(parts)] if parts else []


def what_if(report: "dict[str, Any]") -> "list[dict[str, float]]":
    """What a little less and a little more memory for slots would have done: bytes more, hit rate, tokens/s.

    Misses change as LRU's would; the time of a token apart from stalls stays, the stalls change like the misses.
    """
    rates, slots = report["lru_hit_rates"], report["slots_per_layer"]
    if not rates or not report["tokens_per_s"] or not slots:
        return []
    layer_nbytes, most = report["slots_nbytes"] / slots, len(rates) - 1
    step = step_nbytes(most * layer_nbytes) / layer_nbytes
    found = []
    for other in (max(slots - step, 0.0), min(slots + step, most)):
        now, then = 1 - _between(rates, slots), 1 - _between(rates, other)
        if other == slots or now <= 0:
            continue
        token_s, stall_s = 1 / report["tokens_per_s"], report["stall_s"] / (report["new_tokens"] - 1)
        found.append(
            {
                "more_nbytes": (other - slots) * layer_nbytes,
                "hit_rate": 1 - min((1 - report["hit_rate"]) * then / now, 1.0),
                "tokens_per_s": 1 / (token_s - stall_s + stall_s * then / now),
            }
        )
    return found


def _between(rates: "list[float]", slots: float) -> float:
    """The hit rate of a number of slots that need not be whole."""
    below = min(int(slots), len(rates) - 1)
    above = min(below + 1, len(rates) - 1)
    return rates[below] + (rates[above] - rates[below]) * (slots - below)


def _choices(report: "dict[str, Any]") -> "list[str]":
    """What crossed the link to a device, if there is one, and what was chosen on the way, with the reasons."""
    if not report["placement"]:
        return []
    sent = f"{format_bytes(report['bytes_up_per_token'])} sent to the GPU per token; "
    return [(sent if report["bytes_up_per_token"] else "") + report["placement"]]


def encode(tokenizer: Any, messages: "list[dict[str, str]]") -> "dict[str, Any]":
    """Tokens of a conversation through the chat template, or of the last message's text where there is none."""
    if getattr(tokenizer, "chat_template", None):
        try:
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # templates raise what they like, e.g. on a system message
            raise ConfigError(f"the model's chat template refuses this conversation ({error})") from error
    else:
        encoded = tokenizer(messages[-1]["content"], return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}
