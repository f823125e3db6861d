"""Cached keys and values as the compiled attention reads them, inside transformers' own cache.

A layer of a `DynamicCache` is replaced by one that holds float16 in the compiled layout, whoever computes: what the
modules add to one sequence is rounded, too. Whatever else asks for its `keys` and `values` gets tensors of the model's
dtype back, and the layer is an ordinary one again until the next compiled step: generation and beam search keep their
semantics because their code is transformers'.
"""

import math
from typing import Any, Protocol

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from greenroom.buffers import allocate
from greenroom.kernels import native
from greenroom.static_kv import lasting

_MIN_CAPACITY = 256
"""Positions."""
_EMPTY = torch.empty(0, dtype=torch.float32, device="cpu")


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
    go. What there is room for beyond `length` takes no memory.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, window: "int | None", forget: bool) -> None:
        """From keys [heads, n, key_dim] and values [heads, n, value_dim]."""
        self.window, self._forget = window, forget
        heads, length, key_dim = keys.shape
        self._keys, self._values = _room(heads, length, key_dim, values.shape[2])
        _put(self._keys, self._values, 0, keys, values)
        self.length = length

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self._values.shape[1]

    @property
    def first(self) -> int:
        """The first position that the next token sees; a window counts the token itself."""
        return 0 if self.window is None else max(self.length + 1 - self.window, 0)

    @property
    def _remembered(self) -> int:
        """The first position that has to be kept."""
        return self.first if self._forget else 0

    def addresses(self, more: int = 1) -> "tuple[int, int]":
        """Of keys and values, with room for `more` positions."""
        if self.length + more > self.capacity:
            self._grow(more)
        return self._keys.data_ptr(), self._values.data_ptr()

    def pair(self, first: "int | None" = None) -> "tuple[torch.Tensor, torch.Tensor]":
        """Keys [heads, n, key_dim] and values [heads, n, value_dim] in float16: all that is remembered, or all from
        `first` on."""
        first = self._remembered if first is None else first
        used = self._keys[:, : -(-self.length // native.BLOCK)]
        return used.transpose(2, 3).flatten(1, 2)[:, first : self.length], self._values[:, first : self.length]

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> "tuple[torch.Tensor, torch.Tensor]":
        """Put keys [heads, n, key_dim] and values [heads, n, value_dim] behind those before; gives what is visible to
        the first of them and after, as `pair` does."""
        self.addresses(keys.shape[1])
        first = self._remembered
        _put(self._keys, self._values, self.length, keys, values)
        self.length += keys.shape[1]
        return self.pair(first)

    def _grow(self, more: int) -> None:
        """Room for `more` positions behind what is remembered."""
        first = self._remembered
        length = self.length - first
        all_keys, all_values = _room(
            self._keys.shape[0], length + max(length // 2, more), self._keys.shape[2], self._values.shape[2]
        )
        if first:
            _put(all_keys, all_values, 0, *self.pair())
        else:  # as they lie: a copy in between would be as large as all of them
            blocks = -(-length // native.BLOCK)
            all_keys[:, :blocks] = self._keys[:, :blocks]
            all_values[:, :length] = self._values[:, :length]
        # together and last: whoever is interrupted before, by a key or for lack of memory, keeps what there was
        self._keys, self._values, self.length = all_keys, all_values, length


def _room(heads: int, positions: int, key_dim: int, value_dim: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Keys and values of at least so many positions, all 0."""
    blocks = -(-max(_MIN_CAPACITY, positions) // native.BLOCK)
    return _halves(heads, blocks, key_dim, native.BLOCK), _halves(heads, blocks * native.BLOCK, value_dim)


def _put(
    all_keys: torch.Tensor, all_values: torch.Tensor, start: int, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Keys and values from position `start` on, rounded to float16, what is larger to its largest number."""
    largest = torch.finfo(torch.float16).max
    positions = torch.arange(start, start + keys.shape[1])
    blocks, lanes = positions // native.BLOCK, positions % native.BLOCK
    all_keys.transpose(2, 3)[:, blocks, lanes] = keys.clamp(-largest, largest).to(torch.float16)
    all_values[:, positions] = values.clamp(-largest, largest).to(torch.float16)


def _halves(*shape: int) -> torch.Tensor:
    with lasting():
        return allocate(2 * math.prod(shape), huge=False).view(torch.float16).view(shape)


class _HalfLayer:
    """`keys` and `values` of a cache layer as properties over a HalfKV or, after any other use, over plain tensors."""

    _half: "HalfKV | None" = None
    _plain: "tuple[torch.Tensor | None, torch.Tensor | None]" = (None, None)
    _layout: Layout
    dtype: torch.dtype
    device: torch.device
    is_initialized: bool
    is_sliding: bool
    sliding_window: int

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
            plain = _EMPTY, _EMPTY  # of no sequence yet, so that any number may follow
            if self._half.length:
                plain = self._as_transformers(self._half.pair())
            self._plain, self._half = plain, None
        return self._plain

    def _as_transformers(self, pair: "tuple[torch.Tensor, torch.Tensor]") -> "tuple[torch.Tensor, torch.Tensor]":
        keys, values = self._layout.from_pair(*pair)
        return keys.to(self.dtype), values.to(self.dtype)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """As the layer that this stands in for, but for what is rounded: the modules put more positions."""
        learns = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if self._half is None or learns or key_states.shape[0] != 1 or getattr(self, "record_past", False):
            updated: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
            return updated
        visible = self._half.append(*self._layout.to_pair(key_states, value_states))
        self._count(key_states.shape[2])
        return self._as_transformers(visible)

    def crop(self, tokens_to_remove: int) -> None:
        """As the layer that this stands in for: forget the last −`tokens_to_remove` positions."""
        window = self.sliding_window if self.is_sliding else math.inf
        if self._half is None or tokens_to_remove > 0 or self.get_seq_length() >= window:  # type: ignore[attr-defined]
            super().crop(tokens_to_remove)  # type: ignore[misc]
            return
        count = min(-tokens_to_remove, self._half.length)
        self._half.length -= count
        self._count(-count)

    def _count(self, more: int) -> None:
        """`more` positions were put."""

    def put(self, count: int = 1) -> None:
        """The compiled step has put `count` more positions."""
        assert self._half is not None
        self._half.length += count
        self._count(count)

    def half(self, window: "int | None") -> HalfKV:
        """The layer in float16; to be called where it holds at most one sequence."""
        if self._half is None:
            keys, values = self._plain
            if keys is None or values is None or not keys.numel():
                self.dtype, self.device, self.is_initialized = torch.float32, torch.device("cpu"), True
                pair = self._layout.empty()
            else:
                pair = self._layout.to_pair(keys, values)
            self._half = HalfKV(*pair, window, forget=self.is_sliding)
            self._plain = (None, None)
        return self._half

    @property
    def is_of_one(self) -> bool:
        """Whether it holds one sequence, or nothing yet."""
        return self._half is not None or _is_of_one(self._plain[0])


class HalfDynamicLayer(_HalfLayer, DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """A DynamicLayer that can hold float16 in the compiled layout."""

    def get_seq_length(self) -> int:
        """Positions held."""
        return int(super().get_seq_length()) if self._half is None else self._half.length


class HalfSlidingLayer(_HalfLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A DynamicSlidingWindowLayer that can hold float16 in the compiled layout."""

    def _count(self, more: int) -> None:
        self.cumulative_length += more


HalfLayer = HalfDynamicLayer | HalfSlidingLayer
_CLASSES: "dict[type, Any]" = {DynamicLayer: HalfDynamicLayer, DynamicSlidingWindowLayer: HalfSlidingLayer}


def adopt(cache: Any, layouts: "list[Layout]", windows: "list[int | None]") -> "list[tuple[HalfLayer, HalfKV]] | None":
    """The layers of `cache`, each made one that holds float16, and what they hold; None where it is not a plain cache
    of at most one sequence, or somebody was interrupted between its layers."""
    if type(cache) is not DynamicCache or cache.offloading:
        return None
    while len(cache.layers) < len(layouts) and cache.layer_class_to_replicate in _CLASSES:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) != len(layouts) or not all(map(_is_plain, cache.layers)):
        return None
    if len({layer.get_seq_length() for layer in cache.layers}) > 1:
        return None
    for index, (layer, layout) in enumerate(zip(cache.layers, layouts, strict=True)):
        if not isinstance(layer, _HalfLayer):
            cache.layers[index] = _half_layer(layer, layout)
    return [(layer, layer.half(window)) for layer, window in zip(cache.layers, windows, strict=True)]


def _is_plain(layer: Any) -> bool:
    """Whether it holds keys and values alone, of at most one sequence, and forgets what it may."""
    if getattr(layer, "record_past", False):
        return False
    return layer.is_of_one if isinstance(layer, _HalfLayer) else type(layer) in _CLASSES and _is_of_one(layer.keys)


def _is_of_one(keys: "torch.Tensor | None") -> bool:
    return keys is None or keys.numel() == 0 or (keys.ndim == 4 and keys.shape[0] == 1)


def _half_layer(layer: Any, layout: Layout) -> HalfLayer:
    state = dict(vars(layer))
    plain = (state.pop("keys"), state.pop("values"))
    new: HalfLayer = object.__new__(_CLASSES[type(layer)])
    new.__dict__.update(state, _plain=plain, _layout=layout)
    return new
