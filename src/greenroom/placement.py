"""Where to compute the experts that a device misses: move them there, or compute them on the CPU where their bytes lie.

A pure decision from live timings: seconds in, a number of experts out. Moving and computing run beside each other, so a
layer's misses are split so that both end together. Either way's time may change at any moment (another process, a
throttled link), and a way that is not taken is not timed: so each is tried again now and then (a shadow measurement),
and a known way is given up only when the other is better by a margin (hysteresis).
"""

import dataclasses

from greenroom.smoothing import smoothed

MARGIN = 0.1
"""A split is changed when the new one saves this share of the time."""
RETRY = 64
"""Decisions after which a way that was not taken is tried with one expert; doubled by each try that does not pay, up to
`RETRY_MOST`."""
RETRY_MOST = 1024
_WEIGHT = 0.25
"""Of the latest time in the smoothed one."""


def best_split(misses: int, move_s: float, compute_s: float, queued_s: float = 0.0) -> int:
    """How many of `misses` experts to compute so that the last is ready soonest, the fewest of equals.

    `queued_s`: what the link has to carry before. Moving n takes queued_s + n · move_s where n > 0.
    """
    # moving takes less time and computing more with every expert computed: the best is where the two lines cross
    crossing = (queued_s + misses * move_s) / max(move_s + compute_s, 1e-30)
    near = {min(max(int(crossing) + step, 0), misses) for step in (0, 1)} | {0, misses}
    return min(sorted(near), key=lambda computed: split_s(misses, computed, move_s, compute_s, queued_s))


def split_s(misses: int, computed: int, move_s: float, compute_s: float, queued_s: float = 0.0) -> float:
    """Seconds until the last of `misses` experts is ready, where `computed` of them are computed."""
    moved = misses - computed
    return max(queued_s + moved * move_s if moved else 0.0, computed * compute_s)


@dataclasses.dataclass(slots=True)
class _Way:
    """One way's time for one expert, smoothed, and how long it was not timed."""

    seconds: float | None = None
    idle: int = 0
    retry: int = RETRY
    stale: bool = False

    def time(self, seconds: float) -> None:
        """It took so long."""
        known = self.seconds
        changed = known is None or not known / 2 < seconds < known * 2
        if changed:
            self.retry = RETRY
        # a time far off says that something has changed, one after a while that what is known is old: believe it
        trusted = 1.0 if changed or self.stale else _WEIGHT
        self.seconds = smoothed(known, seconds, trusted)
        self.idle, self.stale = 0, False


class Placement:
    """Decides for one device. With `enabled` False every expert is moved."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._move, self._compute = _Way(), _Way()
        self._shares: dict[int, int] = {}  # misses → how many were computed the last time
        self.moved, self.computed = 0, 0
        """experts so far"""

    def moving_took(self, seconds: float) -> None:
        """One expert crossed the link."""
        self._move.time(seconds)

    def computing_took(self, seconds: float) -> None:
        """One expert was computed on the CPU, its result on the way to the device included."""
        self._compute.time(seconds)

    def split(self, misses: int, most: int, queued_s: float = 0.0) -> int:
        """How many of `misses` experts (≥ 1) to compute on the CPU, at most `most`; `queued_s` is what the link carries
        before."""
        computed = min(self._split(misses, queued_s), most) if self.enabled else 0
        self.computed += computed
        self.moved += misses - computed
        return computed

    def _split(self, misses: int, queued_s: float) -> int:
        move, compute = self._move, self._compute
        if move.seconds is None:
            return 0
        if compute.seconds is None:
            return 1
        best = best_split(misses, move.seconds, compute.seconds, queued_s)
        best = self._steady(misses, best, queued_s)
        move.idle += 1
        compute.idle += 1
        if best == 0 and self._due(compute):
            return 1
        if best == misses and self._due(move):
            return misses - 1
        return best

    def _steady(self, misses: int, best: int, queued_s: float) -> int:
        """The last split of so many misses, unless the best is better by the margin."""
        assert self._move.seconds is not None and self._compute.seconds is not None
        times = self._move.seconds, self._compute.seconds, queued_s
        last = self._shares.get(misses, best)
        if split_s(misses, best, *times) >= (1 - MARGIN) * split_s(misses, last, *times):
            best = last
        self._shares[misses] = best
        return best

    def _due(self, way: _Way) -> bool:
        """Whether a way that is not taken has to be timed again."""
        if way.idle < way.retry:
            return False
        way.idle, way.retry, way.stale = 0, min(2 * way.retry, RETRY_MOST), True
        return True

    def __str__(self) -> str:
        """The decision and its reason, for people."""
        if not self.enabled:
            return "every missed expert is moved (computing on the CPU is off)"
        move, compute = self._move.seconds, self._compute.seconds
        if move is None or compute is None:
            return "every missed expert is moved (not timed yet)"
        share = self.computed / max(self.computed + self.moved, 1)
        return (
            f"{share:.0%} of missed experts computed on the CPU: {compute * 1e3:.2f} ms each there, "
            f"{move * 1e3:.2f} ms over the link"
        )
