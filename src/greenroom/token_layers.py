"""A decoder layer's way with one token, as a function of tensors that stay where they are, so that a device can repeat
it without the host: its keys and values (`static_kv`), what the mask shows of them, and whatever else it is given.

The first token of a length is captured; until room for keys and values grows, memory runs out, or somebody watches the
layer's modules, the others are replays. The layer's own code runs either way, on the same shapes: bits are the same.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import SUPPORTED_NODES, TreeSpec, tree_flatten, tree_map_only

from greenroom.device import Captured, CaptureError, Device
from greenroom.device_runner import AheadCall, DeviceRunner, SentCall, sent_calls, told_by
from greenroom.hooks import forward_hooks
from greenroom.static_kv import NotServedError, StaticKV, StaticLayer, Window, adopt, lasting, unfit

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


@dataclasses.dataclass(frozen=True, slots=True)
class Graph:
    """A layer captured for one token."""

    captured: Captured
    state: "tuple[Any, ...]"
    places: Places
    calls: "list[SentCall]"
    """with the event of no replay"""


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


class TokenLayer:
    """One layer. `reason` says why it is not served this way, `eager` why it is not captured; empty while it is."""

    def __init__(self, layer: nn.Module, device: Device, runner: DeviceRunner, inputs: Inputs, sights: Sights) -> None:
        self._forward, modules = layer.forward, list(layer.modules())
        self._hooks = forward_hooks(layer)
        self._device, self._runner, self._inputs, self._sights = device, runner, inputs, sights
        number: Any = next((module.layer_idx for module in modules if hasattr(module, "layer_idx")), None)
        self._kv, self._number = StaticKV(-1 if number is None else number), number
        self.graph: Graph | None = None
        self.reason = self.eager = ""

    @property
    def room(self) -> int:
        """Positions there is room for."""
        return self._kv.room

    def forget(self) -> None:
        """Capture anew: what was captured reads memory that is no more."""
        self.graph = None

    def token(self, args: "tuple[Any, ...]", kwargs: Arguments) -> "Token | None":
        """One token's way through the layer; None where it is not one, or not served this way."""
        if self.reason or torch.is_grad_enabled():
            return None
        cache = kwargs.get("past_key_values")
        layer = adopt(cache, self._number)
        if layer is None:
            self.eager = self.eager or unfit(cache, self._number)
            return None
        length = layer.get_seq_length()
        if not _fits(length, layer.window, kwargs.get("attention_mask")):
            return None
        self._kv.hold(layer)
        return Token(self, layer, length, args, kwargs)

    def watched(self) -> bool:
        """Whether somebody looks on: hooks of modules and observers of experts run on the host."""
        return self._runner.observer is not None or any(self._hooks)

    def see(self, window: "int | None", length: int, args: "tuple[Any, ...]", kwargs: Arguments) -> Arguments:
        """The layer's arguments after `length` tokens, with keys, values and mask in their places."""
        mask, hidden = kwargs.get("attention_mask"), args[0] if args else kwargs["hidden_states"]
        sight = self._sights.of(self._kv.room, window, mask is not None)
        sight.show(length, mask, hidden)
        self._kv.slot = sight.slot
        return {**kwargs, "past_key_values": self._kv, "attention_mask": sight.mask}

    def run(self, args: "tuple[Any, ...]", kwargs: Arguments) -> Any:
        """The layer's own forward."""
        try:
            return self._forward(*args, **kwargs)
        except NotServedError as error:
            self.reason = str(error)
            raise

    def replay(self, args: "tuple[Any, ...]", kwargs: Arguments) -> "tuple[Any, list[SentCall]] | None":
        """The same as a graph, launched ahead; None where it cannot be one."""
        if self.eager or self.watched():
            return None
        if self.graph is None or self.graph.state != self._state() or not self.graph.places.take(args, kwargs):
            self.graph = None
            try:
                self.graph = self._capture(args, kwargs)
            except CaptureError as error:
                self.eager = str(error)
                return None
        return self._launch(self.graph)

    def repeat(self, args: "tuple[Any, ...]", kwargs: Arguments) -> "tuple[Any, list[SentCall]] | None":
        """`replay` where all but the hidden states is in its place."""
        if self.graph is None:  # given up since
            return self.replay(args, kwargs)
        self.graph.places.leaves[0].take(args[0])
        return self._launch(self.graph)

    def again(self, cache: Any, length: int) -> "StaticLayer | None":
        """The cache's layer, if the token after `length` may repeat the graph."""
        if self._number is None or self._number >= len(cache.layers):
            return None
        layer: StaticLayer = cache.layers[self._number]
        if self.graph is None or not self._kv.holds(layer, length) or self.graph.state != self._state():
            return None
        return layer

    def known(self, places: Places, layer: StaticLayer, length: int, hidden: torch.Tensor) -> "Token":
        """The way of a token that repeats the graph, given `hidden` and else what is in `places`."""
        return KnownToken(self, layer, length, (hidden, *places.args[1:]), places.kwargs)

    def enter(self, args: "tuple[Any, ...]", kwargs: Arguments, position: torch.Tensor, window: Window) -> Any:
        """Within a capture: put what the layer is given where its graph reads it; gives what the graph gives.

        Raises CaptureError where that is something else than the graph was captured with.
        """
        assert self.graph is not None
        mask = kwargs.get("attention_mask")
        sight = self._sights.known(self._kv.room, window.size, mask is not None)
        if sight is None or sight.slot is not self._kv.slot:
            raise CaptureError("masks come and go")
        sight.follow(position, mask, window.full)
        kwargs = {**kwargs, "past_key_values": self._kv, "attention_mask": sight.mask}
        if not args or not self.graph.places.take(args, kwargs):
            raise CaptureError("its layers are given something else")
        return self.graph.captured.result[0]

    def _launch(self, graph: Graph) -> "tuple[Any, list[SentCall]]":
        event, out = graph.captured.replay(), graph.captured.result[0]
        # it was written past torch: a layer that copies it to memory of its own has to see that it is new
        torch.autograd.graph.increment_version(hidden_of(out))
        return out, [SentCall(call, told, shares, event) for call, told, shares, _ in graph.calls]

    def _state(self) -> "tuple[Any, ...]":
        """What a graph depends on beside its arguments."""
        return (torch.is_inference_mode_enabled(), *self._kv.address)

    def _capture(self, args: "tuple[Any, ...]", kwargs: Arguments) -> Graph:
        self._inputs.keep(kwargs["attention_mask"])
        places = Places(self._inputs, args, kwargs)

        def launch() -> "tuple[Any, list[AheadCall]]":
            with self._runner.going(True) as calls:
                return self.run(places.args, places.kwargs), calls

        captured = self._device.capture(launch, lambda result: told_by(result[1]))
        self._inputs.keep(hidden_of(captured.result[0]))
        calls = sent_calls(captured.result[1], captured.back, None)
        return Graph(captured, self._state(), places, calls)


