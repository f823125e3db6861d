"""The engine against oracles: whatever is cached, guessed or reordered, the logits are the same to the last bit."""

import copy
import gc
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import MixtralForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from greenroom import dropped, threads
from greenroom.cache import POLICIES, ExpertCache, Load, replay
from greenroom.config import EngineSettings
from greenroom.engine import Engine
from greenroom.errors import BudgetError, ConfigError
from greenroom.packed import PackedModel
from greenroom.runner import _ANY_ORDER
from greenroom.store import DiskStore

LAYERS, EXPERTS, TOP_K = 3, 6, 2
PROMPT = torch.randint(4, 100, (1, 48), generator=torch.Generator().manual_seed(0))
SHORT = PROMPT[:, :7]
NEXT = [[17], [61], [5]]


class Noted(DiskStore):
    """Counts reads of records and sleeps for random microseconds before each."""

    def __init__(self, packed: PackedModel, seed: "int | None" = None) -> None:
        super().__init__(packed)
        self.reads: list[tuple[int, int]] = []
        self._random = random.Random(seed) if seed is not None else None

    def read(self, layer: int, expert: int, start: int, into: memoryview) -> None:
        if start == 0:
            self.reads.append((layer, expert))
        if self._random is not None:
            time.sleep(self._random.choice((0, 0, 1e-4, 5e-4)))
        super().read(layer, expert, start, into)


class Engines:
    """Makes engines with every check on, and closes them."""

    def __init__(self) -> None:
        self._made: list[Engine] = []

    def __call__(self, packed: PackedModel, store: Any = None, shuffle: Any = None, **options: Any) -> Engine:
        given = EngineSettings(**{"experts_per_layer": 2, "validate": True, **options})
        self._made.append(Engine(packed, given, store=store, shuffle=shuffle))
        return self._made[-1]

    def close(self) -> None:
        while self._made:
            self._made.pop().close()


@pytest.fixture
def engines() -> "Iterator[Engines]":
    made = Engines()
    yield made
    made.close()


@torch.no_grad()
def logits_of(model: Any) -> "list[torch.Tensor]":
    """A long prompt, a short one, and three tokens decoded after it."""
    found = [model(PROMPT).logits]
    out = model(SHORT, use_cache=True)
    found.append(out.logits)
    for token in NEXT:
        out = model(torch.tensor([token]), past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return found


def test_the_inputs_take_both_paths() -> None:
    assert PROMPT.numel() * TOP_K > _ANY_ORDER >= SHORT.numel() * TOP_K


@pytest.fixture(scope="module")
def expected(packed4: PackedModel) -> "list[torch.Tensor]":
    """With everything in memory, one reader, no guesses."""
    engine = Engine(packed4, EngineSettings(experts_per_layer=EXPERTS, readers=1, staging=1))
    found = logits_of(engine.model)
    engine.close()
    return found


def same(found: "list[torch.Tensor]", expected: "list[torch.Tensor]") -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def original(checkpoint: Path) -> Any:
    """transformers' own model, with transformers' own experts."""
    model = MixtralForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, experts_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # weights mapped from a file are summed in another order
    return model


# --- the same logits, whatever is in memory


@pytest.mark.parametrize("staging", [1, 2, 3, 4])
@pytest.mark.parametrize("slots", [0, 1, 2, EXPERTS])
def test_slots_and_staging_do_not_show(
    packed4: PackedModel, expected: "list[torch.Tensor]", engines: Engines, slots: int, staging: int
) -> None:
    engine = engines(packed4, experts_per_layer=slots, staging=staging)
    for _ in range(2):
        assert same(logits_of(engine.model), expected)


@pytest.mark.parametrize("lookahead", [1, 2])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("slots", [0, 1, 2])
def test_guesses_do_not_show(
    packed4: PackedModel, expected: "list[torch.Tensor]", engines: Engines, slots: int, prefetch: int, lookahead: int
) -> None:
    engine = engines(packed4, experts_per_layer=slots, prefetch=prefetch, lookahead=lookahead)
    for _ in range(2):
        assert same(logits_of(engine.model), expected)


@pytest.mark.parametrize("policy", ["lru", "lfu", "s3fifo", "learned", "lru-shared", "learned-shared"])
@pytest.mark.parametrize("slots", [1, 2])
def test_policies_do_not_show(
    packed4: PackedModel, expected: "list[torch.Tensor]", engines: Engines, slots: int, policy: str
) -> None:
    engine = engines(packed4, experts_per_layer=slots, policy=policy, prefetch=2)
    assert len(engine.plan.capacities) == (1 if policy.endswith("shared") else LAYERS)
    assert same(logits_of(engine.model), expected)


@pytest.mark.parametrize("readers", [1, 2, 3, 4])
def test_readers_do_not_show(
    packed4: PackedModel, expected: "list[torch.Tensor]", engines: Engines, readers: int
) -> None:
    assert same(logits_of(engines(packed4, readers=readers, prefetch=1).model), expected)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    slots=st.integers(0, 4),
    staging=st.integers(1, 4),
    readers=st.integers(1, 4),
    prefetch=st.integers(0, 3),
    lookahead=st.integers(1, 2),
    policy=st.sampled_from(["lru", "lfu", "s3fifo", "probability", "learned", "lru-shared", "learned-shared"]),
)
def test_the_order_of_arrival_does_not_show(
    packed4: PackedModel, expected: "list[torch.Tensor]", engines: Engines, seed: int, slots: int, **options: Any
) -> None:
    engine = engines(packed4, Noted(packed4, seed), random.Random(seed), experts_per_layer=slots, **options)
    try:
        assert same(logits_of(engine.model), expected)
    finally:
        engines.close()


