"""Decoder layers as steps that may be taken again, because what a layer has changed can be put back.

So a device that runs out of memory in the middle of a token loses slots, not the answer. And a layer may be launched
before it is known whether all its experts are there: the host looks one layer later, and where something was missing
that layer and the one after are taken again.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from greenroom.device_runner import DeviceRunner

_STEADY = 0.95
"""The share of layers that found all their experts, from which on layers are launched ahead: without CUDA graphs taking
two layers again costs the host twenty times what a read-back does."""
_WEIGHT = 1 / 256
"""Of the latest layer in that share."""


@dataclasses.dataclass(slots=True)
class _Launched:
    """A layer that has been launched ahead."""

    run: "Callable[[], Any]"
    memo: "_Memo"
    out: Any
    calls: "list[Any]"


class LayerSteps:
    """Takes the place of the forward of `layers`, in the order in which a token passes them.

    `shrink` frees device memory, and raises where it has no more to give.
    """

    def __init__(self, layers: "list[nn.Module]", runner: DeviceRunner, shrink: "Callable[[], None]") -> None:
        self._runner, self._shrink = runner, shrink
        self._count = len(layers)
        self._previous: _Launched | None = None
        self._last_out: Any = None
        self._chained, self._passes_on = -1, False
        """of the layers of a token, those that got what the layer before gave; whether in the last token all did"""
        self._steady = 0.0
        self.ahead: bool | None = None
        """whether layers are launched ahead; None decides by the share that found all their experts"""
        self.launched = 0
        """layers launched ahead that need not be taken again"""
        for number, layer in enumerate(layers):
            layer.forward = self._step(number, layer)

    def _step(self, number: int, layer: nn.Module) -> "Callable[..., Any]":
        forward = layer.forward
        cached: Any = next((module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")), None)

        def step(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.get("hidden_states")
            memo = _Memo(kwargs.get("past_key_values"), cached)
            if number == 0:
                self._passes_on, self._chained, self._previous = self._chained == self._count - 1, 0, None
            else:
                self._chained += hidden is _first(self._last_out)
            ahead = self._goes_ahead(number, hidden, memo)
            if (
                self._previous is not None and not ahead
            ):  # this layer cannot be taken again: what it gets has to be right
                self._settle(self._previous)
                self._previous = None
            before = self._runner.metrics.misses
            launched = self._take(lambda: forward(*args, **kwargs), memo, ahead)
            if ahead:
                launched = self._settle_previous(launched)
                self._previous = launched
                if number == self._count - 1:
                    self._settle(launched)
                    self._previous = None
            elif _is_token(hidden):
                self._steady += ((self._runner.metrics.misses == before) - self._steady) * _WEIGHT
            self._last_out = launched.out
            return launched.out

        return step

    def _goes_ahead(self, number: int, hidden: Any, memo: "_Memo") -> bool:
        """Whether to launch without waiting: one token, and layers that hand on their outputs as they are."""
        if number > 0 and self._previous is None:
            return False  # a token goes one way as a whole
        wanted = self._steady > _STEADY if self.ahead is None else self.ahead
        if not wanted or not memo.whole or torch.is_grad_enabled():
            return False
        return self._passes_on and _is_token(hidden) and self._runner.may_go_ahead

    def _take(self, run: "Callable[[], Any]", memo: "_Memo", ahead: bool) -> _Launched:
        """Run a layer, in less memory if there is none left."""
        while True:
            try:
                with self._runner.going(ahead) as calls:
                    return _Launched(run, memo, run(), calls)
            except torch.OutOfMemoryError:
                if not memo.restore():
                    raise
            self._shrink()  # out of the handler: the failed frames and their tensors are gone

    def _settle_previous(self, launched: _Launched) -> _Launched:
        """The layer just launched, taken again if the one before had to be."""
        if self._previous is None or self._settle(self._previous):
            return launched
        launched.memo.restore()
        return self._take(launched.run, launched.memo, ahead=True)

    def _settle(self, launched: _Launched) -> bool:
        """Whether a layer found all its experts; if not it is taken again, and its outputs are put right in place."""
        found = all(self._runner.settle(call) for call in launched.calls)
        self._steady += (found - self._steady) * _WEIGHT
        if found:
            self.launched += 1
            return True
        launched.memo.restore()
        right = self._take(launched.run, launched.memo, ahead=False)
        _first(launched.out).copy_(_first(right.out))
        return False


def _is_token(hidden: Any) -> bool:
    return torch.is_tensor(hidden) and hidden.shape[:-1] == (1, 1)


def _first(out: Any) -> Any:
    """The hidden states among what a layer gives."""
    return out[0] if isinstance(out, tuple) else out


class _Memo:
    """What a cache's layer held: keys and values grow by being replaced, so the old ones are still whole."""

    def __init__(self, cache: Any, number: "int | None") -> None:
        self._layers: Any = getattr(cache, "layers", [])
        self._number = number
        self._layer = self._layers[number] if number is not None and number < len(self._layers) else None
        self._state = dict(vars(self._layer)) if self._layer is not None else {}
        counts = [name for name, value in self._state.items() if torch.is_tensor(value) and value.numel() == 1]
        self._state |= {name: self._state[name].clone() for name in counts}

    @property
    def whole(self) -> bool:
        """Whether everything can be put back: keys and values are all there is, and not, say, a recurrent state."""
        return self._layer is not None and hasattr(self._layer, "keys")

    def restore(self) -> bool:
        """Put it back; False where the layer's state is of another kind, or its number unknown."""
        if self._number is None:
            return False
        if self._layer is None:
            del self._layers[self._number :]  # made by the failed step, if at all
            return True
        if not self.whole:
            return False
        vars(self._layer).clear()
        vars(self._layer).update(self._state)
        return True
