"""Layers launched before the host knows what is missing: the same bits, the same account of the cache."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from greenroom import token_layers
from greenroom.device_runner import DeviceRunner
from greenroom.engine import Engine
from greenroom.layer_steps import _Plain
from greenroom.tiers import SlotTable
from on_device import Engines, Timed
from samples import some
from test_engine import EXPERTS, LAYERS, SHORT, same
from test_tiers import out_of_memory_at

TOKENS = [17, 61, 5, 17, 61, 40, 5, 5, 22, 17]


@torch.no_grad()
def decoded(model: Any) -> "list[torch.Tensor]":
    """Logits of some tokens after a short prompt."""
    out, found = model(SHORT, use_cache=True), []
    for token in TOKENS:
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return found


def ahead(engine: Engine, always: bool = True) -> Engine:
    assert engine.steps is not None
    engine.steps.ahead = always
    return engine


@pytest.fixture
def expected(device_engines: Engines) -> "list[torch.Tensor]":
    return decoded(ahead(device_engines(experts_per_layer=EXPERTS), False).model)


@pytest.mark.parametrize("slots", some([0, 1, 2, 4, EXPERTS], [0, 2]))
def test_going_ahead_does_not_show(expected: "list[torch.Tensor]", device_engines: Engines, slots: int) -> None:
    engine = ahead(device_engines(experts_per_layer=slots))
    for _ in range(2):
        assert same(decoded(engine.model), expected)
    assert (engine.steps.launched > 0) == (slots > 1)
    if slots == EXPERTS:
        assert engine.steps.launched >= LAYERS * (len(TOKENS) - 1)


def test_the_host_waits_for_what_it_reads(
    expected: "list[torch.Tensor]", device_engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: what is sent back is there when its event has come."""
    engine = ahead(device_engines(experts_per_layer=EXPERTS))
    assert same(decoded(engine.model), expected)
    launched, device = engine.steps.launched, engine.device
    monkeypatch.setattr(device, "fetch", lambda *tensors: [tensor.clone() for tensor in tensors])
    monkeypatch.setattr(device, "synchronise", lambda event: None)
    decoded(engine.model)
    assert engine.steps.launched == launched, "layers were settled by what was not there yet"


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ram_slots=st.integers(0, EXPERTS * LAYERS),
    slots=st.integers(0, 5),
    staging=st.integers(1, 4),
    cpu_experts=st.just(False),
    policy=st.sampled_from(["lru", "lfu", "learned", "probability", "lru-shared", "learned-shared"]),
)
def test_nothing_of_it_shows(
    expected: "list[torch.Tensor]", device_engines: Engines, ram_slots: int, slots: int, **options: Any
) -> None:
    found = []
    for always in (True, False):
        engine = ahead(device_engines(ram_slots, experts_per_layer=slots, **options), always)
        engine.runner.trace = []
        for _ in range(2):
            assert same(decoded(engine.model), expected)
        metrics = engine.metrics()
        found.append((engine.runner.trace, metrics.hits, metrics.misses))
    assert found[0] == found[1], "the cache sees the same requests either way"


@pytest.mark.parametrize("fixed", [0, 1, 2])
def test_a_layer_that_cannot_be_taken_again_waits(
    device_engines: Engines, monkeypatch: pytest.MonkeyPatch, fixed: int
) -> None:
    """As one with a recurrent state, between others."""
    real = token_layers.adopt
    monkeypatch.setattr(token_layers, "adopt", lambda cache, number: None if number == fixed else real(cache, number))
    monkeypatch.setattr(_Plain, "whole", property(lambda way: way._layer is not None and way._number != fixed))
    expected = decoded(ahead(device_engines(experts_per_layer=EXPERTS), False).model)
    engine = ahead(device_engines(experts_per_layer=2))
    for _ in range(3):
        assert same(decoded(engine.model), expected)
    assert (engine.steps.launched > 0) == (fixed > 0)


