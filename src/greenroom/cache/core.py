"""The expert cache as a pure state machine: events in, loads out.

One access of a layer goes:

    cache.expect(layer, experts)             optional: what will be missing may be read before the request is prepared
    access = cache.request(layer, experts)   what is there, what is late, what is missing
    for load in cache.issue(): ...           start these reads
    cache.guess(next_layer, ranked)          optional; issue() starts guesses when no demand is waiting
    cache.loaded(buffer)                     a read has finished
    cache.release(layer, expert)             computed: its buffer may be reused
    cache.finish()                           all experts of the access are released

or, where all experts are there, in one step: `hit` before they are computed, `used` afterwards.

Buffers are numbered 0 … slots + staging - 1 and all alike: being a slot or a staging buffer is a role, so a guess
that is used becomes resident without a copy, and its victim's buffer becomes a staging buffer.

Which experts are resident depends on the sequence of requests alone, never on when reads finish or what was
guessed: a recorded trace replays to exactly the hits of the live run.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from greenroom.cache.access import Access, Counters, Load
from greenroom.cache.policies import LRU, EvictionPolicy, Hints, Key


@dataclass(slots=True)
class _Held:
    """What a buffer holds."""

    buffer: int
    ready: bool = False
    pinned: bool = False


@dataclass(slots=True)
class _Queue:
    """Loads that wait for a buffer."""

    demand: list[Key] = field(default_factory=list)
    guesses: list[Key] = field(default_factory=list)


class ExpertCache:
    """Slots for experts, decided without knowing what an expert is.

    `capacities`: slots per group. One per layer, or a single number for one pool that all `layers` share.
    `staging`: extra buffers (≥ 1) for guesses and for experts that get no slot.
    `policy`: makes one `EvictionPolicy` per group from its capacity.
    `validate`: check all invariants after each event (on in tests).
    """

    def __init__(
        self,
        *,
        layers: int,
        capacities: Sequence[int],
        staging: int,
        policy: Callable[[int], EvictionPolicy] = LRU,
        validate: bool = False,
    ) -> None:
        if len(capacities) not in (1, layers) or min(capacities, default=-1) < 0 or staging < 1:
            raise ValueError(
                f"{layers=} {capacities=} {staging=}: need one capacity ≥ 0 per layer or in all, staging ≥ 1"
            )
        self.layers, self.capacities, self.staging = layers, tuple(capacities), staging
        self.buffers = sum(capacities) + staging
        self.counters = Counters()
        self._policies = [policy(capacity) for capacity in capacities]
        self.uses_probabilities = any(one.uses_probabilities for one in self._policies)
        """whether a policy gains by the router's probabilities"""
        self.needs_probabilities = any(one.needs_probabilities for one in self._policies)
        """whether one needs them so much that the router is to be computed again"""
        self._shared = len(self.capacities) < self.layers
        self._validate = validate
        self._free = deque(range(self.buffers))
        self._held: dict[Key, _Held] = {}
        self._guessed: dict[Key, None] = {}  # held by a guess that no request has used yet, oldest first
        self._reading: dict[int, Key | None] = {}  # buffer → key, or None where nobody wants it any more
        self._resident: list[set[Key]] = [set() for _ in capacities]
        self._queue = _Queue()
        self._active: set[Key] = set()  # requested and not yet released
        self._expected: set[Key] = set()  # held for the request that comes, which will count them as misses
        self._moved: set[Key] = set()  # came or went since they were discarded
        self._recent: dict[int, Sequence[int]] = {}  # each layer's latest set, for policies

    def expect(self, layer: int, experts: Sequence[int]) -> list[Load]:
        """The layer will be asked for `experts` next, or is found to have `used` them: loads, to be started, of what is
        missing, as far as buffers are free. Others may be `used` before it; if another request comes instead, they are
        dropped."""
        self._drop_guesses(layer, keep={(layer, expert) for expert in experts})
        lacking = [(layer, expert) for expert in experts if (layer, expert) not in self._held]
        loads = [self._start(key, speculative=False) for key in lacking[: len(self._free)]]
        self._expected.update(load.key for load in loads)
        self._check()
        return loads

    def request(
        self,
        layer: int,
        experts: Sequence[int],
        valued: "Sequence[int] | None" = None,
        probabilities: "Sequence[float] | None" = None,
    ) -> Access:
        """Ask for distinct `experts` of `layer` at once, in the order they will be computed. Ends with `finish`.

        For the policy: `valued`, the same experts, least valuable first, the order of computing by default; and
        `probabilities`, the router's for all experts of the layer.
        """
        assert not self._active, "finish the previous access first"
        needed = [(layer, expert) for expert in experts]
        self._drop_guesses(layer, keep=set(needed))
        self._drop_expected(keep=set(needed))
        access = self._classify(needed)
        self._expected.clear()
        self._decide(layer, needed, valued, probabilities)
        self._check()
        return access

    def _decide(
        self,
        layer: int,
        needed: "list[Key]",
        valued: "Sequence[int] | None",
        probabilities: "Sequence[float] | None",
    ) -> None:
        """Who has a slot now that `needed` are used; those are pinned, and queued where they are not held."""
        group = self._group(layer)
        ranked = needed if valued is None else [(layer, expert) for expert in valued]
        hints = Hints(layer, self._recent, probabilities)
        self._active = set(needed)
        before = self._resident[group]
        # after an aborted access the policy may still believe in keys whose read never finished, or that a guess holds
        after = {key for key in self._policies[group].update(ranked, hints) if key in self._active or key in before}
        self._resident[group] = after
        self._moved |= after ^ before
        self._recent[layer] = [expert for _, expert in ranked]
        for key in needed:
            self._guessed.pop(key, None)
            if key in self._held:
                self._held[key].pinned = True
        for key in before - after - self._active:
            self._discard(key)
        self._queue.demand = [key for key in needed if key not in self._held]

    def hit(
        self,
        layer: int,
        experts: Sequence[int],
        valued: Sequence[int],
        probabilities: "Sequence[float] | None" = None,
    ) -> "list[int] | None":
        """The buffers of `experts` where all are there: a whole access in one step, from request to finish, with the
        same arguments. None where something is missing; then nothing has happened."""
        buffers = self._found(layer, experts)
        if buffers is not None:
            self._use(layer, valued, probabilities)
        return buffers

    def hit_at(
        self,
        layer: int,
        valued: Sequence[int],
        buffers: Sequence[int],
        probabilities: "Sequence[float] | None" = None,
    ) -> bool:
        """The same of an access that has already read each expert from its buffer; False where they are not all there
        any more, or never were. Then nothing has happened."""
        there = self._found(layer, valued) == buffers
        if there:
            self._use(layer, valued, probabilities)
        return there

    def used(
        self,
        layer: int,
        experts: Sequence[int],
        valued: Sequence[int],
        probabilities: "Sequence[float] | None" = None,
    ) -> bool:
        """The same of an access that has been computed already, where experts were there as guesses, too, though
        another may be expected meanwhile; False where some are not there. Then nothing has happened."""
        if self.hit(layer, experts, valued, probabilities) is not None:
            return True
        if any(self.ready(layer, expert) is None for expert in experts):
            return False
        needed = [(layer, expert) for expert in experts]
        self._drop_guesses(layer, keep=set(needed))
        self._classify(needed)
        self._expected.difference_update(needed)
        self._decide(layer, needed, valued, probabilities)
        for expert in experts:
            self.release(layer, expert)
        return True

    def _found(self, layer: int, experts: Sequence[int]) -> "list[int] | None":
        """The buffers of experts that are resident and ready; None where one is not."""
        resident, held, buffers = self._resident[self._group(layer)], self._held, []
        for expert in experts:
            key = (layer, expert)
            found = held.get(key)
            if found is None or not found.ready or key not in resident:
                return None
            buffers.append(found.buffer)
        return buffers

    @property
    def moved(self) -> "set[Key]":
        """Experts that may have come or gone: `there` is to be asked again, after which they may be discarded."""
        return self._moved

    def there(self, layer: int, expert: int) -> "int | None":
        """The buffer in which `used` will find the expert, whatever other layers have used before, if no request comes
        first; None where that is not sure: where all share their slots, a guess that another layer uses may take an
        expert's."""
        if self._shared and (layer, expert) not in self._resident[0]:
            return None
        return self.ready(layer, expert)

    def _use(self, layer: int, valued: Sequence[int], probabilities: "Sequence[float] | None") -> None:
        """Account an access whose experts are all there."""
        self.counters.hits += len(valued)
        if self._guessed or self._queue.guesses:
            self._drop_guesses(layer, keep=set())
        group = self._group(layer)
        resident = self._resident[group]
        hints = Hints(layer, self._recent, probabilities)
        after = self._policies[group].update([(layer, expert) for expert in valued], hints)
        self._recent[layer] = valued
        if len(after) != len(resident):  # it let go of what was just used, or believes in what was aborted
            self._resident[group] = resident.intersection(after)
            for key in resident - self._resident[group]:
                self._discard(key)
        self._check()

    def elsewhere(self, layer: int, expert: int) -> None:
        """An expert of the active request, whose load has not been issued, is computed without being loaded. It gets no
        slot, whatever the policy said."""
        key = (layer, expert)
        self._queue.demand.remove(key)
        self._active.remove(key)
        self._resident[self._group(layer)].discard(key)
        self._check()

    def later(self, layer: int, expert: int) -> list[Load]:
        """The same, but its slot is to be filled, if it has one and a buffer is free: the load, to be started."""
        key = (layer, expert)
        if key not in self._resident[self._group(layer)] or not self._free:
            self.elsewhere(layer, expert)
            return []
        self._queue.demand.remove(key)
        self._active.remove(key)
        load = self._start(key, speculative=False)
        self._held[key].pinned = False
        self._check()
        return [Load(key, load.buffer, speculative=True)]

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """Queue a read of `experts` of `layer`, likeliest first, replacing that layer's queued guesses.

        What is resident, held or being read already is skipped. At most `staging` guesses are held at a time.
        """
        queued = [key for key in self._queue.guesses if key[0] != layer]
        queued += [(layer, expert) for expert in experts if (layer, expert) not in self._held]
        self._queue.guesses = queued
        self._check()

    def issue(self) -> list[Load]:
        """Loads to start now. Guesses follow only when every load of the active request has been issued."""
        loads = []
        while self._queue.demand and (self._free or self._reclaim_guess()):
            loads.append(self._start(self._queue.demand.pop(0), speculative=False))
        while not self._queue.demand and self._queue.guesses and self._free and self._room_to_guess():
            key = self._queue.guesses.pop(0)
            self.counters.guesses += 1
            loads.append(self._start(key, speculative=True))
        self._check()
        return loads

    def loaded(self, buffer: int) -> None:
        """A read into `buffer` has finished."""
        key = self._reading.pop(buffer)
        if key is None:
            self._free.append(buffer)
        else:
            self._held[key].ready = True
            self._moved.add(key)
        self._check()

    def ready(self, layer: int, expert: int) -> "int | None":
        """The buffer that holds the expert's bytes now, or None."""
        held = self._held.get((layer, expert))
        return held.buffer if held is not None and held.ready else None

    def holds(self, layer: int, expert: int) -> bool:
        """Whether the expert is there or being read."""
        return (layer, expert) in self._held

    @property
    def crowded(self) -> bool:
        """Whether guesses wait for a buffer."""
        return bool(self._queue.guesses)

    @property
    def reading(self) -> "set[int]":
        """Buffers that are being read into."""
        return set(self._reading)

    @property
    def free(self) -> "tuple[int, ...]":
        """Buffers that nobody needs."""
        return tuple(self._free)

    def release(self, layer: int, expert: int) -> None:
        """The expert of the active request is computed; without a slot its buffer becomes free."""
        key = (layer, expert)
        self._active.remove(key)
        self._held[key].pinned = False
        if key not in self._resident[self._group(layer)]:
            self._discard(key)
        self._check()

    def finish(self) -> None:
        """End the access: every requested expert has been released."""
        assert not self._active and not self._queue.demand, "experts are still in use"

    def abort(self) -> None:
        """Give the access up after an error: nothing stays pinned or queued; reads under way become orphans."""
        for key in list(self._held):
            held = self._held[key]
            if not held.ready or key not in self._resident[self._group(key[0])]:
                self._discard(key)
            held.pinned = False
        for group, resident in enumerate(self._resident):
            self._resident[group] = resident & self._held.keys()
        self._queue, self._active, self._expected = _Queue(), set(), set()
        self._check()

    def _classify(self, needed: list[Key]) -> Access:
        resident = self._resident[self._group(needed[0][0])] if needed else set()
        hits = tuple(key for key in needed if key in resident and key in self._held)
        guessed = [key for key in needed if key in self._held and key not in resident and key not in self._expected]
        prefetched = tuple(key for key in guessed if self._held[key].ready)
        late = tuple(key for key in guessed if not self._held[key].ready)
        misses = tuple(key for key in needed if key not in self._held or key in self._expected)
        self.counters.hits += len(hits)
        self.counters.prefetched += len(prefetched)
        self.counters.late += len(late)
        self.counters.misses += len(misses)
        return Access(hits=hits, prefetched=prefetched, late=late, misses=misses)

    def _start(self, key: Key, *, speculative: bool) -> Load:
        buffer = self._free.popleft()  # the longest free, so that what it held has been saved, if it had to be
        self._held[key] = _Held(buffer, pinned=not speculative)
        self._reading[buffer] = key
        if speculative:
            self._guessed[key] = None
        return Load(key, buffer, speculative)

    def _room_to_guess(self) -> bool:
        """A guess lives in a staging buffer: it must never take one that an unfilled slot will need."""
        unwanted = sum(key is None for key in self._reading.values())
        return len(self._guessed) + unwanted < self.staging

    def _reclaim_guess(self) -> bool:
        """Demand found no free buffer: drop one finished guess, the farthest ahead first."""
        finished = [key for key in self._guessed if self._held[key].ready]
        if finished:
            self._discard(finished[-1])
        return bool(finished)

    def _drop_guesses(self, layer: int, keep: set[Key]) -> None:
        """A layer's guesses live until the layer is requested."""
        self._queue.guesses = [key for key in self._queue.guesses if key[0] != layer]
        for key in [key for key in self._guessed if key[0] == layer and key not in keep]:
            self._discard(key)

    def _drop_expected(self, keep: set[Key]) -> None:
        for key in self._expected - keep:
            self._expected.remove(key)
            self._held[key].pinned = False
            self._discard(key)

    def _discard(self, key: Key) -> None:
        held = self._held.pop(key)
        self._moved.add(key)
        self._guessed.pop(key, None)
        if held.ready:
            self._free.append(held.buffer)
        else:
            self._reading[held.buffer] = None

    def _group(self, layer: int) -> int:
        return 0 if self._shared else layer

    def _check(self) -> None:
        if not self._validate:
            return
        used = [held.buffer for held in self._held.values()]
        unwanted = [buffer for buffer, key in self._reading.items() if key is None]
        assert sorted([*used, *self._free, *unwanted]) == list(range(self.buffers)), "a buffer is lost or doubled"
        for key, held in self._held.items():
            assert held.ready != (self._reading.get(held.buffer) == key), f"{key} is neither read nor being read"
        for capacity, resident in zip(self.capacities, self._resident, strict=True):
            assert len(resident) <= capacity, "a group holds more than its slots"
        residents = set().union(*self._resident)
        for key in residents - self._held.keys():
            assert key in self._queue.demand, f"{key} has a slot but is neither held nor asked for"
        for key, held in self._held.items():
            wanted = key in self._active or key in self._expected
            assert held.pinned == wanted, f"{key} is pinned without being requested, or the reverse"
            assert held.pinned or key in self._guessed or key in residents, f"{key} holds a buffer for no reason"
        assert self._active.issuperset(self._queue.demand), "a load is queued that nobody asked for"
        assert self._guessed.keys() <= self._held.keys() and len(self._guessed) <= self.staging, "guesses took slots"
