"""Measure a packed model on a text, against its original checkpoint or alone."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greenroom import library, planner, seam
from greenroom.buffers import give_back
from greenroom.errors import ConfigError
from greenroom.evaluate import packed as packed_states
from greenroom.evaluate.score import Summary, score, scoring_nbytes, summarise
from greenroom.machine import available_memory
from greenroom.metrics import process_memory
from greenroom.original import Head, Original, Text, Window, cut, ids_of, positions_of
from greenroom.original.states import StatesFile, attention_nbytes, stream
from greenroom.packed import PackedModel, Receipt
from greenroom.progress import Progress

if TYPE_CHECKING:
    from greenroom.config import EngineSettings

DEFAULT_CONTEXT = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a text was scored. `stride` None is without overlap; `mode` is "whole-window" or "token-by-token"."""

    context: int
    stride: "int | None"
    mode: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured, of what, how."""

    summary: Summary
    protocol: Protocol
    text: Text
    settings: "dict[str, Any]"
    """the bits the model is packed with"""
    nbytes: int
    """of the packed weights"""
    original_nbytes: "int | None"
    """of the original's weights"""
    same_source: "bool | None"
    """whether the original is the checkpoint that was packed"""

    def receipt(self) -> Receipt:
        """What to keep in the manifest. Raises ConfigError without an original, or where a figure is no number."""
        summary = self.summary
        if self.original_nbytes is None or summary.original_perplexity is None:
            raise ConfigError("a receipt compares with the original: leave --no-original out")
        assert summary.perplexity_ratio and summary.kl and summary.top1_agreement
        receipt = Receipt(
            text=self.text.name,
            sha256=self.text.sha256,
            **dataclasses.asdict(self.protocol),
            windows=summary.windows,
            tokens=summary.tokens,
            nbytes=self.nbytes,
            original_nbytes=self.original_nbytes,
            perplexity=summary.perplexity,
            original_perplexity=summary.original_perplexity,
            perplexity_ratio=summary.perplexity_ratio,
            kl=summary.kl,
            top1_agreement=summary.top1_agreement,
        )
        if not receipt.is_finite:
            raise ConfigError("the figures are no finite numbers, so there is no receipt: the model is broken")
        return receipt

    def report(self) -> "dict[str, Any]":
        """The figures as plain values, for JSON and for the manifest; each estimate as {value, se}."""
        figures = {name: _finite(value) for name, value in dataclasses.asdict(self.summary).items()}
        text = {"name": self.text.name, "sha256": self.text.sha256, "nbytes": self.text.nbytes}
        return {
            **figures,
            **dataclasses.asdict(self.protocol),
            "text": text,
            "settings": self.settings,
            "nbytes": self.nbytes,
            "original_nbytes": self.original_nbytes,
            "same_source": self.same_source,
        }


def _finite(value: Any) -> Any:
    """JSON knows no infinity."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def windows_of(
    folder: Path, text: Text, context: "int | None" = None, stride: "int | None" = None, most: "int | None" = None
) -> list[Window]:
    """`text` as windows for the model in `folder`. Raises ConfigError where that cannot be."""
    ids, positions = ids_of(folder, text), positions_of(folder)
    if context is not None and positions is not None and context > positions:
        raise ConfigError(f"--context {context} is more than the model's {positions} positions: give a smaller one")
    context = context or min(DEFAULT_CONTEXT, positions or DEFAULT_CONTEXT)
    return cut(ids, context, stride, most)


def evaluate(
    model: "str | Path",
    folder: Path,
    text: Text,
    settings: "EngineSettings",
    *,
    original: "Path | None",
    context: "int | None" = None,
    stride: "int | None" = None,
    most: "int | None" = None,
    token_by_token: bool = False,
    only_source: bool = False,
) -> Evaluation:
    """Measure `model`, packed in `folder`, on the windows of `text` (see `windows.cut`).

    `original`: the folder of the checkpoint to compare with, or None for perplexity alone; with `only_source`, one that
    is not the checkpoint that was packed is refused. `settings`: what the running model may use; its `ram` holds for
    the original as well, which is streamed before the model is loaded.
    """
    windows = windows_of(folder, text, context, stride, most)
    context = len(windows[0].ids) if stride is None else context or max(len(window.ids) for window in windows)
    packed = PackedModel(folder)
    with contextlib.ExitStack() as stack:
        reference: _Reference | None = None
        if original is not None:
            source = packed.manifest.source.get("fingerprint") if only_source else None
            reference = stack.enter_context(_reference(original, windows, settings, source))
        scores = list(_scores(model, packed, windows, settings, reference, token_by_token))
    return Evaluation(
        summary=summarise(scores, reference is not None),
        protocol=Protocol(context=context, stride=stride, mode="token-by-token" if token_by_token else "whole-window"),
        text=text,
        settings=packed.manifest.settings,
        nbytes=packed.nbytes,
        original_nbytes=None if reference is None else reference.nbytes,
        same_source=None if reference is None else packed.manifest.source.get("fingerprint") == reference.fingerprint,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reference:
    """The original after it has been streamed: its states, and the head that makes logits of them."""

    states: StatesFile
    head: Head
    nbytes: int
    fingerprint: str


def room_for(settings: "EngineSettings") -> "tuple[int, int]":
    """(bytes that streaming an original may take, bytes the process holds already)."""
    held, available = process_memory()["anonymous"], available_memory()
    return (planner.budget_of(settings, held, available) or held + available) - held, held


@contextlib.contextmanager
def _reference(
    folder: Path, windows: "list[Window]", settings: "EngineSettings", source: "str | None"
) -> "Iterator[_Reference]":
    give_back()  # tokenising a text takes more than the text
    room, held = room_for(settings)
    with Original(folder) as original:
        own = original.checkpoint.fingerprint()
        if source not in (None, own):
            raise ConfigError(f"{folder} is not the checkpoint that was packed: give that one with --original")
        states = stream(original, windows, room, held=held)
        try:
            original.drop_outer()
            original.head.logits(states.get(0)[:1])  # read now, so that the memory plan counts it
            yield _Reference(
                states=states,
                head=original.head,
                nbytes=original.checkpoint.nbytes,
                fingerprint=own,
            )
        finally:
            states.close()


def _scores(
    model: "str | Path",
    packed: PackedModel,
    windows: "list[Window]",
    settings: "EngineSettings",
    reference: "_Reference | None",
    token_by_token: bool,
) -> "Iterator[Any]":
    context = len(windows[0].ids)
    config = seam.load_config(packed.folder)
    own = scoring_nbytes(int(config.get_text_config().vocab_size)) + attention_nbytes(config, context)
    chunk = settings.prompt_chunk if token_by_token else context
    settings = dataclasses.replace(settings, context=context, prompt_chunk=chunk, reserve=own)
    give_back()  # it counts what the process holds now
    engine = library.start(model, packed.folder, settings)
    try:
        label = "token by token" if token_by_token else "packed"
        with Progress(label, sum(len(window.ids) for window in windows), unit="tokens") as progress:
            for number, window in enumerate(windows):
                run = packed_states.token_by_token if token_by_token else packed_states.whole_window
                states, output = run(engine, window)
                head = Head(engine.model, output)
                if reference is None:
                    yield score(window, states, head)
                else:
                    yield score(window, states, head, reference.states.get(number), reference.head)
                progress.advance(len(window.ids))
    finally:
        engine.close()
