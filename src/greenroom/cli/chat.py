"""`greenroom chat MODEL`: talk. /exit leaves, Ctrl-C stops the answer, not the program."""

import argparse
import contextlib
import itertools
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from greenroom.cli import options as shared
from greenroom.cli import receipt
from greenroom.errors import ConfigError

if TYPE_CHECKING:
    from greenroom.engine import Engine

_HELP = "/exit leaves, /reset forgets the conversation, /stats shows the last answer's figures, Ctrl-C stops an answer"


def add(commands: Any) -> None:
    """Register the command."""
    parser: argparse.ArgumentParser = commands.add_parser("chat", help="talk")
    parser.add_argument("model", help=shared.MODEL_HELP)
    parser.add_argument("--stats", action="store_true", help="print figures after each answer")
    shared.add_sampling(parser, max_new_tokens=1024)
    shared.add_memory(parser)
    shared.add_bits(parser)
    shared.add_common(parser)
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Answer until /exit or the end of input."""
    from greenroom import library
    from greenroom.cli import generation
    from greenroom.tokenizer import tokenizer_of

    generation.check_sampling(options)
    settings = shared.settings_of(options, context=4096)
    folder = library.find(options.model, options.vram, **shared.bits_of(options))
    tokenizer = tokenizer_of(folder)
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"{options.model} has no chat template: use greenroom run")
    engine = library.start(options.model, folder, settings)
    receipt.show(engine.packed)
    print(_HELP, file=sys.stderr)
    try:
        last = _Conversation(engine, tokenizer, options).talk()
    finally:
        engine.close()
    if options.json:
        shared.print_json({**last, "receipt": receipt.fields(engine.packed.manifest.receipt)} if last else last)
    return 0


class _Conversation:
    """Messages so far, and the KV cache of their tokens, so that a turn costs its new tokens only."""

    def __init__(self, engine: "Engine", tokenizer: Any, options: argparse.Namespace) -> None:
        self._engine, self._tokenizer, self._options = engine, tokenizer, options
        self._last: dict[str, Any] = {}
        self._stop = False
        self._reset()

    def talk(self) -> "dict[str, Any]":
        """Read lines until the end; returns the last answer's figures."""
        while (line := self._read()) is not None:
            if line == "/reset":
                self._reset()
            elif line == "/stats":
                self._show()
            elif line.startswith("/"):
                print(_HELP, file=sys.stderr)
            elif line:
                self._answer(line)
        return self._last

    def _reset(self) -> None:
        system = self._options.system
        self._messages = [{"role": "system", "content": system}] if system else []
        self._cache: Any = None
        self._cached: list[int] = []

    def _read(self) -> "str | None":
        from greenroom.cli import generation

        while True:
            try:
                with generation.reading_stdin():
                    line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return None
            except KeyboardInterrupt:  # at the prompt it clears the line
                print(file=sys.stderr)
                continue
            try:
                generation.check_text(line)
            except ConfigError as error:  # of one line: the conversation goes on
                print(f"greenroom: {error}", file=sys.stderr)
                continue
            return None if line in ("/exit", "/quit") else line

    def _show(self) -> None:
        from greenroom.cli import generation

        if self._last:
            generation.show_stats(self._last)

    def _answer(self, line: str) -> None:
        import transformers

        from greenroom.cli import generation

        self._messages.append({"role": "user", "content": line})
        inputs = generation.encode(self._tokenizer, self._messages)
        ids = inputs["input_ids"][0].tolist()
        kept = {"past_key_values": self._cache} if self._goes_on(ids) else {}
        stop = transformers.StoppingCriteriaList([lambda *_: self._stop])
        with self._interruptible():
            answer = generation.answer(
                self._engine,
                self._tokenizer,
                inputs,
                self._options,
                **kept,
                stopping_criteria=stop,
            )
        # a cache of a kind that the model's own settings ask for cannot be given back
        kept_on = isinstance(answer.cache, transformers.DynamicCache)
        self._cache, self._cached = (answer.cache, ids + answer.token_ids[:-1]) if kept_on else (None, [])
        self._messages.append({"role": "assistant", "content": answer.text})
        generation.tell_if_cut(answer)
        self._last = answer.report()
        if self._options.stats:
            self._show()

    def _goes_on(self, ids: "list[int]") -> bool:
        """Whether the cache holds the beginning of `ids`, after it was cropped to that where it can be.

        Templates rewrite what was said, e.g. drop earlier thinking. At least one token is left to feed. One family's
        cache says that it is empty: it is of no use.
        """
        both = zip(self._cached, ids[:-1], strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
        if not common or self._cache.get_seq_length() != len(self._cached):
            return False
        if common < len(self._cached):
            if not _can_be_cropped(self._cache):
                return False
            self._cache.crop(common - len(self._cached))
        return int(self._cache.get_seq_length()) == common

    @contextlib.contextmanager
    def _interruptible(self) -> "Iterator[None]":
        """Ctrl-C ends the answer after the current token; a second one is the usual interrupt."""
        self._stop = False

        def stop(*_: object) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _can_be_cropped(cache: Any) -> bool:
    """Whether all of its layers hold every position and nothing else: no window, no state that runs on."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    from greenroom.decode.kv import CompiledDynamicLayer
    from greenroom.static_kv import StaticDynamicLayer

    kinds = (DynamicLayer, CompiledDynamicLayer, StaticDynamicLayer)
    return type(cache) is DynamicCache and not cache.offloading and all(type(layer) in kinds for layer in cache.layers)
