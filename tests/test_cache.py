"""The pure cache core: invariants under any order of events, policies, and replay."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom.cache import POLICIES, ExpertCache, Hints, replay

LAYERS, EXPERTS = 3, 6


@st.composite
def scenarios(draw):
    shared = draw(st.booleans())
    capacities = [draw(st.integers(0, 7))] if shared else [draw(st.integers(0, 4)) for _ in range(LAYERS)]
    requests = draw(
        st.lists(
            st.tuples(
                st.integers(0, LAYERS - 1),
                st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True),
                st.lists(st.integers(0, EXPERTS - 1), max_size=3, unique=True),
            ),
            max_size=25,
        )
    )
    return capacities, draw(st.integers(1, 4)), draw(st.sampled_from(sorted(POLICIES))), requests, draw(st.randoms())


def make(capacities, staging, policy):
    return ExpertCache(layers=LAYERS, capacities=capacities, staging=staging, policy=POLICIES[policy], validate=True)


def drive(cache: ExpertCache, requests, rng: random.Random, guess: bool = True, seen=lambda: None, expect: bool = True):
    """A live run in miniature: reads finish in any order, guesses are right or wrong, some requests are expected, and,
    where there are guesses, some that do not come."""
    reading, accesses = [], []
    for layer, experts, guesses in requests:
        if expect and rng.random() < 0.5:
            reading += cache.expect(layer, guesses if guess and rng.random() < 0.3 else experts)
            while reading and rng.random() < 0.5:
                cache.loaded(reading.pop(rng.randrange(len(reading))).buffer)
                seen()
        access = cache.request(layer, experts)
        accesses.append(access)
        waiting = set(experts)
        steps = 0
        while waiting:
            reading += cache.issue()
            if guess:
                cache.guess((layer + 1) % LAYERS, guesses)
                reading += cache.issue()
            ready = sorted(e for e in waiting if cache.ready(layer, e) is not None)
            if reading and (not ready or rng.random() < 0.5):
                cache.loaded(reading.pop(rng.randrange(len(reading))).buffer)
            else:
                expert = rng.choice(ready)
                waiting.remove(expert)
                cache.release(layer, expert)
            steps += 1
            assert steps < 1000, "no progress"
            seen()
        cache.finish()
    return accesses


@settings(max_examples=300, deadline=None)
@given(scenarios())
def test_every_request_is_served_whatever_the_order(scenario):
    capacities, staging, policy, requests, rng = scenario
    cache = make(capacities, staging, policy)
    accesses = drive(cache, requests, rng)
    for access, (layer, experts, _) in zip(accesses, requests, strict=True):
        found = [*access.hits, *access.prefetched, *access.late, *access.misses]
        assert sorted(found) == sorted((layer, expert) for expert in experts)


class Places:
    """Where experts lie, as whoever listens to `moved` knows it; of `deaf` layers it hears nothing."""

    def __init__(self, cache: ExpertCache, deaf=()) -> None:
        self.cache, self.deaf, self.known = cache, deaf, {}

    def follow(self) -> None:
        for key in tuple(self.cache.moved):
            if key[0] not in self.deaf:
                self.known[key] = self.cache.there(*key)
            self.cache.moved.discard(key)

    @property
    def right(self) -> bool:
        keys = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
        return all(self.known.get(key) == self.cache.there(*key) for key in keys)


@settings(max_examples=300, deadline=None)
@given(scenarios(), st.integers(0, 25))
def test_what_moved_is_told(scenario, until):
    """Also of what is given up, and when nobody asks for a while."""
    capacities, staging, policy, requests, rng = scenario
    cache = make(capacities, staging, policy)
    places = Places(cache)

    def seen() -> None:
        if rng.random() < 0.7:
            places.follow()
            assert places.right

    drive(cache, requests[:until], rng, seen=seen)
    if until < len(requests):
        cache.request(*requests[until][:2])
        cache.issue()
        cache.abort()
    seen()
    for buffer in cache.reading:
        cache.loaded(buffer)
    drive(cache, requests[until + 1 :], rng, seen=seen)


def test_who_does_not_listen_is_wrong():
    cache = make([2] * LAYERS, 1, "lru")
    places = Places(cache, deaf=(1,))
    drive(cache, [(0, [0, 1], []), (1, [2], [])], random.Random(0), guess=False, seen=places.follow)
    assert not places.right


@settings(max_examples=300, deadline=None)
@given(scenarios())
def test_a_replay_has_the_hits_of_the_live_run(scenario):
    """Guesses, and the order in which reads finish, never change which experts are resident."""
    capacities, staging, policy, requests, rng = scenario
    live = drive(make(capacities, staging, policy), requests, rng)
    again = replay(make(capacities, staging, policy), [(layer, experts) for layer, experts, _ in requests])
    assert [set(a.hits) for a in live] == [set(a.hits) for a in again]


@settings(max_examples=200, deadline=None)
@given(scenarios())
def test_what_is_expected_is_still_a_miss(scenario):
    capacities, staging, policy, requests, rng = scenario
    cache = make(capacities, staging, policy)
    live = drive(cache, requests, rng, guess=False)
    assert live == replay(make(capacities, staging, policy), [(layer, experts) for layer, experts, _ in requests])
    assert cache.counters.loads == cache.counters.misses == sum(len(access.misses) for access in live)


def test_what_is_guessed_is_none():
    """Negative control of the test before."""
    cache = make([2] * LAYERS, 2, "lru")
    cache.guess(1, [4])
    assert len(cache.issue()) == 1
    assert cache.expect(1, [3, 4]) != [] and cache.request(1, [3, 4]).late == ((1, 4),)


def test_accesses_of_other_layers_leave_alone_what_is_expected():
    cache = make([1, 0, 0], 1, "lru")
    serve(cache, 0, [5], [])
    (load,) = cache.expect(1, [2, 3])  # one buffer is free
    assert not load.speculative and cache.hit(0, [5], [5]) is not None
    cache.guess(2, [0])
    assert cache.issue() == []
    cache.loaded(load.buffer)
    assert cache.request(1, [2, 3]).misses == ((1, 2), (1, 3)) and cache.ready(1, 2) == load.buffer


def test_another_request_drops_what_was_expected():
    cache = make([1] * LAYERS, 1, "lru")
    loads = cache.expect(1, [2, 3, 4, 5])
    for load in loads:
        cache.loaded(load.buffer)
    assert len(loads) == cache.buffers and cache.request(0, [2]).misses == ((0, 2),)
    assert len(cache.free) == cache.buffers and cache.ready(1, 2) is None


def test_giving_up_frees_what_was_expected():
    cache = make([1] * LAYERS, 2, "lru")
    there, coming = cache.expect(1, [2, 3])
    cache.loaded(there.buffer)
    cache.abort()
    assert there.buffer in cache.free and cache.ready(1, 2) is None
    cache.loaded(coming.buffer)
    assert len(cache.free) == cache.buffers


@settings(max_examples=100, deadline=None)
@given(scenarios(), st.integers(0, 3))
def test_an_aborted_access_loses_no_buffer(scenario, started):
    capacities, staging, policy, requests, rng = scenario
    cache = make(capacities, staging, policy)
    reading = []
    for layer, experts, _ in requests:
        cache.request(layer, experts)
        reading += cache.issue()
        for _ in range(min(started, len(reading))):
            cache.loaded(reading.pop().buffer)
        cache.abort()
    while reading:
        cache.loaded(reading.pop().buffer)
    drive(cache, requests, rng)


def serve(cache: ExpertCache, layer: int, experts: "list[int]", guesses: "list[int]") -> None:
    if cache.hit(layer, experts, experts) is None:
        cache.request(layer, experts)
        for load in cache.issue():
            cache.loaded(load.buffer)
        cache.guess((layer + 1) % LAYERS, guesses)
        for load in cache.issue():
            cache.loaded(load.buffer)
        for expert in experts:
            cache.release(layer, expert)
        cache.finish()


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("guesses", [[], [0]])
def test_what_was_aborted_gets_no_slot_unread(policy, guesses):
    """The policy believes in (1, 0), which was never read, or by a guess alone; one access in a step or in many."""
    cache = make([2], 1, policy)
    serve(cache, 0, [0], [])
    cache.request(1, [0])
    cache.abort()
    for layer, expert in ((0, 0), (0, 1), (0, 0), (1, 1), (0, 0), (1, 0), (0, 1), (1, 1)):
        serve(cache, layer, [expert], guesses if layer == 0 else [])


def brute_force_lru(capacity, requests):
    """Negative-control-free oracle: an LRU written the obvious way, as sets per request."""
    order, hits = [], []
    for experts in requests:
        hits.append({e for e in experts if e in order})
        for expert in experts:
            if expert in order:
                order.remove(expert)
            order.append(expert)
        order = order[-capacity:] if capacity else []
    return hits


@given(st.integers(0, 5), st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), max_size=40))
def test_lru_equals_the_obvious_one(capacity, requests):
    cache = ExpertCache(layers=1, capacities=[capacity], staging=1, validate=True)
    found = replay(cache, [(0, experts) for experts in requests])
    assert [{e for _, e in a.hits} for a in found] == brute_force_lru(capacity, requests)


def test_the_comparison_can_fail():
    """Negative control: one slot more gives other hits on a cyclic trace."""
    requests = [(0, [i % 3]) for i in range(12)]
    hits = {
        capacity: sum(len(a.hits) for a in replay(ExpertCache(layers=1, capacities=[capacity], staging=1), requests))
        for capacity in (2, 3)
    }
    assert hits == {2: 0, 3: 9}


def test_lfu_declines_to_cache_a_passer_by():
    cache = ExpertCache(layers=1, capacities=[1], staging=1, policy=POLICIES["lfu"], validate=True)
    accesses = replay(cache, [(0, [e]) for e in (1, 1, 1, 2, 1)])
    assert [len(a.hits) for a in accesses] == [0, 1, 1, 0, 1]


def test_guesses_wait_for_demand_and_take_no_slot():
    cache = ExpertCache(layers=2, capacities=[1, 1], staging=2, validate=True)
    cache.guess(1, [0, 1, 2])
    first = cache.issue()
    assert [load.speculative for load in first] == [True, True]  # never more than the staging buffers
    cache.loaded(first[0].buffer)
    cache.request(1, [first[0].key[1], 5])
    loads = cache.issue()
    assert [load.key for load in loads if not load.speculative] == [(1, 5)]
    assert cache.counters.prefetched == 1 and cache.counters.misses == 1


def access(cache: ExpertCache, layer: int, experts: "list[int]") -> None:
    """All the steps of one, with as few buffers as there are."""
    cache.request(layer, experts)
    waiting = list(experts)
    while waiting:
        cache.issue()
        for buffer in cache.reading:
            cache.loaded(buffer)
        for expert in [one for one in waiting if cache.ready(layer, one) is not None]:
            cache.release(layer, expert)
            waiting.remove(expert)
    cache.finish()


@settings(max_examples=200, deadline=None)
@given(scenarios())
def test_a_hit_in_one_step_is_an_access_in_all_its_steps(scenario):
    """Guesses may be queued, read or held meanwhile, and be what is `used`: what follows is the same."""
    capacities, staging, policy, requests, _ = scenario
    states = []
    for at_once in ("", "hit", "hit_at", "used"):
        cache, seen = make(capacities, staging, policy), []
        for layer, experts, guesses in requests:
            there = [cache.ready(layer, expert) for expert in experts]
            if at_once == "hit_at":
                before = dataclasses.astuple(cache.counters)
                assert not cache.hit_at(layer, experts, [None, *there[1:]]), "it was read from elsewhere"
                assert dataclasses.astuple(cache.counters) == before
                found = cache.hit_at(layer, experts, there)
            elif at_once == "used":
                found = cache.used(layer, experts, experts)
                assert found == (None not in there)
            else:
                found = at_once == "hit" and cache.hit(layer, experts, experts) == there
            if not found:
                access(cache, layer, experts)
            cache.issue()
            for buffer in cache.reading:
                cache.loaded(buffer)
            cache.guess((layer + 1) % LAYERS, guesses)
            for number, load in enumerate(cache.issue()):
                if number % 2 == 0:
                    cache.loaded(load.buffer)
            seen.append({(at, one) for at in range(LAYERS) for one in range(EXPERTS) if cache.holds(at, one)})
        states.append((seen, dataclasses.astuple(cache.counters)))
    assert states[0] == states[1] == states[2] == states[3]


def walks(cache: ExpertCache, tokens, rng: random.Random, there) -> "list[bool]":
    """Tokens that pass the layers in which all is `there`, and tell of them later; whether each could be told."""
    told = []
    for choices in tokens:
        passed: list[tuple[int, list[int]]] = []
        for layer, (experts, guesses) in enumerate(choices):
            goes_on = all(there(layer, expert) is not None for expert in experts)
            if goes_on:
                passed.append((layer, experts))
            else:
                cache.expect(layer, experts)
            if layer + 1 < LAYERS:
                cache.guess(layer + 1, guesses)
            cache.issue()
            for buffer in cache.reading:
                cache.loaded(buffer)
            if not goes_on or rng.random() < 0.3 or layer + 1 == LAYERS:
                told += [cache.used(at, experts, experts) for at, experts in passed]
                passed = []
            if not goes_on:
                access(cache, layer, experts)
    return told


@st.composite
def tokens_of_walks(draw):
    experts = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=3, unique=True)
    layers = st.lists(st.tuples(experts, experts), min_size=LAYERS, max_size=LAYERS)
    return draw(st.lists(layers, max_size=12))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=LAYERS, max_size=LAYERS),
    st.booleans(),
    st.integers(1, 4),
    st.sampled_from(sorted(POLICIES)),
    tokens_of_walks(),
    st.randoms(use_true_random=False),
)
def test_what_is_there_can_be_used_and_told_of_later(capacities, shared, staging, policy, tokens, rng):
    """Whatever is guessed and expected in between, and whatever other layers use; what is resident is what requests
    one by one give."""
    capacities = [sum(capacities)] if shared else capacities
    cache, other = make(capacities, staging, policy), make(capacities, staging, policy)
    assert all(walks(cache, tokens, rng, cache.there))
    for choices in tokens:
        for layer, (experts, _) in enumerate(choices):
            access(other, layer, experts)
    held = [(at, one) for at in range(LAYERS) for one in range(EXPERTS) if cache.holds(at, one)]
    assert set(held) - cache._guessed.keys() == other._held.keys()
    assert cache.counters.requests == other.counters.requests and cache.counters.hits == other.counters.hits


def test_where_layers_share_slots_a_guess_may_take_another_s():
    """Negative control: what is merely `ready` was taken before it was told of."""
    tokens = [[([0], []), ([1], []), ([2], [])], [([0], [4, 5]), ([4, 5], []), ([2], [])]]
    late, found = random.Random(0), {}
    late.random = lambda: 1.0
    for name in ("there", "ready"):
        cache = make([3], 2, "lru")
        found[name] = all(walks(cache, tokens, late, getattr(cache, name)))
    assert found == {"there": True, "ready": False}


def test_late_guess_is_not_read_twice():
    cache = ExpertCache(layers=1, capacities=[2], staging=1, validate=True)
    cache.guess(0, [3])
    (load,) = cache.issue()
    access = cache.request(0, [3])
    assert access.late == ((0, 3),) and cache.issue() == []
    cache.loaded(load.buffer)
    assert cache.ready(0, 3) == load.buffer


@pytest.mark.parametrize("capacities,staging", [([1, 1], 1), ([-1], 1), ([1], 0)])
def test_bad_settings(capacities, staging):
    with pytest.raises(ValueError):
        ExpertCache(layers=3, capacities=capacities, staging=staging)


def kept(policy, capacity, requests):
    """Experts resident after single-layer `requests`."""
    one = POLICIES[policy](capacity)
    for request in requests:
        resident = one.update([(0, expert) for expert in request], Hints(0))
    return {expert for _, expert in resident}


def test_s3fifo_by_hand():
    """Two slots, of which one is the small queue's."""
    assert kept("s3fifo", 2, [[0], [1]]) == {0, 1}
    assert kept("s3fifo", 2, [[0], [1], [2]]) == {1, 2}  # 0 was used once: it leaves the small queue, and is remembered
    assert kept("s3fifo", 2, [[0], [0], [0], [1], [2]]) == {0, 2}  # used three times: it moves to the main queue
    assert kept("s3fifo", 3, [[0], [1], [2], [3], [0], [4], [5]]) == {0, 4, 5}  # back soon after it left: main queue
    assert kept("s3fifo", 0, [[0]]) == set()