# --- negative controls: the comparison can fail


class Tampered(DiskStore):
    """Gives other bytes for expert 1 of layer 1."""

    def __init__(self, packed: PackedModel, how: str) -> None:
        super().__init__(packed)
        self._how = how

    def read(self, layer: int, expert: int, start: int, into: memoryview) -> None:
        target = (layer, expert) == (1, 1)
        super().read(layer, 2 if target and self._how == "swapped" else expert, start, into)
        if target and self._how == "dropped":
            into[:] = bytes(len(into))
        if target and self._how == "one bit":
            into[100] ^= 8

    def check(self, layer: int, expert: int, record: memoryview) -> None:
        """Let it pass."""


@pytest.mark.parametrize("how", ["swapped", "dropped", "one bit", "sound"])
def test_a_wrong_expert_shows(packed4: PackedModel, expected: "list[torch.Tensor]", engines: Engines, how: str) -> None:
    found = logits_of(engines(packed4, Tampered(packed4, how)).model)
    assert torch.equal(found[0], expected[0]) == (how == "sound")


def test_16_bits_are_close_to_transformers_and_4_bits_are_not(
    packed4: PackedModel, packed16: PackedModel, original: Any, engines: Engines
) -> None:
    theirs, ours = logits_of(original), engines(packed16, prefetch=2)
    compiled, rough = logits_of(ours.model), logits_of(engines(packed4, prefetch=2).model)
    ours.decode.enabled = False
    for one, exact, other, far in zip(compiled, logits_of(ours.model), theirs, rough, strict=True):
        torch.testing.assert_close(exact, other, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one, other, rtol=5e-3, atol=5e-3)  # it reads keys and values in float16
        assert (far - other).abs().max() > 10 * (one - other).abs().max()


# --- the cache's account


