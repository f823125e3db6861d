"""Whether loading guessed experts pays: a pure decision from what guesses were worth and what the link had left.

The link is what carries missed experts: a device's, or the disk's. A guess that comes true saves the time for which it
would have stood idle; one that does not delays the next demand by the rest of its copy. So the n-th load gains

    right · overlap − (1 − right) · (move − overlap)      seconds,

where `right` is the share of guesses of its rank that came true where the expert was not there already, `move` the
seconds of one copy, and `overlap` the part of the n-th copy that fits into the link's idle time: the byte budget. Loads
that gain are made; where they gain less than guessing itself takes, guessing is off. What is known goes stale, so some
calls are guessed all the same.
"""

import math
import sys
from collections.abc import Callable, Sequence

from greenroom.smoothing import smoothed

WATCH = 17
"""Where guessing is off, one call in so many is guessed: a prime, so that each layer's turn comes."""
_LEAST = 0.01
"""Of the time that an expert takes: guessing that gains no more a call is off."""
_WEIGHT = 1 / 32
"""Of the latest comparison, interval or gain in the smoothed one."""


class Speculation:
    """Decides which of up to `most` ranked guesses for a layer are loaded."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._right = [1.0] * most  # optimistic: a guess has to be tried to be known
        self._compared = [1] * most
        self._idle_s: float | None = None
        self._move_s = 0.0
        self._gain_s: float | None = None
        self._cost_s: float | None = None
        self._loads = 0.0  # a guessed call, smoothed
        self._guesses: dict[int, list[tuple[int, int]]] = {}  # layer → (rank, expert) of what was not there
        self._calls = 0

    @property
    def pays(self) -> bool:
        """Whether guessing gains more than it takes, as far as is known."""
        return self._gain_s is None or self._gain_s > max(self._cost_s or 0.0, _LEAST * self._move_s)

    def watches(self) -> bool:
        """Whether to guess for this call at all."""
        self._calls += 1
        return self.most > 0 and (self.pays or self._calls % WATCH == 0)

    @property
    def ranks(self) -> int:
        """How many experts of a layer may be guessed now."""
        return self.most if self.pays else 0

    def rests(self) -> int:
        """How many calls will not be guessed for, except where one of `ranks` is not there: of those, `passed` is to be
        told instead of `watches`."""
        return sys.maxsize if self.ranks or not self.most else WATCH - 1 - self._calls % WATCH

    def passed(self, calls: int, seconds: float = 0.0) -> None:
        """So many calls were not guessed for, or all that was guessed was there, which took each so long."""
        for _ in range(calls if self.ranks else 0):
            self._guessed(0, 0.0)
            self.guessing_took(seconds)
        self._calls += calls

    def choose(
        self, layer: int, guesses: "Sequence[tuple[int, list[int]]]", there: "Callable[[int, int], bool]"
    ) -> "list[tuple[int, list[int]]]":
        """Those to load of the guesses (layer ahead, experts likeliest first) made in `layer`; whether or not they are,
        what is not `there` is compared with what is then requested."""
        chosen: list[tuple[int, list[int]]] = []
        loads, gain_s = 0, 0.0
        for ahead, ranked in guesses:
            lacking = [(rank, expert) for rank, expert in enumerate(ranked) if not there(ahead, expert)]
            self._guesses[ahead] = lacking
            experts = []
            for rank, expert in lacking:
                gains_s = self._gains_s(rank, loads, ahead - layer)
                if gains_s <= 0:
                    break
                experts.append(expert)
                loads, gain_s = loads + 1, gain_s + gains_s
            chosen.append((ahead, experts))
        self._guessed(loads, gain_s)
        return chosen

    def _guessed(self, loads: int, gain_s: float) -> None:
        self._loads = smoothed(self._loads, loads, _WEIGHT)
        if self._idle_s is not None:
            self._gain_s = smoothed(self._gain_s, gain_s, _WEIGHT)

    def requested(self, layer: int, experts: "Sequence[int]") -> None:
        """What the layer then wanted."""
        for rank, expert in self._guesses.pop(layer, []):
            self._compared[rank] += 1
            weight = max(_WEIGHT, 1 / self._compared[rank])
            self._right[rank] = smoothed(self._right[rank], expert in experts, weight)

    def link_was(self, idle_s: float, move_s: float) -> None:
        """Between two layers the link had nothing to do for `idle_s`; one expert takes `move_s`."""
        self._idle_s = smoothed(self._idle_s, idle_s, _WEIGHT)
        self._move_s = move_s

    def guessing_took(self, seconds: float) -> None:
        """Guessing for one call kept the caller from computing for so long."""
        self._cost_s = smoothed(self._cost_s, seconds, _WEIGHT)

    def _gains_s(self, rank: int, before: int, layers: int) -> float:
        """What loading a guess for so many layers ahead gains, after `before` others; infinite where it is unknown."""
        if self._idle_s is None:
            return math.inf
        overlap_s = min(max(self._idle_s * layers - before * self._move_s, 0.0), self._move_s)
        right = self._right[rank]
        return right * overlap_s - (1 - right) * (self._move_s - overlap_s)

    def __str__(self) -> str:
        """The decision and its reason, for people; empty where nothing is guessed."""
        if not self.most:
            return ""
        if self._idle_s is None or self._gain_s is None:
            return f"up to {self.most} guesses a layer (not timed yet)"
        right = ", ".join(f"{share:.0%}" for share in self._right)
        reason = (
            f"of what is not there {right} come true, the link is idle for {self._idle_s * 1e3:.2f} ms a layer, an "
            f"expert takes {self._move_s * 1e3:.2f} ms; guessing gains {self._gain_s * 1e6:.0f} µs and takes "
            f"{(self._cost_s or 0.0) * 1e6:.0f}"
        )
        if not self.pays:
            return f"guessing is off: {reason}"
        return f"{self._loads:.2f} guesses a layer loaded of up to {self.most}: {reason}"
