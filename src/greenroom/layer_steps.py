"""Decoder layers as steps that may be taken again, because what a layer has changed can be put back.

So a device that runs out of memory in the middle of a token loses slots, not the answer. And a layer may be launched
before it is known whether all its experts are there: the host looks one layer later, and where something was missing
that layer and the one after are taken again. What is launched ahead is captured, where it can be (`token_layers`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from greenroom.device import Device
from greenroom.device_runner import DeviceRunner, SentCall
from greenroom.static_kv import NotServedError, StaticLayer, Window, only_grows
from greenroom.token_inputs import Arguments, Inputs, Sights
from greenroom.token_layers import Graph, Token, TokenLayer, hidden_of

_STEADY = 0.95
"""The share of layers that found all their experts, from which on layers are launched ahead: where they are not
captured, taking two layers again costs the host twenty times what a read-back does."""
_STEADY_AS_GRAPHS = 0.6
"""The same for layers that are captured: launching one costs a tenth, and only the one that lacked an expert is taken
again by the host."""
_WEIGHT = 1 / 256
"""Of the latest layer in that share."""


@dataclasses.dataclass(slots=True)
class _Launched:
    """A layer that has been launched, and the calls for experts that wait to be settled."""

    way: "_Plain | Token"
    out: Any
    calls: "list[SentCall]"


class LayerSteps:
    """Takes the place of the forward of `layers`, in the order in which a token passes them.

    `shrink` frees device memory, and raises where it has no more to give.
    """

    def __init__(
        self, layers: "list[nn.Module]", runner: DeviceRunner, device: Device, shrink: "Callable[[], None]"
    ) -> None:
        self.layers, self._runner, self._shrink = layers, runner, shrink
        self._count = len(layers)
        self._inputs, self._sights = Inputs(), Sights(device.place)
        self._tokens = [TokenLayer(layer, device, runner, self._inputs, self._sights) for layer in layers]
        self._previous: _Launched | None = None
        self._last_out: Any = None
        self._chained, self._passes_on = -1, False
        """of the layers of a token, those that got what the layer before gave; whether in the last token all did"""
        self._steady, self._wanted = 0.0, False
        self.ahead: bool | None = None
        """whether layers are launched ahead; None decides by the share that found all their experts"""
        self.graphs = True
        """whether what is launched ahead is captured"""
        self.launched = self.replayed = 0
        """layers launched ahead that need not be taken again; layers launched as graphs"""
        for number, layer in enumerate(layers):
            layer.forward = self._step(number, layer)

    def __str__(self) -> str:
        """For people: how single tokens pass the layers, and why not otherwise."""
        if not self.replayed:
            reasons = {token.eager or token.reason for token in self._tokens} - {""}
            return f"no graphs: {min(reasons)}" if reasons else ""
        eager = [f"layer {n}: {t.eager or t.reason}" for n, t in enumerate(self._tokens) if t.eager or t.reason]
        return f"{self.replayed} layers as graphs" + (f"; not {'; '.join(eager[:2])}" if eager else "")

    def _step(self, number: int, layer: nn.Module) -> "Callable[..., Any]":
        forward = layer.forward
        cached: Any = next((module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")), None)

        def step(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if number == 0:
                self._begin()
            else:
                self._chained += hidden is hidden_of(self._last_out)
            try:
                launched = self._advance(
                    number, hidden, self._token(number, hidden, args, kwargs) or plain(args, kwargs)
                )
            except NotServedError:
                launched = self._advance(number, hidden, plain(args, kwargs))
            self._last_out = launched.out
            return launched.out

        def plain(args: "tuple[Any, ...]", kwargs: "dict[str, Any]") -> _Plain:
            return _Plain(lambda: forward(*args, **kwargs), kwargs.get("past_key_values"), cached)

        return step

    def _begin(self) -> None:
        """Another token, or a prompt, enters the first layer."""
        self._passes_on, self._chained, self._previous = self._chained == self._count - 1, 0, None
        self._wanted = self._steady > self._threshold() if self.ahead is None else self.ahead

    def _token(self, number: int, hidden: Any, args: "tuple[Any, ...]", kwargs: "dict[str, Any]") -> "Token | None":
        """The way of a single token, in less memory if there is none left for its keys and values."""
        while _is_token(hidden):
            try:
                return self._tokens[number].token(args, kwargs)
            except torch.OutOfMemoryError:
                pass
            self._free()
        return None

    def _advance(self, number: int, hidden: Any, way: "_Plain | Token") -> _Launched:
        """Take a layer, ahead or not, and settle what was launched before."""
        ahead = self._goes_ahead(number, hidden, way)
        if self._previous is not None and not ahead:  # this layer cannot be taken again: what it gets has to be right
            self._settle(self._previous)
            self._previous = None
        before = self._runner.metrics.misses
        launched = self._take(way, ahead)
        if ahead:
            launched = self._settle_previous(launched)
            self._previous = launched
            if number == self._count - 1:
                self._settle(launched)
                self._previous = None
        elif isinstance(way, Token) or _is_token(hidden):
            self._steady += ((self._runner.metrics.misses == before) - self._steady) * _WEIGHT
        if isinstance(way, Token):
            way.put()
        return launched

    def _goes_ahead(self, number: int, hidden: Any, way: "_Plain | Token") -> bool:
        """Whether to launch without waiting: one token, and layers that hand on their outputs as they are."""
        if number > 0 and self._previous is None:
            return False  # a token goes one way as a whole
        if not self._wanted or not self._passes_on or not self._runner.may_go_ahead or torch.is_grad_enabled():
            return False
        return way.whole and (isinstance(way, Token) or _is_token(hidden))

    def _threshold(self) -> float:
        captured = self.graphs and not any(token.reason or token.eager for token in self._tokens)
        return _STEADY_AS_GRAPHS if captured else _STEADY

    def _take(self, way: "_Plain | Token", ahead: bool) -> _Launched:
        """Run a layer, in less memory if there is none left."""
        while True:
            try:
                return self._launch(way, ahead)
            except torch.OutOfMemoryError:
                if not way.restore():
                    raise
            self._free()  # out of the handler: the failed frames and their tensors are gone

    def _launch(self, way: "_Plain | Token", ahead: bool) -> _Launched:
        if ahead and self.graphs and isinstance(way, Token):
            replayed = way.replay()
            if replayed is not None:
                self.replayed += 1
                return _Launched(way, *replayed)
        with self._runner.going(ahead) as calls:
            out = way()
        return _Launched(way, out, self._runner.send(calls))

    # --- tokens that repeat all layers' graphs: what those are given is put in its place by somebody else

    @property
    def observed(self) -> bool:
        """Whether somebody looks at the calls for experts."""
        return self._runner.observer is not None

    @property
    def captured(self) -> "list[Graph | None]":
        """Each layer's graph, or None."""
        return [token.graph for token in self._tokens]

    @property
    def rooms(self) -> "list[int]":
        """Positions that each layer has room for."""
        return [token.room for token in self._tokens]

    @property
    def last(self) -> torch.Tensor:
        """Where the last layer's graph leaves its hidden states."""
        graph = self._tokens[-1].graph
        assert graph is not None
        return hidden_of(graph.captured.result[0])

    def given(self) -> "list[torch.Tensor]":
        """Memory that graphs read."""
        return self._inputs.memory() + self._sights.memory()

    def forget_given(self) -> None:
        """Somebody else writes what graphs read: copy anew what layers are given."""
        self._inputs.forget()
        self._sights.forget()

    def enter(
        self, number: int, args: "tuple[Any, ...]", kwargs: Arguments, position: torch.Tensor, window: Window
    ) -> Any:
        """See `TokenLayer.enter`."""
        return self._tokens[number].enter(args, kwargs, position, window)

    def again(self, cache: DynamicCache, length: int) -> "list[StaticLayer] | None":
        """The cache's layers, if the token after `length` may repeat all graphs."""
        found = []
        for token in self._tokens:
            layer = token.again(cache, length)
            if layer is None:
                return None
            found.append(layer)
        return found

    def repeat(self, layers: "Sequence[StaticLayer]", length: int) -> torch.Tensor:
        """What the last layer gives for the token after `length`; at `last`, if no graph had to be given up."""
        self._begin()
        places = [graph.places for graph in self.captured if graph is not None]
        hidden: torch.Tensor = places[0].args[0]
        for number, token in enumerate(self._tokens):
            way = token.known(places[number], layers[number], length, hidden)
            hidden = hidden_of(self._advance(number, hidden, way).out)
        self._chained = self._count - 1
        return hidden

    def forget(self) -> None:
        """Give up what was captured: it reads slots that are no more."""
        for token in self._tokens:
            token.forget()
        self._inputs.clear()

    def _free(self) -> None:
        """Give up slots, and what was captured over them."""
        self.forget()
        self._shrink()

    def _settle_previous(self, launched: _Launched) -> _Launched:
        """The layer just launched, taken again if the one before had to be."""
        if self._previous is None or self._settle(self._previous):
            return launched
        launched.way.restore()
        return self._take(launched.way, ahead=True)

    def _settle(self, launched: _Launched) -> bool:
        """Whether a layer found all its experts; if not it is taken again, and its outputs are put right in place."""
        found = all(self._runner.settle(call) for call in launched.calls)
        self._steady += (found - self._steady) * _WEIGHT
        if found:
            self.launched += 1
            return True
        launched.way.restore()
        right = self._take(launched.way, ahead=False)
        hidden_of(launched.out).copy_(hidden_of(right.out))
        return False


