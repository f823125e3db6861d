"""Cached keys and values as the compiled attention reads them, inside transformers' own cache.

A layer of a `DynamicCache` is replaced by one that holds float16 in the compiled layout. Whatever else asks for its
`keys` and `values` gets tensors of the model's dtype back, and the layer is an ordinary one again until the next
compiled step: generation, cropping and beam search keep their semantics because their code is transformers'.
"""

import math
from typing import Any, Protocol

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from greenroom.buffers import allocate
from greenroom.kernels import native

_MIN_CAPACITY = 256
"""Positions."""


class Layout(Protocol):
    """Between transformers' (keys, values) [1, heads, n, dim] and the compiled pair [heads, n, key_dim], [heads, n,
    value_dim]."""

    def empty(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """The compiled pair of no positions, in float32."""
        ...

    def to_pair(self, keys: torch.Tensor, values: torch.Tensor) -> "tuple[torch.Tensor, torch.Tensor]":
        """What the compiled attention calls keys and values."""
        ...

    def from_pair(self, keys: torch.Tensor, values: torch.Tensor) -> "tuple[torch.Tensor, torch.Tensor]":
        """What transformers calls them."""
        ...


def _nothing(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


class Grouped:
    """Grouped-query attention: both call the same things keys and values."""

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        self._shape = (kv_heads, 0, head_dim)

    def empty(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """The compiled pair of no positions."""
        return _nothing(*self._shape), _nothing(*self._shape)

    def to_pair(self, keys: torch.Tensor, values: torch.Tensor) -> "tuple[torch.Tensor, torch.Tensor]":
        """Without the batch."""
        return keys[0], values[0]

    def from_pair(self, keys: torch.Tensor, values: torch.Tensor) -> "tuple[torch.Tensor, torch.Tensor]":
        """With a batch of one."""
        return keys[None], values[None]


class Latent:
    """Multi-head latent attention: transformers caches (latent, rotated key); the compiled keys are both, one after the
    other, its values the latent."""

    def __init__(self, latent_dim: int, rotary_dim: int) -> None:
        self._latent_dim, self._key_dim = latent_dim, latent_dim + rotary_dim

    def empty(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """The compiled pair of no positions."""
        return _nothing(1, 0, self._key_dim), _nothing(1, 0, self._latent_dim)

    def to_pair(self, keys: torch.Tensor, values: torch.Tensor) -> "tuple[torch.Tensor, torch.Tensor]":
        """([1, n, latent + rotated], [1, n, latent])."""
        return torch.cat((keys[0], values[0]), dim=-1), keys[0]

    def from_pair(self, keys: torch.Tensor, values: torch.Tensor) -> "tuple[torch.Tensor, torch.Tensor]":
        """([1, 1, n, latent], [1, 1, n, rotated])."""
        return values[None], keys[None, ..., values.shape[-1] :]


class HalfKV:
    """Keys [heads, blocks, key_dim, BLOCK] and values [heads, capacity, value_dim] in float16, grown as needed.

    `length` positions are held, the ones from `first` on are visible to the next token; with `forget` the others may
    go.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, window: "int | None", forget: bool) -> None:
        """From keys [heads, n, key_dim] and values [heads, n, value_dim]."""
        self.window, self.length, self._forget = window, 0, forget
        self._keys = torch.empty(keys.shape[0], 0, keys.shape[2], native.BLOCK, dtype=torch.float16)
        self._values = torch.empty(values.shape[0], 0, values.shape[2], dtype=torch.float16)
        self._hold(keys, values)

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self._values.shape[1]

    @property
    def first(self) -> int:
        """The first position that the next token sees; a window counts the token itself."""
        return 0 if self.window is None else max(self.length + 1 - self.window, 0)

    def addresses(self) -> "tuple[int, int]":
        """Of keys and values, with room for one more position."""
        if self.length == self.capacity:
            self._hold(*self.pair())
        return self._keys.data_ptr(), self._values.data_ptr()

    def pair(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """Keys [heads, n, key_dim] and values [heads, n, value_dim] in float16: all that is remembered."""
        remembered = slice(self.first if self._forget else 0, self.length)
        return self._keys.transpose(2, 3).flatten(1, 2)[:, remembered], self._values[:, remembered]

    def _hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        heads, length, key_dim = keys.shape
        blocks = -(-max(_MIN_CAPACITY, length + length // 2 + 1) // native.BLOCK)
        all_keys = _halves(heads, blocks, key_dim, native.BLOCK)
        all_values = _halves(heads, blocks * native.BLOCK, values.shape[2])
        largest = torch.finfo(torch.float16).max
        by_position = all_keys.transpose(2, 3)
        full = length // native.BLOCK
        clamped = keys.clamp(-largest, largest)
        by_position[:, :full] = (
            clamped[:, : full * native.BLOCK].reshape(heads, full, native.BLOCK, key_dim) if full else 0
        )
        by_position[:, full, : length - full * native.BLOCK] = clamped[:, full * native.BLOCK :]
        all_values[:, :length] = values.clamp(-largest, largest)
        # together and last: whoever is interrupted before, by a key or for lack of memory, keeps what there was
        self._keys, self._values, self.length = all_keys, all_values, length


def _halves(*shape: int) -> torch.Tensor:
    return allocate(2 * math.prod(shape)).view(torch.float16).view(shape)


class _HalfLayer:
    """`keys` and `values` of a cache layer as properties over a HalfKV or, after any other use, over plain tensors."""

    _half: "HalfKV | None" = None
    _plain: "tuple[torch.Tensor | None, torch.Tensor | None]" = (None, None)
    _layout: Layout
    dtype: torch.dtype
    is_sliding: bool

    @property
    def keys(self) -> "torch.Tensor | None":
        """[1, heads, n, dim] in the model's dtype."""
        return self._tensors()[0]

    @keys.setter
    def keys(self, value: "torch.Tensor | None") -> None:
        self._plain = (value, self._tensors()[1])

    @property
    def values(self) -> "torch.Tensor | None":
        """[1, heads, n, dim] in the model's dtype."""
        return self._tensors()[1]

    @values.setter
    def values(self, value: "torch.Tensor | None") -> None:
        self._plain = (self._tensors()[0], value)

    def _tensors(self) -> "tuple[torch.Tensor | None, torch.Tensor | None]":
        if self._half is not None:
            keys, values = self._layout.from_pair(*self._half.pair())
            self._plain, self._half = (keys.to(self.dtype), values.to(self.dtype)), None
        return self._plain

    def half(self, window: "int | None") -> "HalfKV | None":
        """The layer in float16, or None where it holds nothing or more than one sequence."""
        if self._half is None:
            keys, values = self._plain
            if keys is None or values is None or keys.ndim != 4 or keys.shape[0] != 1:
                return None
            self._half = HalfKV(*self._layout.to_pair(keys, values), window, forget=self.is_sliding)
            self._plain = (None, None)
        return self._half


class HalfDynamicLayer(_HalfLayer, DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """A DynamicLayer that can hold float16 in the compiled layout."""

    def get_seq_length(self) -> int:
        """Positions held."""
        return int(super().get_seq_length()) if self._half is None else self._half.length

    def put(self) -> None:
        """The compiled step has put one more position."""
        assert self._half is not None
        self._half.length += 1


class HalfSlidingLayer(_HalfLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A DynamicSlidingWindowLayer that can hold float16 in the compiled layout."""

    def put(self) -> None:
        """The compiled step has put one more position."""
        assert self._half is not None
        self._half.length += 1
        self.cumulative_length += 1


HalfLayer = HalfDynamicLayer | HalfSlidingLayer
_CLASSES: "dict[type, Any]" = {DynamicLayer: HalfDynamicLayer, DynamicSlidingWindowLayer: HalfSlidingLayer}


def is_plain(cache: Any) -> bool:
    """Whether `cache` is one of keys and values alone, of at most one sequence."""
    if type(cache) is not DynamicCache or cache.offloading:
        return False
    known = all(type(layer) in _CLASSES or isinstance(layer, _HalfLayer) for layer in cache.layers)
    return known and all(not layer.is_initialized or layer.keys.shape[0] == 1 for layer in cache.layers)


def adopt(cache: Any, layouts: "list[Layout]") -> "list[HalfLayer] | None":
    """The layers of `cache`, each made one that holds float16; None where it is not a plain cache of one sequence."""
    if type(cache) is not DynamicCache or cache.offloading or len(cache.layers) != len(layouts):
        return None
    if any(getattr(layer, "record_past", False) for layer in cache.layers):
        return None
    if all(isinstance(layer, _HalfLayer) for layer in cache.layers):
        return list(cache.layers)
    if any(type(layer) not in _CLASSES or not layer.is_initialized for layer in cache.layers):
        return None
    for index, (layer, layout) in enumerate(zip(cache.layers, layouts, strict=True)):
        state = dict(vars(layer))
        plain = (state.pop("keys"), state.pop("values"))
        if plain[0].ndim != 4 or plain[0].shape[0] != 1:
            return None
        new = object.__new__(_CLASSES[type(layer)])
        new.__dict__.update(state, _plain=plain, _layout=layout)
        cache.layers[index] = new
    return list(cache.layers)
