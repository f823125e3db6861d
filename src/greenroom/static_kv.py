"""Cached keys and values at fixed addresses while single tokens are decoded, inside transformers' own cache.

A layer of a `DynamicCache` is replaced by one whose keys and values lie in a `StaticKV`, which belongs to the decoder
layer and not to the cache, so that what reads them can be recorded once and repeated. Whoever asks the cache for
`keys` and `values` (a prompt, a crop, a beam) gets plain tensors back, and the layer is an ordinary one again until the
next token.

Room grows with the position, and nothing else: so do the shapes that attention sees, and its bits.
"""

import weakref
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

SMALLEST = 256
"""Positions."""


class NotServedError(AttributeError):
    """A layer wants more of its cache than to put one token into it."""


def room_for(length: int, window: "int | None") -> int:
    """Positions there is room for where one more follows `length`: a power of two, or a ring of `window`."""
    room = max(SMALLEST, 1 << length.bit_length())
    return room if window is None else min(room, window)


def most_room(context: int) -> int:
    """Positions there is room for, at most, in a conversation of `context` tokens."""
    return room_for(max(context - 1, 0), None)


class StaticKV:
    """One decoder layer's keys and values [1, heads, room, dim]; position p is at `p % room`.

    It is what the layer's forward is given as its cache while a token passes: `update` puts the token at `slot` and
    answers with all there is room for, of which the mask shows what there is.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._owner: weakref.ref[StaticLayer] | None = None
        self._keys = self._values = torch.empty(0)
        self.slot = torch.empty(0, dtype=torch.int64)
        """int64 [1], on the device: where the next token goes"""
        self.room = 0
        """positions there is room for"""
        self._address = (0, 0)

    @property
    def address(self) -> "tuple[int, ...]":
        """Where all of it lies, and how much."""
        return self.room, *self._address, self.slot.data_ptr()

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, number: int, *_: Any, **__: Any
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Put one token's keys and values [1, heads, 1, dim]; all of them [1, heads, room, dim]."""
        if number != self._number:
            raise NotServedError(f"it writes into the cache of layer {number}")
        self._keys.index_copy_(2, self.slot, keys)
        self._values.index_copy_(2, self.slot, values)
        return self._keys, self._values

    def __getattr__(self, name: str) -> Any:
        raise NotServedError(f"it asks its cache for {name}")

    def hold(self, layer: "StaticLayer") -> None:
        """Take the layer's keys and values, from whoever held any before.

        Raises torch.OutOfMemoryError; then nothing has changed but that nobody's are held.
        """
        room = room_for(layer.get_seq_length(), layer.window)
        if layer.is_lent_to(self) and self.room == room:
            return
        self.give_back()
        keys, values = layer.take_back()
        assert keys is not None and values is not None
        length = layer.get_seq_length()
        self._keys, self._values = _of_room(self._keys, keys, room), _of_room(self._values, values, room)
        self.room, self._address = room, (self._keys.data_ptr(), self._values.data_ptr())
        places = _places(length, keys.shape[2], room, keys.device)
        self._keys.index_copy_(2, places, keys)
        self._values.index_copy_(2, places, values)
        self._owner = weakref.ref(layer)
        layer.lend(self)

    def holds(self, layer: Any, length: int) -> bool:
        """Whether they are those of a cache's layer, and there is room for the token after `length`."""
        owner = self._owner() if self._owner is not None else None
        return (
            owner is not None
            and owner is layer
            and owner.is_lent_to(self)
            and owner.get_seq_length() == length
            and self.room == room_for(length, owner.window)
            and not getattr(owner, "record_past", False)
        )

    def pair(self, layer: "StaticLayer") -> "tuple[torch.Tensor, torch.Tensor]":
        """Copies of what the layer remembers: keys and values [1, heads, n, dim], in order of their positions."""
        length = layer.lent_length
        held = length if layer.window is None else min(length, layer.window - 1)
        places = _places(length, held, self.room, self._keys.device)
        return self._keys.index_select(2, places), self._values.index_select(2, places)

    def give_back(self) -> None:
        """Nobody's keys and values are held any more."""
        owner, self._owner = self._owner() if self._owner is not None else None, None
        if owner is not None and owner.is_lent_to(self):
            owner.take_back()


def _of_room(known: torch.Tensor, like: torch.Tensor, room: int) -> torch.Tensor:
    """Zeros: what is masked must still be finite."""
    shape = (*like.shape[:2], room, like.shape[3])
    if known.shape == shape and known.dtype == like.dtype:
        return known.zero_()
    with lasting():
        return like.new_zeros(shape)


def lasting() -> "AbstractContextManager[None]":
    """For making memory that is written again and again: tensors made in inference mode cannot be written without."""
    return torch.inference_mode(False)


def _places(length: int, held: int, room: int, on: torch.device) -> torch.Tensor:
    """Where the last `held` of `length` positions lie, int64 [held]."""
    return torch.arange(length - held, length, device=on) % room


