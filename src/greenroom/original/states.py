"""The original's final hidden states of every window, in a scratch file: far smaller than its logits, and models of
other bits are compared with them one after the other."""

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from greenroom.buffers import byte_view, read_into
from greenroom.errors import BudgetError, GreenroomError
from greenroom.original.original import Original
from greenroom.original.windows import Window
from greenroom.progress import Progress
from greenroom.sizes import format_bytes

_BATCH = 8
"""Windows that pass through the layers together, where memory allows: reading weights costs little beside computing
that many, and more would only take memory."""

_ALLOCATOR_NBYTES = 32 << 20
"""What the C library keeps of memory that was given back."""


class StatesFile:
    """float32 [scored, hidden] for each window, in a file without a name that goes with this object."""

    def __init__(self, windows: "list[Window]", hidden: int, folder: "Path | None" = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed with the object
        self._shapes = [(window.scored, hidden) for window in windows]

    def put(self, number: int, states: torch.Tensor) -> None:
        """Keep window `number`'s states."""
        self._file.seek(self._offset(number))
        try:
            self._file.write(byte_view(states.contiguous().view(-1)))
            self._file.flush()
        except OSError as error:
            raise GreenroomError(
                f"cannot keep the original's hidden states ({error.strerror or error}): make room in "
                f"{tempfile.gettempdir()} or set TMPDIR, or give fewer --windows"
            ) from error

    def get(self, number: int) -> torch.Tensor:
        """Window `number`'s states."""
        rows, hidden = self._shapes[number]
        out = torch.empty(rows * hidden, dtype=torch.float32)
        read_into(self._file.fileno(), byte_view(out), self._offset(number))
        return out.view(rows, hidden)

    def close(self) -> None:
        """Free the disk."""
        self._file.close()

    def _offset(self, number: int) -> int:
        return 4 * sum(rows * hidden for rows, hidden in self._shapes[:number])


def stream(
    original: Original, windows: "list[Window]", room: int, label: str = "original", held: int = 0
) -> StatesFile:
    """The final hidden states of all `windows`, that predict their targets.

    `room`: bytes that weights and activations may take. As many windows at a time as that allows pass through the
    layers, and weights are read once for each time. Raises BudgetError where it does not hold one window; `held`, what
    the process has taken already, is for its message.
    """
    config = original.model.config.get_text_config()
    kept = StatesFile(windows, int(config.hidden_size))
    number = 0
    with Progress(label, len(windows) * original.layers, unit="layers") as progress:
        for batch in batches(windows, windows_at_a_time(original, len(windows[0].ids), room, held)):
            original.on_layer = functools.partial(progress.advance, len(batch))
            states = original.states(torch.stack([window.ids for window in batch]))
            for window, own in zip(batch, states, strict=True):
                kept.put(number, window.predicting(own))
                number += 1
    return kept


def windows_at_a_time(
    original: Original, tokens: int, room: int, held: int = 0, most: int = _BATCH, remedy: "str | None" = None
) -> int:
    """How many windows of `tokens` tokens, up to `most`, fit in `room` bytes beside the weights. Raises BudgetError for
    none; `remedy` is what its message ends with, where that is not a larger --ram."""
    least = streaming_nbytes(original, tokens, 1)
    if room < least:
        raise BudgetError(
            f"the original's largest layer with one window of {tokens} tokens takes {format_bytes(least)}, and "
            f"{format_bytes(max(room, 0))} are left: "
            + (remedy or f"give --ram {-(-(least + held) // (1 << 20)) + 8}MiB or a smaller --context")
        )
    return min(1 + (room - least) // activation_nbytes(original.model.config, tokens), most)


def streaming_nbytes(original: Original, tokens: int, windows: int) -> int:
    """Bytes that streaming takes at most with so many windows of `tokens` tokens at a time."""
    weights = original.layer_nbytes + original.outer_nbytes + _ALLOCATOR_NBYTES
    return weights + windows * activation_nbytes(original.model.config, tokens)


def activation_nbytes(config: object, tokens: int) -> int:
    """Bytes that a window of `tokens` takes at most on its way through one layer, in float32: hidden states and what
    attention and MLPs make of them."""
    text = config.get_text_config()  # type: ignore[attr-defined]
    wide = max(_number(text, "intermediate_size"), _number(text, "moe_intermediate_size"))
    return 4 * tokens * (12 * int(text.hidden_size) + 3 * wide) + attention_nbytes(config, tokens)


def attention_nbytes(config: object, tokens: int) -> int:
    """Bytes of the scores of all heads, where attention computes them plainly."""
    if getattr(config, "_attn_implementation", "sdpa") != "eager":
        return 0
    return 3 * 4 * tokens**2 * _number(config.get_text_config(), "num_attention_heads")  # type: ignore[attr-defined]


def _number(config: object, name: str) -> int:
    value = getattr(config, name, None)
    if isinstance(value, (list, tuple)):
        value = max(value, default=0)
    return int(value or 0)


def batches(windows: "list[Window]", most: int) -> "Iterator[list[Window]]":
    """Neighbours of equal length, at most `most` at a time."""
    batch: list[Window] = []
    for window in windows:
        if batch and (len(batch) == most or len(batch[0].ids) != len(window.ids)):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
