"""A decoder layer's way with one token, as a function of tensors that stay where they are, so that a device can repeat
it without the host: its keys and values (`static_kv`), what the mask shows of them, and whatever else it is given.

The first token of a length is captured; until room for keys and values grows, memory runs out, or somebody watches the
layer's modules, the others are replays. The layer's own code runs either way, on the same shapes: bits are the same.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

from greenroom.device import Captured, CaptureError, Device
from greenroom.device_runner import AheadCall, DeviceRunner, SentCall, sent_calls, told_by
from greenroom.hooks import Hooks
from greenroom.static_kv import NotServedError, StaticKV, StaticLayer, Window, adopt, unfit
from greenroom.token_inputs import Arguments, Inputs, Places, Sights


@dataclasses.dataclass(frozen=True, slots=True)
class Graph:
    """A layer captured for one token."""

    captured: Captured
    state: "tuple[Any, ...]"
    places: Places
    calls: "list[SentCall]"
    """with the event of no replay"""


class TokenLayer:
    """One layer. `reason` says why it is not served this way, `eager` why it is not captured; empty while it is."""

    def __init__(self, layer: nn.Module, device: Device, runner: DeviceRunner, inputs: Inputs, sights: Sights) -> None:
        self._forward, modules = layer.forward, list(layer.modules())
        self._hooks = Hooks(layer)
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
        self._hooks.renew()

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
        return self._runner.observer is not None or bool(self._hooks)

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
