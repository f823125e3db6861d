"""Whether a model's modules are still what they were."""

import operator
from typing import Any, NamedTuple

import torch
from torch import nn


class _Seen(NamedTuple):
    """One module."""

    module: nn.Module
    plain: "dict[str, Any]"
    """its numbers, texts and functions, a `forward` that somebody gave it among them"""
    tensors: "tuple[torch.Tensor, ...]"
    written: "tuple[tuple[int, int], ...]"
    """(where a tensor lies, how often it was written to): what is written to its `data` leaves no trace"""

    def equals(self, other: "_Seen") -> bool:
        """Whether nothing was replaced, set or written."""
        return (
            self.module is other.module
            and self.plain == other.plain
            and self.written == other.written
            and all(map(operator.is_, self.tensors, other.tensors))
        )


class Identity:
    """What the modules of `base` are now. Rotary embeddings are left out: some replace their own tensors as positions
    grow, and all are asked anew at every token."""

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._seen = _look(base)

    def holds(self) -> bool:
        """Whether they still are."""
        now = _look(self._base)
        return len(now) == len(self._seen) and all(map(_Seen.equals, now, self._seen))


def _look(base: nn.Module) -> "list[_Seen]":
    apart = {part for name, one in base.named_modules() if name.endswith("rotary_emb") for part in one.modules()}
    return [_see(module) for module in base.modules() if module not in apart]


def _see(module: nn.Module) -> _Seen:
    own = vars(module)
    tensors = tuple(one for one in (*module._parameters.values(), *module._buffers.values()) if one is not None)
    return _Seen(
        module=module,
        plain={name: one for name, one in own.items() if _is_plain(one) and (name[0] != "_" or callable(one))},
        tensors=tensors,
        # tensors made in inference mode do not count
        written=tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in tensors),
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) or callable(value)
