"""The live miss-ratio curve against replays of every size, and the division of a budget against exhaustion."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom.cache import ExpertCache, replay
from greenroom.cache.curve import PRIOR, HitCounts, MissRatioCurve, divide
from greenroom.cache.simulate import hits_by_size

REQUESTS = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 6), min_size=1, max_size=4, unique=True)), max_size=60
)


@settings(max_examples=100, deadline=None)
@given(REQUESTS)
def test_watching_all_equals_a_replay_of_every_size(requests):
    curve = MissRatioCurve(3, sample=1)
    for layer, experts in requests:
        curve.feed(layer, experts)
    for size in range(8):
        cache = ExpertCache(layers=3, capacities=[size] * 3, staging=1, validate=True)
        found = list(zip(requests, replay(cache, requests), strict=True))
        for layer in range(3):
            hits = [len(access.hits) for (asked, _), access in found if asked == layer]
            wanted = sum(len(experts) for asked, experts in requests if asked == layer)
            assert curve.counts.hit_rate(layer, size) == (sum(hits) / wanted if wanted else 0.0)
    assert sum(curve.counts.requested) == sum(len(experts) for _, experts in requests)


def test_the_comparison_can_fail():
    """Negative control: one request less, and the curve is another."""
    one, other = MissRatioCurve(1, sample=1), MissRatioCurve(1, sample=1)
    for expert in (0, 1, 0, 1):
        one.feed(0, [expert])
    for expert in (0, 1, 1):
        other.feed(0, [expert])
    assert one.counts.rates(0, 2) == [0.0, 0.0, 0.5] != other.counts.rates(0, 2)


def drifting(tokens, layers, experts, k, seed=0):
    """Sets [tokens, layers, k] whose popular experts change slowly."""
    rng = np.random.default_rng(seed)
    taste = np.cumsum(rng.normal(size=(tokens, layers, experts)) * 0.2, axis=0)
    return np.argsort(-(taste + rng.gumbel(size=taste.shape)), axis=2)[:, :, :k]


def test_a_sample_of_the_layers_estimates_all():
    """Within 0.03, measured 0.01, which is less than one slot more or less makes."""
    sets = drifting(3000, 12, 16, 2)
    curve = MissRatioCurve(12, sample=4, period=64, warmup=16)
    for row in sets.tolist():
        for layer, experts in enumerate(row):
            curve.feed(layer, experts[::-1])
    exact = hits_by_size("lru", sets, 16, range(17)) / (len(sets) * 2)
    mine = np.array([curve.counts.rates(layer, 16) for layer in range(12)])
    assert sum(curve.counts.requested) < 0.25 * sets.size
    assert np.abs(mine.mean(axis=0) - exact.mean(axis=0)).max() < 0.03
    assert np.abs(np.diff(exact.mean(axis=0))).max() > 0.1  # negative control: sizes differ by more than the tolerance


def test_a_short_run_is_exact():
    """The first period watches all layers, with nothing thrown away."""
    sets = drifting(64, 5, 8, 2)
    sampled, exact = MissRatioCurve(5, sample=4, period=64, warmup=16), MissRatioCurve(5, sample=1)
    for row in sets.tolist():
        for layer, experts in enumerate(row):
            sampled.feed(layer, experts)
            exact.feed(layer, experts)
    assert all(sampled.counts.rates(layer, 8) == exact.counts.rates(layer, 8) for layer in range(5))
    assert exact.counts.rates(0, 8) != exact.counts.rates(1, 8)


def test_a_layer_not_watched_yet_has_the_mean():
    curve = MissRatioCurve(2, sample=2, period=64, warmup=0)
    for expert in (0, 1, 0, 1):
        curve.feed(0, [expert])
    assert curve.counts.rates(1, 3) == curve.counts.rates(0, 3) == [0.0, 0.0, 0.5, 0.5]
    assert HitCounts(2).rates(0, 1) == [0.0, 0.0]


def test_a_layer_hardly_watched_leans_on_the_mean():
    counts = HitCounts(2)
    counts.requested, counts.found = [PRIOR, 9 * PRIOR], [[PRIOR], [0.0, 9 * PRIOR]]
    assert counts.rates(0, 2) == pytest.approx([0.0, 0.55, 1.0])  # half its own 1.0, half the mean 0.1
    assert counts.rates(1, 2) == pytest.approx([0.0, 0.01, 1.0])
    assert counts.hit_rate(0, 1) == 1.0  # negative control: its own


def test_counts_add_up():
    one, other = HitCounts(2), HitCounts(2)
    one.requested, one.found = [4.0, 0.0], [[1.0, 2.0], []]
    other.requested, other.found = [2.0, 3.0], [[1.0], [0.0, 0.0, 3.0]]
    one.add(other)
    assert (one.requested, one.found) == ([6.0, 3.0], [[2.0, 2.0], [0.0, 0.0, 3.0]])
    one.scale(0, 0.5)
    assert (one.requested, one.found) == ([3.0, 3.0], [[1.0, 1.0], [0.0, 0.0, 3.0]])


@pytest.mark.parametrize("bad", [{"sample": 0}, {"period": 0}, {"warmup": -1}, {"period": 8, "warmup": 8}])
def test_bad_settings(bad):
    with pytest.raises(ValueError):
        MissRatioCurve(4, **bad)


def most(gains, slots):
    choices = itertools.product(*(range(len(curve)) for curve in gains))
    return max(sum(curve[n] for curve, n in zip(gains, given, strict=True)) for given in choices if sum(given) <= slots)


RISES = st.lists(st.integers(0, 20), max_size=5)


@settings(max_examples=200, deadline=None)
@given(st.lists(RISES, min_size=1, max_size=3), st.integers(0, 16))
def test_concave_curves_are_divided_best(rises, budget):
    gains = [[0, *itertools.accumulate(sorted(rise, reverse=True))] for rise in rises]
    slots = divide(gains, budget)
    assert sum(slots) == min(budget, sum(len(curve) - 1 for curve in gains))  # no slot is left that could serve
    assert sum(curve[n] for curve, n in zip(gains, slots, strict=True)) == most(gains, budget)


@settings(max_examples=200, deadline=None)
@given(st.lists(RISES, min_size=1, max_size=3), st.integers(0, 16))
def test_any_curves_are_divided_without_rest(rises, budget):
    gains = [[0, *itertools.accumulate(rise)] for rise in rises]
    slots = divide(gains, budget)
    assert all(0 <= n < len(curve) for n, curve in zip(slots, gains, strict=True))
    assert sum(slots) == min(budget, sum(len(curve) - 1 for curve in gains))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 40))
def test_nothing_known_is_divided_evenly(experts, budget):
    slots = divide([[0.0] * (count + 1) for count in experts], budget)
    for n, count in zip(slots, experts, strict=True):
        assert n == count or n >= max(slots) - 1  # only a full layer has fewer than the others


def test_division_by_hand():
    steep, flat = [0, 10, 19, 27], [0, 2, 3, 3]
    assert divide([steep, flat], 4) == [3, 1]
    assert divide([[0, 0, 30], [0, 10, 15]], 2) == [2, 0]  # over the step where one slot alone gains nothing
    assert divide([[0, 0, 0], [0, 0, 0]], 2) == [1, 1]  # nothing known: evenly
    assert divide([], 5) == []
