"""Hits of every cache size in one pass (Mattson et al. 1970), for policies that keep the highest scores.

Where scores do not depend on what is resident, a cache of C slots always holds a subset of what one of C + 1 slots
holds: with U the set used, top_C(R_C ∪ U) ⊆ top_(C+1)(R_(C+1) ∪ U), since R_(C+1) ∪ U has at most one key more. So each
expert has one number, its stack distance: the least size at which it is resident. A set counts at once.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenroom.cache.compiled import extension

_replay = extension()


class Stack:
    """Stack distances of the experts of `layers` layers, and how often a request found each distance."""

    def __init__(self, layers: int, experts: int) -> None:
        self.order = np.full((layers, experts), -1, np.int32)
        """expert that enters at each size 1 … experts, or -1"""
        self.distance = np.zeros((layers, experts), np.int32)
        """least size that holds the expert; 0 where none does"""
        self.found = np.zeros((layers, experts + 1), np.int64)
        """requests by distance; index 0 counts first uses"""

    def feed(self, sets: "NDArray[np.uint16]", scores: "NDArray[np.float64]") -> None:
        """Requests of `sets` [n, layers, k], experts or anything ≥ `experts` for nobody; `scores` [n, layers, experts]
        as of after each."""
        if _replay is not None:
            _replay.feed_stack(
                np.ascontiguousarray(sets), np.ascontiguousarray(scores), self.order, self.distance, self.found
            )
            return
        for step in range(len(sets)):
            for layer in range(len(self.order)):
                self._feed_one(layer, sets[step, layer], scores[step, layer])

    def _feed_one(self, layer: int, used: Any, scores: Any) -> None:
        order, distance, found = self.order[layer], self.distance[layer], self.found[layer]
        pool = [int(expert) for expert in used if expert < len(order)]
        for expert in pool:
            found[distance[expert]] += 1
        requested = set(pool)
        for place, expert in enumerate(order.tolist()):
            if not pool:
                break
            if expert >= 0 and expert not in requested:
                pool.append(expert)
            best = max(pool, key=lambda candidate: (scores[candidate], -candidate))
            pool.remove(best)
            order[place], distance[best] = best, place + 1

    def hits(self) -> "NDArray[np.int64]":
        """[layers, experts + 1]: requested experts that a cache of 0 … experts slots held."""
        found = self.found.copy()
        found[:, 0] = 0
        return found.cumsum(axis=1)
