"""A model around its decoder layers, for single tokens on a device.

For every token transformers makes masks and rotary embeddings anew, calls each layer through its wrappers and wraps the
result, which takes the host half as long as all captured layers. What it hands to the layers follows from the token and
its position alone. So its own code is captured up to the last layer, over a room of positions, and what it calls after
that; a token then is two graphs, and those of the layers between them. Everything else goes the model's own way: other
arguments, padding, caches that have not been seen, gradients, hooks.

What is captured has to give what the model's own forward has just given, bit for bit; it sees a cache that knows its
position on the device alone, so nothing of it can follow from the length that it was captured at.
"""

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.utils import ModelOutput

from greenroom.device import Captured, CaptureError, Device
from greenroom.hooks import Hooks
from greenroom.layer_steps import LayerSteps
from greenroom.static_kv import NotServedError, StaticLayer, Window, lasting
from greenroom.token_inputs import Arguments, Inputs, Places
from greenroom.token_layers import Graph, hidden_of

_CACHED = {"past_key_values", "attention_mask"}
"""Arguments that change with the number of tokens."""
_RESULT = {"last_hidden_state", "past_key_values"}


class _EnteredError(Exception):
    """The model has called its last layer."""


class _Offset:
    """A token's position as what is added to numbers. A tensor it must not be: while a stream is being captured,
    transformers makes a mask even where none is needed as soon as the position is one."""

    def __init__(self, position: torch.Tensor) -> None:
        self._position = position

    def __add__(self, other: Any) -> torch.Tensor:
        return torch.add(self._position, other)

    __radd__ = __add__


class _Past(DynamicCache):  # type: ignore[misc]  # transformers has no types
    """What the model's code is captured with as its cache: as many tokens as `position` int64 [1] says on the device,
    seen through `windows`; the layers have room for one more."""

    def __init__(self, position: torch.Tensor, windows: "Sequence[Window]", rooms: "Sequence[int]") -> None:
        self._position, self._windows, self._rooms = position, windows, rooms

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """The token's position."""
        return _Offset(self._position)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> "tuple[int, Any]":
        """How many positions a mask shows, and the first. Of a ring that is not full never so many as would fill it:
        that alone makes masks where none is needed."""
        room, window = self._rooms[layer_idx], self._windows[layer_idx]
        if window.size is None:
            return room, 0
        if window.full:
            return window.size, self._position - (window.size - 1)
        return min(room, window.size - 1), 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Not known to the host."""
        raise NotServedError("it asks its cache for its length")

    @property
    def is_sliding(self) -> "list[bool]":
        """Of each layer."""
        return [window.size is not None for window in self._windows]

    @property
    def is_linear(self) -> "list[bool]":
        """No layer is."""
        return [False] * len(self._windows)

    is_dummy = is_linear
    is_compileable = False

    def __getattr__(self, name: str) -> Any:
        raise NotServedError(f"it asks its cache for {name}")


@dataclasses.dataclass(slots=True)
class _Plan:
    """How tokens pass the model while its configuration is `config` and its layers repeat `graphs`."""

    config: Arguments
    graphs: "list[Graph | None]"
    windows: "list[Window]"
    places: Places
    position: torch.Tensor
    """int64 [1], the token's"""
    looked_up: "dict[nn.Module, torch.Tensor]"
    """embeddings that look rows up on the host, and where these go"""
    before: "Captured | None" = None
    """what comes before the layers; None where it could not be captured"""
    after: "Captured | None" = None
    """what comes after them, with what they leave at `last`: gives the last hidden states"""
    last: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    kind: Any = None
    """of the model's result"""


