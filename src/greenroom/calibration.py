"""What a checkpoint's experts are given on a text, kept on disk while it is packed.

The original is streamed once before packing. Each expert is then rounded for its own inputs (`quant.quantize_for`): the
hidden states of the tokens that are routed to it, and what its own first product makes of them.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from greenroom import seam
from greenroom.buffers import byte_view, read_into
from greenroom.checkpoint import Checkpoint
from greenroom.errors import ConfigError, PackError
from greenroom.original import Original, Text, ids_of, positions_of, windows_at_a_time
from greenroom.progress import Progress

WINDOW = 512
"""Tokens that go through the model together."""
WINDOWS = 32
"""At most, evenly spread over the text."""
_FEWEST_WINDOWS = 4
_ENOUGH = 1024
"""Tokens: an expert that is routed fewer is also given others', whose errors weigh `_STRANGERS` of its own."""
_STRANGERS = 0.1
_PRIOR = 0.25
"""For each column as many tokens' worth of what all experts of the layer are given: an expert of many sees too few of
its own for a matrix of moments."""


_REMEDY = "close other programs, or pack without --calibrate"


class Given(NamedTuple):
    """What a matrix is given: `quant.quantize_for`'s arguments."""

    inputs: torch.Tensor
    prior: "torch.Tensor | None"


class Inputs:
    """What the experts of one module were given.

    `states`: bfloat16 [T, hidden]; `index`: int32 [T, k], which experts a token went to; `weights`: float32 [T, k].
    `moments`: the mean of x xᵀ over all states, float32 [hidden, hidden].
    """

    def __init__(self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        self.states, self.index, self.weights = states, index, weights
        self.moments = _moments(states)

    def of(self, expert: int) -> "tuple[torch.Tensor, torch.Tensor]":
        """(hidden states float32 [n, hidden], roots of what errors on them weigh, float32 [n, 1]) of an expert: the
        square of the router's weight for its own tokens."""
        tokens, places = torch.where(self.index == expert)
        roots = self.weights[tokens, places]
        missing = min(_ENOUGH - len(tokens), len(self.states))
        if missing > 0:
            others = torch.arange(missing) * len(self.states) // missing
            tokens = torch.cat((tokens, others))
            own = roots.square().mean() if len(roots) else torch.tensor(1.0)
            roots = torch.cat((roots, (own * _STRANGERS).sqrt().expand(missing)))
        return self.states[tokens].float(), roots[:, None]

    def of_matrices(self, expert: int, module: Any, weights: "dict[str, torch.Tensor]") -> "dict[str, Given]":
        """What each matrix of an expert is given, by its name.

        `module`: transformers' module of the experts; `weights`: the expert's, float32, as `seam.expert_output` has
        them.
        """
        x, roots = self.of(expert)
        with torch.no_grad():
            inner = seam.expert_inner(module, weights, x)
        first = next(name for name in ("gate_up_proj", "up_proj") if name in weights)
        prior = self.moments * (_PRIOR * x.shape[1] * roots.square().mean())
        return {first: Given(x * roots, prior), "down_proj": Given(inner * roots, None)}


def _moments(states: torch.Tensor) -> torch.Tensor:
    """The mean of x xᵀ over bfloat16 [T, hidden], float32 [hidden, hidden]."""
    total = torch.zeros(states.shape[1], states.shape[1])
    for some in torch.split(states, _ENOUGH):
        total.addmm_(some.float().T, some.float())
    return total / len(states)


class Calibration:
    """All modules' inputs on a text. Use it as a context manager: the scratch file goes with it."""

    def __init__(self, folder: Path, windows: torch.Tensor, scratch: Path, room: int) -> None:
        """Stream the checkpoint in `folder` with token ids `windows` [windows, T]; `scratch` is the folder for the
        file, `room` bytes of memory. Raises BudgetError where that does not hold a layer."""
        self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115, closed with the object
        self._calls: dict[str, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
        with Original(folder) as original:
            at_a_time = windows_at_a_time(original, windows.shape[1], room, remedy=_REMEDY)
            original.on_experts = self._keep
            with Progress("calibrating", len(windows) * original.layers, unit="layers") as progress:
                for batch in torch.split(windows, at_a_time):
                    original.on_layer = functools.partial(progress.advance, len(batch))
                    original.states(batch)

    def __enter__(self) -> "Calibration":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def inputs(self, module: seam.ExpertsModule) -> "Inputs | None":
        """What `module`'s experts were given; None where they were not called."""
        hidden = module.parameters[0].cols
        calls = self._calls.get(module.name)
        if calls is None:
            return None
        states = [torch.empty(len(index), hidden, dtype=torch.bfloat16) for _, index, _ in calls]
        for kept, (offset, _, _) in zip(states, calls, strict=True):
            read_into(self._file.fileno(), byte_view(kept), offset)
        return Inputs(torch.cat(states), torch.cat([call[1] for call in calls]), torch.cat([call[2] for call in calls]))

    def _keep(self, module: Any, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> None:
        offset = self._file.seek(0, 2)
        try:
            self._file.write(byte_view(x.to(torch.bfloat16).contiguous()))
            self._file.flush()
        except OSError as error:
            raise PackError(f"cannot keep what experts are given ({error.strerror or error}): make room") from error
        kept = (offset, top_k_index.to(torch.int32), top_k_weights.float())
        self._calls.setdefault(module.name, []).append(kept)


def scratch_nbytes(checkpoint: Checkpoint, tokens: int) -> int:
    """Bytes of disk that calibrating on so many tokens takes while it lasts."""
    return torch.bfloat16.itemsize * tokens * sum(module.parameters[0].cols for module in checkpoint.experts)


def windows_of(folder: Path, text: Text) -> torch.Tensor:
    """Token ids [windows, WINDOW] for the model in `folder`, fewer where it has fewer positions.

    Raises ConfigError for a folder without a tokenizer and for a text that is too short.
    """
    ids = ids_of(folder, text)
    length = min(WINDOW, positions_of(folder) or WINDOW)
    count = min(WINDOWS, len(ids) // length)
    if count < _FEWEST_WINDOWS:
        raise ConfigError(
            f"{text.name} has {len(ids)} tokens, and calibrating takes at least {_FEWEST_WINDOWS * length} "
            f"({WINDOWS * length} or more are best): give a longer text"
        )
    step = len(ids) // count
    return torch.stack([ids[start : start + length] for start in range(0, count * step, step)])
