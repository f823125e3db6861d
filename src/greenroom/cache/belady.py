"""Belady's optimum with bypass: keep what is used again soonest, and what was just used only if it is among that."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Belady:
    """Scores that rank experts by their next use, for one whole trace `sets` [n, layers, k] of `experts` experts.

    Anything ≥ `experts` in `sets` is nobody. Holds [n, layers, k] numbers, and yields scores in blocks.
    """

    def __init__(self, sets: "NDArray[np.uint16]", experts: int) -> None:
        steps, layers, _ = sets.shape
        self._lane = np.arange(layers)[:, None]
        self._used = np.minimum(sets, experts).astype(np.intp)
        self._next = np.empty(sets.shape)  # minus the number of the request that uses it next; −∞ for never
        coming = np.full((layers, experts + 1), -np.inf)
        for step in range(steps - 1, -1, -1):
            self._next[step] = coming[self._lane, self._used[step]]
            coming[self._lane, self._used[step]] = -float(step)
        self._now = np.full((layers, experts + 1), -np.inf)
        self._step = 0

    def scores(self, count: int) -> "NDArray[Any]":
        """Scores [count, layers, experts] after each of the next `count` requests."""
        block = np.empty((count, *self._now.shape))
        for row in block:
            self._now[self._lane, self._used[self._step]] = self._next[self._step]
            row[:] = self._now
            self._step += 1
        return block[:, :, :-1]