@pytest.mark.parametrize("policy", [*sorted(POLICIES), "lru-shared", "probability-shared", "learned-shared"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_replay_of_the_trace_has_the_hits_of_the_run(
    packed4: PackedModel, engines: Engines, monkeypatch: pytest.MonkeyPatch, policy: str, prefetch: int
) -> None:
    live, real, at_once = [], ExpertCache._classify, ExpertCache.hit

    def noted(cache: ExpertCache, *args: Any) -> Any:  # of a request, or of guesses that a token used in passing
        access = real(cache, *args)
        live.append(set(access.hits))
        return access

    def all_there(cache: ExpertCache, layer: int, experts: Any, *args: Any) -> Any:
        buffers = at_once(cache, layer, experts, *args)
        if buffers is not None:
            live.append({(layer, expert) for expert in experts})
        return buffers

    monkeypatch.setattr(ExpertCache, "_classify", noted)
    monkeypatch.setattr(ExpertCache, "hit", all_there)
    engine = engines(packed4, policy=policy, prefetch=prefetch, lookahead=2)
    engine.runner.trace = []
    logits_of(engine.model)
    monkeypatch.undo()
    cache = ExpertCache(
        layers=LAYERS, capacities=engine.plan.capacities, staging=4, policy=POLICIES[policy.removesuffix("-shared")]
    )
    again = replay(cache, engine.runner.trace)
    assert len(live) == 5 * LAYERS and any(live)
    assert [set(access.hits) for access in again] == live
    metrics = engine.metrics()
    assert metrics.calls == len(live) and metrics.hits == sum(map(len, live))
    assert metrics.requests == metrics.hits + metrics.prefetched + metrics.late + metrics.misses
    assert (metrics.guesses > 0) and (metrics.prefetched + metrics.late > 0)  # prompts guess in any case


@pytest.mark.parametrize("staging", [1, 2, 4])
@pytest.mark.parametrize("slots", [0, 1, 3])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_an_expert_is_read_at_most_once_per_layer_and_prompt(
    packed4: PackedModel, engines: Engines, slots: int, staging: int, prefetch: int
) -> None:
    store = Noted(packed4)
    engine = engines(packed4, store, experts_per_layer=slots, staging=staging, prefetch=prefetch)
    for ids in (PROMPT, SHORT, PROMPT):
        store.reads.clear()
        with torch.no_grad():
            engine.model(ids)
        assert len(set(store.reads)) == len(store.reads)
    assert len(store.reads) <= LAYERS * (EXPERTS - slots) + staging  # a guess may be wrong


def test_with_a_slot_for_all_nothing_is_read_twice(packed4: PackedModel, engines: Engines) -> None:
    store = Noted(packed4)
    engine = engines(packed4, store, experts_per_layer=EXPERTS)
    for _ in range(2):
        logits_of(engine.model)
    assert sorted(store.reads) == [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    records = [entry.record_nbytes * EXPERTS for entry in packed4.manifest.experts]
    assert engine.metrics().bytes_read == sum(records)


@pytest.mark.parametrize("slots,most", [(EXPERTS, 0), (1, 8)])
def test_guessing_is_automatic_where_something_is_missing(
    packed4: PackedModel, engines: Engines, slots: int, most: int
) -> None:
    engine = engines(packed4, experts_per_layer=slots, prefetch=None)
    logits_of(engine.model)
    assert engine.runner.speculation.most == most
    assert ("guess" in engine.placement()) == bool(most)
    assert engines(packed4, experts_per_layer=slots, prefetch=0).placement() == ""


@pytest.mark.parametrize("staging", [1, 2, 4])
def test_guesses_never_exceed_the_staging_buffers(
    packed4: PackedModel, engines: Engines, monkeypatch: pytest.MonkeyPatch, staging: int
) -> None:
    held, real = [], ExpertCache.issue

    def noted(cache: ExpertCache) -> Any:
        loads = real(cache)
        held.append(len(cache._guessed))
        return loads

    monkeypatch.setattr(ExpertCache, "issue", noted)
    engine = engines(packed4, Noted(packed4, 0), staging=staging, prefetch=4, lookahead=2, experts_per_layer=1)
    logits_of(engine.model)
    assert 0 < max(held) <= staging
    metrics = engine.metrics()
    assert metrics.guesses > 0 and metrics.prefetched + metrics.late > 0


def test_guesses_are_found_when_there_is_time(packed4: PackedModel, engines: Engines) -> None:
    engine = engines(packed4, prefetch=EXPERTS, staging=EXPERTS, experts_per_layer=0)
    real = engine.runner._kernel

    def slow(*args: Any) -> Any:
        time.sleep(0.01)  # computing takes longer than reading
        return real(*args)

    engine.runner._kernel = slow
    with torch.no_grad():
        engine.model(SHORT[:, :1])
    metrics = engine.metrics()
    assert metrics.prefetched >= TOP_K and metrics.misses >= TOP_K  # the first layer is never guessed


# --- odd calls of the seam


def call(engine: Engine, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    module = engine.model.get_submodule(engine.packed.manifest.experts[1].module)
    return engine.runner(1, module, x, index, weights)


def routed(rows: int) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 96, generator=g)
    index = torch.stack([torch.randperm(EXPERTS, generator=g)[:TOP_K] for _ in range(rows)])
    return x, index, torch.rand(rows, TOP_K, generator=g)


@pytest.mark.parametrize("rows", [1, 5, 32, 33, 100])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_batch_equals_transformers_loop(
    packed16: PackedModel, original: Any, engines: Engines, rows: int, prefetch: int
) -> None:
    x, index, weights = routed(rows)
    experts = original.get_submodule(packed16.manifest.experts[1].module)
    with torch.no_grad():
        theirs = experts(x, index, weights)
    ours = call(engines(packed16, prefetch=prefetch, experts_per_layer=1, staging=2), x, index, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [4, 60])
def test_a_sentinel_adds_nothing(packed4: PackedModel, engines: Engines, rows: int) -> None:
    engine = engines(packed4)
    x, index, weights = routed(rows)
    dropped = index.clone()
    dropped[1::2, 1] = EXPERTS
    without = weights.clone()
    without[1::2, 1] = 0
    assert torch.equal(call(engine, x, dropped, weights), call(engine, x, index, without))
    assert torch.equal(call(engine, x, torch.full_like(index, EXPERTS), weights), torch.zeros_like(x))
    assert not torch.equal(call(engine, x, dropped, weights), call(engine, x, index, weights))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_no_rows_give_no_rows(packed4: PackedModel, engines: Engines, prefetch: int) -> None:
    engine = engines(packed4, prefetch=prefetch)
    empty = torch.empty(0, TOP_K)
    assert call(engine, torch.empty(0, 96), empty.long(), empty).shape == (0, 96)
    assert call(engine, *routed(3)).shape == (3, 96)


def test_the_order_of_rows_does_not_show(packed4: PackedModel, engines: Engines) -> None:
    engine = engines(packed4)
    x, index, weights = routed(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    shuffled = call(engine, x[order], index[order], weights[order])
    torch.testing.assert_close(shuffled, call(engine, x, index, weights)[order], rtol=1e-5, atol=1e-5)


def test_a_closed_engine_says_so(packed4: PackedModel, engines: Engines) -> None:
    engine = engines(packed4, experts_per_layer=0)
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        call(engine, *routed(3))


@pytest.mark.parametrize("at", [1, 3, 7])
def test_an_interrupt_leaves_a_usable_engine(
    packed4: PackedModel, expected: "list[torch.Tensor]", engines: Engines, at: int
) -> None:
    engine = engines(packed4, prefetch=2, experts_per_layer=1)
    real, calls = engine.runner._kernel, [0]

    def interrupted(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt
        return real(*args)

    engine.runner._kernel = interrupted
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        engine.model(PROMPT)
    assert same(logits_of(engine.model), expected)


# --- generate


@pytest.fixture(scope="module")
def models(packed16: PackedModel, original: Any) -> "Iterator[tuple[Any, Any]]":
    engine = Engine(packed16, EngineSettings(experts_per_layer=1, prefetch=2, validate=True))
    yield engine.model, original
    engine.close()


def both(models: "tuple[Any, Any]", ids: torch.Tensor, **options: Any) -> "tuple[torch.Tensor, torch.Tensor]":
    found = []
    for model in models:
        torch.manual_seed(11)
        given = {"max_new_tokens": 24, "do_sample": False, **options}
        found.append(model.generate(ids, **copy.deepcopy(given)))
    return found[0], found[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.3},
        {"use_cache": False, "max_new_tokens": 6},
    ],
    ids=lambda options: "-".join(map(str, options)) or "greedy",
)
def test_generate_equals_transformers(models: "tuple[Any, Any]", options: "dict[str, Any]") -> None:
    ours, theirs = both(models, SHORT, **options)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] > SHORT.shape[1]


def test_generate_from_a_long_prompt(models: "tuple[Any, Any]") -> None:
    ours, theirs = both(models, PROMPT)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}], ids=["greedy", "sample", "beams"])
