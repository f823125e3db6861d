"""Slots on a device, RAM and disk behind them, on a fake device: the same bits whatever lies where, and what is
copied."""

import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from greenroom.cache import VictimCache
from greenroom.config import EngineSettings
from greenroom.device import FakeDevice
from greenroom.engine import Engine
from greenroom.errors import BudgetError, PackedModelError
from greenroom.kernels import device, over_slots
from greenroom.packed import PackedModel
from greenroom.store import DiskStore
from greenroom.tiers import DeviceArena, Link
from on_device import Engines, Timed
from samples import some
from test_engine import EXPERTS, LAYERS, Noted, Tampered, call, interrupted_once, logits_of, routed, same

# --- the same logits, whatever lies where


@pytest.mark.parametrize("ram_slots", [0, 3, EXPERTS * LAYERS])
@pytest.mark.parametrize("device_slots", [0, 2, EXPERTS])
def test_tiers_do_not_show(
    device_logits: "list[torch.Tensor]", device_engines: Engines, ram_slots: int, device_slots: int
) -> None:
    engine = device_engines(ram_slots, experts_per_layer=device_slots)
    for _ in range(2):
        assert same(logits_of(engine.model), device_logits)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    ram_slots=st.integers(0, EXPERTS * LAYERS),
    slots=st.integers(0, 4),
    link=st.sampled_from([1e3, 1e6, 1e9, 1e15]),
    staging=st.integers(1, 4),
    readers=st.integers(1, 4),
    prefetch=st.integers(0, 3),
    lookahead=st.integers(1, 2),
    policy=st.sampled_from(["lru", "lfu", "learned", "lru-shared", "learned-shared"]),
)
def test_nothing_about_arrival_shows(
    packed4: PackedModel,
    device_logits: "list[torch.Tensor]",
    device_engines: Engines,
    seed: int,
    ram_slots: int,
    slots: int,
    link: float,
    **options: Any,
) -> None:
    made = {"store": Noted(packed4, seed), "shuffle": random.Random(seed), "device": FakeDevice(link_bytes_per_s=link)}
    engine = device_engines(ram_slots, experts_per_layer=slots, **made, **options)
    try:
        for _ in range(2):
            assert same(logits_of(engine.model), device_logits)
    finally:
        device_engines.close()


def test_the_tokens_are_those_of_the_cpu(packed4: PackedModel, device_engines: Engines) -> None:
    cpu = Engine(packed4, EngineSettings(experts_per_layer=2))
    prompt = torch.arange(4, 30)[None]
    wanted = cpu.model.generate(prompt, max_new_tokens=24, do_sample=False)
    cpu.close()
    for options in ({}, {"cpu_experts": True}, {"prefetch": 2}):
        found = device_engines(4, **options).model.generate(prompt, max_new_tokens=24, do_sample=False)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("rows", some([1, 34], [34]))
def test_compiled_kernels_give_what_the_definition_gives(device_engines: Engines, rows: int) -> None:
    """One layer, in Triton's interpreter, which takes seconds for each; `-m slow` runs the whole model."""
    pytest.importorskip("triton")
    if device.unusable("cpu"):
        pytest.skip(device.unusable("cpu"))
    compiled, plain = device_engines(4, slots_kernel=over_slots.Compiled()), device_engines(4)
    found, wanted = (call(engine, *routed(rows)) for engine in (compiled, plain))
    torch.testing.assert_close(found, wanted, rtol=5e-3, atol=5e-3 * float(wanted.abs().max()))
    assert not torch.equal(found, call(plain, *routed(rows + 1))[:rows])


