"""What an expert is worth to the cache: scores of all experts of a layer after each of its requests.

A scorer knows which experts were used, never which are resident, so one run of it serves every cache size. Its arrays
have a leading axis of lanes: one lane in the engine (`one`), all layers at once in the analysis (`update`). Arithmetic
is elementwise, with sums in a fixed order, so that both give the same bits.

Index 0 of an expert axis is nobody: expert e lies at e + 1, and padded sets hold 0. See also: `policies`, `stack`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Sets = NDArray[np.intp]
"""[lanes, n]: expert + 1, distinct within a lane, or 0 for nobody"""
Floats = NDArray[Any]

CONTEXT = (-8, -4, -2, -1, 2, 6)
"""Layers whose latest sets a scorer may see, relative to its own."""


class Scorer:
    """Base: lanes of scores that grow as higher experts appear. Subclasses fill `_observe` and list `_arrays`."""

    uses_probabilities = False
    """whether it sees the router's probabilities of all experts, where there are any"""
    needs_probabilities = False
    """whether it is much worse without them"""
    needs_context = False

    def __init__(self, lanes: int = 1, experts: int = 0) -> None:
        self.lanes, self.width = lanes, experts + 1
        self._lane = np.arange(lanes)[:, None]

    def update(self, used: Sets, context: "Sequence[Sets]" = (), probabilities: "Floats | None" = None) -> Floats:
        """Account one request per lane and return the scores [lanes, experts].

        `context`: latest sets of the layers at CONTEXT. `probabilities` [lanes, experts] of the router.
        """
        return self._observe(used, context, probabilities)[:, 1:]

    def one(
        self,
        layer: int,
        used: Sequence[int],
        recent: Mapping[int, Sequence[int]],
        probabilities: "Sequence[float] | None",
    ) -> "list[float]":
        """`update` for a single lane, from lists of experts; `recent` maps a layer to its latest set."""
        context = [to_set(recent.get(layer + step, ())) for step in CONTEXT] if self.needs_context else []
        sets = to_set(used)
        given = None
        if self.uses_probabilities and probabilities is not None:
            given = np.asarray(probabilities, np.float64)[None]
        highest = max((int(s.max()) for s in (sets, *context) if s.size), default=0)
        self._grow(max(highest + 1, 0 if given is None else given.shape[1] + 1))
        scores: list[float] = self.update(sets, context, given)[0].tolist()
        return scores

    def _grow(self, width: int) -> None:
        """Make room for more experts: what was never used scores like one that is new."""
        if width > self.width:
            self.width = max(width, min(2 * self.width, self.width + 64))
            self._widen()

    def _widen(self) -> None:
        raise NotImplementedError

    def _observe(self, used: Sets, context: "Sequence[Sets]", probabilities: "Floats | None") -> Floats:
        raise NotImplementedError


def to_set(experts: Sequence[int]) -> Sets:
    """One lane's set of `experts`."""
    return np.array([experts], np.intp) + 1


def widened(array: Floats, width: int, axes: int = 1) -> Floats:
    """`array` with its last `axes` axes grown to `width`, filled with zeros."""
    return np.pad(array, [(0, 0)] * (array.ndim - axes) + [(0, width - array.shape[-1])] * axes)


class Recency(Scorer):
    """When an expert was last used; within a set, the more valuable last. The order of LRU."""

    def __init__(self, lanes: int = 1, experts: int = 0) -> None:
        super().__init__(lanes, experts)
        self._last = np.zeros((lanes, self.width))
        self._now = 0

    def _widen(self) -> None:
        self._last = widened(self._last, self.width)

    def _observe(self, used: Sets, context: "Sequence[Sets]", probabilities: "Floats | None") -> Floats:
        count = used.shape[1]
        self._last[self._lane, used] = np.arange(self._now + 1, self._now + count + 1)
        self._now += count
        return self._last


class Frequency(Scorer):
    """Decayed frequency: a use counts 1 and halves every `half_life` requests of the layer."""

    def __init__(self, lanes: int = 1, experts: int = 0, half_life: float = 8.0) -> None:
        super().__init__(lanes, experts)
        self._decay = 0.5 ** (1.0 / half_life)
        self._counts = np.zeros((lanes, self.width))

    def _widen(self) -> None:
        self._counts = widened(self._counts, self.width)

    def _observe(self, used: Sets, context: "Sequence[Sets]", probabilities: "Floats | None") -> Floats:
        self._counts *= self._decay
        self._counts[self._lane, used] += 1.0
        return self._counts


class FrequencyAge(Scorer):
    """Frequency ÷ age: a slowly decayed count over the requests since the last use."""

    def __init__(self, lanes: int = 1, experts: int = 0, half_life: float = 64.0) -> None:
        super().__init__(lanes, experts)
        self._frequency = Frequency(lanes, experts, half_life)
        self._age = np.ones((lanes, self.width))

    def _widen(self) -> None:
        self._frequency._grow(self.width)
        self._age = widened(self._age, self.width)
        self._age[self._age == 0.0] = 1.0

    def _observe(self, used: Sets, context: "Sequence[Sets]", probabilities: "Floats | None") -> Floats:
        self._age += 1.0
        self._age[self._lane, used] = 1.0
        counts = self._frequency._observe(used, context, probabilities)
        return counts[:, : self.width] / self._age


class Probability(Scorer):
    """Decayed sum of the router's probabilities of all experts, not only of those it chose.

    Without probabilities a use counts 1, shared by the set: the decayed frequency.
    """

    uses_probabilities = needs_probabilities = True

    def __init__(self, lanes: int = 1, experts: int = 0, half_life: float = 8.0) -> None:
        super().__init__(lanes, experts)
        self._decay = 0.5 ** (1.0 / half_life)
        self._sums = np.zeros((lanes, self.width))

    def _widen(self) -> None:
        self._sums = widened(self._sums, self.width)

    def _observe(self, used: Sets, context: "Sequence[Sets]", probabilities: "Floats | None") -> Floats:
        self._sums *= self._decay
        if probabilities is None:
            self._sums[self._lane, used] += 1.0
        else:
            self._sums[:, 1 : probabilities.shape[1] + 1] += probabilities
        return self._sums
