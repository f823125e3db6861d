"""Cached keys and values as the compiled attention reads them, inside transformers' own cache.

A layer of a `DynamicCache` is replaced by one that holds 16 or 8 bits in the compiled layout, whoever computes: what
the modules add to one sequence is rounded, too. Whatever else asks for its `keys` and `values` gets tensors of the
model's dtype back, and the layer is an ordinary one again until the next compiled step: generation and beam search keep
their semantics because their code is transformers'.
"""

import math
from typing import Any, Protocol

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from greenroom.decode.blocks import Blocks

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


class CompiledKV:
    """Keys and values of one sequence in `bits` bits, 16 or 8, grown as needed.

    `length` positions are held, the ones from `first` on are visible to the next token; with `forget` the others may
    go. What there is room for beyond `length` takes no memory.
    """

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, window: "int | None", forget: bool, bits: int = 16
    ) -> None:
        """From keys [heads, n, key_dim] and values [heads, n, value_dim]."""
        self.window, self._forget = window, forget
        heads, length, _ = keys.shape
        self._pair = tuple(
            Blocks(heads, length, x.shape[2], bits, across) for x, across in ((keys, True), (values, False))
        )
        self._put(0, keys, values)
        self.length = length

    @property
    def first(self) -> int:
        """The first position that the next token sees; a window counts the token itself."""
        return 0 if self.window is None else max(self.length + 1 - self.window, 0)

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self._pair[0].capacity

    @property
    def _remembered(self) -> int:
        """The first position that has to be kept."""
        return self.first if self._forget else 0

    def place(self, more: int = 1) -> "tuple[int, int, int, int]":
        """Addresses of keys and values, positions there is room for, `more` of them not held yet, and bits."""
        if self.length + more > self.capacity:
            self._grow(more)
        keys, values = self._pair
        return keys.address, values.address, keys.capacity, keys.bits

    def pair(self, first: "int | None" = None) -> "tuple[torch.Tensor, torch.Tensor]":
        """Keys [heads, n, key_dim] and values [heads, n, value_dim], in float16 or of 8 bits in float32: all that is
        remembered, or all from `first` on."""
        first = self._remembered if first is None else first
        keys, values = (its.get(first, self.length) for its in self._pair)
        return keys, values

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> "tuple[torch.Tensor, torch.Tensor]":
        """Put keys [heads, n, key_dim] and values [heads, n, value_dim] behind those before; gives what is visible to
        the first of them and after, as `pair` does."""
        self.place(keys.shape[1])
        first = self._remembered
        self._put(self.length, keys, values)
        self.length += keys.shape[1]
        return self.pair(first)

    def _put(self, start: int, *pair: torch.Tensor) -> None:
        for its, x in zip(self._pair, pair, strict=True):
            its.put(start, x)

    def _grow(self, more: int) -> None:
        """Room for `more` positions behind what is remembered."""
        first = self._remembered
        length = self.length - first
        pair = tuple(its.moved(first, self.length, length + max(length // 2, more)) for its in self._pair)
        # together and last: whoever is interrupted before, by a key or for lack of memory, keeps what there was
        self._pair, self.length = pair, length


class _CompiledLayer:
    """`keys` and `values` of a cache layer as properties over a CompiledKV or, after any other use, plain tensors."""

    _kv: "CompiledKV | None" = None
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
        if self._kv is not None:
            plain = _EMPTY, _EMPTY  # of no sequence yet, so that any number may follow
            if self._kv.length:
                plain = self._as_transformers(self._kv.pair())
            self._plain, self._kv = plain, None
        return self._plain

    def _as_transformers(self, pair: "tuple[torch.Tensor, torch.Tensor]") -> "tuple[torch.Tensor, torch.Tensor]":
        keys, values = self._layout.from_pair(*pair)
        return keys.to(self.dtype), values.to(self.dtype)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """As the layer that this stands in for, but for what is rounded: the modules put more positions."""
        learns = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if self._kv is None or learns or key_states.shape[0] != 1 or getattr(self, "record_past", False):
            updated: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
            return updated
        visible = self._kv.append(*self._layout.to_pair(key_states, value_states))
        self._count(key_states.shape[2])
        return self._as_transformers(visible)

    def crop(self, tokens_to_remove: int) -> None:
        """As the layer that this stands in for: forget the last −`tokens_to_remove` positions."""
        window = self.sliding_window if self.is_sliding else math.inf
        if self._kv is None or tokens_to_remove > 0 or self.get_seq_length() >= window:  # type: ignore[attr-defined]
            super().crop(tokens_to_remove)  # type: ignore[misc]
            return
        count = min(-tokens_to_remove, self._kv.length)
        self._kv.length -= count
        self._count(-count)

    def _count(self, more: int) -> None:
        """`more` positions were put."""

    def put(self, count: int = 1) -> None:
        """The compiled step has put `count` more positions."""
        assert self._kv is not None
        self._kv.length += count
        self._count(count)

    def compiled(self, window: "int | None", bits: int) -> CompiledKV:
        """The layer in the compiled layout; to be called where it holds at most one sequence."""
        if self._kv is None:
            keys, values = self._plain
            if keys is None or values is None or not keys.numel():
                self.dtype, self.device, self.is_initialized = torch.float32, torch.device("cpu"), True
                pair = self._layout.empty()
            else:
                pair = self._layout.to_pair(keys, values)
            self._kv = CompiledKV(*pair, window, forget=self.is_sliding, bits=bits)
            self._plain = (None, None)
        return self._kv

    @property
    def is_of_one(self) -> bool:
        """Whether it holds one sequence, or nothing yet."""
        return self._kv is not None or _is_of_one(self._plain[0])


class CompiledDynamicLayer(_CompiledLayer, DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """A DynamicLayer that can hold the compiled layout."""

    def get_seq_length(self) -> int:
        """Positions held."""
        return int(super().get_seq_length()) if self._kv is None else self._kv.length


class CompiledSlidingLayer(_CompiledLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A DynamicSlidingWindowLayer that can hold the compiled layout."""

    def _count(self, more: int) -> None:
        self.cumulative_length += more


CompiledLayer = CompiledDynamicLayer | CompiledSlidingLayer
_CLASSES: "dict[type, Any]" = {DynamicLayer: CompiledDynamicLayer, DynamicSlidingWindowLayer: CompiledSlidingLayer}


def adopt(
    cache: Any, layouts: "list[Layout]", windows: "list[int | None]", bits: int = 16
) -> "list[tuple[CompiledLayer, CompiledKV]] | None":
    """The layers of `cache`, each made one that holds `bits` bits in the compiled layout, and what they hold; None
    where it is not a plain cache of at most one sequence, or somebody was interrupted between its layers."""
    if type(cache) is not DynamicCache or cache.offloading:
        return None
    while len(cache.layers) < len(layouts) and cache.layer_class_to_replicate in _CLASSES:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) != len(layouts) or not all(map(_is_plain, cache.layers)):
        return None
    if len({layer.get_seq_length() for layer in cache.layers}) > 1:
        return None
    for index, (layer, layout) in enumerate(zip(cache.layers, layouts, strict=True)):
        if not isinstance(layer, _CompiledLayer):
            cache.layers[index] = _compiled_layer(layer, layout)
    return [(layer, layer.compiled(window, bits)) for layer, window in zip(cache.layers, windows, strict=True)]


def _is_plain(layer: Any) -> bool:
    """Whether it holds keys and values alone, of at most one sequence, and forgets what it may."""
    if getattr(layer, "record_past", False):
        return False
    return layer.is_of_one if isinstance(layer, _CompiledLayer) else type(layer) in _CLASSES and _is_of_one(layer.keys)


def _is_of_one(keys: "torch.Tensor | None") -> bool:
    return keys is None or keys.numel() == 0 or (keys.ndim == 4 and keys.shape[0] == 1)


def _compiled_layer(layer: Any, layout: Layout) -> CompiledLayer:
    state = dict(vars(layer))
    plain = (state.pop("keys"), state.pop("values"))
    new: CompiledLayer = object.__new__(_CLASSES[type(layer)])
    new.__dict__.update(state, _plain=plain, _layout=layout)
    return new