class Flow(TorchFunctionMode):
    """Refuses to send a tensor to a device and wait for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is torch.Tensor.to and not given.get("non_blocking"):
            places = [one for one in (*args[1:], *given.values()) if isinstance(one, torch.device)]
            assert not places, "the host waits for all that is queued before"
        return func(*args, **given)


@pytest.mark.parametrize("rows", [1, 34])
def test_the_host_does_not_wait_for_what_it_sends(
    device_engines: Engines, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """While experts are served: the device may still have kernels and copies before it."""
    pytest.importorskip("triton")
    if device.unusable("cpu"):
        pytest.skip(device.unusable("cpu"))
    engine = device_engines(4, slots_kernel=over_slots.Compiled(), cpu_experts=True)
    real, served = engine.runner._serve, []

    def serve(*args: Any) -> torch.Tensor:
        with Flow():
            served.append(1)
            return real(*args)

    monkeypatch.setattr(engine.runner, "_serve", serve)
    call(engine, *routed(rows))
    assert served
    with pytest.raises(AssertionError, match="waits"), Flow():  # negative control
        torch.ones(1).to(torch.device("cpu"))


@pytest.mark.slow
def test_compiled_kernels_run_the_model(device_logits: "list[torch.Tensor]", device_engines: Engines) -> None:
    pytest.importorskip("triton")
    if device.unusable("cpu"):
        pytest.skip(device.unusable("cpu"))
    found = logits_of(device_engines(4, slots_kernel=over_slots.Compiled()).model)
    for one, other in zip(found, device_logits, strict=True):
        torch.testing.assert_close(one, other, rtol=5e-3, atol=5e-3)


# --- negative controls: the comparison can fail


@pytest.mark.parametrize("how", ["swapped", "dropped", "one bit", "sound"])
def test_a_wrong_expert_shows(
    packed4: PackedModel, device_logits: "list[torch.Tensor]", device_engines: Engines, how: str
) -> None:
    found = logits_of(device_engines(3, store=Tampered(packed4, how)).model)
    assert torch.equal(found[0], device_logits[0]) == (how == "sound")


class Hasty(FakeDevice):
    """Computes without waiting for copies."""

    def wait(self, event: Any) -> None:
        pass


def test_a_missing_wait_shows(device_logits: "list[torch.Tensor]", device_engines: Engines) -> None:
    assert not same(logits_of(device_engines(device=Hasty()).model), device_logits)


def test_an_upload_that_overtakes_a_save_shows(
    device_logits: "list[torch.Tensor]", device_engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leaves the device is saved before its buffer is filled again."""
    real = Link.upload
    monkeypatch.setattr(
        Link, "upload", lambda link, target, source, after, buffer: real(link, target, source, [], buffer)
    )
    engine = device_engines(EXPERTS * LAYERS - 6, experts_per_layer=2, staging=1)
    assert not all(same(logits_of(engine.model), device_logits) for _ in range(4))


