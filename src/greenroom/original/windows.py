"""A text as windows of tokens, and which of their tokens are scored.

Without overlap, as GPTQ, HQQ and most papers do WikiText-2: the whole text is tokenised once, with the special tokens
that the tokenizer puts before a text, and cut into windows of `context` tokens; a last, shorter one is dropped; in each
window all tokens but the first are predicted. With a stride, as in transformers' documentation ("Perplexity of
fixed-length models"): windows of `context` tokens begin `stride` tokens apart, the last may be shorter, and each scores
only the tokens that no window before it has scored: every token but the text's first is predicted once, or with a
stride of `context` every one but the windows' first.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch

from greenroom.errors import ConfigError
from greenroom.seam import load_config
from greenroom.tokenizer import tokenizer_of

MAX_TEXT_NBYTES = 8 << 20
"""Of longer texts only this much is read: about two million tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A text and what identifies it: its file's name, and the SHA-256 of the bytes that were read."""

    name: str
    sha256: str
    nbytes: int
    truncated: bool
    content: str = dataclasses.field(repr=False)

    @classmethod
    def read(cls, path: Path) -> "Text":
        """Read UTF-8, line ends as "\\n". Raises ConfigError where that cannot be."""
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_TEXT_NBYTES + 1)
        except OSError as error:
            raise ConfigError(f"cannot read {path} ({error.strerror or error}): give a text file") from error
        truncated = len(raw) > MAX_TEXT_NBYTES
        raw = raw[:MAX_TEXT_NBYTES]
        try:
            content = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if not truncated or error.start < len(raw) - 3:
                raise ConfigError(
                    f"{path} is no UTF-8 text (byte {error.start}): convert it, for instance with iconv"
                ) from error
            content = raw[: error.start].decode("utf-8-sig")
        content = content.replace("\r\n", "\n").replace("\r", "\n")
        digest = hashlib.sha256(raw).hexdigest()
        return cls(name=path.name, sha256=digest, nbytes=len(raw), truncated=truncated, content=content)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens int64 [T], of which the last `scored` are predicted, each from all before it; `scored` < T."""

    ids: torch.Tensor
    scored: int

    @property
    def targets(self) -> torch.Tensor:
        """The tokens that are predicted, int64 [scored]."""
        return self.ids[len(self.ids) - self.scored :]

    def predicting(self, states: torch.Tensor) -> torch.Tensor:
        """Of `states` [T, …] of all tokens those that predict the targets, [scored, …]."""
        return states[len(self.ids) - self.scored - 1 : -1]


def tokens_of(tokenizer: Any, text: str) -> torch.Tensor:
    """The tokens of a text, int64 [N], with what the tokenizer puts before it."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def ids_of(folder: Path, text: Text) -> torch.Tensor:
    """The tokens of `text` for the model in `folder`, int64 [N]. Raises ConfigError where that has no tokenizer."""
    tokenizer = tokenizer_of(folder)
    if tokenizer is None:
        raise ConfigError(f"{folder} has no tokenizer: add its tokenizer files to the checkpoint and pack again")
    return tokens_of(tokenizer, text.content)


def positions_of(folder: Path) -> "int | None":
    """How many tokens the model in `folder` can tell apart by place, or None where it does not say."""
    positions: int | None = getattr(load_config(folder).get_text_config(), "max_position_embeddings", None)
    return positions


def cut(ids: torch.Tensor, context: int, stride: "int | None" = None, most: "int | None" = None) -> "list[Window]":
    """`ids` [N] as windows of `context` tokens, `stride` apart; None is without overlap. At most the first `most`.

    Raises ConfigError where numbers cannot be or the text is too short.
    """
    if context < 2:
        raise ConfigError(f"--context must be at least 2, not {context}")
    if stride is not None and not 1 <= stride <= context:
        raise ConfigError(f"--stride must be from 1 to the context of {context}, not {stride}")
    if most is not None and most < 1:
        raise ConfigError(f"--windows must be at least 1, not {most}")
    shortest = context if stride is None else 2
    if len(ids) < shortest:
        raise ConfigError(
            f"the text has {len(ids)} tokens, and a window needs {shortest}: give a longer text"
            + (" or a smaller --context" if stride is None and len(ids) > 1 else "")
        )
    windows = _separate(ids, context) if stride is None else _overlapping(ids, context, stride)
    return windows[:most]


def _separate(ids: torch.Tensor, context: int) -> "list[Window]":
    return [
        Window(ids=window, scored=context - 1) for window in torch.split(ids[: len(ids) // context * context], context)
    ]


def _overlapping(ids: torch.Tensor, context: int, stride: int) -> "list[Window]":
    windows, done = [], 0
    for start in range(0, len(ids), stride):
        end = min(start + context, len(ids))
        scored = min(end - done, end - start - 1)  # a window's first token has nothing before it
        if scored:
            windows.append(Window(ids=ids[start:end], scored=scored))
        done = end
        if end == len(ids):
            break
    return windows
