"""A scorer that learns from routing while it runs, and its compiled twin, which gives the same bits.

See also: `scores`, what a scorer is.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from greenroom.cache.compiled import extension
from greenroom.cache.scores import CONTEXT, Floats, Scorer, Sets, widened


class Learned(Scorer):
    """A linear predictor of γ^d, d the requests until an expert is next used; it learns while it runs.

    Two parts are added. Decayed counts, whose weights start alike for all models and move for each expert; where the
    router's probabilities of all experts are given, a use counts as one in its own request, and from the next one on
    each expert counts with its probability, times the size of the set. And one
    weight for each pair of (expert seen in a set of the context, expert of this layer), by normalised least mean
    squares, from zero. The context is this request's set, the one before, and the latest sets of the layers at
    CONTEXT: what a token chose elsewhere tells what it is, and what it is tells what comes next. The target of a
    request is known `HORIZON` requests later.
    """

    needs_context = True
    uses_probabilities = True
    HORIZON = 8
    GAMMA = 0.75
    RATE = 0.04
    COUNT_RATE = 0.0005
    DECAYS = tuple(0.5 ** (1.0 / half_life) for half_life in (2.0, 8.0, 64.0))
    SCALES = (1.0, 0.3, 0.05)
    """of the counts, so that one rate suits all"""
    WEIGHTS = (0.06, 0.09, 0.09)

    def __init__(self, lanes: int = 1, experts: int = 0) -> None:
        super().__init__(lanes, experts)
        self._decays, self._scales, self._start = (
            np.array(values)[:, None, None] for values in (self.DECAYS, self.SCALES, self.WEIGHTS)
        )
        self._counts = np.zeros((len(self.DECAYS), lanes, self.width))
        self._moved = np.zeros_like(self._counts)  # of the counts' weights, since the start
        self._pairs = np.zeros((lanes, 2 + len(CONTEXT), self.width, self.width), np.float32)
        self._used: deque[Sets] = deque(maxlen=self.HORIZON + 1)
        self._seen: deque[_Seen] = deque()

    def _widen(self) -> None:
        self._counts, self._moved = widened(self._counts, self.width), widened(self._moved, self.width)
        self._pairs = widened(self._pairs, self.width, axes=2)
        for seen in self._seen:
            seen.counts, seen.scores = widened(seen.counts, self.width), widened(seen.scores, self.width)

    def _observe(self, used: Sets, context: "Sequence[Sets]", probabilities: "Floats | None") -> Floats:
        self._counts *= self._decays
        self._counts[:, self._lane, used] += self._scales
        before = self._used[-1] if self._used else used[:, :0]
        self._used.append(used)
        if len(self._seen) == self.HORIZON:
            self._learn(self._seen.popleft())
        sets = (used, before, *context)
        slots = np.repeat(np.arange(len(sets)), [s.shape[1] for s in sets])
        rows = np.concatenate(sets, axis=1)
        scores: Floats = ((self._start + self._moved) * self._counts).sum(0)
        scores += self._pairs[self._lane, slots, rows].sum(1)
        self._seen.append(_Seen(slots, rows, self._counts.copy(), scores))
        if probabilities is not None:
            sizes = (used > 0).sum(1)[:, None]
            self._counts[:, self._lane, used] -= self._scales
            self._counts[:, :, 1 : probabilities.shape[1] + 1] += self._scales * (sizes * probabilities)
        return scores

    def _learn(self, seen: "_Seen") -> None:
        """Move the weights of a past request towards its target, known now."""
        error = self._target(seen.scores) - seen.scores
        self._moved += seen.counts * (self.COUNT_RATE * error)
        active = np.maximum((seen.rows > 0).sum(1), 1)
        step = (self.RATE / active)[:, None] * error
        self._pairs[self._lane, seen.slots, seen.rows] += step[:, None].astype(np.float32)
        self._pairs[:, :, 0] = 0.0  # nobody tells nothing

    def _target(self, like: Floats) -> Floats:
        later = list(self._used)[:0:-1]  # from the last request to the one after; the nearest is written last
        powers = np.repeat(self.GAMMA ** np.arange(len(later), 0, -1), [s.shape[1] for s in later])
        target = np.zeros_like(like)
        target[self._lane, np.concatenate(later, axis=1)] = powers
        return target


@dataclass(slots=True)
class _Seen:
    """A request whose target is not known yet."""

    slots: "NDArray[np.intp]"
    """[n] which set of the context"""
    rows: Sets
    counts: Floats
    scores: Floats


_replay = extension()


class CompiledLearned:
    """`Learned` for one layer, where there is an extension: some microseconds a request."""

    uses_probabilities, needs_probabilities = Learned.uses_probabilities, Learned.needs_probabilities

    def __init__(self) -> None:
        assert _replay is not None
        self._learned = _replay.Learned(len(CONTEXT), *constants())

    def one(
        self,
        layer: int,
        used: Sequence[int],
        recent: Mapping[int, Sequence[int]],
        probabilities: "Sequence[float] | None",
    ) -> "list[float]":
        """As `Scorer.one`."""
        context = [recent.get(layer + step, ()) for step in CONTEXT]
        scores: list[float] = self._learned.observe(used, context, probabilities or ())
        return scores


def constants() -> "tuple[list[float], list[float], list[float], list[float], float, float]":
    """Of the compiled twin: decays, scales and first weights of the counts; γ^1 … γ^HORIZON; both rates."""
    powers = [Learned.GAMMA**distance for distance in range(1, Learned.HORIZON + 1)]
    return (
        list(Learned.DECAYS),
        list(Learned.SCALES),
        list(Learned.WEIGHTS),
        powers,
        Learned.RATE,
        Learned.COUNT_RATE,
    )


def learned() -> "type[Learned] | type[CompiledLearned]":
    """The faster of the two that there is."""
    return CompiledLearned if _replay is not None else Learned
