"""Whether loading guessed experts pays: a pure decision from what guesses were worth and what the link had left.

A guess that comes true saves the time for which the link would have stood idle; one that does not delays the next
demand by the rest of its copy. So the j-th guess of a layer pays if

    right_j · overlap_j > (1 − right_j) · (move − overlap_j)

where right_j is the share of j-th guesses that came true, `move` the seconds of one copy, and overlap_j the part of the
j-th copy that fits into the link's idle time: the byte budget. What is known goes stale, so some guesses are compared
with what is then requested though they are not loaded.
"""

from collections.abc import Sequence

WATCH = 16
"""Where nothing is loaded, one call in so many is guessed and compared."""
_WEIGHT = 1 / 32
"""Of the latest comparison, or interval, in the smoothed one."""


class Speculation:
    """Decides how many of up to `most` ranked guesses a layer's are loaded."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._right = [1.0] * most  # optimistic: a guess has to be tried to be known
        self._idle_s: float | None = None
        self._move_s = 0.0
        self._guesses: dict[int, list[int]] = {}
        self._calls = 0

    def count(self) -> int:
        """How many guesses to load."""
        if self._idle_s is None:
            return self.most
        for rank in range(self.most):
            overlap_s = min(max(self._idle_s - rank * self._move_s, 0.0), self._move_s)
            right = self._right[rank]
            if right * overlap_s <= (1 - right) * (self._move_s - overlap_s):
                return rank
        return self.most

    def watches(self) -> bool:
        """Whether to guess for this call at all."""
        self._calls += 1
        return self.count() > 0 or (self.most > 0 and self._calls % WATCH == 0)

    def guessed(self, layer: int, ranked: "Sequence[int]") -> None:
        """The guesses for a layer ahead, likeliest first, loaded or not."""
        self._guesses[layer] = list(ranked)

    def requested(self, layer: int, experts: "Sequence[int]") -> None:
        """What the layer then wanted."""
        for rank, expert in enumerate(self._guesses.pop(layer, [])[: self.most]):
            self._right[rank] += ((expert in experts) - self._right[rank]) * _WEIGHT

    def link_was(self, idle_s: float, move_s: float) -> None:
        """Between two layers the link had nothing to do for `idle_s`; one expert takes `move_s`."""
        known = self._idle_s
        self._idle_s = idle_s if known is None else known + (idle_s - known) * _WEIGHT
        self._move_s = move_s

    def __str__(self) -> str:
        """The decision and its reason, for people; empty where nothing is guessed."""
        if not self.most:
            return ""
        if self._idle_s is None:
            return f"{self.most} guesses a layer"
        right = ", ".join(f"{share:.0%}" for share in self._right)
        reason = (
            f"{right} come true, the link is idle for {self._idle_s * 1e3:.2f} ms a layer and an expert takes "
            f"{self._move_s * 1e3:.2f} ms"
        )
        count = self.count()
        return f"guessing is off: {reason}" if not count else f"{count} of {self.most} guesses loaded: {reason}"
