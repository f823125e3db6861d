"""Guesses are loaded where they pay: by hand, and on a fake device's clock."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom.device import FakeDevice
from greenroom.speculation import WATCH, Speculation
from on_device import Engines, Timed


def settled(most: int, right: "list[float]", idle_s: float, move_s: float) -> Speculation:
    """After many layers whose j-th guess comes true with probability right[j]."""
    decider = Speculation(most)
    for number in range(2000):
        decider.guessed(number % 3, list(range(most)))
        decider.requested(number % 3, [rank for rank in range(most) if (number * 37 % 100) < 100 * right[rank]])
        decider.link_was(idle_s, move_s)
    return decider


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
    decider = settled(2, right, idle_s, 1.0)
    assert decider.count() == count
    assert ("off" in str(decider)) == (count == 0)
    assert "come true, the link is idle for" in str(decider)


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.floats(0, 2))
def test_no_guess_is_loaded_at_a_loss(right: float, idle_s: float) -> None:
    decider = settled(1, [right], idle_s, 1.0)
    overlap_s = min(idle_s, 1.0)
    gain_s = right * overlap_s - (1 - right) * (1 - overlap_s)
    assert (gain_s > 0) == (decider.count() == 1) or abs(gain_s) < 0.2  # the share is an estimate


def test_what_is_off_is_looked_at_again() -> None:
    decider = settled(1, [0.9], 0.0, 1.0)
    assert sum(decider.watches() for _ in range(10 * WATCH)) == 10
    for _ in range(200):
        decider.link_was(1.0, 1.0)
    assert decider.watches() and decider.count() == 1


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
