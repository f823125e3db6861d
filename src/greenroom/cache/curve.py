"""The live miss-ratio curve: what more or fewer slots would do to the hit rate, and how to divide them.

Stack distances of an LRU cache, taken while the model runs (Mattson et al. 1970), for a sample of the layers at a time,
so that the cost stays a fraction of a request's. Which layers are watched changes every `period` requests of a layer.
See also: `stack`, the same for any policy on a recorded trace.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice, pairwise, repeat, zip_longest

PRIOR = 1000.0
"""Requested experts that the mean of all layers counts for beside a layer's own: what little was watched of one is
mostly noise, and slots divided by it would miss more than equal ones."""


class HitCounts:
    """Uses of each layer's experts by the number of LRU slots that would have held them.

    `requested[l]`: experts requested of layer l; `found[l][n]`: those that n + 1 slots would have held and n would not.
    """

    def __init__(self, layers: int) -> None:
        self.requested = [0.0] * layers
        self.found: list[list[float]] = [[] for _ in range(layers)]

    def hit_rate(self, layer: int, slots: int) -> float:
        """Share of the layer's requested experts that `slots` slots would have held; 0 before anything was counted."""
        return sum(self.found[layer][:slots]) / self.requested[layer] if self.requested[layer] else 0.0

    def rates(self, layer: int, most: int) -> "list[float]":
        """Hit rates of 0 … `most` slots, drawn towards the mean of all layers as if PRIOR more had been seen of it."""
        own, total = self.requested[layer], sum(self.requested)
        mean = _running_sums(map(sum, zip_longest(*self.found, fillvalue=0.0)), most)
        mine = _running_sums(self.found[layer], most)
        if not total:
            return mine
        return [(hits + PRIOR * everyones / total) / (own + PRIOR) for hits, everyones in zip(mine, mean, strict=True)]

    def add(self, other: "HitCounts") -> None:
        """Count what `other` counted, too."""
        for layer, found in enumerate(other.found):
            self.requested[layer] += other.requested[layer]
            self.found[layer] = list(map(sum, zip_longest(self.found[layer], found, fillvalue=0.0)))

    def scale(self, layer: int, by: float) -> None:
        """Let what was counted of a layer weigh `by` times as much."""
        self.requested[layer] *= by
        self.found[layer] = [uses * by for uses in self.found[layer]]


def _running_sums(found: Iterable[float], most: int) -> "list[float]":
    """Sums of the first 0 … `most` numbers; what is missing is 0."""
    return list(accumulate(islice(chain(found, repeat(0.0)), most), initial=0.0))


@dataclass(slots=True)
class _Layer:
    order: "list[int]" = field(default_factory=list)
    """experts, the most recently used first; a set in one piece, the most valuable first"""
    seen: int = 0
    """requests, watched or not"""


class MissRatioCurve:
    """Hit rates of LRU for every number of slots per layer, from the requests of a running model.

    All layers are watched for their first `period` requests, so that short runs say something; then `sample`: one of so
    many at a time, and 1 goes on watching all, and is exact. A layer that has not been watched for a while knows an old
    order: its first `warmup` requests after that update it and are not counted.
    """

    def __init__(self, layers: int, *, sample: int = 8, period: int = 128, warmup: int = 32) -> None:
        if layers < 1 or sample < 1 or period < 1 or warmup < 0 or (sample > 1 and warmup >= period):
            raise ValueError(f"{layers=} {sample=} {period=} {warmup=}: need at least 1, and a warmup within a period")
        self.counts = HitCounts(layers)
        """what was watched"""
        self._layers = [_Layer() for _ in range(layers)]
        self._sample, self._period, self._warmup = min(sample, layers), period, warmup

    def feed(self, layer: int, experts: Sequence[int]) -> None:
        """A request of `layer` for distinct `experts`, least valuable first."""
        watched = self._layers[layer]
        turn, place = divmod(watched.seen, self._period)
        watched.seen += 1
        if turn == 1 and place == 0:  # from now on a sample: what was seen of all counts as one, too
            self.counts.scale(layer, 1 / self._sample)
        if turn and (layer + turn) % self._sample:
            return
        used, found = set(experts), self.counts.found[layer]
        if self._sample == 1 or turn == 0 or place >= self._warmup:
            self.counts.requested[layer] += len(used)
            for distance, expert in enumerate(watched.order):
                if expert in used:
                    found[distance] += 1
        watched.order = [*reversed(experts), *[expert for expert in watched.order if expert not in used]]
        found.extend([0.0] * (len(watched.order) - len(found)))


def divide(gains: Sequence[Sequence[float]], slots: int) -> "list[int]":
    """Slots per layer, `slots` in all or as many as there are experts, that gain most.

    `gains[l][n]`: what n slots give layer l, from n = 0 to all its experts, for example its hit rate. Slots are given
    one by one, by gain along the least concave curve above `gains`; among equals to the layer that has fewest. Where
    curves are concave, nothing gains more.
    """
    offers = [
        (-gain, slot, layer) for layer, curve in enumerate(gains) for slot, gain in enumerate(_concave_steps(curve))
    ]
    given = [0] * len(gains)
    for _, _, layer in sorted(offers)[:slots]:
        given[layer] += 1
    return given


def _concave_steps(curve: Sequence[float]) -> "list[float]":
    """The rise of each slot along the least concave curve above `curve`; it never grows."""
    corners: list[int] = []
    for point, gain in enumerate(curve):
        while (
            len(corners) > 1
            and _slope(curve, corners[-2], corners[-1]) * (point - corners[-1]) <= gain - curve[corners[-1]]
        ):
            corners.pop()
        corners.append(point)
    return [_slope(curve, start, stop) for start, stop in pairwise(corners) for _ in range(start, stop)]


def _slope(curve: Sequence[float], start: int, stop: int) -> float:
    return (curve[stop] - curve[start]) / (stop - start)
