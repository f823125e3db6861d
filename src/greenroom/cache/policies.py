"""Eviction policies: after each use of a *set* of experts, which ones keep a slot.

A policy sees one group of slots (one layer, or all layers when they share), never bytes or buffers.
It is told the experts used, least valuable first, and answers with the keys that stay resident. It may
decline to keep what was just used. What stays depends on the sequence of requests and their hints alone.
See also: `core`, which turns the answer into loads; `scores`, which most policies rank experts by.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from greenroom.cache.learned import CompiledLearned, learned
from greenroom.cache.scores import Frequency, FrequencyAge, Probability, Scorer

Key = tuple[int, int]
"""(MoE layer index, expert index)"""


@dataclass(frozen=True, slots=True)
class Hints:
    """What else is known when `layer` is asked for experts."""

    layer: int
    recent: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """The latest set of each layer: of this pass for the layers before, of the pass before for the others."""
    probabilities: "Sequence[float] | None" = None
    """The router's, for all experts of the layer, where the caller knows them."""


class EvictionPolicy(Protocol):
    """Keeps at most `capacity` keys.

    `uses_probabilities`: it gains by `Hints.probabilities`. `needs_probabilities`: so much that the router is to be
    computed again where they are not at hand.
    """

    capacity: int
    uses_probabilities: bool
    needs_probabilities: bool

    def update(self, used: Sequence[Key], hints: Hints) -> Collection[Key]:
        """Account one atomic use of `used` (distinct keys) and return the keys resident from now on."""
        ...


class LRU:
    """Least recently used leaves first: the paper's cache."""

    uses_probabilities = needs_probabilities = False

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._order: dict[Key, None] = {}  # oldest first

    def update(self, used: Sequence[Key], hints: Hints) -> Collection[Key]:
        """Return the `capacity` most recently used keys."""
        for key in used:
            self._order.pop(key, None)
            self._order[key] = None
        while len(self._order) > self.capacity:
            del self._order[next(iter(self._order))]
        return self._order.keys()


class S3FIFO:
    """Three first-in-first-out queues (Yang et al., SOSP 2023): newcomers pass a small queue of a tenth of the slots;
    what is used twice there, or again soon after it left, enters the main queue, where each use buys another round.

    A set counts as hits first, then as arrivals, least valuable first; an arrival may push out another of its set.
    """

    uses_probabilities = needs_probabilities = False

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._small_capacity = max(1, capacity // 10)
        self._small: dict[Key, int] = {}  # oldest first; uses since arrival, at most 3
        self._main: dict[Key, int] = {}
        self._ghost: dict[Key, None] = {}  # keys that left the small queue

    def update(self, used: Sequence[Key], hints: Hints) -> Collection[Key]:
        """Return what the small and the main queue hold."""
        if self.capacity == 0:
            return ()
        arrivals = []
        for key in used:
            queue = self._small if key in self._small else self._main
            if key in queue:
                queue[key] = min(queue[key] + 1, 3)
            else:
                arrivals.append(key)
        for key in arrivals:
            while len(self._small) + len(self._main) >= self.capacity:
                self._evict()
            if key in self._ghost:
                del self._ghost[key]
                self._main[key] = 0
            else:
                self._small[key] = 0
        return self._small.keys() | self._main.keys()

    def _evict(self) -> None:
        """One step: a key leaves, or moves to the end of the main queue."""
        if self._small and (len(self._small) >= self._small_capacity or not self._main):
            key = next(iter(self._small))
            if self._small.pop(key) > 1:
                self._main[key] = 0
                return
            self._ghost[key] = None
            if len(self._ghost) > self.capacity - self._small_capacity:
                del self._ghost[next(iter(self._ghost))]
            return
        key = next(iter(self._main))
        uses = self._main.pop(key)
        if uses > 0:
            self._main[key] = uses - 1


class Scored:
    """Keeps the keys of the highest scores among residents and those just used; of equal ones the lower index.

    Each layer has a scorer of its own, whose clock is the layer's requests: a half-life means tokens in a shared
    group, too.
    """

    def __init__(self, capacity: int, scorer: "type[Scorer] | type[CompiledLearned]") -> None:
        self.capacity = capacity
        self._scorer = scorer
        self.uses_probabilities, self.needs_probabilities = scorer.uses_probabilities, scorer.needs_probabilities
        self._layers: dict[int, Scorer | CompiledLearned] = {}
        self._scores: dict[int, Sequence[float]] = {}  # each layer's as of its last request
        self._resident: dict[Key, None] = {}

    def update(self, used: Sequence[Key], hints: Hints) -> Collection[Key]:
        """Return the `capacity` keys of the highest scores."""
        layer = hints.layer
        if layer not in self._layers:
            self._layers[layer] = self._scorer()
        self._scores[layer] = self._layers[layer].one(
            layer, [expert for _, expert in used], hints.recent, hints.probabilities
        )
        self._resident |= dict.fromkeys(used)
        while len(self._resident) > self.capacity:
            del self._resident[max(self._resident, key=self._worthless)]
        return self._resident.keys()

    def _worthless(self, key: Key) -> "tuple[float, Key]":
        layer, expert = key
        return -self._scores[layer][expert], key


def _scored(scorer: "Callable[[], type[Scorer] | type[CompiledLearned]]") -> Callable[[int], EvictionPolicy]:
    return lambda capacity: Scored(capacity, scorer())


POLICIES: dict[str, Callable[[int], EvictionPolicy]] = {
    "lru": LRU,
    "lfu": _scored(lambda: Frequency),
    "s3fifo": S3FIFO,
    "frequency-age": _scored(lambda: FrequencyAge),
    "probability": _scored(lambda: Probability),
    "learned": _scored(learned),
}
"""Name on the command line → constructor taking the capacity in slots."""
