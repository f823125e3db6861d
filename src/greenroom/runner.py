"""Serve one layer's experts: the only place where cache, transfer, prefetch and kernels meet.

The order in which experts arrive never shows: each expert's output is computed from its record and its tokens alone,
and outputs are summed in ascending order of expert.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from greenroom import seam
from greenroom.cache import ExpertCache
from greenroom.cache.curve import MissRatioCurve
from greenroom.expert_call import Call, Shares
from greenroom.kernels import Activation, ExpertsKernel, ExpertTask, native
from greenroom.metrics import Metrics, Stopwatch
from greenroom.packed import ExpertsEntry
from greenroom.prefetch import Guesses, Prefetcher, Router
from greenroom.speculation import Speculation
from greenroom.store import Arena
from greenroom.threads import kept_from_torch
from greenroom.transfer import Transfer

Rows = torch.Tensor | list[list[int]] | list[list[float]]
Passed = tuple[int, list[int], list[float], "Shares | None"]
"""(layer, experts, weights, what the router thinks of all where `wants_shares`) of a token that passed it"""
Observer = Callable[[int, torch.Tensor, Rows, Rows, "Shares | None"], None]
"""(layer, x [T, H], top_k_index [T, k], top_k_weights [T, k], the router's probabilities where the cache is told)"""

_ANY_ORDER = 64
"""Up to this many (token, expert) pairs, outputs are kept until all are there, and computed in order of arrival."""


class ExpertRunner:
    """Computes the experts of MoE layers from a cache of fewer slots than there are experts."""

    def __init__(
        self,
        *,
        entries: "Sequence[ExpertsEntry]",
        cache: ExpertCache,
        transfer: Transfer,
        arena: Arena,
        kernel: ExpertsKernel,
        prefetcher: Prefetcher,
        routers: "Sequence[Router | None]",
        curve: MissRatioCurve,
    ) -> None:
        self._entries, self._cache, self._transfer, self._arena = entries, cache, transfer, arena
        self._kernel, self._prefetcher, self._routers, self._curve = kernel, prefetcher, routers, curve
        self._kinds: dict[int, str] = {}
        self._clock: Callable[[], float] = time.perf_counter
        self.speculation = Speculation(prefetcher.experts)
        # the clock after the last guess, what the link had to do then, and in which layer it was
        self._since: tuple[float, float, int] | None = None
        self._went_on = 0  # layers in which a token lacked something and went on, since others were accounted for
        self._foresee_s = 0.0  # that a layer took to foresee others in the latest walk
        self._places: tuple[Any, dict[int, int]] | None = None  # where experts lie, and MoE layers among a decoder's
        self.metrics = Metrics()
        self.trace: list[tuple[int, tuple[int, ...], Shares | None]] | None = None
        """Set to a list to record every call, as `cache.replay` wants it."""
        self.observer: Observer | None = None
        """Called before each call; for a single token index and weights may be lists of one row: tensors of a few
        numbers take longer to make than to use."""

    @torch.no_grad()
    def __call__(
        self, layer: int, module: Any, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The experts' weighted sum: x [T, H], index and weights [T, k] → [T, H] in x's dtype.

        An index that is not an expert's (the sentinel `num_experts`) adds nothing.
        """
        call = self._call(layer, x, top_k_index, top_k_weights)
        if self.observer is not None:
            self.observer(layer, x, top_k_index, top_k_weights, call.shares)
        prompt = top_k_index.numel() > _ANY_ORDER
        self._note(layer, call.valued, call.shares, prompt)
        self._learn(layer, call.experts)
        try:
            self._ask(layer, call.experts, call.valued, call.shares)
            if len(x):
                self._guess(layer, x, top_k_index.shape[1], prompt)
            with kept_from_torch():
                out = self._serve(layer, call, activation_of(module), prompt)
            self._cache.finish()
        except BaseException:
            self._give_up()
            raise
        self._count()
        return out

    def token(
        self,
        layer: int,
        module: Any,
        x: torch.Tensor,
        experts: "list[int]",
        weights: "list[float]",
        outputs: torch.Tensor,
        meanwhile: "Callable[[], None]",
        shares: "Callable[[], Shares]",
        foresee: "Callable[[int, int], list[int]] | None",
    ) -> None:
        """The same for one token of the compiled decode step: a `decode.ServeToken`."""
        ranked = sorted(zip(weights, experts, strict=True))
        valued = [expert for _, expert in ranked]
        given = shares() if self._cache.uses_probabilities else None
        if self.observer is not None:
            self.observer(layer, x, [valued[::-1]], [[weight for weight, _ in reversed(ranked)]], given)
        self._note(layer, valued, given, prompt=False)
        self._learn(layer, experts)
        kind = self._kind(layer, module)
        try:
            buffers = self._cache.hit(layer, experts, valued, given)
            if buffers is None:
                self._ask(layer, experts, valued, given)
            if foresee is not None:
                self._speculate(layer, functools.partial(self._prefetcher.foresee, layer, foresee))
            meanwhile()
            if buffers is None:
                self._token_as_they_come(layer, kind, x, experts, outputs)
                self._cache.finish()
            else:
                self._token(layer, kind, x, buffers, list(range(len(experts))), outputs)
        except BaseException:
            self._give_up()
            raise
        self._count()

    def there(self, modules: "Sequence[Any]") -> "tuple[Any, int, tuple[int, int]]":
        """Where experts lie, for a token that passes layers in one call: `native.all_records` of a decoder's layers,
        whose experts modules are `modules`, None where there are none; how many layers may be passed, none where
        somebody watches each call; and how many ahead are guessed meanwhile, so many experts of each."""
        self._went_on = 0  # where a token was interrupted
        most = self.speculation.rests() if self.observer is None else 0
        if not most:
            return None, 0, (0, 0)
        if self._transfer.under_way:
            self._receive()
        if self._places is None:
            layers = {module.greenroom_layer: place for place, module in enumerate(modules) if module is not None}
            nowhere = [None if module is None else self._records(module) for module in modules]
            self._places = native.all_records(nowhere), layers
            counts = [(layer, self._entries[layer].num_experts) for layer in layers]
            self._cache.moved.update((layer, expert) for layer, count in counts for expert in range(count))
        return self._put_places(), most, (self._prefetcher.lookahead, self.speculation.ranks)

    def _put_places(self) -> Any:
        """Where experts lie, brought up to date."""
        assert self._places is not None
        records, layers = self._places
        moved = self._cache.moved
        for layer, expert in tuple(moved):
            if layer in layers:
                buffer = self._cache.there(layer, expert)
                records.put(layers[layer], expert, 0 if buffer is None else self._arena.address(buffer))
            moved.discard((layer, expert))  # not before, so that an interrupt loses none
        return records

    def _receive(self) -> None:
        """Take note of what has come."""
        try:
            self._collect(wait=False)
        except BaseException:
            self._give_up()
            raise

    def _records(self, module: Any) -> Any:
        """With no expert there yet."""
        layer = module.greenroom_layer
        entry = self._entries[layer]
        nowhere = [0] * entry.num_experts
        return native.records(entry.tensors, self._kind(layer, module), nowhere, entry.record_nbytes)

    def lacks(
        self, layer: int, experts: "list[int]", foreseen: Guesses, passed: "Callable[[], Sequence[Passed]]"
    ) -> bool:
        """A token that passes layers lacks some of a layer's `experts`, or of what is `foreseen`: begin to read.
        Whether it may go on, since all `experts` are there: see `decode.Residents`."""
        start_s = self._clock()
        try:
            self._take(self._transfer.poll(wait=False))
            if not self._all_there(layer, experts):
                self._expect(layer, experts)
                if not all(self._cache.holds(layer, expert) for expert in experts):  # what was used has the buffers
                    self._account(passed())
                    self._expect(layer, experts)
                start_s = self._clock()  # before, it was not for guesses
            self._rested(layer)
            self._speculate(layer, lambda: foreseen, start_s - self._foresee_s)
            if self._cache.crowded:
                self._account(passed())
                self._start_loads()
            goes_on = self._all_there(layer, experts)
            if goes_on:
                self._put_places()
                self._went_on += 1
        except BaseException:
            self._give_up()
            raise
        return goes_on

    def _all_there(self, layer: int, experts: "list[int]") -> bool:
        return all(self._cache.there(layer, expert) is not None for expert in experts)

    def _expect(self, layer: int, experts: "list[int]") -> None:
        for load in self._cache.expect(layer, experts):
            self._transfer.start(load)

    @property
    def wants_shares(self) -> bool:
        """Whether `walked` is to be told what routers think of all experts."""
        return self._cache.uses_probabilities

    def walked(self, passed: "Sequence[Passed]", compute_s: float, foresee_s: float) -> None:
        """A token has passed layers at once; `compute_s` is the time in experts, `foresee_s` that in which a layer
        foresaw others."""
        self._foresee_s = foresee_s
        try:
            self._account(passed)
            if passed:
                self._rested(passed[-1][0])
        except BaseException:
            self._give_up()
            raise
        self.metrics.compute_s += compute_s
        self._count()

    def _account(self, passed: "Sequence[Passed]") -> None:
        """Tell the cache, and whoever studies experts, of layers that a token has passed."""
        for layer, experts, weights, shares in passed:
            valued = [expert for _, expert in sorted(zip(weights, experts, strict=True))]
            self._note(layer, valued, shares, prompt=False)
            self.speculation.requested(layer, experts)
            there = self._cache.used(layer, experts, valued, shares)
            assert there, "an expert was taken before its use was accounted for"
        self.speculation.passed(len(passed) - self._went_on, self._foresee_s)
        self._went_on = 0

    def _kind(self, layer: int, module: Any) -> str:
        return self._kinds.get(layer) or self._kinds.setdefault(layer, seam.activation_kind(module))

    def forget(self) -> None:
        """Ask modules anew what their experts compute."""
        self._kinds.clear()
        self._places = None

    def drain(self) -> None:
        """Wait for what is still being read, for nobody perhaps, so that `metrics` counts all that was started."""
        while self._transfer.under_way:
            self._collect(wait=True)
        self._count()

    def _note(self, layer: int, valued: "list[int]", shares: "Shares | None", prompt: bool) -> None:
        """Count a call and keep its experts, least valuable first, for whoever studies them."""
        self.metrics.calls += 1
        if self.trace is not None:
            self.trace.append((layer, tuple(valued), shares))
        if not prompt:
            self._curve.feed(layer, valued)

    def _call(self, layer: int, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Call:
        shares = self._shares(layer, x)
        return Call(self._entries[layer], x, top_k_index, top_k_weights, shares)

    def _shares(self, layer: int, x: torch.Tensor) -> "torch.Tensor | None":
        """What the router thinks of all experts for one token, float16 [1, experts] where x is, if the cache needs it
        and the router can be computed again."""
        router = self._routers[layer]
        if not self._cache.needs_probabilities or len(x) != 1 or router is None or not router.reads(x):
            return None
        return router.shares(router.scores(x))

    def _serve(self, layer: int, call: Call, activation: Activation, prompt: bool) -> torch.Tensor:
        """The weighted sum, when all has been asked for."""
        serve = self._in_turn if prompt else self._as_they_come
        return serve(layer, call, activation)

    def _ask(self, layer: int, experts: "list[int]", valued: "list[int]", shares: "Shares | None") -> None:
        self._cache.request(layer, experts, valued, shares)
        self._start_loads()

    def _learn(self, layer: int, experts: "list[int]") -> None:
        """Which guesses came true, and what the link did since they were made."""
        self.speculation.requested(layer, experts)
        self._rested(layer)

    def _rested(self, layer: int) -> None:
        """A token has come to `layer`: what the link did for each layer since the last guess, if that was before."""
        if self._since is None or layer <= self._since[2]:
            return
        (start_s, queued_s, since), rate = self._since, self._transfer.seconds_per_byte
        if rate is not None:
            idle_s = max((self._clock() - start_s) / (layer - since) - queued_s, 0.0)
            self.speculation.link_was(idle_s, rate * self._entries[layer].record_nbytes)
        self._since = None

    def _guess(self, layer: int, x: torch.Tensor, top_k: int, prompt: bool) -> None:
        if not prompt:
            self._speculate(layer, lambda: self._prefetcher.guess(layer, x, top_k, prompt))
            return
        for ahead, experts in self._prefetcher.guess(layer, x, top_k, prompt):
            self._cache.guess(ahead, experts)
        self._start_loads()

    def _speculate(self, layer: int, guess: "Callable[[], Guesses]", start_s: "float | None" = None) -> None:
        """Load the guesses that pay; guessing began at `start_s`, or begins now."""
        if not self.speculation.watches():
            return
        start_s = self._clock() if start_s is None else start_s
        guesses = guess()
        if guesses:
            self._collect(wait=False)  # which may make room for them
            for ahead, experts in self.speculation.choose(layer, guesses, self._cache.holds):
                self._cache.guess(ahead, experts)
            self._since = self._clock(), self._transfer.queued_s, layer
            self._start_loads()
            self.speculation.guessing_took(self._clock() - start_s)

    def _token(
        self,
        layer: int,
        kind: str,
        x: torch.Tensor,
        buffers: "list[int]",
        places: "list[int]",
        outputs: torch.Tensor,
    ) -> None:
        entry, addresses = self._entries[layer], [self._arena.address(buffer) for buffer in buffers]
        with Stopwatch(self.metrics, "compute_s"):
            native.token(x, addresses, places, entry.record_nbytes, entry.tensors, kind, outputs)

    def _token_as_they_come(
        self, layer: int, kind: str, x: torch.Tensor, experts: "list[int]", outputs: torch.Tensor
    ) -> None:
        places = {expert: place for place, expert in enumerate(experts)}
        while places:
            found = {expert: self._cache.ready(layer, expert) for expert in places}
            ready = {expert: buffer for expert, buffer in found.items() if buffer is not None}
            if not ready:
                self._collect(wait=True)
                continue
            self._token(layer, kind, x, list(ready.values()), [places.pop(expert) for expert in ready], outputs)
            for expert in ready:
                self._cache.release(layer, expert)
            self._start_loads()
            self._collect(wait=False)

    def _as_they_come(self, layer: int, call: Call, activation: Activation) -> torch.Tensor:
        """Resident experts first, then the others in the order in which their reads finish."""
        outputs: dict[int, torch.Tensor] = {}
        waiting = list(call.experts)
        while waiting:
            ready = [expert for expert in waiting if self._cache.ready(layer, expert) is not None]
            if not ready:
                self._collect(wait=True)
                continue
            # with nothing left to read, one call computes all; otherwise start what a freed buffer allows in between
            outputs.update(self._compute(layer, call, ready, activation))
            waiting = [expert for expert in waiting if expert not in outputs]
            self._collect(wait=False)
        out = torch.zeros_like(call.x, dtype=torch.float32)
        for expert in call.experts:
            call.add(out, expert, outputs[expert])
        return out.to(call.x.dtype)

    def _in_turn(self, layer: int, call: Call, activation: Activation) -> torch.Tensor:
        """A prompt: experts in ascending order, each added at once, so that few outputs are held."""
        out = torch.zeros_like(call.x, dtype=torch.float32)
        early: dict[int, torch.Tensor] = {}
        for number, expert in enumerate(call.experts):
            while expert not in early and self._cache.ready(layer, expert) is None:
                if self._transfer.under_way:
                    self._collect(wait=True)
                    continue
                # guesses that came true hold every buffer: they are computed first, and added in their turn
                later = [other for other in call.experts[number + 1 :] if other not in early]
                ready = [other for other in later if self._cache.ready(layer, other) is not None]
                assert ready, "nothing is read and nothing is there"
                early |= self._compute(layer, call, ready, activation)
            if expert not in early:
                early |= self._compute(layer, call, [expert], activation)
            call.add(out, expert, early.pop(expert))
            self._collect(wait=False)
        return out.to(call.x.dtype)

    def _compute(
        self, layer: int, call: Call, experts: "list[int]", activation: Activation
    ) -> "dict[int, torch.Tensor]":
        tasks = []
        for expert in experts:
            buffer = self._cache.ready(layer, expert)
            assert buffer is not None
            tasks.append(ExpertTask(self._arena.record(buffer), call.rows(expert)))
        with Stopwatch(self.metrics, "compute_s"):
            outputs = self._kernel(call.x, tasks, self._entries[layer].tensors, activation)
        for expert in experts:
            self._cache.release(layer, expert)
        self._start_loads()
        return dict(zip(experts, outputs, strict=True))

    def _give_up(self) -> None:
        """After an error or an interrupt, at any point: leave cache and transfer agreed on what is being read."""
        self._since, self._went_on = None, 0
        self._transfer.abandon()
        self._cache.abort()
        for buffer in self._cache.reading - self._transfer.under_way:
            self._cache.loaded(buffer)  # issued but never started, or reported but never counted

    def _start_loads(self) -> None:
        for load in self._cache.issue():
            self._transfer.start(load)

    def _collect(self, wait: bool) -> None:
        """Tell the cache what has arrived; with `wait`, stall until something has."""
        if wait:
            with Stopwatch(self.metrics, "stall_s"):
                buffers = self._transfer.poll(wait=True)
        else:
            buffers = self._transfer.poll(wait=False)
        self._take(buffers)
        if buffers:
            self._start_loads()

    def _take(self, buffers: "list[int]") -> None:
        for buffer in buffers:
            self._cache.loaded(buffer)

    def _count(self) -> None:
        counters, metrics = self._cache.counters, self.metrics
        metrics.bytes_read = self._transfer.bytes_read
        metrics.requests, metrics.hits = counters.requests, counters.hits
        metrics.prefetched, metrics.late = counters.prefetched, counters.late
        metrics.misses, metrics.guesses = counters.misses, counters.guesses


def activation_of(module: Any) -> Activation:
    """What happens between and after the products of a module's experts."""
    gate = module._apply_gate if module.has_gate else module.act_fn
    after = module.post_expert_norm if module.has_post_expert_norm else None
    return Activation(gate=gate, after=after, kind=seam.activation_kind(module))
