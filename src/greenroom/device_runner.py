"""Serve one layer's experts from a device's slots.

Differs from `runner` in what the host waits for: the routing, once a call, and records from disk. Copies and kernels
are queued on the device, which orders them by itself. Each (token, expert) pair has a row of outputs of its own, and
rows are summed in the router's order when all are there: the order in which experts come never shows, nor which of them
were moved in time.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from greenroom.buffers import sent
from greenroom.cache import ExpertCache, Load
from greenroom.device import Device, Event
from greenroom.expert_call import Call, Shares
from greenroom.kernels import Activation, ExpertsKernel, ExpertTask
from greenroom.kernels.over_slots import SlotsKernel
from greenroom.metrics import Stopwatch
from greenroom.packed import ExpertsEntry
from greenroom.placement import Placement
from greenroom.runner import ExpertRunner, activation_of
from greenroom.tiers import DeviceArena, SlotTable, TierTransfer

MOST_TOKENS = 16
"""Up to this many tokens, and outside a prompt, a call's pairs are computed together."""


class DeviceCall(Call):
    """A call whose x and weights lie on the device; its routing has been fetched."""

    def __init__(
        self,
        entry: ExpertsEntry,
        x: torch.Tensor,
        weights: torch.Tensor,
        fetched: "tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]",
    ) -> None:
        index, host_weights, shares, host_x = fetched
        super().__init__(entry, x, index, host_weights, shares)
        self.device_weights, self.index = weights, index.tolist()
        self._served = (index >= 0) & (index < entry.num_experts)
        self.host_x = None if host_x is None else host_x.to(torch.float32)
        """x on the host, where it may be computed there"""

    def span(self, expert: int) -> "tuple[int, int]":
        """(start, count) of the expert's pairs among those sorted by expert."""
        start, end = self.spans[expert]
        return start, end - start

    def slots(self, buffers: "dict[int, int]") -> torch.Tensor:
        """int32 [T, k] on the device: each pair's buffer, −1 for experts that are not in `buffers`."""
        found = [[buffers.get(expert, -1) for expert in row] for row in self.index]
        return sent(torch.tensor(found, dtype=torch.int32), self.x.device)

    def rows_by_expert(self) -> torch.Tensor:
        """int32 [P] on the device: each pair's token, pairs sorted by expert."""
        return self.placed_rows.to(torch.int32)

    def places(self, by_expert: bool) -> torch.Tensor:
        """int32 [T, k] on the device: where each pair's output is, `by_expert` or in the order of tokens; −1 for
        sentinels."""
        found = torch.arange(len(self.order), dtype=torch.int32)
        if by_expert:
            found = torch.empty_like(found).index_copy_(0, self.order, found)
        found = torch.where(self._served, found.view(self._served.shape), -1)
        return sent(found, self.x.device)


class AheadCall(NamedTuple):
    """One token's call that is launched before the host knows its routing; all of it lies on the device."""

    layer: int
    told: torch.Tensor
    """int32 [3, 1, k]: the slots that were used (first, since kernels want them aligned), index, and the bits of the
    weights in float32"""
    shares: "torch.Tensor | None"
    """[1, num_experts], the router's, where the cache is told of them"""
    seen: "tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None"
    """x, index and weights, where there is an observer"""


class SentCall(NamedTuple):
    """A call that has been launched ahead, and what it tells the host."""

    call: AheadCall
    told: "NDArray[np.int32]"
    """the call's, on the host once `event` has come, as are `shares`; numpy hands a few numbers over in a quarter of
    torch's time"""
    shares: "torch.Tensor | None"
    event: Event


def told_by(calls: "Sequence[AheadCall]") -> "list[torch.Tensor]":
    """What calls tell the host."""
    return [call.told for call in calls] + [call.shares for call in calls if call.shares is not None]


def sent_calls(calls: "Sequence[AheadCall]", back: "Sequence[torch.Tensor]", event: Event) -> "list[SentCall]":
    """Calls whose `told_by` is on its way to `back`."""
    rest = iter(back[len(calls) :])
    return [
        SentCall(call, told.numpy(), None if call.shares is None else next(rest), event)
        for call, told in zip(calls, back, strict=False)
    ]