def test_generate_a_padded_batch(models: "tuple[Any, Any]", options: "dict[str, Any]") -> None:
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for row, length in enumerate((12, 5, 9)):
        ids[row, -length:], mask[row, -length:] = PROMPT[0, row : row + length], 1
    ours, theirs = both(models, ids, attention_mask=mask, pad_token_id=0, **options)
    assert torch.equal(ours, theirs)
    alone, _ = both(models, ids[1:2, -5:])
    if not options:
        assert ours[1, 12:].tolist()[: alone.shape[1] - 5] == alone[0, 5:].tolist()


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_sees_every_token(models: "tuple[Any, Any]") -> None:
    streamers = [Collected(), Collected()]
    out = [
        model.generate(SHORT, max_new_tokens=12, do_sample=False, streamer=streamer)
        for model, streamer in zip(models, streamers, strict=True)
    ]
    assert streamers[0].tokens == streamers[1].tokens == out[0][0].tolist() == out[1][0].tolist()
    assert streamers[0].ended


class StopAfter(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_stopping_criteria_stop(models: "tuple[Any, Any]") -> None:
    ours, theirs = both(models, SHORT, stopping_criteria=StoppingCriteriaList([StopAfter(11)]))
    assert torch.equal(ours, theirs) and ours.shape[1] == 11


def test_past_key_values_continue(models: "tuple[Any, Any]") -> None:
    whole, _ = both(models, SHORT, max_new_tokens=16)
    for model in models:
        first = model.generate(SHORT, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        again = model.generate(
            first.sequences, past_key_values=first.past_key_values, max_new_tokens=8, do_sample=False
        )
        assert torch.equal(again, whole)


def test_two_models_run_side_by_side(packed16: PackedModel, models: "tuple[Any, Any]", engines: Engines) -> None:
    other = engines(packed16, experts_per_layer=0).model
    before, _ = both(models, SHORT)
    mixed = []
    for model in (other, models[0], other):
        mixed.append(model.generate(SHORT, max_new_tokens=24, do_sample=False))
    assert all(torch.equal(one, before) for one in mixed)


# --- the memory promise

BUDGET = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from greenroom.config import EngineSettings
from greenroom.engine import Engine
from greenroom.errors import BudgetError, ConfigError
from greenroom.packed import PackedModel
packed = PackedModel(Path(sys.argv[1]))
try:
    engine = Engine(packed, EngineSettings(ram=int(sys.argv[2]) << 20, context=64))
except BudgetError as error:
    print(error)
else:
    engine.model(torch.arange(4, 64)[None])
    print("ok", engine.plan.slots)
"""


def with_budget(folder: Path, mib: int) -> str:
    command = [sys.executable, "-c", BUDGET, str(folder), str(mib)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.slow
def test_the_budget_that_the_error_names_is_enough(packed4: PackedModel) -> None:
    message = with_budget(packed4.folder, 20)
    assert "\n" not in message and message.startswith("20 MiB is too small")
    named = int(message.split("give --ram ")[1].split("MiB")[0])
    assert with_budget(packed4.folder, named).startswith("ok")
    assert "too small" in with_budget(packed4.folder, named - 16)


def test_the_plan_keeps_the_budget(packed4: PackedModel, engines: Engines) -> None:
    least = engines(packed4, experts_per_layer=0).plan
    record = least.record_nbytes
    for spare in (64 << 20, (64 << 20) + 3 * record, 1 << 30):
        ram = least.total + spare
        plan = engines(packed4, experts_per_layer=None, ram=ram).plan
        assert plan.total <= ram and plan.budget == ram
        assert plan.slots == min(LAYERS * EXPERTS, (ram - plan.fixed) // record)
    with pytest.raises(BudgetError) as caught:
        engines(packed4, experts_per_layer=EXPERTS, ram=8 << 20)
    assert "\n" not in str(caught.value) and "fewer experts per layer (0 fit)" in str(caught.value)


def test_an_expert_budget_is_shared_out(packed4: PackedModel, engines: Engines) -> None:
    record = packed4.manifest.experts[0].record_nbytes
    plan = engines(packed4, experts_per_layer=None, expert_budget=7 * record).plan
    assert plan.slots == 7 and sorted(plan.capacities) == [2, 2, 3]


def test_a_copy_elsewhere_runs_alike(
    packed4: PackedModel, expected: "list[torch.Tensor]", engines: Engines, tmp_path: Path
) -> None:
    shutil.copytree(packed4.folder, tmp_path / "copy")
    assert same(logits_of(engines(PackedModel(tmp_path / "copy")).model), expected)


def test_an_interrupt_between_two_steps_loses_no_buffer(
    packed4: PackedModel, engines: "Engines", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the cache has issued loads and before they are started, and before arrivals are counted."""
    engine = engines(packed4, experts_per_layer=0, staging=2)
    ids = torch.arange(1, 7).view(1, -1)
    want = engine.model(ids).logits
    for victim, name in ((engine.runner._transfer, "start"), (engine.runner._cache, "loaded")):
        for _ in range(5):  # more often than there are buffers to lose
            with monkeypatch.context() as patch:
                patch.setattr(victim, name, interrupted_once(getattr(victim, name)))
                with pytest.raises(KeyboardInterrupt):
                    engine.model(ids)
            assert torch.equal(engine.model(ids).logits, want)


def interrupted_once(function: Any) -> Any:
    calls = []

    def call(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return function(*arguments)

    return call


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other test's engine runs, or is dropped meanwhile."""
    gc.collect()
    dropped.stop_all()
    monkeypatch.setattr("greenroom.engine._RUNNING", weakref.WeakSet())
    monkeypatch.setattr(threads, "_users", 0)


@pytest.mark.usefixtures("alone")
def test_a_second_model_leaves_what_the_first_was_promised(packed4: PackedModel, monkeypatch: Any) -> None:
    """Slots are not touched before they are filled: the system counts them as free."""
    nbytes = sum(entry.num_experts * entry.record_nbytes for entry in packed4.manifest.experts)
    monkeypatch.setattr("greenroom.engine.available_memory", lambda: 400 << 20)
    one = Engine(packed4, EngineSettings(ram=1 << 40, context=16))
    before = one.owed
    assert before >= nbytes
    two = Engine(packed4, EngineSettings(context=16))
    assert two.plan.runtime > before and two.plan.budget - two.plan.runtime == int(0.9 * ((400 << 20) - before))
    one.model(torch.arange(4, 40)[None], use_cache=False)
    assert one.owed < before
    two.close()
    one.close()
    three = Engine(packed4, EngineSettings(context=16))
    assert three.plan.budget - three.plan.runtime == int(0.9 * (400 << 20))
    three.close()


def test_a_model_that_is_dropped_stops_its_threads(packed4: PackedModel) -> None:
    def readers() -> int:
        return sum(path.read_text().startswith("greenroom-read") for path in Path("/proc/self/task").glob("*/comm"))

    gc.collect()
    before = readers()
    engine = Engine(packed4, EngineSettings(experts_per_layer=2, context=16))
    engine.model.generate(torch.arange(4, 9)[None], max_new_tokens=2)
    assert readers() > before
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    dropped.stop_all()
    assert gone() is None and readers() == before


def threads_alive() -> int:
    """Those of C++, too."""
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.usefixtures("alone")
def test_the_next_model_stops_those_that_were_dropped(packed4: PackedModel) -> None:
    """Python collects what lies in cycles too rarely."""
    before, gone = threads_alive(), []
    gc.disable()
    try:
        for _ in range(3):
            engine = Engine(packed4, EngineSettings(experts_per_layer=2, context=16))
            engine.model.generate(torch.arange(4, 9)[None], max_new_tokens=2)
            gone.append(weakref.ref(engine))
            running = threads_alive()
            del engine
        assert [ref() is None for ref in gone] == [True, True, False]
        assert running - before <= 5, "four readers, and the thread that stops them"
    finally:
        gc.enable()
        gc.collect()


@pytest.mark.usefixtures("alone")
def test_what_fails_to_start_leaves_nothing(packed4: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        torch.set_num_threads(2)
        Engine(packed4, EngineSettings(experts_per_layer=2, context=16)).close()  # the kernels' own threads stay
        gc.collect()
        before, files = threads_alive(), len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(BudgetError):
            Engine(packed4, EngineSettings(ram=1 << 20))
        with monkeypatch.context() as patch:
            patch.setattr("greenroom.engine.Prompts", None)
            with pytest.raises(TypeError):
                Engine(packed4, EngineSettings(experts_per_layer=2, context=16))
        assert torch.get_num_threads() == 2
        ends = time.monotonic() + 5
        while threads_alive() != before:  # who has been joined is counted for a moment still
            assert time.monotonic() < ends
            time.sleep(0.01)
        gc.collect()  # embeddings stay mapped while the error's frames are kept
        assert len(list(Path("/proc/self/fd").iterdir())) == files
    finally:
        torch.set_num_threads(1)


def test_the_collector_may_run_in_a_reader(packed4: PackedModel) -> None:
    """Which cannot wait for itself."""
    inside, go_on = threading.Event(), threading.Event()

    class Collecting(DiskStore):
        def check(self, layer: int, expert: int, record: memoryview) -> None:
            inside.set()
            assert go_on.wait(20)
            gc.collect()

    engine = Engine(packed4, EngineSettings(experts_per_layer=2, context=16), store=Collecting(packed4))
    transfer, gone = engine._transfer, weakref.ref(engine)
    transfer.start(Load((0, 0), 0, True))
    assert inside.wait(20)
    del engine
    go_on.set()
    for thread in transfer._readers._threads:
        thread.join(20)
    assert gone() is None and not any(thread.is_alive() for thread in transfer._readers._threads)


@pytest.mark.usefixtures("alone")
def test_torch_has_its_threads_back(packed4: PackedModel) -> None:
    try:
        torch.set_num_threads(2)
        with Engine(packed4, EngineSettings(experts_per_layer=2, context=16)) as one:
            assert torch.get_num_threads() == 1
            with Engine(packed4, EngineSettings(experts_per_layer=2, context=16)):
                pass
            assert torch.get_num_threads() == 1, "one still runs"
            one.model(torch.arange(4, 9)[None])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_what_would_copy_a_model_without_its_experts_is_refused(packed4: PackedModel, tmp_path: Path) -> None:
    with Engine(packed4, EngineSettings(experts_per_layer=2, context=16)) as engine:
        for action in (
            lambda: engine.model.save_pretrained(tmp_path / "saved"),
            lambda: copy.deepcopy(engine.model),
            lambda: pickle.dumps(engine.model),
        ):
            with pytest.raises(ConfigError, match=r"copy .*or load it once more"):
                action()
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("action", [lambda it: it.half(), lambda it: it.to(torch.float64), lambda it: it.to("meta")])
def test_what_packed_weights_cannot_follow_is_refused(packed4: PackedModel, action: Any, dtype: "str | None") -> None:
    """What asks for what there is does nothing, also to what is kept in another dtype."""
    ids = torch.arange(4, 9)[None]
    with Engine(packed4, EngineSettings(experts_per_layer=2, context=16, dtype=dtype)) as engine, torch.no_grad():
        model, kinds = engine.model, [it.dtype for it in [*engine.model.parameters(), *engine.model.buffers()]]
        want = model(ids).logits
        with pytest.raises(ConfigError, match="dtype="):
            action(model)
        assert model.to(getattr(torch, dtype or "float32")).to("cpu") is model
        assert kinds == [it.dtype for it in [*model.parameters(), *model.buffers()]]
        assert dtype is None or torch.float32 in kinds, "control: nothing is kept in another dtype"
        assert torch.equal(model(ids).logits, want)
