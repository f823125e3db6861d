"""Where captured layers read what they are given: memory that stays, into which each token's arguments are copied, and
what a mask shows of as much room as there is for keys and values.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._pytree import SUPPORTED_NODES, TreeSpec, tree_flatten, tree_map_only

from greenroom.static_kv import lasting

Arguments = dict[str, Any]
_PLAIN = (bool, int, float, str, tuple, TreeSpec)
"""What is compared by value among a layer's arguments."""


class _Fixed:
    """Memory that stays, and the tensor that was last copied there."""

    def __init__(self, memory: torch.Tensor, source: "torch.Tensor | None" = None) -> None:
        self.memory, self.source, self._version = memory, source, -1

    def take(self, value: Any) -> bool:
        """Hold what a tensor holds; False where it is none, or of another shape."""
        if value is self.memory:
            return True
        if not isinstance(value, torch.Tensor):
            return False
        version = -1 if value.is_inference() else value._version
        if value is self.source and version == self._version >= 0:
            return True
        if value.shape != self.memory.shape or value.dtype != self.memory.dtype:
            return False
        self.memory.copy_(value)
        self.source, self._version = value, version
        return True

    def forget(self) -> None:
        """Somebody else writes the memory: what is taken next is copied."""
        self.source = None


class Inputs:
    """Fixed memory for what layers are given: what several of them get in a token is copied once."""

    def __init__(self) -> None:
        self._all: list[_Fixed] = []

    def hold(self, tensor: torch.Tensor) -> _Fixed:
        """What holds the same as a tensor: where another layer put it, else somewhere new."""
        fixed = next((one for one in self._all if tensor is one.memory or tensor is one.source), None)
        if fixed is None:
            with lasting():
                fixed = _Fixed(torch.empty_like(tensor))
            self._all.append(fixed)
        fixed.take(tensor)
        return fixed

    def keep(self, tensor: torch.Tensor) -> None:
        """A tensor that stays where it is."""
        if all(tensor is not one.memory for one in self._all):
            self._all.append(_Fixed(tensor))

    def forget(self) -> None:
        """Copy anew whatever is taken next."""
        for fixed in self._all:
            fixed.forget()

    def memory(self) -> "list[torch.Tensor]":
        """All of it."""
        return [fixed.memory for fixed in self._all]

    def clear(self) -> None:
        """Nothing is used any more."""
        self._all.clear()


class Places:
    """Fixed memory for a call's arguments: `args` and `kwargs` with each tensor as the memory that it is copied to."""

    def __init__(self, inputs: Inputs, args: "tuple[Any, ...]", kwargs: Arguments) -> None:
        self._names = (len(args), *kwargs)
        self.leaves = [
            inputs.hold(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in _leaves((*args, *kwargs.values()))
        ]
        """of the arguments, in order"""
        self.args, self.kwargs = tree_map_only(torch.Tensor, lambda tensor: inputs.hold(tensor).memory, (args, kwargs))

    def take(self, args: "tuple[Any, ...]", kwargs: Arguments) -> bool:
        """Copy the arguments' tensors to where they are read; False where they are others than these were made for."""
        leaves = _leaves((*args, *kwargs.values()))
        if len(leaves) != len(self.leaves) or (len(args), *kwargs) != self._names:
            return False
        for leaf, known in zip(leaves, self.leaves, strict=True):
            if leaf is known:
                continue
            if not (known.take(leaf) if isinstance(known, _Fixed) else isinstance(leaf, _PLAIN) and leaf == known):
                return False
        return True


class _Sight:
    """What tokens see of so much room for keys and values: a mask, and the slot of the next token."""

    def __init__(self, room: int, slot: torch.Tensor) -> None:
        self.room, self.slot = room, slot
        self.mask = torch.empty(0)
        self._shown: tuple[Any, Any] = (-1, None)

    def forget(self) -> None:
        """Show anew, whatever is shown next."""
        self._shown = (-1, None)

    def show(self, length: int, mask: "torch.Tensor | None", like: torch.Tensor) -> None:
        """Of `length` positions before the token those that `mask` [1, heads, 1, n] lets it see: its last is the
        token. None: all."""
        if self._shown[0] == length and self._shown[1] is mask:
            return
        shape = (*(mask.shape[:-1] if mask is not None else (1, 1, 1)), self.room)
        dtype = like.dtype if mask is None else mask.dtype
        if self.mask.shape != shape or self.mask.dtype != dtype or self.mask.device != like.device:
            with lasting():
                self.mask = torch.empty(shape, dtype=dtype, device=like.device)
        if length < self.room:  # nothing has been overwritten
            self.mask.fill_(False if dtype == torch.bool else torch.finfo(dtype).min)
            here = self.mask[..., : length + 1]
            here.zero_() if mask is None else here.copy_(mask)
        elif mask is None:
            self.mask.zero_()
        else:
            self.mask.copy_(mask.roll((length + 1) % self.room, -1))
        self.slot.fill_(length % self.room)
        self._shown = (length, mask)

    def follow(self, position: torch.Tensor, mask: "torch.Tensor | None", full: bool) -> None:
        """The same on the device, after as many tokens as `position` int64 [1] says there. A mask shows as much as
        there is room for, of a ring that is not `full` or of all in the order of positions, or of one that is."""
        if self._shown[0] is position and self._shown[1] is mask:
            return
        places = torch.arange(self.room, device=position.device)
        if mask is None:
            self.mask.fill_(torch.finfo(self.mask.dtype).min).masked_fill_(places <= position, 0.0)
        else:
            shown = mask.index_select(-1, (places - position - 1) % self.room) if full else mask
            self.mask[..., : shown.shape[-1]].copy_(shown)
        self.slot.copy_(position % self.room)
        self._shown = (position, mask)


class Sights:
    """One for each room and window; layers share them."""

    def __init__(self, place: torch.device) -> None:
        self._place = place
        self._all: dict[tuple[int, int | None, bool], _Sight] = {}

    def of(self, room: int, window: "int | None", masked: bool) -> _Sight:
        """For layers that have so much room, and are given a mask or none."""
        key = (room, window, masked)
        if key not in self._all:
            with lasting():
                self._all[key] = _Sight(room, torch.zeros(1, dtype=torch.int64, device=self._place))
        return self._all[key]

    def known(self, room: int, window: "int | None", masked: bool) -> "_Sight | None":
        """The same, or None where there is none yet."""
        return self._all.get((room, window, masked))

    def forget(self) -> None:
        """Show anew, whatever is shown next."""
        for sight in self._all.values():
            sight.forget()

    def memory(self) -> "list[torch.Tensor]":
        """All that they show is there."""
        return [tensor for sight in self._all.values() for tensor in (sight.mask, sight.slot)]


def _leaves(values: "Iterable[Any]") -> "list[Any]":
    """Arguments one by one, what they are held in before them: most are no more than a tensor, for which a general
    walk would take longer than all else that is done to repeat a layer."""
    found: list[Any] = []
    for value in values:
        kind = type(value)
        if kind is tuple:
            found.append((len(value),))
            found += _leaves(value)
        elif kind in SUPPORTED_NODES or isinstance(value, tuple):
            leaves, tree = tree_flatten(value)
            found.append(tree)
            found += leaves
        else:
            found.append(value)
    return found