class DeviceRunner(ExpertRunner):
    """An `ExpertRunner` whose arena and transfer are a device's; hidden states come and go on the device.

    `cpu_kernel` computes the experts that `placement` leaves in RAM: one token's, in float32.
    """

    _arena: DeviceArena  # type: ignore[assignment]
    _transfer: TierTransfer  # type: ignore[assignment]

    def __init__(
        self,
        *,
        device: Device,
        slots_kernel: SlotsKernel,
        cpu_kernel: ExpertsKernel,
        placement: Placement,
        **others: Any,
    ) -> None:
        super().__init__(kernel=cpu_kernel, **others)
        self._device, self._slots_kernel, self.placement = device, slots_kernel, placement
        self._choose = False  # whether the CPU may compute some of the call
        self._here: list[int] = []  # experts that it computes
        self._ahead: list[AheadCall] | None = None
        most = max(entry.num_experts for entry in self._entries)
        self._table = SlotTable(len(self._entries), most, device.place)
        self._clock = device.clock

    @contextlib.contextmanager
    def going(self, ahead: bool) -> "Iterator[list[AheadCall]]":
        """Within it, calls are launched `ahead`, and noted to be settled."""
        calls: list[AheadCall] = []
        self._ahead = calls if ahead else None
        try:
            yield calls
        finally:
            self._ahead = None

    @property
    def may_go_ahead(self) -> bool:
        """Whether calls may be launched before it is known that their experts are there: guesses need the host."""
        return not self._prefetcher.experts

    def __call__(
        self, layer: int, module: Any, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As `ExpertRunner`'s; ahead, experts that are not in the table are left out."""
        if self._ahead is None or len(x) > 1:
            return super().__call__(layer, module, x, top_k_index, top_k_weights)
        entry, told = self._entries[layer], self._tell(layer, top_k_index, top_k_weights)
        slots = told[0]
        out = torch.empty((*slots.shape, entry.tensors[1].rows), dtype=torch.float32, device=x.device)
        kernel, memory = self._slots_kernel, self._arena.memory
        self._device.launch(kernel.pairs, x, memory, slots, entry.tensors, activation_of(module), out)
        seen = None if self.observer is None else (x, top_k_index, top_k_weights)
        self._ahead.append(AheadCall(layer, told, self._shares(layer, x), seen))
        return self._device.launch(kernel.combine, out.flatten(0, 1), slots, top_k_weights, True).to(x.dtype)

    def _tell(self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """What the host will be told, written by as few kernels as that takes: see `AheadCall.told`."""
        told = torch.empty((3, *top_k_index.shape), dtype=torch.int32, device=top_k_index.device)
        self._table.find(layer, top_k_index, told[0])
        told[1].copy_(top_k_index)
        told[2].view(torch.float32).copy_(top_k_weights)
        return told

    def send(self, calls: "Sequence[AheadCall]") -> "list[SentCall]":
        """Let the device tell what calls that are now launched found."""
        return sent_calls(calls, *self._device.send_back(*told_by(calls))) if calls else []

    def settle(self, sent: SentCall) -> bool:
        """Whether a call that was launched ahead found all its experts where the cache has them; it is then counted as
        any other. If not, nothing has happened, and the call has to be made again."""
        self._device.synchronise(sent.event)
        call, told = sent.call, sent.told
        slots, index = told[:2, 0].tolist()
        weights = told[2, 0].view(np.float32).tolist()
        shares = None if sent.shares is None else sent.shares[0].tolist()
        count = self._entries[call.layer].num_experts
        found = sorted([one for one in zip(weights, index, slots, strict=True) if one[1] < count])
        valued = [expert for _, expert, _ in found]
        if not self._cache.hit_at(call.layer, valued, [slot for _, _, slot in found], shares):
            return False
        if self.observer is not None and call.seen is not None:
            self.observer(call.layer, *call.seen, shares)
        self._note(call.layer, valued, shares, prompt=False)
        self._count()
        return True

    def occupy(self, arena: DeviceArena, cache: ExpertCache) -> None:
        """Go on with another arena and an empty cache, after the transfer has vacated the old one."""
        cache.counters = self._cache.counters
        self._arena, self._cache = arena, cache
        self._table.clear()
        self._transfer.occupy(arena)

    def _call(self, layer: int, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Call:
        self._choose = self.placement.enabled and len(x) == 1
        wanted = [top_k_index, top_k_weights, self._shares(layer, x), x if self._choose else None]
        found = iter(self._device.fetch(*(one for one in wanted if one is not None)))
        index, weights, shares, host_x = (None if one is None else next(found) for one in wanted)
        assert index is not None and weights is not None
        return DeviceCall(self._entries[layer], x, top_k_weights, (index, weights, shares, host_x))

    def _ask(self, layer: int, experts: "list[int]", valued: "list[int]", shares: "Shares | None") -> None:
        access = self._cache.request(layer, experts, valued, shares)
        missing = {expert for _, expert in access.misses}
        self._here = self._leave_in_ram(layer, [e for e in valued if e in missing]) if self._choose else []
        self._start_loads()

    def _learn(self, layer: int, experts: "list[int]") -> None:
        """The same, and how long experts took over the link."""
        for rate in self._transfer.link.new_rates():
            self.placement.moving_took(rate * self._entries[layer].record_nbytes)
        super()._learn(layer, experts)

    def _leave_in_ram(self, layer: int, missing: "list[int]") -> "list[int]":
        """The experts of `missing`, least valuable first, that the CPU computes; they are not loaded, but for one where
        the link has nothing else to do."""
        there = [expert for expert in missing if self._transfer.in_ram((layer, expert))]
        if not there:
            return []
        queued_s = self._transfer.link.queued_s
        chosen = there[: self.placement.split(len(missing), len(there), queued_s)]
        fill = chosen[-1:] if len(chosen) == len(missing) and not queued_s else []
        for expert in chosen:
            self._transfer.borrow((layer, expert))
            if expert in fill:
                self._start(self._cache.later(layer, expert))
            else:
                self._cache.elsewhere(layer, expert)
        return chosen

    def _start_loads(self) -> None:
        self._start(self._cache.issue())

    def _start(self, loads: "list[Load]") -> None:
        for load in loads:
            self._table.take_out(load.buffer)
            self._transfer.start(load)

    def _serve(self, layer: int, call: Call, activation: Activation, prompt: bool) -> torch.Tensor:
        assert isinstance(call, DeviceCall)
        few = not prompt and len(call.x) <= MOST_TOKENS
        out = torch.empty(
            (len(call.order), self._entries[layer].tensors[1].rows), dtype=torch.float32, device=call.x.device
        )
        self._compute_here(layer, call, activation, out)
        rows = None if few else call.rows_by_expert()
        waiting = [expert for expert in call.experts if expert not in self._here]
        while waiting:
            buffers = self._next(layer, waiting, together=few)
            if not buffers:
                self._collect(wait=True)
                continue
            self._launch(layer, call, activation, buffers, rows, out)
            waiting = [expert for expert in waiting if expert not in buffers]
            for expert in buffers:
                self._cache.release(layer, expert)
            self._start_loads()
            self._collect(wait=False)
        self._transfer.retire(self._cache.free)
        return self._slots_kernel.combine(out, call.places(by_expert=not few), call.device_weights).to(call.x.dtype)

    def _next(self, layer: int, waiting: "list[int]", together: bool) -> "dict[int, int]":
        """Expert → buffer of what to compute now; nothing, to wait for more.

        `together`: all at once, or in parts where they do not fit at once. Else what has crossed the link, or the first
        that will: the link carries the next while it is computed.
        """
        found = {expert: self._cache.ready(layer, expert) for expert in waiting}
        ready = {expert: buffer for expert, buffer in found.items() if buffer is not None}
        if together:
            return ready if len(ready) == len(waiting) or not self._transfer.under_way else {}
        chosen = self._arena.first(list(ready.values()))
        return {expert: buffer for expert, buffer in ready.items() if buffer in chosen}

    def _launch(
        self,
        layer: int,
        call: DeviceCall,
        activation: Activation,
        buffers: "dict[int, int]",
        rows: "torch.Tensor | None",
        out: torch.Tensor,
    ) -> None:
        """Compute the experts in `buffers` into their pairs' rows of `out`: by tokens, or with `rows` by experts."""
        memory, layout = self._arena.memory, self._entries[layer].tensors
        self._arena.wait(buffers.values())
        for expert, buffer in buffers.items():
            self._table.enter(layer, expert, buffer)
        with Stopwatch(self.metrics, "compute_s"):
            if rows is None:
                by_token = out.view(*call.device_weights.shape, -1)
                self._slots_kernel.pairs(call.x, memory, call.slots(buffers), layout, activation, by_token)
            else:
                spans = [(buffer, *call.span(expert)) for expert, buffer in buffers.items()]
                self._slots_kernel.prompt(call.x, memory, spans, rows, layout, activation, out)

    def _compute_here(self, layer: int, call: DeviceCall, activation: Activation, out: torch.Tensor) -> None:
        """Compute on the CPU what was left in RAM, while the link carries the rest."""
        if not self._here:
            return
        assert call.host_x is not None
        start_s, row = self._device.clock(), torch.zeros(1, dtype=torch.int64)
        tasks = [ExpertTask(self._transfer.borrow((layer, expert)), row) for expert in self._here]
        outputs = self._kernel(call.host_x, tasks, self._entries[layer].tensors, activation)
        for expert, output in zip(self._here, outputs, strict=True):
            out[call.index[0].index(expert)] = sent(output[0], out.device)
        self._transfer.give_back()
        self.placement.computing_took((self._device.clock() - start_s) / len(self._here))

    def _count(self) -> None:
        super()._count()
        self.metrics.bytes_up = self._transfer.link.bytes_up