def wrong(runner: DeviceRunner) -> "Callable[[Any], bool]":
    real = runner.settle

    def settle(call: Any) -> bool:
        real(call)
        return True

    return settle


def test_a_missing_expert_that_is_not_noticed_shows(
    expected: "list[torch.Tensor]", device_engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    engine = ahead(device_engines(experts_per_layer=2))
    assert same(decoded(engine.model), expected)
    monkeypatch.setattr(engine.runner, "settle", wrong(engine.runner))
    assert not same(decoded(engine.model), expected)


@pytest.mark.slow
def test_it_is_decided_by_what_is_found(device_engines: Engines) -> None:
    for slots, goes in ((EXPERTS, True), (1, False)):
        engine = device_engines(experts_per_layer=slots)
        for _ in range(60):
            decoded(engine.model)
        assert (engine.steps.launched > 0) == goes


def test_the_host_does_not_wait_where_all_is_there(device_engines: Engines) -> None:
    """By the clock: reading back after each layer, the host is never ahead of the device."""
    behind = {}
    for always in (True, False):
        engine = ahead(device_engines(experts_per_layer=EXPERTS), always)
        device, real = engine.device, engine.device.synchronise
        engine.runner._slots_kernel = Timed(device, 1e-3)
        decoded(engine.model)
        waits: list[float] = []

        def noted(event: Any, waits: "list[float]" = waits, device: Any = device, real: Any = real) -> None:
            waits.append(device.compute_s - event.end_s)  # what the device still has to do when the event has come
            real(event)

        device.synchronise = noted
        decoded(engine.model)
        behind[always] = sum(wait > 0 for wait in waits) / len(waits)
    assert behind[True] > 0.5 > behind[False] == 0


@pytest.mark.parametrize("at", some([{4}, {5, 6}, {30}], [{5, 6}]))
def test_out_of_memory_on_the_way(
    expected: "list[torch.Tensor]", device_engines: Engines, monkeypatch: pytest.MonkeyPatch, at: "set[int]"
) -> None:
    engine = ahead(device_engines(experts_per_layer=4))
    assert same(decoded(engine.model), expected)
    with monkeypatch.context() as patch:
        calls = out_of_memory_at(patch, engine.runner._slots_kernel, "combine", at)
        assert same(decoded(engine.model), expected)
    assert len(calls) > max(at)
    assert same(decoded(engine.model), expected)


@pytest.mark.slow
def test_an_interrupt_on_the_way(expected: "list[torch.Tensor]", device_engines: Engines) -> None:
    engine = ahead(device_engines(experts_per_layer=2))
    decoded(engine.model)
    for at in range(1, 12, 2):
        real, calls = engine.runner._slots_kernel.combine, [0]

        def interrupted(*args: Any, real: Any = real, calls: "list[int]" = calls, at: int = at) -> Any:
            calls[0] += 1
            if calls[0] == at:
                raise KeyboardInterrupt
            return real(*args)

        kernel = Timed(engine.device)
        kernel.combine = interrupted  # type: ignore[method-assign]
        before, engine.runner._slots_kernel = engine.runner._slots_kernel, kernel
        with pytest.raises(KeyboardInterrupt):
            decoded(engine.model)
        engine.runner._slots_kernel = before
        assert same(decoded(engine.model), expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1), st.integers(0, 3), st.integers(0, 4)), max_size=40))
def test_the_table_is_what_was_entered_last(events: "list[tuple[bool, int, int, int]]") -> None:
    table, model = SlotTable(2, 4, torch.device("cpu")), {}
    for enters, layer, expert, buffer in events:
        model = {key: held for key, held in model.items() if held != buffer}
        if enters:
            table.enter(layer, expert, buffer)
            model[layer, expert] = buffer
        else:
            table.take_out(buffer)
    for layer in range(2):
        index = torch.tensor([[0, 1, 2, 3, 4]])
        slots = torch.empty(index.shape, dtype=torch.int32)
        table.find(layer, index, slots)
        assert slots.tolist() == [[model.get((layer, expert), -1) for expert in range(5)]]
