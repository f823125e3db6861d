"""Eviction policies: after each use of a *set* of experts, which ones keep a slot.

A policy sees one group of slots (one layer, or all layers when they share), never bytes or buffers.
It is told the experts used, least valuable first, and answers with the keys that stay resident. It may
decline to keep what was just used. See also: `core`, which turns the answer into loads.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

Key = tuple[int, int]
"""(MoE layer index, expert index)"""


class EvictionPolicy(Protocol):
    """Keeps at most `capacity` keys."""

    capacity: int

    def update(self, used: Sequence[Key]) -> Collection[Key]:
        """Account one atomic use of `used` (distinct keys) and return the keys resident from now on."""
        ...


class LRU:
    """Least recently used leaves first: the paper's cache."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._order: dict[Key, None] = {}  # oldest first

    def update(self, used: Sequence[Key]) -> Collection[Key]:
        """Return the `capacity` most recently used keys."""
        for key in used:
            self._order.pop(key, None)
            self._order[key] = None
        while len(self._order) > self.capacity:
            del self._order[next(iter(self._order))]
        return self._order.keys()


class LFU:
    """Decayed frequency: each use counts 1 and halves every `half_life` uses of the group; may bypass."""

    def __init__(self, capacity: int, half_life: float = 16.0) -> None:
        self.capacity = capacity
        self._decay = 0.5 ** (1.0 / half_life)
        self._now = 0
        self._scores: dict[Key, tuple[float, int]] = {}  # score as of the use numbered in the second field
        self._resident: set[Key] = set()

    def update(self, used: Sequence[Key]) -> Collection[Key]:
        """Return the `capacity` keys of the highest decayed count among residents and `used`."""
        self._now += 1
        for key in used:
            self._scores[key] = (self._score(key) + 1.0, self._now)
        candidates = self._resident.union(used)
        ranked = sorted(candidates, key=lambda key: (self._score(key), self._scores[key][1], key), reverse=True)
        self._resident = set(ranked[: self.capacity])
        return self._resident

    def _score(self, key: Key) -> float:
        score, then = self._scores.get(key, (0.0, self._now))
        return float(score * self._decay ** (self._now - then))


POLICIES: dict[str, Callable[[int], EvictionPolicy]] = {"lru": LRU, "lfu": LFU}
"""Name on the command line → constructor taking the capacity in slots."""