@dataclasses.dataclass(slots=True)
class Token:
    """One token's way through a layer, which may be gone again until `put`."""

    _through: TokenLayer
    _layer: StaticLayer
    _length: int
    """tokens before it"""
    _args: "tuple[Any, ...]"
    _kwargs: Arguments

    @property
    def whole(self) -> bool:
        """Everything can be put back: nothing counts before `put`."""
        return True

    def restore(self) -> bool:
        """Nothing to put back: taken again, a token goes to the same slot."""
        return True

    def __call__(self) -> Any:
        """The layer's own code. Raises NotServedError where that wants more; then nothing has happened."""
        return self._through.run(self._args, self._seen())

    def replay(self) -> "tuple[Any, list[SentCall]] | None":
        """What the layer gives, and its calls for experts, all launched ahead; None where that is not to be had."""
        return self._through.replay(self._args, self._seen())

    def _seen(self) -> Arguments:
        return self._through.see(self._layer.window, self._length, self._args, self._kwargs)

    def put(self) -> None:
        """The token has passed."""
        self._layer.put()


class KnownToken(Token):
    """One whose arguments are where the layer's graph reads them, hidden states apart."""

    __slots__ = ()

    def replay(self) -> "tuple[Any, list[SentCall]] | None":
        """As any token's."""
        return self._through.repeat(self._args, self._kwargs)

    def _seen(self) -> Arguments:
        return self._kwargs


def hidden_of(out: Any) -> torch.Tensor:
    """The hidden states among what a layer gives."""
    found: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _fits(length: int, window: "int | None", mask: Any) -> bool:
    """Whether a mask shows what a layer remembers after `length` tokens, and the token."""
    if mask is None:
        return True
    seen = length + 1 if window is None else min(length + 1, window)
    return isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[0] == 1 and mask.shape[2:] == (1, seen)
