"""The fast replays equal the core: every policy, every size, to the last hit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom.cache import POLICIES, ExpertCache, learned, replay, simulate, stack
from greenroom.cache.simulate import OPTIMUM, hits_by_size


@st.composite
def traces(draw, most_experts=9):
    """(sets [tokens, layers, k] with nobody among them, experts, probabilities [tokens, layers, experts])"""
    experts, layers = draw(st.integers(1, most_experts)), draw(st.integers(1, 4))
    k = draw(st.integers(1, min(4, experts)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tokens = draw(st.integers(0, 40))
    liked = rng.random((layers, experts)) ** 3
    noise = rng.random((tokens, layers, experts))
    sets = np.argsort(-(liked + noise), axis=2)[:, :, :k].astype(np.uint16)
    sets[rng.random(sets.shape) < 0.1] = experts
    return sets, experts, rng.random((tokens, layers, experts)).astype(np.float16)


def through_the_core(policy, sets, experts, size, probabilities=None):
    """Hits [layers] of a replay, asked token by token, layer by layer."""
    layers = sets.shape[1]
    cache = ExpertCache(layers=layers, capacities=[size] * layers, staging=1, policy=POLICIES[policy], validate=True)
    requests = []
    for token, rows in enumerate(sets.tolist()):
        for layer, row in enumerate(rows):
            given = None if probabilities is None else probabilities[token, layer].tolist()
            requests.append((layer, [expert for expert in reversed(row) if expert < experts], given))
    hits = np.zeros(layers, np.int64)
    for (layer, *_), access in zip(requests, replay(cache, requests), strict=True):
        hits[layer] += len(access.hits)
    return hits


@settings(max_examples=150, deadline=None)
@given(traces(), st.sampled_from(sorted(POLICIES)), st.booleans(), st.booleans(), st.booleans())
def test_all_sizes_equal_a_replay_of_each(trace, policy, compiled, core_compiled, with_probabilities):
    sets, experts, probabilities = trace
    given = probabilities if with_probabilities else None
    sizes = range(experts + 1)
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(stack, "_replay", None)
            patch.setattr(simulate, "_replay", None)
        if not core_compiled:
            patch.setattr(learned, "_replay", None)
        fast = hits_by_size(policy, sets, experts, sizes, given)
        core = [through_the_core(policy, sets, experts, size, given).tolist() for size in sizes]
    assert fast.T.tolist() == core


def test_the_comparison_can_fail():
    """Negative control: with two experts of one token exchanged, some size of some policy has other hits."""
    rng = np.random.default_rng(1)
    sets = np.argsort(rng.random((60, 1, 6)), axis=2)[:, :, :2].astype(np.uint16)
    broken = sets.copy()
    broken[30, 0] = [e for e in range(6) if e not in sets[30, 0]][:2]
    for policy in POLICIES:
        core = [int(through_the_core(policy, sets, 6, size)[0]) for size in range(7)]
        assert hits_by_size(policy, sets, 6, range(7))[0].tolist() == core
        assert hits_by_size(policy, broken, 6, range(7))[0].tolist() != core


def least_misses(requests, size):
    """Belady with bypass by exhaustion: any choice of who stays among residents and those just used."""
    from functools import cache
    from itertools import combinations

    @cache
    def best(step, resident):
        if step == len(requests):
            return 0
        candidates = resident | requests[step]
        keep = min(size, len(candidates))
        rest = min(best(step + 1, frozenset(kept)) for kept in combinations(sorted(candidates), keep))
        return len(requests[step] - resident) + rest

    return best(0, frozenset())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.frozensets(st.integers(0, 4), min_size=1, max_size=2), max_size=9), st.integers(0, 4))
def test_the_optimum_is_one(requests, size):
    sets = np.full((len(requests), 1, 2), 5, np.uint16)
    for row, request in zip(sets, requests, strict=True):
        row[0, : len(request)] = sorted(request)
    hits = int(hits_by_size(OPTIMUM, sets, 5, [size])[0, 0])
    assert sum(map(len, requests)) - hits == least_misses(tuple(requests), size)


@settings(max_examples=30, deadline=None)
@given(traces(), st.sampled_from(sorted(POLICIES)))
def test_nobody_beats_the_optimum(trace, policy):
    sets, experts, probabilities = trace
    sizes = range(experts + 1)
    optimum = hits_by_size(OPTIMUM, sets, experts, sizes)
    assert (hits_by_size(policy, sets, experts, sizes, probabilities) <= optimum).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 70), st.integers(1, 6))
def test_the_compiled_predictor_gives_the_same_bits(seed, experts, k):
    """As experts appear, both grow; every score of every request is the same, unlike after another request."""
    rng = np.random.default_rng(seed)
    ours, theirs = learned.Learned(), learned.CompiledLearned()
    for step in range(30):
        most = max(k, experts * (step + 1) // 30)
        sets = {layer: rng.permutation(most)[: rng.integers(0, k + 1)].tolist() for layer in range(20)}
        given = rng.random(most).tolist() if rng.random() < 0.3 else None
        one, other = ours.one(9, sets[9], sets, given), theirs.one(9, sets[9], sets, given)
        width = min(len(one), len(other))
        assert one[:width] == other[:width] and not any(one[width:]) and not any(other[width:])
    ours.one(9, [0], {}, None)
    assert ours.one(9, [0], {}, None)[0] != theirs.one(9, [0], {}, None)[0]  # negative control