def test_frequency_over_age_by_hand():
    """0 was used four times, 1 twice and since: count over age decides, 4/4 against 2/1, then 4/5 against 2/3."""
    uses = [[0], [0], [0], [0], [1], [1]]
    assert kept("frequency-age", 1, uses) == {1}
    assert kept("frequency-age", 1, [*uses, [2]]) == {2}
    assert kept("frequency-age", 2, [*uses, [2]]) == {1, 2}


def test_probabilities_keep_what_was_nearly_chosen():
    policy = POLICIES["probability"](1)
    policy.update([(0, 1)], Hints(0, probabilities=[0.0, 0.9, 0.1]))
    assert set(policy.update([(0, 2)], Hints(0, probabilities=[0.0, 0.45, 0.55]))) == {(0, 1)}
    assert set(POLICIES["probability"](1).update([(0, 2)], Hints(0))) == {(0, 2)}  # without them: what was used


def test_the_predictor_learns_what_follows_what():
    """Four experts in a circle, two slots: whatever was used longest ago comes next, which recency and counts never
    keep. Letting two of them pass hits half of the time, the optimum."""
    requests = [(0, [number % 4]) for number in range(400)]
    hits = {}
    for policy in ("lru", "lfu", "learned"):
        cache = ExpertCache(layers=1, capacities=[2], staging=1, policy=POLICIES[policy], validate=True)
        hits[policy] = sum(len(access.hits) for access in replay(cache, requests)[-120:])
    assert hits["lru"] == hits["lfu"] == 0 and hits["learned"] == 60