class Window(NamedTuple):
    """What a token sees of a layer's keys and values."""

    size: "int | None"
    """positions, itself included; None for all"""
    full: bool
    """whether there are so many"""

    def at(self, length: int) -> "Window":
        """The same after `length` tokens."""
        return Window(self.size, self.size is not None and length + 1 >= self.size)


class StaticLayer:
    """A cache's layer whose `keys` and `values` are a StaticKV's or, after any other use, plain tensors."""

    _holder: "StaticKV | None" = None
    plain: "tuple[torch.Tensor | None, torch.Tensor | None]" = (None, None)
    """what is not lent"""
    lent_length = 0
    """positions that had passed when it was lent, and have been put since"""

    @property
    def keys(self) -> "torch.Tensor | None":
        """[1, heads, n, dim]."""
        return self.take_back()[0]

    @keys.setter
    def keys(self, value: "torch.Tensor | None") -> None:
        self.plain = (value, self.take_back()[1])

    @property
    def values(self) -> "torch.Tensor | None":
        """[1, heads, n, dim]."""
        return self.take_back()[1]

    @values.setter
    def values(self, value: "torch.Tensor | None") -> None:
        self.plain = (self.take_back()[0], value)

    @property
    def window(self) -> "int | None":
        """Positions that a token sees, itself included; None for all."""
        return getattr(self, "sliding_window", None)

    def take_back(self) -> "tuple[torch.Tensor | None, torch.Tensor | None]":
        """Keys and values as plain tensors."""
        if self._holder is not None:
            self.plain, self._holder = self._holder.pair(self), None
        return self.plain

    def lend(self, holder: StaticKV) -> None:
        """Keys and values are the holder's now."""
        self.lent_length = self.get_seq_length()
        self.plain, self._holder = (None, None), holder

    def is_lent_to(self, holder: StaticKV) -> bool:
        """Whether keys and values are this holder's."""
        return self._holder is holder

    def get_seq_length(self) -> int:
        """Positions that have passed."""
        raise NotImplementedError

    def put(self) -> None:
        """One more position has been put into the holder."""
        self.lent_length += 1

    @property
    def ordinary(self) -> bool:
        """Whether it remembers one sequence, and of that what its kind does."""
        keys, values = self.plain
        if self._holder is not None:
            return True
        if keys is None or values is None or keys.ndim != 4 or values.ndim != 4 or keys.shape[0] != 1:
            return False
        length = self.get_seq_length()
        return bool(keys.shape[2] == values.shape[2] == (min(length, self.window - 1) if self.window else length))


class StaticDynamicLayer(StaticLayer, DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """A DynamicLayer that can lend its keys and values."""

    def get_seq_length(self) -> int:
        """Positions that have passed."""
        if self._holder is not None:
            return self.lent_length
        return 0 if self.plain[0] is None else int(self.plain[0].shape[2])


class StaticSlidingLayer(StaticLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A DynamicSlidingWindowLayer that can lend its keys and values."""

    def get_seq_length(self) -> int:
        """Positions that have passed."""
        return int(self.cumulative_length)

    def put(self) -> None:
        """One more position has been put into the holder."""
        super().put()
        self.cumulative_length += 1


_CLASSES: "dict[type, Any]" = {DynamicLayer: StaticDynamicLayer, DynamicSlidingWindowLayer: StaticSlidingLayer}
_GROWING = {*_CLASSES, *_CLASSES.values(), getattr(cache_utils, "DynamicIndexedLayer", DynamicLayer)}


def only_grows(layer: Any) -> bool:
    """Whether a cache's layer changes by replacing what it holds by something longer; others write over a state."""
    return type(layer) in _GROWING


def adopt(cache: Any, number: "int | None") -> "StaticLayer | None":
    """A cache's layer, made one that can lend; None where it is not a plain layer of one sequence."""
    if type(cache) is not DynamicCache or cache.offloading or number is None or number >= len(cache.layers):
        return None
    layer = cache.layers[number]
    if getattr(layer, "record_past", False) or not getattr(layer, "is_initialized", False):
        return None
    if type(layer) in _CLASSES:
        state = dict(vars(layer))
        new = object.__new__(_CLASSES[type(layer)])
        plain = (state.pop("keys"), state.pop("values"))
        new.__dict__.update(state, plain=plain)
        cache.layers[number] = layer = new
    return layer if isinstance(layer, StaticLayer) and layer.ordinary else None


def unfit(cache: Any, number: "int | None") -> str:
    """Why a layer of the cache will never lend, or nothing."""
    layers = getattr(cache, "layers", [])
    if number is None or number >= len(layers) or isinstance(layers[number], (StaticLayer, *_CLASSES)):
        return ""
    return f"its cache is a {type(layers[number]).__name__}"
