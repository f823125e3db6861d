"""Moving missed experts or computing them on the CPU: the split is the best of its times, and follows them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom import kernels, placement
from greenroom.device import FakeDevice
from greenroom.placement import RETRY, RETRY_MOST, Placement, best_split, split_s
from on_device import Engines, Timed
from test_engine import LAYERS, logits_of, same

seconds = st.floats(1e-6, 10.0)


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 16), seconds, seconds, st.one_of(st.just(0.0), seconds))
def test_the_split_ends_soonest(misses: int, move_s: float, compute_s: float, queued_s: float) -> None:
    times = move_s, compute_s, queued_s
    best = min(split_s(misses, computed, *times) for computed in range(misses + 1))
    assert split_s(misses, best_split(misses, *times), *times) == best


def test_a_split_by_hand() -> None:
    assert best_split(4, move_s=1.0, compute_s=1.0) == 2
    assert best_split(4, move_s=1.0, compute_s=3.0) == 1
    assert best_split(4, move_s=1.0, compute_s=100.0) == 0
    assert best_split(4, move_s=1.0, compute_s=0.01) == 4
    assert best_split(1, move_s=1.0, compute_s=1.5) == 0
    assert best_split(1, move_s=1.0, compute_s=1.5, queued_s=2.0) == 1  # the link is taken


class World:
    """What moving and computing take, now; `spent_s` adds what layers took until their last expert was ready."""

    def __init__(self, move_s: float, compute_s: float) -> None:
        self.move_s, self.compute_s, self.spent_s = move_s, compute_s, 0.0

    def layer(self, decider: Placement, misses: int) -> int:
        computed = decider.split(misses, misses)
        self.spent_s += split_s(misses, computed, self.move_s, self.compute_s)
        for _ in range(misses - computed):
            decider.moving_took(self.move_s)
        if computed:
            decider.computing_took(self.compute_s)
        return computed

    def share_lost(self, decider: Placement, misses: int, layers: int) -> float:
        """How much longer than at best `layers` layers took."""
        start_s = self.spent_s
        for _ in range(layers):
            self.layer(decider, misses)
        best_s = split_s(misses, best_split(misses, self.move_s, self.compute_s), self.move_s, self.compute_s)
        return (self.spent_s - start_s) / (layers * best_s) - 1


@pytest.mark.parametrize("misses", [1, 2, 5])
@pytest.mark.parametrize("compute_s", [0.1, 0.7, 1.0, 3.0, 20.0])
def test_it_converges(compute_s: float, misses: int) -> None:
    world, decider = World(1.0, compute_s), Placement()
    world.share_lost(decider, misses, 2 * RETRY)
    # one expert tried in RETRY decisions, and what hysteresis leaves on the table
    assert world.share_lost(decider, misses, 4 * RETRY_MOST) < placement.MARGIN + 0.05 + compute_s / RETRY_MOST


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0.05, 20.0), st.floats(0.05, 20.0)), min_size=2, max_size=5), st.integers(1, 4))
def test_it_never_stays_with_the_slower_way(speeds: "list[tuple[float, float]]", misses: int) -> None:
    decider, world = Placement(), World(1.0, 1.0)
    for world.move_s, world.compute_s in speeds:
        world.share_lost(decider, misses, 3 * RETRY_MOST)  # time to notice
        lost = world.share_lost(decider, misses, 500)
        slower = max(world.move_s, world.compute_s) / min(world.move_s, world.compute_s)
        assert lost < placement.MARGIN / (1 - placement.MARGIN) + 0.01 + slower / 400


def test_without_trying_again_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    for retry in (RETRY, 10**9):
        monkeypatch.setattr(placement, "RETRY", retry)
        decider, world = Placement(), World(1.0, 50.0)
        world.share_lost(decider, 1, 20)
        world.compute_s = 0.1  # the CPU was busy, and no longer is
        world.share_lost(decider, 1, 3 * RETRY_MOST)
        lost = world.share_lost(decider, 1, 100)
        assert (lost < 0.2) == (retry == RETRY)


def test_noise_changes_nothing() -> None:
    decider, world = Placement(), World(1.0, 1.02)
    world.share_lost(decider, 4, 10)
    found = set()
    for number in range(RETRY // 2):
        world.compute_s = 1.0 + 0.03 * (-1) ** number
        found.add(world.layer(decider, 4))
    assert len(found) == 1


def test_off_moves_everything() -> None:
    decider = Placement(enabled=False)
    decider.moving_took(1.0)
    decider.computing_took(0.001)
    assert decider.split(4, 4) == 0 and "off" in str(decider)


def test_it_says_why() -> None:
    world, decider = World(1.0, 0.2), Placement()
    world.share_lost(decider, 2, 50)
    assert "computed on the CPU: 200.00 ms each there, 1000.00 ms over the link" in str(decider)


# --- in the engine


def on_the_clock(monkeypatch: pytest.MonkeyPatch, device: FakeDevice, seconds: float) -> None:
    """The CPU takes `seconds` an expert."""
    real = kernels.experts

    def slow(x: torch.Tensor, tasks: Any, *others: Any, **options: Any) -> Any:
        device.work(seconds * len(tasks))
        return real(x, tasks, *others, **options)

    monkeypatch.setattr(kernels, "experts", slow)


@pytest.mark.parametrize("cpu_s,most", [(1e-4, 1.0), (1e-2, 0.35)])
def test_the_engine_computes_where_it_is_faster(
    device_logits: "list[torch.Tensor]",
    device_engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
    cpu_s: float,
    most: float,
) -> None:
    device = FakeDevice(link_bytes_per_s=device_engines.record / 1e-3)
    on_the_clock(monkeypatch, device, cpu_s)
    engine = device_engines(device=device, slots_kernel=Timed(device, 1e-5), cpu_experts=True, experts_per_layer=0)
    for _ in range(3):
        found = logits_of(engine.model)
    for one, other in zip(found, device_logits, strict=True):  # the CPU multiplies in 16-bit integers
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    assert same(found, device_logits) == (cpu_s > 1e-3)  # then none is computed there any more
    decider = engine.runner.placement
    share = decider.computed / (decider.computed + decider.moved)
    assert (share > 0.6) == (cpu_s < 1e-3) and share <= most


def test_idle_links_fill_slots(
    device_engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the CPU computes everything, slots are filled all the same, while the link has nothing else to do."""
    device = FakeDevice(link_bytes_per_s=device_engines.record / 1e-3)
    on_the_clock(monkeypatch, device, 1e-5)
    engine = device_engines(device=device, slots_kernel=Timed(device, 1e-5), cpu_experts=True, experts_per_layer=4)
    with torch.no_grad():
        cache = engine.model(torch.arange(4, 11)[None], use_cache=True).past_key_values
        for token in range(40):
            device.work(1e-2)
            cache = engine.model(torch.tensor([[token % 5 + 4]]), past_key_values=cache).past_key_values
        before = engine.metrics()
        for token in range(10):
            device.work(1e-2)
            cache = engine.model(torch.tensor([[token % 5 + 4]]), past_key_values=cache).past_key_values
    assert (engine.metrics() - before).hit_rate > 0.5
    assert engine.runner.placement.computed > LAYERS