def _is_token(hidden: Any) -> bool:
    return isinstance(hidden, torch.Tensor) and hidden.shape[:-1] == (1, 1)


class _Plain:
    """A layer's own forward, and what its layer of the cache held: keys and values grow by being replaced, so the old
    ones are still whole."""

    def __init__(self, run: "Callable[[], Any]", cache: Any, number: "int | None") -> None:
        self._run = run
        self._known = cache is None or type(cache) is DynamicCache  # others may remember what is in no layer
        self._layers: Any = getattr(cache, "layers", [])
        self._number = number
        self._layer = self._layers[number] if number is not None and number < len(self._layers) else None
        self._state = dict(vars(self._layer)) if self._layer is not None else {}
        counts = [name for name, value in self._state.items() if torch.is_tensor(value) and value.numel() == 1]
        self._state |= {name: self._state[name].clone() for name in counts}

    def __call__(self) -> Any:
        """Take the layer."""
        return self._run()

    @property
    def whole(self) -> bool:
        """Whether everything can be put back: keys and values are all there is, and not, say, a recurrent state."""
        return self._known and only_grows(self._layer)

    def restore(self) -> bool:
        """Put it back; False where the layer's state is of another kind, or its number unknown."""
        if self._number is None or not self._known:
            return False
        if self._layer is None:
            del self._layers[self._number :]  # made by the failed step, if at all
            return True
        if not self.whole:
            return False
        vars(self._layer).clear()
        vars(self._layer).update(self._state)
        return True