class Watchful(FakeDevice):
    """Notices uploads into buffers that are still being read."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.overtaken = Timed(self), 0
        self.arena: DeviceArena | None = None

    def upload(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        event = super().upload(target, source, after)
        assert self.arena is not None
        buffer = (target.data_ptr() - self.arena.memory.data_ptr()) // self.arena.record_nbytes
        self.overtaken += event.start_s < self.kernel.read_until.get(buffer, 0.0)
        return event


@pytest.mark.parametrize("sound", [True, False])
def test_no_upload_overtakes_a_kernel(device_engines: Engines, monkeypatch: pytest.MonkeyPatch, sound: bool) -> None:
    device = Watchful()
    engine = device_engines(device=device, slots_kernel=device.kernel, experts_per_layer=0, staging=2)
    device.arena = engine.runner._arena
    if not sound:
        monkeypatch.setattr(device, "mark", lambda: FakeDevice().mark())
    logits_of(engine.model)
    assert (device.overtaken == 0) == sound


# --- what is copied, and when


def test_a_record_is_read_from_disk_once_where_all_fit(packed4: PackedModel, device_engines: Engines) -> None:
    store = Noted(packed4)
    engine = device_engines(store=store, experts_per_layer=1)
    for _ in range(3):
        logits_of(engine.model)
    assert sorted(store.reads) == [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    metrics = engine.metrics()
    assert metrics.bytes_read == EXPERTS * LAYERS * device_engines.record < metrics.bytes_up


def test_ram_and_device_hold_different_experts_where_ram_is_short(
    packed4: PackedModel, device_engines: Engines
) -> None:
    """Neither tier holds the model; together they do, and nothing is read from disk twice."""
    store, device = Noted(packed4), FakeDevice()
    slots = 3
    ram_slots = (EXPERTS - slots) * LAYERS
    engine = device_engines(ram_slots, store=store, device=device, experts_per_layer=slots, staging=4, policy="lru")
    for _ in range(4):
        logits_of(engine.model)
    assert sorted(set(store.reads)) == [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    assert len(store.reads) == EXPERTS * LAYERS
    assert device.downloaded > 0


def test_without_ram_every_miss_is_read_from_disk(packed4: PackedModel, device_engines: Engines) -> None:
    store = Noted(packed4)
    engine = device_engines(0, store=store, experts_per_layer=1)
    logits_of(engine.model)
    metrics = engine.metrics()
    assert metrics.bytes_read == metrics.bytes_up == len(store.reads) * device_engines.record


def test_a_prompt_streams(device_engines: Engines) -> None:
    """Each expert crosses the link once a chunk, and the slower of link and kernels sets the time."""
    record = device_engines.record
    for seconds_per_expert in (1e-4, 1e-3, 1e-2):
        device = FakeDevice(link_bytes_per_s=record / 1e-3)
        kernel = Timed(device, seconds_per_expert)
        engine = device_engines(device=device, slots_kernel=kernel, experts_per_layer=0, staging=3)
        with torch.no_grad():
            prompt = torch.arange(512)[None] % 96 + 4
            engine.model(prompt)
            start_s, before = max(device.host_s, device.compute_s), engine.metrics()
            device.host_s = start_s
            engine.model(prompt)
        sent = (engine.metrics() - before).bytes_up
        assert sent == EXPERTS * LAYERS * record
        took_s = device.compute_s - start_s
        bound_s = EXPERTS * LAYERS * max(seconds_per_expert, 1e-3)
        assert bound_s <= took_s <= 1.3 * bound_s


# --- errors and interrupts


class Broken(DiskStore):
    def read(self, layer: int, expert: int, start: int, into: memoryview) -> None:
        if self.broken:
            raise PackedModelError(f"expert {expert} is gone")
        super().read(layer, expert, start, into)

    broken = True


@pytest.mark.parametrize("ram_slots", [0, 5, EXPERTS * LAYERS])
def test_a_read_error_leaves_a_usable_engine(
    packed4: PackedModel, device_logits: "list[torch.Tensor]", device_engines: Engines, ram_slots: int
) -> None:
    store = Broken(packed4)
    engine = device_engines(ram_slots, store=store, prefetch=2)
    for _ in range(3):
        with pytest.raises(PackedModelError):
            logits_of(engine.model)
    store.broken = False
    for _ in range(2):
        assert same(logits_of(engine.model), device_logits)


@pytest.mark.parametrize("ram_slots", [0, 5, EXPERTS * LAYERS])
@pytest.mark.parametrize(
    "where", ["_transfer.start", "_cache.loaded", "_transfer._send", "_transfer._disk.start", "_arena.wait"]
)
def test_an_interrupt_anywhere_leaves_a_usable_engine(
    device_logits: "list[torch.Tensor]",
    device_engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    ram_slots: int,
) -> None:
    engine = device_engines(ram_slots, experts_per_layer=0, staging=2)
    *path, name = where.split(".")
    victim: Any = engine.runner
    for part in path:
        victim = getattr(victim, part)
    for _ in range(5):  # more often than there are buffers to lose
        with monkeypatch.context() as patch:
            patch.setattr(victim, name, interrupted_once(getattr(victim, name)))
            try:
                logits_of(engine.model)
            except KeyboardInterrupt:
                continue
            assert ram_slots and where == "_transfer._disk.start", "nothing was interrupted"  # all of it is in RAM
    assert same(logits_of(engine.model), device_logits)


# --- the victim cache


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 6), st.integers(1, 9), st.integers(1, 5), st.randoms())
def test_two_tiers_that_hold_everything_lose_nothing(ram_slots: int, experts: int, device_slots: int, rng: Any) -> None:
    """Experts climb and leave in any order: as long as both tiers have room for all, no expert is read twice."""
    ram, device, read = VictimCache(ram_slots, validate=True), set(), []
    for _ in range(60):
        key = (0, rng.randrange(experts))
        if key in device:
            continue
        if len(device) == device_slots:
            leaving = rng.choice(sorted(device))
            device.remove(leaving)
            held = leaving in ram.keys
            slot = ram.leave(leaving)
            assert slot is None or not held, "saved twice"
        if ram.find(key) is None:
            read.append(key)
            ram.place(key)
        else:
            ram.climb(key)
        device.add(key)
        # the one that climbs and the one that leaves pass each other: one slot more is needed for that
        if ram_slots > experts - device_slots:
            assert len(read) == len(set(read))
            assert {(0, e) for e in range(experts)} & set(read) <= ram.keys | device


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 4), st.lists(st.tuples(st.sampled_from("plcf"), st.integers(0, 6), st.sets(st.integers(0, 3)))))
def test_a_busy_slot_is_given_to_nobody(ram_slots: int, events: "list[tuple[str, int, set[int]]]") -> None:
    ram = VictimCache(ram_slots, validate=True)
    for kind, expert, busy in events:
        key, before = (0, expert), {slot: key for key in ram.keys if (slot := ram.find(key)) is not None}
        if kind == "p":
            slot = ram.place(key, busy) if ram.find(key) is None else None
        elif kind == "l":
            slot = ram.leave(key, busy)
        else:
            slot = None
            ram.climb(key) if kind == "c" else ram.forget(key)
        assert slot not in busy
        assert slot is None or ram.find(key) == slot
        for taken, owner in before.items():
            if taken in busy and not (kind == "f" and owner == key):
                assert ram.find(owner) == taken


# --- out of memory


def out_of_memory_at(monkeypatch: pytest.MonkeyPatch, victim: Any, name: str, at: "set[int]") -> "list[int]":
    """Let calls of a function find no memory; returns the numbers of those that did not."""
    real, calls = getattr(victim, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        if len(calls) in at:
            raise torch.OutOfMemoryError("no memory left")
        return real(*args, **kwargs)

    monkeypatch.setattr(victim, name, call)
    return calls


@pytest.mark.parametrize("at", [{1}, {4}, {5, 6}, {3, 11, 12}])
@pytest.mark.parametrize("where", ["experts", "attention"])
def test_out_of_memory_shrinks_the_cache_and_goes_on(
    device_logits: "list[torch.Tensor]",
    device_engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    at: "set[int]",
) -> None:
    engine = device_engines(experts_per_layer=4, prefetch=1)
    attention = engine.model.model.layers[1].self_attn
    victim = (engine.runner._slots_kernel, "combine") if where == "experts" else (attention, "forward")
    slots_before, hits = engine.plan.slots, engine.metrics().hits
    with monkeypatch.context() as patch:
        calls = out_of_memory_at(patch, *victim, at)
        assert same(logits_of(engine.model), device_logits)
    failed = sum(number <= len(calls) for number in at)
    wanted = slots_before
    for _ in range(failed):
        wanted = wanted * 3 // 4
    assert engine.plan.slots == wanted and failed
    assert engine.runner._arena.count == wanted + 4
    assert engine.metrics().hits >= hits
    assert same(logits_of(engine.model), device_logits)


def test_no_slot_left_to_give_back_is_one_line(device_engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = device_engines(experts_per_layer=1)
    with monkeypatch.context() as patch:
        out_of_memory_at(patch, engine.runner._slots_kernel, "combine", set(range(100)))
        with pytest.raises(BudgetError, match="ran out of memory") as caught:
            logits_of(engine.model)
    assert "\n" not in str(caught.value)


def test_a_closed_engine_gives_its_slots_back_and_says_so(device_engines: Engines) -> None:
    """Also where all experts are there, and layers are graphs that read the slots."""
    device = FakeDevice()
    engine = device_engines(device=device, experts_per_layer=EXPERTS)
    engine.steps.ahead = True
    token = torch.tensor([[5]])
    with torch.no_grad():
        out = engine.model(torch.arange(4, 20)[None], use_cache=True)
        for _ in range(3):
            out = engine.model(token, past_key_values=out.past_key_values, use_cache=True)
        assert engine.steps.replayed and device.allocated == engine.plan.slots_nbytes + engine.plan.staging
        engine.close()
        assert device.allocated == 0
        with pytest.raises(RuntimeError, match="closed"):
            engine.model(token, past_key_values=out.past_key_values, use_cache=True)


def test_two_engines_share_a_devices_memory(device_engines: Engines) -> None:
    """The second is told that there is too little left; where the first is closed, there is enough."""
    device = FakeDevice()
    first = device_engines(device=device, experts_per_layer=EXPERTS)
    needed = first.plan.total - first.plan.runtime
    device.nbytes = device.allocated + needed - 1
    with pytest.raises(BudgetError, match="give a smaller --vram"):
        device_engines(device=device, experts_per_layer=EXPERTS)
    first.close()
    device_engines(device=device, experts_per_layer=EXPERTS)


def test_a_device_that_is_too_small_is_one_line(device_engines: Engines) -> None:
    with pytest.raises(BudgetError, match="give a smaller --vram") as caught:
        device_engines(device=FakeDevice(nbytes=1 << 16))
    assert "\n" not in str(caught.value)
    plan = device_engines().plan
    needed = plan.total - plan.runtime  # the driver's own part is not free any more
    device_engines(device=FakeDevice(nbytes=needed))
    with pytest.raises(BudgetError, match=f"at most {(needed - 1 + plan.runtime) >> 20}MiB"):
        device_engines(device=FakeDevice(nbytes=needed - 1))
    with pytest.raises(BudgetError, match=r"give --vram \d+MiB or more"):
        device_engines(vram=1 << 20, experts_per_layer=None)
