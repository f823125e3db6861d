"""The live miss-ratio curve: what more or fewer slots would do to the hit rate, and how to divide them.

Stack distances of an LRU cache, taken while the model runs (Mattson et al. 1970), for a sample of the layers at a time,
so that the cost stays a fraction of a request's. Which layers are watched changes every `period` requests of a layer.
See also: `stack`, the same for any policy on a recorded trace.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(slots=True)
class _Layer:
    order: "list[int]" = field(default_factory=list)
    """experts, the most recently used first; a set in one piece, the most valuable first"""
    found: "list[float]" = field(default_factory=list)
    """uses by the number of slots that would have held the expert, less one"""
    requested: float = 0.0
    """experts of the requests that were watched"""
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
        self._layers = [_Layer() for _ in range(layers)]
        self._sample, self._period, self._warmup = min(sample, layers), period, warmup

    def feed(self, layer: int, experts: Sequence[int]) -> None:
        """A request of `layer` for distinct `experts`, least valuable first."""
        watched = self._layers[layer]
        turn, place = divmod(watched.seen, self._period)
        watched.seen += 1
        if turn == 1 and place == 0:  # from now on a sample: what was seen of all counts as one, too
            watched.requested /= self._sample
            watched.found = [uses / self._sample for uses in watched.found]
        if turn and (layer + turn) % self._sample:
            return
        used = set(experts)
        if self._sample == 1 or turn == 0 or place >= self._warmup:
            watched.requested += len(used)
            for distance, expert in enumerate(watched.order):
                if expert in used:
                    watched.found[distance] += 1
        watched.order = [*reversed(experts), *[expert for expert in watched.order if expert not in used]]
        watched.found.extend([0] * (len(watched.order) - len(watched.found)))

    def hit_rate(self, layer: int, slots: int) -> float:
        """Share of the layer's requested experts that `slots` slots would have held; 0 before anything was watched."""
        watched = self._layers[layer]
        return sum(watched.found[:slots]) / watched.requested if watched.requested else 0.0

    def rates(self, layer: int, most: int) -> "list[float]":
        """Hit rates of 0 … `most` slots. A layer not watched yet has the mean of those that were."""
        if self._layers[layer].requested:
            return [self.hit_rate(layer, slots) for slots in range(most + 1)]
        known = [number for number, other in enumerate(self._layers) if other.requested]
        return [sum(self.hit_rate(n, slots) for n in known) / max(len(known), 1) for slots in range(most + 1)]

    @property
    def requested(self) -> float:
        """Experts of the requests that were counted: what the estimate rests on."""
        return sum(watched.requested for watched in self._layers)


def divide(gains: Sequence[Sequence[float]], sizes: Sequence[int], budget: int) -> "list[int]":
    """Slots per layer that a budget of bytes holds and that gain most.

    `gains[l][n]`: what n slots give layer l, from n = 0 to all its experts, for example its hit rate times its
    requests; `sizes[l]`: bytes of a slot. Slots are given one by one, by gain per byte along the least concave curve
    above `gains`; among equals to the layer that has fewest. Where curves are concave and sizes equal, nothing gains
    more.
    """
    offers = [
        (-gain / size, slot, layer)
        for layer, (curve, size) in enumerate(zip(gains, sizes, strict=True))
        for slot, gain in enumerate(_concave_steps(curve))
    ]
    slots = [0] * len(gains)
    for _, _, layer in sorted(offers):
        if sizes[layer] <= budget:
            slots[layer] += 1
            budget -= sizes[layer]
    return slots


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
