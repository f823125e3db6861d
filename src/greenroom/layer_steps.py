"""Decoder layers as steps that may be taken again: what a layer has changed when it fails is put back, and it is tried
anew. So a device that runs out of memory in the middle of a token loses slots, not the answer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class LayerSteps:
    """Takes the place of the forward of `layers`.

    `shrink` frees device memory, and raises where it has no more to give.
    """

    def __init__(self, layers: "list[nn.Module]", shrink: "Callable[[], None]") -> None:
        self._shrink = shrink
        for layer in layers:
            layer.forward = self._repeatable(layer)

    def _repeatable(self, layer: nn.Module) -> "Callable[..., Any]":
        forward = layer.forward
        number: Any = next((module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")), None)

        def step(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
            if past_key_values is not None:
                kwargs["past_key_values"] = past_key_values
            before = _Memo(past_key_values, number)
            while True:
                try:
                    return forward(*args, **kwargs)
                except torch.OutOfMemoryError:
                    if not before.restore():
                        raise
                self._shrink()  # out of the handler: the failed frames and their tensors are gone

        return step


class _Memo:
    """What a cache's layer held: keys and values grow by being replaced, so the old ones are still whole."""

    def __init__(self, cache: Any, number: "int | None") -> None:
        self._layers: Any = getattr(cache, "layers", [])
        self._number = number
        self._layer = self._layers[number] if number is not None and number < len(self._layers) else None
        self._state = dict(vars(self._layer)) if self._layer is not None else {}
        counts = [name for name, value in self._state.items() if torch.is_tensor(value) and value.numel() == 1]
        self._state |= {name: self._state[name].clone() for name in counts}

    def restore(self) -> bool:
        """Put it back; False where the layer's state is of another kind (recurrent), or its number unknown."""
        if self._number is None:
            return False
        if self._layer is None:
            del self._layers[self._number :]  # made by the failed step, if at all
            return True
        if not hasattr(self._layer, "keys"):
            return False
        vars(self._layer).clear()
        vars(self._layer).update(self._state)
        return True