class TokenModel:
    """Takes the place of the forward of `base`, which owns the layers of `steps`. `embeddings` are those of its modules
    that look rows up on the host.

    `reason` says why tokens go the model's own way, and is empty while they need not.
    """

    def __init__(self, base: Any, steps: LayerSteps, device: Device, embeddings: "Sequence[nn.Module]") -> None:
        self._base, self._forward, self._steps, self._device = base, base.forward, steps, device
        self._config, self._embeddings = vars(base.config), embeddings
        self._hooks = Hooks(base)
        self._plan: _Plan | None = None
        self.enabled, self.reason = True, ""
        self.tokens = 0
        """that did not go the model's own way"""
        base.forward = self.forward

    def __str__(self) -> str:
        """For people: why the model's own code runs for every token."""
        return f"around the layers transformers' own code: {self.reason}" if self.reason else ""

    def forget(self) -> None:
        """Give up what was captured."""
        self._plan, self.reason = None, ""
        self._hooks.renew()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        cache: Any = kwargs.get("past_key_values")
        if args or not self._is_next(cache, kwargs):
            return self._forward(*args, **kwargs)
        given = {name: value for name, value in kwargs.items() if name not in _CACHED}
        plan, length = self._plan, cache.get_seq_length()
        if plan is not None and plan.before is not None and self._follows(plan, length, given):
            layers = self._steps.again(cache, length)
            if layers is not None:
                return self._pass(plan, cache, layers, length, given)
        replayed = self._steps.replayed
        out = self._forward(**kwargs)
        graphs = self._steps.replayed - replayed >= len(self._steps.layers)
        if graphs and not (plan is not None and self._follows(plan, length, given)):
            self._plan = self._made(cache, given, length, out)
        return out

    def _follows(self, plan: _Plan, length: int, given: Arguments) -> bool:
        """Whether the token after `length` is one of the plan's; what it is given is in its place then."""
        return (
            plan.config == self._config
            and all(map(operator.is_, plan.graphs, self._steps.captured))
            and all(window.size is None or window == window.at(length) for window in plan.windows)
            and plan.places.take((), given)
        )

    def _is_next(self, cache: Any, kwargs: Arguments) -> bool:
        """Whether a call asks for one more token of one sequence that sees all before it, and nobody looks on."""
        ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        given = ids if embeddings is None else embeddings
        if not isinstance(given, torch.Tensor) or given.shape[:2] != (1, 1) or torch.is_grad_enabled():
            return False
        if type(cache) is not DynamicCache or cache.offloading or not self.enabled or self._base.training:
            return False
        if self._steps.observed or self._hooks:
            return False
        mask = kwargs.get("attention_mask")
        shape = (1, cache.get_seq_length() + 1)
        return mask is None or (isinstance(mask, torch.Tensor) and mask.shape == shape and bool(mask.all()))

    def _pass(self, plan: _Plan, cache: Any, layers: "Sequence[StaticLayer]", length: int, given: Arguments) -> Any:
        """One token, without the model's own code."""
        assert plan.before is not None and plan.after is not None
        self._steps.forget_given()
        plan.position.fill_(length)
        for embedding, memory in plan.looked_up.items():
            memory.copy_(embedding(given["input_ids"]))
        plan.before.replay()
        hidden = self._steps.repeat(layers, length)
        if hidden is not plan.last:  # the last layer was captured anew on the way
            plan.last.copy_(hidden)
        plan.after.replay()
        self.tokens += 1
        return plan.kind(last_hidden_state=plan.after.result.clone(), past_key_values=cache)

    def _made(self, cache: Any, given: Arguments, length: int, out: Any) -> "_Plan | None":
        """A plan for tokens like the one that has just passed after `length`, and gave `out`; None where the next
        cannot be like it."""
        layers = self._steps.again(cache, length + 1)
        if layers is None:
            return None
        windows = [Window(layer.window, False).at(length) for layer in layers]
        places, ids = Places(Inputs(), (), given), given.get("input_ids")
        with lasting():
            position = torch.full((1,), length, device=self._device.place)
            looked_up = {one: one(ids).clone() for one in self._embeddings if ids is not None}
        plan = _Plan(dict(self._config), self._steps.captured, windows, places, position, looked_up)
        try:
            self._capture(plan, cache, out)
            self.reason = ""
        except Exception as error:  # modelling code of any family, memory: what cannot be captured runs as before
            plan.before, self.reason = None, str(error) or type(error).__name__
        finally:
            self._steps.forget_given()
        return plan

    def _capture(self, plan: _Plan, cache: Any, out: Any) -> None:
        """Raises an error where the graphs would give something else than the token was given, or gave."""
        if not isinstance(out, ModelOutput) or set(out) != _RESULT or out.past_key_values is not cache:
            raise CaptureError("it gives more than hidden states")
        memory = self._steps.given()
        right = [one.clone() for one in memory]
        plan.before = self._device.capture(lambda: self._enter(plan))
        plan.before.replay()
        if not all(map(torch.equal, memory, right)):
            raise CaptureError("as a graph it gives its layers something else")
        norm, plan.last = self._last_module(plan), self._steps.last
        plan.after, plan.kind = self._device.capture(lambda: norm(plan.last)), type(out)
        plan.after.replay()
        if not torch.equal(plan.after.result, out.last_hidden_state):
            raise CaptureError("as a graph it gives something else")

    def _enter(self, plan: _Plan) -> None:
        """What the model does before its layers."""
        self._steps.forget_given()
        try:
            self._call(plan, to_the_end=False)
        except _EnteredError:
            return
        raise CaptureError("it does not call all its layers")

    def _last_module(self, plan: _Plan) -> nn.Module:
        """The module that makes the model's result of what the last layer gives."""
        calls: list[tuple[Any, ...]] = []
        hooks = [
            child.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
            for child in self._base.children()
        ]
        try:
            out = self._call(plan, to_the_end=True)
        finally:
            for hook in hooks:
                hook.remove()
        for module, args, kwargs, result in calls:
            if result is out.last_hidden_state and len(args) == 1 and args[0] is self._steps.last and not kwargs:
                found: nn.Module = module
                return found
        raise CaptureError("more than a norm follows its layers")

    def _call(self, plan: _Plan, to_the_end: bool) -> Any:
        """The model's own code with stand-ins for its layers, which only take what they are given."""
        given = dict(plan.places.kwargs)
        if given.get("position_ids") is None:
            given["position_ids"] = plan.position[None]
        passed: list[Any] = []

        def layer(number: int, *args: Any, **kwargs: Any) -> Any:
            if len(passed) != number or (passed and (not args or args[0] is not hidden_of(passed[-1]))):
                raise CaptureError("more happens between its layers")
            passed.append(self._steps.enter(number, args, kwargs, plan.position, plan.windows[number]))
            if len(passed) == len(plan.windows) and not to_the_end:
                raise _EnteredError
            return passed[-1]

        def rows(memory: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            if ids is not given.get("input_ids"):
                raise CaptureError("it looks up other rows than its token's")
            return memory

        instead = {one: functools.partial(layer, number) for number, one in enumerate(self._steps.layers)}
        instead |= {one: functools.partial(rows, memory) for one, memory in plan.looked_up.items()}
        with _forwards(instead):
            past = _Past(plan.position, plan.windows, self._steps.rooms)
            return self._forward(**given, attention_mask=None, past_key_values=past)


@contextlib.contextmanager
def _forwards(instead: "Mapping[nn.Module, Callable[..., Any]]") -> "Iterator[None]":
    """Within it, modules have other forwards."""
    before = {module: vars(module).get("forward") for module in instead}
    try:
        for module, forward in instead.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            if own is not None:
                module.forward = own
            else:
                vars(module).pop("forward", None)
