"""Guesses are loaded where they pay: by hand, and on a fake device's clock."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom.device import FakeDevice
from greenroom.speculation import WATCH, Speculation
from on_device import Engines, Timed

RANKED = [4, 7, 1]


def settled(right: "list[float]", idle_s: float, move_s: float, cost_s: float = 0.0) -> Speculation:
    """After many layers whose guesses of a rank come true with probability right[rank]."""
    decider = Speculation(len(right))
    for number in range(3000):
        loads(decider, layer=number % 3)
        true = [expert for rank, expert in enumerate(RANKED[: len(right)]) if (number * 37 % 100) < 100 * right[rank]]
        decider.requested(number % 3 + 1, true)
        decider.link_was(idle_s, move_s)
        decider.guessing_took(cost_s)
    return decider


def loads(decider: Speculation, layer: int = 0, there: "tuple[int, ...]" = ()) -> "list[int]":
    ranked = RANKED[: decider.most]
    ((ahead, chosen),) = decider.choose(layer, [(layer + 1, ranked)], lambda _, expert: expert in there)
    assert ahead == layer + 1
    return chosen


@pytest.mark.parametrize(
    "right,idle_s,count",
    [
        ([0.9, 0.6], 2.0, 2),  # all fits into idle time
        ([0.9, 0.6], 1.0, 1),  # one fits; the second would only delay
        ([0.9, 0.6], 0.5, 1),  # half of it is saved nine times of ten
        ([0.3, 0.1], 0.5, 0),  # too often wrong
        ([0.3, 0.1], 1.0, 1),  # an idle link loses nothing
        ([0.9, 0.9], 0.0, 0),  # the link is never idle
    ],
)
def test_guesses_are_loaded_where_they_pay(right: "list[float]", idle_s: float, count: int) -> None:
    decider = settled(right, idle_s, 1.0)
    assert loads(decider) == RANKED[:count]
    assert ("off" in str(decider)) == (count == 0) and decider.pays == (count > 0)
    assert "come true, the link is idle for" in str(decider)


def test_what_is_there_is_neither_loaded_nor_compared() -> None:
    decider = settled([0.1, 0.9], 1.0, 1.0)
    # the likely second is loaded in place of a first that is there, and more than one does not fit
    assert loads(decider) == [4] and loads(decider, there=(4,)) == [7] and loads(decider, there=(4, 7)) == []
    before = str(decider)
    for _ in range(100):
        loads(decider, there=(4, 7))
        decider.requested(1, [])
    assert before.split("come true")[0].split("there")[1] == str(decider).split("come true")[0].split("there")[1]


def test_two_layers_ahead_share_the_idle_time_of_two() -> None:
    decider = settled([0.9], 0.9, 1.0)
    ((_, near), (_, far)) = decider.choose(0, [(1, [4]), (2, [4])], lambda *_: False)
    assert near == [4] and far == [4]
    decider = settled([0.9], 0.4, 1.0)
    ((_, near), (_, far)) = decider.choose(0, [(1, [4]), (2, [4])], lambda *_: False)
    assert near == [4] and far == []


@pytest.mark.parametrize("cost_s,pays", [(0.5, True), (1.0, False)])
def test_guessing_is_off_where_it_takes_longer_than_it_gains(cost_s: float, pays: bool) -> None:
    decider = settled([0.8], 1.0, 1.0, cost_s)
    assert decider.pays == pays and ("off" in str(decider)) != pays


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.floats(0, 2))
def test_no_guess_is_loaded_at_a_loss(right: float, idle_s: float) -> None:
    decider = settled([right], idle_s, 1.0)
    overlap_s = min(idle_s, 1.0)
    gain_s = right * overlap_s - (1 - right) * (1 - overlap_s)
    assert (gain_s > 0) == bool(loads(decider)) or abs(gain_s) < 0.2  # the share is an estimate


def test_what_is_off_is_looked_at_again() -> None:
    decider = settled([0.9], 0.0, 1.0)
    assert sum(decider.watches() for _ in range(10 * WATCH)) == 10
    for _ in range(200):
        decider.link_was(1.0, 1.0)
        loads(decider)
    assert decider.watches() and decider.pays


def test_nothing_asked_for_is_nothing_guessed() -> None:
    decider = Speculation(0)
    assert not any(decider.watches() for _ in range(100)) and str(decider) == ""


@pytest.mark.parametrize("idle", [True, False])
def test_the_engine_guesses_while_the_link_is_idle(device_engines: Engines, idle: bool) -> None:
    device = FakeDevice(link_bytes_per_s=device_engines.record / 1e-3)
    # kernels that take longer than a layer's copies leave the link idle
    kernel = Timed(device, 5e-3 if idle else 1e-6)
    engine = device_engines(device=device, slots_kernel=kernel, experts_per_layer=0, prefetch=1)
    with torch.no_grad():
        cache = engine.model(torch.arange(4, 6)[None], use_cache=True).past_key_values
        for token in range(120):
            cache = engine.model(torch.tensor([[token % 90 + 4]]), past_key_values=cache).past_key_values
    assert ("off" in engine.placement().split(";")[1]) != idle
