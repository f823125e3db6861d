"""The compiled decode step against the modules it stands in for."""

import contextlib
import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, GptOssConfig

import families
from greenroom import footprint, threads
from greenroom.config import EngineSettings
from greenroom.decode import blocks, describe, kv, proof
from greenroom.engine import Engine
from greenroom.kernels import native
from greenroom.model import routers
from greenroom.packed import PackedModel
from greenroom.prefetch import Foresight
from greenroom.speculation import Speculation
from samples import some
from test_families import case_of, distance

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension is not built")

NAMED = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3"]
"""What must be on the fast path; the others are there because they prove right."""
OTHERS = [
    *("aria_text", "dots1", "exaone_moe", "glm4_moe", "glm4_moe_lite", "granitemoe", "hy_v3", "minimax_m2", "mistral4"),
    "solar_open",
]
FEW_OTHERS = ["gemma4", "jamba", "lfm2_moe", "qwen3_next", "zaya"]
"""Families without a fast path, for what takes long."""
TOLERANCE = 5e-3
"""largest |difference| / largest |logit|: float16 keys and values, over random weights that exaggerate"""
PROMPT_TOLERANCE = 5e-4
"""the same where the modules round keys and values, too; measured 1e-6 to 1.2e-4: some fall between two numbers"""
CONTROL = 2e-2
MANY = 8
"""tokens from which on a prompt's activations may be rounded to 8 bits"""
PROMPT = torch.randint(families.FIRST_ID, families.LAST_ID, (1, 9), generator=torch.Generator().manual_seed(3))
FORCED = torch.randint(families.FIRST_ID, families.LAST_ID, (14,), generator=torch.Generator().manual_seed(4)).tolist()


@contextlib.contextmanager
def running(packed: PackedModel, **settings: Any) -> "Iterator[Engine]":
    engine = Engine(packed, EngineSettings(**{"experts_per_layer": 2, "validate": True, "context": 64, **settings}))
    try:
        yield engine
    finally:
        engine.close()


def rounding_cache(engine: Engine) -> DynamicCache:
    """One that rounds, whoever computes."""
    cache = DynamicCache(config=engine.model.config)
    assert engine.decode.prove() == "" and engine.decode._adopt(cache) is not None
    return cache


@torch.no_grad()
def decoded(model: Any, prompt: torch.Tensor = PROMPT, past: "DynamicCache | None" = None) -> torch.Tensor:
    """Logits of the forced tokens after the prompt, [tokens, vocab]."""
    out = model(prompt, past_key_values=DynamicCache(config=model.config) if past is None else past, use_cache=True)
    found = []
    for token in FORCED:
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits[0, -1])
    return torch.stack(found)


def by_modules(engine: Engine, rounded: bool = False) -> torch.Tensor:
    engine.decode.enabled = False
    found = decoded(engine.model, past=rounding_cache(engine) if rounded else None)
    engine.decode.enabled = True
    return found


# --- families


@pytest.mark.parametrize("name", some(NAMED + OTHERS, NAMED))
@pytest.mark.parametrize("bits", some([16, 4], [4]))
def test_a_family_decodes_like_its_modules(name: str, bits: int) -> None:
    with running(case_of(name).pack(bits)) as engine:
        want = by_modules(engine, rounded=True)
        assert engine.decode.steps == engine.decode.prompts == 0
        got = decoded(engine.model)
        assert engine.decode.reason == "" and engine.decode.steps == len(FORCED) and engine.decode.prompts == 1
        assert distance(got, want) < TOLERANCE


def test_time_in_weights_is_told_apart(mixtral: Engine) -> None:
    """Products with experts, with other linears, and all the rest; by either way of decoding."""
    for enabled in (True, False):
        mixtral.decode.enabled = enabled
        before, start_s = mixtral.metrics(), time.perf_counter()
        decoded(mixtral.model)
        spent, took_s = mixtral.metrics() - before, time.perf_counter() - start_s
        assert spent.compute_s > 0 and spent.dense_s > 0
        assert spent.compute_s + spent.dense_s + spent.stall_s < took_s
    mixtral.decode.enabled = True


# --- prompts

LONG = torch.randint(families.FIRST_ID, families.LAST_ID, (1, 230), generator=torch.Generator().manual_seed(6))


@torch.no_grad()
def read(
    engine: Engine, *ends: int, ids: torch.Tensor = LONG, cached: bool = True, rounded: bool = False
) -> torch.Tensor:
    """Logits of `ids` [n, vocab], fed in pieces that end at `ends`. `rounded`: into a `rounding_cache`."""
    past = DynamicCache(config=engine.model.config) if cached else None
    past = rounding_cache(engine) if rounded else past
    pieces = [
        engine.model(ids[:, start:end], past_key_values=past, use_cache=cached).logits[0]
        for start, end in zip((0, *ends), (*ends, ids.shape[1]), strict=True)
    ]
    return torch.cat(pieces)


@contextlib.contextmanager
def modules_only(engine: Engine) -> "Iterator[None]":
    engine.decode.enabled = False
    yield
    engine.decode.enabled = True


@pytest.mark.parametrize("name", NAMED + OTHERS)
def test_a_prompt_is_read_like_its_modules_read_it(name: str) -> None:
    """In one piece, in pieces of all kinds after a cache, and without one; 16 bits, so that nothing else differs."""
    with running(case_of(name).pack(16), context=256) as engine:
        ids = LONG[:, :31]
        with modules_only(engine):
            want, other = read(engine, ids=ids, rounded=True), read(engine, ids=ids.flip(1), rounded=True)
            assert distance(read(engine, 9, ids=ids, rounded=True), want) < PROMPT_TOLERANCE
            assert 0 < distance(read(engine, ids=ids), want) < TOLERANCE
        for ends in ((), (2,), (7, 9, 25)):
            before = engine.decode.prompts
            assert distance(read(engine, *ends, ids=ids), want) < PROMPT_TOLERANCE
            assert engine.decode.prompts == before + 1 + len(ends) and engine.decode.reason == ""
        assert distance(read(engine, ids=ids, cached=False), want) < PROMPT_TOLERANCE
        assert distance(other, want) > CONTROL, "any prompt would have passed"


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_long_prompts_cross_tiles(name: str) -> None:
    """More tokens and keys than a tile holds, after a cache, too."""
    with running(case_of(name).pack(4), context=512) as engine:
        with modules_only(engine):
            want = read(engine, rounded=True)
        for ends in ((), (100,), (150, 170)):
            assert distance(read(engine, *ends), want) < TOLERANCE
        assert engine.decode.prompts == 6


def test_long_prompts_of_wide_matrices_are_left_to_torch() -> None:
    """At 16 bits its products of many vectors are the faster ones."""
    with running(case_of("mixtral").pack(16), context=256) as engine:
        read(engine)
        assert engine.decode.reason == "" and engine.decode.prompts == 0
        read(engine, ids=LONG[:, :20])
        assert engine.decode.prompts == 1


def test_a_prompt_sees_no_further_than_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(case_of("gpt_oss").pack(16)) as engine:
        ids = LONG[:, :30]
        with modules_only(engine):
            want = read(engine, ids=ids)
        real = describe.describe
        monkeypatch.setattr(
            "greenroom.decode.step.describe",
            lambda base: dataclasses.replace(real(base), windows=[None] * len(real(base).windows)),
        )
        engine.decode.forget()
        assert distance(read(engine, ids=ids), want) > CONTROL, "the window would not have shown"


def test_padded_prompts_go_through_the_modules(mixtral: Engine) -> None:
    mask = torch.ones_like(PROMPT)
    with torch.no_grad():
        mixtral.model(PROMPT, attention_mask=mask)
        assert mixtral.decode.prompts == 1
        mask[0, :2] = 0
        mixtral.model(PROMPT, attention_mask=mask)
        mixtral.model(PROMPT, position_ids=torch.arange(3, 3 + PROMPT.shape[1])[None])
        mixtral.model(PROMPT.repeat(2, 1))
        assert mixtral.decode.prompts == 1


@pytest.mark.parametrize("bits", [16, 8])
def test_memory_and_threads_do_not_show_in_prompts(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = case_of("qwen2_moe").pack(4)
    found = []
    for slots, count in ((10, 1), (0, 2), (3, 3)):
        monkeypatch.setattr(threads, "_ours", count)
        with running(packed, experts_per_layer=slots, context=256, activation_bits=bits) as engine:
            found.append(read(engine, 50))
            assert engine.decode.prompts == 2
    assert all(torch.equal(one, found[0]) for one in found[1:])


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_activations_in_8_bits_are_close(name: str) -> None:
    """In a long prompt, and nowhere else."""
    packed = case_of(name).pack(4)
    found = {}
    for bits in (16, 8):
        with running(packed, context=256, activation_bits=bits) as engine:
            found[bits] = read(engine, ids=LONG[:, :100]), read(engine, ids=LONG[:, : MANY - 1])
            assert engine.decode.reason == ""
    if native.describe().startswith("native (portable"):
        pytest.skip("always exact")
    near, exact = found[8][0], found[16][0]
    errors = (near - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert 1e-3 < float(errors.median()) < 5e-2  # a token's router may stand between two experts
    assert torch.equal(found[8][1], found[16][1])


@pytest.mark.parametrize("name", some(sorted(set(families.FAMILIES) - set(NAMED + OTHERS)), FEW_OTHERS))
def test_other_families_run_as_before(name: str) -> None:
    """Most are not on the fast path, and none comes to harm."""
    family = families.FAMILIES[name]
    if not family.generates:
        pytest.skip("it does not generate")
    with running(case_of(name).pack(16)) as engine:
        options = {
            "max_new_tokens": 4,
            "min_new_tokens": 4,
            "do_sample": False,
            "attention_mask": torch.ones_like(PROMPT),
        }
        engine.decode.enabled = False
        want = engine.model.generate(PROMPT, **options)
        engine.decode.enabled = True
        assert torch.equal(engine.model.generate(PROMPT, **options), want)


@torch.no_grad()
def after_a_long_prompt(engine: Engine) -> "tuple[torch.Tensor, list[Any], Any]":
    """Logits of FORCED, its trace, and what was counted, when most experts are there."""
    out = engine.model(LONG, use_cache=True)
    engine.runner.drain()
    engine.runner.trace, before, found = [], engine.metrics(), []
    for token in FORCED:
        out = engine.model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits[0, -1])
    spent, trace = engine.metrics() - before, engine.runner.trace
    engine.runner.trace = None
    return torch.stack(found), trace, (spent.calls, spent.requests, spent.hits, spent.bytes_read)


def most_experts(packed: PackedModel) -> int:
    return max(entry.num_experts for entry in packed.manifest.experts)


@pytest.mark.parametrize("name", NAMED + OTHERS)
def test_a_token_through_all_layers_at_once_is_one_layer_by_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, and so is what is counted and recorded; layer by layer where somebody watches. Guesses that are all
    there stop nobody."""
    packed = case_of(name).pack(4)
    with running(packed, context=256, experts_per_layer=most_experts(packed)) as engine:
        want = after_a_long_prompt(engine)
        assert engine.decode.walks > 0 and want[2][2] == want[2][1]
        walks = engine.decode.walks
        engine.runner.observer = lambda *_: None
        got = after_a_long_prompt(engine)
        assert engine.decode.walks == walks and engine.decode.steps == 2 * len(FORCED)
        assert torch.equal(got[0], want[0]) and got[1:] == want[1:]
    with running(packed, context=256, experts_per_layer=most_experts(packed), prefetch=2) as engine:
        monkeypatch.setattr(Speculation, "pays", True)
        assert torch.equal(after_a_long_prompt(engine)[0], want[0])
        assert engine.decode.walks == walks


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("policy", some(["learned", "lru-shared"], ["learned"]))
@pytest.mark.parametrize("prefetch,pays", [(0, False), (2, False), (2, True)])
def test_a_token_walks_up_to_the_layer_that_lacks_an_expert(
    name: str, policy: str, prefetch: int, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what layer by layer gives, counted and recorded alike, also where calls are guessed, or some are."""
    monkeypatch.setattr(Speculation, "pays", pays)
    found = []
    packed = case_of(name).pack(4)
    for watched in (False, True):
        settings = {"experts_per_layer": most_experts(packed) // 2 + 1, "policy": policy, "prefetch": prefetch}
        with running(packed, context=256, validate=True, **settings) as engine:
            engine.runner.observer = (lambda *_: None) if watched else None
            found.append(after_a_long_prompt(engine))
            assert (engine.decode.walks > 0) != watched and engine.decode.steps == len(FORCED)
            assert found[0][2][2] < found[0][2][1], "nothing was missing"
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert prefetch or found[0][2] == found[1][2]


def test_a_walk_asks_where_a_guess_is_not_there(mixtral: Engine) -> None:
    """In the layer before, and goes on only if it is told to, and all that it wants itself is there; nobody is asked
    where nothing is guessed, nor for another expert."""
    experts = most_experts(mixtral.packed)
    with running(mixtral.packed, context=256, experts_per_layer=experts) as engine:
        step, found = engine.decode, []
        walk, decoder, arena = step._walk, step._decoder, engine.runner._arena

        def watched(first: int, last: int, caches: Any, turn: Any, records: Any, *rest: Any) -> int:
            hidden, outputs = step.hidden.clone(), step._outputs.data_ptr()
            places = turn.cosine.data_ptr(), turn.sine.data_ptr(), records
            for layer, guesses, goes_on, lacking in product((0, 1), (0, 1, experts), (False, True), range(experts)):
                asked: list[Any] = []
                lacks = functools.partial(lambda asked, goes_on, *given: asked.append(given) or goes_on, asked, goes_on)
                records.put(layer, lacking, 0)
                end, foresee_s = decoder.walk(0, 1, caches, *places, (1, guesses), lacks, False, outputs, 1)
                assert len(decoder.passed()) == end and len(asked) < 2 and 0 <= foresee_s < 60
                for index, chosen, _, foreseen in asked:
                    assert index == 0 and [ahead for ahead, _ in foreseen] == [1] * bool(guesses)
                    assert lacking in (chosen if layer == 0 else foreseen[0][1])
                found.append((layer, guesses, goes_on, bool(asked), bool(end)))
                records.put(layer, lacking, arena.address(engine.runner._cache.there(layer, lacking)))
                step.hidden.copy_(hidden)
            step._walk = walk
            return walk(first, last, caches, turn, records, *rest)

        after_a_long_prompt(engine)
        step._walk, decoder = watched, step._decoder
        after_a_long_prompt(engine)
    for goes_on in (False, True):  # the layer ahead lacks one of what is guessed
        assert [found.count((1, guesses, goes_on, True, goes_on)) for guesses in (0, 1, experts)] == [0, 1, experts]
        chosen = found.count((0, 0, goes_on, True, False))  # its own choice is elsewhere, whatever it is told
        assert 0 < chosen < experts and found.count((0, 0, goes_on, False, True)) == experts - chosen


def guessing(engine: Engine) -> "list[bool]":
    """Have it load all guesses, which come at once; whether tokens went on where something was lacking."""
    runner, transfer, answers = engine.runner, engine._transfer, []
    poll, lacks = transfer.poll, runner.lacks
    runner.speculation.watches = lambda: True
    runner.speculation.choose = lambda layer, guesses, there: guesses
    transfer.poll = lambda wait: poll(wait or bool(transfer.under_way))

    def noted(*arguments: Any) -> bool:
        answers.append(lacks(*arguments))
        return answers[-1]

    runner.lacks = noted
    return answers


@pytest.mark.parametrize("policy", ["learned", "lru-shared"])
def test_a_token_goes_on_where_what_it_lacked_has_come(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses are used in passing, and accounted for when their buffers are wanted: the bits, and what is recorded, are
    those of layer by layer. Where layers share their slots a guess has to be asked for."""
    monkeypatch.setattr(Speculation, "pays", True)
    packed, found = case_of("mixtral").pack(4), []
    settings = {"experts_per_layer": most_experts(packed) // 2 + 1, "policy": policy, "prefetch": most_experts(packed)}
    for watched in (True, False):
        with running(packed, context=256, validate=True, **settings) as engine:
            engine.runner.observer = (lambda *_: None) if watched else None
            answers, cache, in_passing = guessing(engine), engine.runner._cache, [0]
            used = cache.used

            def noted(*access: Any, cache: Any = cache, used: Any = used, in_passing: Any = in_passing) -> bool:
                before = cache.counters.prefetched
                there: bool = used(*access)
                in_passing[0] += cache.counters.prefetched - before
                return there

            cache.used = noted
            found.append(after_a_long_prompt(engine))
            assert (True in answers) != watched
            assert (in_passing[0] > 0) == (policy == "learned" and not watched)
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_an_interrupt_in_a_walk_loses_no_buffer() -> None:
    with running(case_of("mixtral").pack(4), experts_per_layer=3, prefetch=4, validate=True) as engine:
        want, transfer, answers = decoded(engine.model), engine._transfer, guessing(engine)
        start = transfer.start

        def interrupted(load: Any) -> None:
            if load.speculative and len(answers) > 3:
                raise KeyboardInterrupt
            start(load)

        transfer.start = interrupted
        with pytest.raises(KeyboardInterrupt):
            for _ in range(20):
                decoded(engine.model)
        assert len(answers) > 3 and engine._transfer.under_way >= engine.runner._cache.reading
        transfer.start = start
        assert torch.equal(decoded(engine.model), want)


def test_where_experts_lie_follows_the_cache(mixtral: Engine) -> None:
    """A token that walks reads each expert from where it lies; where the places are wrong, it is another token."""
    with running(mixtral.packed, context=256, experts_per_layer=most_experts(mixtral.packed)) as engine:
        want = after_a_long_prompt(engine)[0]
        modules = engine.decode._parts.moe
        records, most, _ = engine.runner.there(modules)
        assert most >= len(modules) and engine.runner.there(modules)[0] is records
        assert torch.equal(after_a_long_prompt(engine)[0], want)
        for layer, experts in enumerate(engine.runner._entries):
            wrong = engine.runner._arena.address(engine.runner._cache.there(layer, 0))
            for expert in range(experts.num_experts):
                records.put(layer, expert, wrong)
        assert not torch.equal(after_a_long_prompt(engine)[0], want), "control"
        with pytest.raises(ValueError, match="no such expert"):
            records.put(0, most_experts(mixtral.packed), 0)


def test_an_interrupt_while_places_are_told_loses_none(mixtral: Engine) -> None:
    with running(mixtral.packed, context=256, experts_per_layer=most_experts(mixtral.packed)) as engine:
        want = after_a_long_prompt(engine)[0]
        modules, runner = engine.decode._parts.moe, engine.runner
        (records, layers), told = runner._places, []

        class Interrupted:
            def put(self, layer: int, expert: int, address: int) -> None:
                if len(told) == 2:
                    raise KeyboardInterrupt
                told.append((layer, expert))
                records.put(layer, expert, address)

        for layer, entry in enumerate(runner._entries):
            for expert in range(entry.num_experts):
                records.put(layer, expert, 0)
                runner._cache.moved.add((layer, expert))
        everything = set(runner._cache.moved)
        runner._places = Interrupted(), layers
        with pytest.raises(KeyboardInterrupt):
            runner.there(modules)
        assert len(told) == 2 and runner._cache.moved == everything - set(told)
        runner._places = records, layers
        assert torch.equal(after_a_long_prompt(engine)[0], want) and not runner._cache.moved


def test_two_threads_take_turns(mixtral: Engine) -> None:
    def answer(start: int) -> "list[int]":
        ids: list[int] = mixtral.model.generate(PROMPT + start, max_new_tokens=20, do_sample=False)[0].tolist()
        return ids

    want = [answer(start) for start in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, range(4))) == want


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_torch_makes_by_default_does_not_matter(dtype: torch.dtype) -> None:
    """Compiled code is given addresses of float32, whatever the default."""
    prompt = PROMPT.repeat(1, 3)
    with running(case_of("deepseek_v3").pack(16)) as engine:
        want = decoded(engine.model, prompt)
    try:
        torch.set_default_dtype(dtype)
        with running(case_of("deepseek_v3").pack(16)) as engine:
            assert torch.equal(decoded(engine.model, prompt), want) and engine.decode.steps
    finally:
        torch.set_default_dtype(torch.float32)


def test_where_attention_becomes_another_the_modules_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral 4 multiplies queries by a factor that depends on their position."""
    model = copy.deepcopy(case_of("mistral4").model)
    model.config.rope_parameters["original_max_position_embeddings"] = first = PROMPT.shape[1] + 5
    with running(case_of("mistral4").pack(16)) as engine:
        engine.model.config.rope_parameters.update(model.config.rope_parameters)
        engine.decode.forget()
        want = by_modules(engine)
        assert distance(decoded(engine.model), want) < TOLERANCE
        assert engine.decode.steps == 5 and not engine.decode.reason
        long = torch.randint(families.FIRST_ID, families.LAST_ID, (1, first + 1))
        with torch.no_grad():
            read, before = engine.model(long).logits, engine.decode.prompts
            engine.model(long[:, :-1])
        assert engine.decode.prompts == before + 1, "a prompt that crosses it is the modules'"
        monkeypatch.setattr(describe, "_limit", lambda config: None)
        engine.decode.forget()
        assert "layer" in engine.decode.prove(), "the proof looks at the end of the context"
        monkeypatch.setattr(proof, "disagreement", lambda *_: "")
        engine.decode.forget()
        with torch.no_grad():
            assert distance(engine.model(long).logits, read) > PROMPT_TOLERANCE, "control"


def test_what_it_does_not_know_goes_through_the_modules() -> None:
    """Arguments by their place, and masks that are made."""
    with running(case_of("gpt_oss").pack(16)) as engine, torch.no_grad():
        base, token = engine.model.base_model, torch.tensor([[5]])
        past = DynamicCache(config=engine.model.config)
        hidden = base(PROMPT, torch.ones_like(PROMPT), past_key_values=past).last_hidden_state
        assert distance(engine.model.lm_head(hidden), engine.model(PROMPT).logits) < TOLERANCE
        masks = {"full_attention": None, "sliding_attention": None}
        want = base(token, attention_mask=masks, past_key_values=copy.deepcopy(past)).last_hidden_state
        assert engine.decode.steps == 0
        assert distance(base(token, past_key_values=past).last_hidden_state, want) < TOLERANCE
        assert engine.decode.steps == 1


def test_no_number_stays_none(mixtral: Engine) -> None:
    """Of a token whose keys are none, later tokens see none."""
    with running(mixtral.packed) as engine, torch.no_grad():
        past = engine.model(PROMPT, use_cache=True).past_key_values
        embed, bad = engine.model.get_input_embeddings(), torch.tensor([[7]])
        handle = embed.register_forward_hook(lambda module, ids, out: out * float("nan"))
        engine.decode._hooks = []  # or the modules would compute it
        engine.model(bad, past_key_values=past)
        handle.remove()
        assert engine.decode.steps == 1
        assert engine.model(torch.tensor([[5]]), past_key_values=past).logits.isnan().all()


def test_windows_hide_what_the_masks_hide() -> None:
    """gpt-oss attends to 5 positions in every other layer; so does a cache that was not told about windows."""
    with running(case_of("gpt_oss").pack(16)) as engine:
        assert set(describe.describe(engine.model.base_model).windows) == {None, 5}
        want = by_modules(engine)
        plain = engine.model(PROMPT, past_key_values=DynamicCache(), use_cache=True)
        for token in FORCED:
            with torch.no_grad():
                plain = engine.model(torch.tensor([[token]]), past_key_values=plain.past_key_values, use_cache=True)
        assert distance(plain.logits[0, -1], want[-1]) < TOLERANCE


@pytest.mark.parametrize("name", NAMED)
def test_a_compiled_router_thinks_what_its_gate_thinks(name: str) -> None:
    with running(case_of(name).pack(16), policy="probability") as engine:
        gates, seen = routers(engine.model, engine.packed), []
        engine.runner.observer = lambda layer, x, index, weights, shares: seen.append((layer, x.clone(), shares))
        decoded(engine.model)
        assert engine.decode.steps == len(FORCED)
        told = [(layer, x, shares) for layer, x, shares in seen if len(x) == 1]
        assert len(told) >= len(FORCED) * len(gates)
        for layer, x, shares in told:
            want = gates[layer].shares(gates[layer].scores(x))[0].float()
            got = torch.tensor(shares)
            assert torch.equal(got.half().float(), got), "a trace could not hold it"
            assert torch.allclose(got, want, atol=1e-3, rtol=1e-2)
            assert not torch.allclose(got.flip(0), want, atol=1e-3, rtol=1e-2), "control"


@pytest.mark.parametrize("name", NAMED)
def test_a_compiled_router_foresees_what_its_gate_would(name: str) -> None:
    with running(case_of(name).pack(16)) as engine:
        gates, serve, found = routers(engine.model, engine.packed), engine.decode._serve, []

        def noted(layer: int, module: Any, x: torch.Tensor, experts: "list[int]", *others: Any) -> None:
            foresee, count = others[-1], gates[layer].weight.shape[0]
            assert sorted(foresee(layer, len(experts))) == experts, "its own choice is not foreseen"
            if layer + 1 < len(gates):
                found.append((layer + 1, x.clone(), len(experts), foresee(layer + 1, count)))
            serve(layer, module, x, experts, *others)

        engine.decode._serve, engine.decode._residents = noted, None
        decoded(engine.model)
        assert engine.decode.steps == len(FORCED) and len(found) >= len(FORCED) * (len(gates) - 1) > 0
        foresight = Foresight(gates)
        for layer, x, top_k, ranked in found:
            scores = gates[layer].scores(foresight(layer - 1, layer, x))[0].float()
            assert len(set(ranked)) == len(ranked) == len(scores)
            ordered = scores[ranked[:top_k]]  # groups that are not chosen come last, in any order
            slack = 0.02 * float(scores.max() - scores.min())
            assert (ordered.diff() <= slack).all()
            if not engine.model.config.to_dict().get("n_group"):
                assert (scores.topk(top_k).values - ordered).abs().max() <= slack
                assert (scores.topk(top_k).values - scores[ranked[::-1][:top_k]]).abs().max() > slack, "control"


# --- the proof


CHANGES: "dict[str, Callable[[Any], None]]" = {
    "scale": lambda layer: _change(layer, "attention", scale=0.7),
    "rotation": lambda layer: _change(layer, "attention", rotation=native.extension().Rotation.pairs),
    "rotary_dim": lambda layer: _change(layer, "attention", rotary_dim=8),
    "clip": lambda layer: _change(layer, "attention", clip=0.1),
    "normalize": lambda layer: _change(layer, "router", normalize=False),
    "scores": lambda layer: _change(layer, "router", scores=native.extension().Router.Scores.sigmoid),
    "top_k": lambda layer: _change(layer, "router", top_k=1),
}


def _change(layer: Any, part: str, **values: Any) -> None:
    """Members are copies: change one and put it back."""
    whole = getattr(layer, part)
    for name, value in values.items():
        setattr(whole, name, value)
    setattr(layer, part, whole)


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_the_proof_refuses_another_computation(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = describe.describe

    def changed(base: Any) -> Any:
        parts = real(base)
        CHANGES[change](parts.described[1])
        return parts

    monkeypatch.setattr("greenroom.decode.step.describe", changed)
    with running(case_of("mixtral").pack(16)) as engine:
        want = by_modules(engine)
        assert torch.equal(decoded(engine.model), want), "the modules did not serve"
        assert "layer 1" in engine.decode.reason and engine.decode.steps == 0
        monkeypatch.setattr(proof, "disagreement", lambda *_: "")
        engine.decode.forget()
        assert distance(decoded(engine.model), want) > CONTROL, "without the proof it would not have shown"


def test_a_decoder_that_raises_is_left_to_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(base: Any) -> Any:
        raise AttributeError("no such thing")

    with running(case_of("mixtral").pack(16)) as engine:
        want = by_modules(engine)
        monkeypatch.setattr("greenroom.decode.step.describe", broken)
        engine.decode.forget()
        assert torch.equal(decoded(engine.model), want)
        assert engine.decode.reason == "AttributeError: no such thing"
        assert engine.decode._parts is None and engine.decode._decoder is None, "weights are held once more"


def test_an_interrupted_proof_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> str:
        raise KeyboardInterrupt

    with running(case_of("mixtral").pack(16)) as engine:
        monkeypatch.setattr(proof, "disagreement", interrupted)
        engine.decode.forget()
        with pytest.raises(KeyboardInterrupt):
            decoded(engine.model)
        monkeypatch.setattr(proof, "disagreement", lambda *_: "it differs")
        decoded(engine.model)
        assert engine.decode.steps == 0 and engine.decode.reason == "it differs"


# --- what is not a plain token goes through the modules


@pytest.fixture
def mixtral() -> "Iterator[Engine]":
    with running(case_of("mixtral").pack(16)) as engine:
        yield engine


def steps_of(engine: Engine, **options: Any) -> int:
    """Fast tokens of a short generation."""
    before = engine.decode.steps
    engine.model.generate(PROMPT, **{"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options})
    return engine.decode.steps - before


def test_which_generations_are_fast(mixtral: Engine) -> None:
    padded = torch.ones_like(PROMPT)
    padded[0, :2] = 0
    assert steps_of(mixtral) == 5
    assert steps_of(mixtral, do_sample=True) == 5
    assert steps_of(mixtral, attention_mask=padded) == 0
    assert steps_of(mixtral, num_beams=2) == 0
    assert steps_of(mixtral, use_cache=False) == 0
    assert steps_of(mixtral, output_hidden_states=True, return_dict_in_generate=True) == 0
    assert steps_of(mixtral, cache_implementation="static") == 0
    mixtral.decode.enabled = False
    assert steps_of(mixtral) == 0


def test_a_token_with_a_position_of_its_own_goes_through_the_modules(mixtral: Engine) -> None:
    past = mixtral.model(PROMPT, use_cache=True).past_key_values
    with torch.no_grad():
        for position, steps in ((PROMPT.shape[1], 1), (40, 1), (PROMPT.shape[1] + 2, 2)):
            mixtral.model(torch.tensor([[5]]), past_key_values=past, position_ids=torch.tensor([[position]]))
            assert mixtral.decode.steps == steps


@pytest.mark.parametrize("way", ["layer", "_walk"])
def test_an_interrupt_in_a_token_leaves_the_cache_as_it_was(
    mixtral: Engine, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> Any:
        found = real(*arguments)
        if way == "_walk" or arguments[0] == 1:
            raise KeyboardInterrupt
        return found

    model, token, real = mixtral.model, torch.tensor([[FORCED[0]]]), getattr(mixtral.decode, way)
    with torch.no_grad():
        past = model(PROMPT, use_cache=True).past_key_values
        want = model(token, past_key_values=past).logits
        past.crop(-1)
        monkeypatch.setattr(mixtral.decode, way, interrupted)
        monkeypatch.setattr(mixtral.decode, "_residents", mixtral.runner if way == "_walk" else None)
        monkeypatch.setattr(Speculation, "pays", False)
        with pytest.raises(KeyboardInterrupt):
            model(token, past_key_values=past)
        monkeypatch.undo()
        assert past.get_seq_length() == PROMPT.shape[1]
        assert torch.equal(model(token, past_key_values=past).logits, want)


def test_an_interrupt_between_a_hit_and_its_guesses_loses_no_buffer() -> None:
    with running(case_of("mixtral").pack(4), experts_per_layer=3, prefetch=4) as engine:
        runner, cache, transfer = engine.runner, engine.runner._cache, engine._transfer
        want, start, hit, there = decoded(engine.model), transfer.start, cache.hit, [False]
        runner.speculation.watches = lambda: True
        runner.speculation.choose = lambda layer, guesses, there: guesses

        def noted(*access: Any) -> "list[int] | None":
            buffers: list[int] | None = hit(*access)
            there[0] = buffers is not None
            return buffers

        def interrupted(load: Any) -> None:
            if load.speculative and there[0]:
                raise KeyboardInterrupt
            start(load)

        transfer.start, cache.hit = interrupted, noted
        with pytest.raises(KeyboardInterrupt):
            for _ in range(20):
                there[0] = False
                decoded(engine.model)
        assert cache.reading <= transfer.under_way, "a buffer waits for a read that was never started"
        transfer.start, cache.hit = start, hit
        assert torch.equal(decoded(engine.model), want)


def test_hooks_see_every_token(mixtral: Engine) -> None:
    seen = []
    hook = mixtral.model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    assert steps_of(mixtral) == 0 and len(seen) == 6
    hook.remove()
    assert steps_of(mixtral) == 5


def test_gradients_are_not_lost(mixtral: Engine) -> None:
    before = mixtral.decode.steps
    past = mixtral.model(PROMPT, use_cache=True).past_key_values
    with torch.enable_grad():
        mixtral.model(torch.tensor([[5]]), past_key_values=past, use_cache=True)
    assert mixtral.decode.steps == before


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_comes_and_goes(first: bool) -> None:
    """What was made in it is written out of it, and a conversation goes on."""
    with running(case_of("mixtral").pack(4)) as engine:
        found = []
        for inference in (first, not first):
            with torch.inference_mode(inference):
                found.append(decoded(engine.model))
        with torch.inference_mode(first), torch.no_grad():
            past = engine.model(PROMPT, use_cache=True).past_key_values
        with torch.inference_mode(not first), torch.no_grad():
            logits = [engine.model(torch.tensor([[token]]), past_key_values=past).logits[0, -1] for token in FORCED]
        assert engine.decode.steps == 3 * len(FORCED) and engine.decode.reason == ""
        assert torch.equal(found[0], found[1]) and torch.equal(torch.stack(logits), found[0])


# --- the cache stays transformers' cache


def test_a_cache_can_be_cropped_and_continued(mixtral: Engine) -> None:
    model = mixtral.model
    with torch.no_grad():
        past = model(PROMPT, use_cache=True).past_key_values
        first = [model(torch.tensor([[token]]), past_key_values=past).logits for token in FORCED[:6]]
        assert past.get_seq_length() == PROMPT.shape[1] + 6
        past.crop(-4)
        assert past.get_seq_length() == PROMPT.shape[1] + 2
        again = [model(torch.tensor([[token]]), past_key_values=past).logits for token in FORCED[2:6]]
        assert all(torch.equal(one, other) for one, other in zip(first[2:], again, strict=True))
        past.crop(-1)
        wrong = model(torch.tensor([[FORCED[3]]]), past_key_values=past).logits
        assert distance(wrong, first[5]) > CONTROL, "another token would not have shown"


def test_chunks_and_tokens_alternate(mixtral: Engine) -> None:
    """A second question of a chat: a chunk after fast tokens, and fast tokens after it."""
    model = mixtral.model
    with torch.no_grad():
        past = model(PROMPT, use_cache=True).past_key_values
        for token in FORCED[:5]:
            model(torch.tensor([[token]]), past_key_values=past)
        chunk = model(torch.tensor([FORCED[5:9]]), past_key_values=past).logits
        last = model(torch.tensor([[FORCED[9]]]), past_key_values=past).logits
        whole = model(torch.cat((PROMPT, torch.tensor([FORCED[:10]])), dim=1)).logits
    assert distance(chunk[0], whole[0, -5:-1]) < TOLERANCE
    assert distance(last[0, -1], whole[0, -1]) < TOLERANCE


def test_assisted_generation_crops_what_was_refused(mixtral: Engine) -> None:
    options = {"max_new_tokens": 16, "do_sample": False}
    want = mixtral.model.generate(PROMPT, **options)
    assert torch.equal(mixtral.model.generate(PROMPT, prompt_lookup_num_tokens=3, **options), want)


@given(
    heads=st.integers(1, 3),
    dim=st.sampled_from([8, 24]),
    length=st.integers(1, 600),
    more=st.integers(0, 300),
    window=st.one_of(st.none(), st.integers(2, 40)),
    seed=st.integers(0, 1000),
)
def test_compiled_kv_holds_what_it_was_given(
    heads: int, dim: int, length: int, more: int, window: "int | None", seed: int
) -> None:
    keys, values = torch.randn(2, heads, length, dim, generator=torch.Generator().manual_seed(seed)) * 100
    held = kv.CompiledKV(keys, values, window, forget=window is not None)
    for _ in range(more):
        held.place()
        assert held.length < held.capacity and held.first <= held.length
        held.length += 1
    remembered = min(length + more, window - 1) if window else length + more
    found = held.pair()
    assert found[0].shape == found[1].shape == (heads, remembered, dim)
    ours = max(remembered - more, 0)
    for one, given_ in zip(found, (keys, values), strict=True):
        want = given_[:, length - ours :].to(torch.float16) if ours else given_[:, :0].to(torch.float16)
        assert torch.equal(one[:, :ours], want)


@given(
    pieces=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    window=st.one_of(st.none(), st.integers(2, 40)),
    named=st.booleans(),
    crop=st.integers(0, 9),
)
def test_what_modules_put_into_compiled_layers_is_what_they_see(
    pieces: "list[int]", window: "int | None", named: bool, crop: int
) -> None:
    """As in transformers' own layers, but for the rounding; the same counts, masks and tensors afterwards."""
    kind = "sliding_attention" if window else "full_attention"
    config = GptOssConfig(num_hidden_layers=1, layer_types=[kind], sliding_window=window)
    own = DynamicCache(config=config) if named or window else DynamicCache()
    halves = DynamicCache(config=config) if named or window else DynamicCache()
    assert kv.adopt(halves, [kv.Grouped(2, 8)], [window]) is not None
    generator = torch.Generator().manual_seed(sum(pieces))
    for count in pieces:
        states = [
            (torch.randn(1, 2, count, 8, generator=generator) * 100).to(torch.float16).to(torch.float32)
            for _ in range(2)
        ]
        for one, other in zip(halves.update(*states, 0), own.update(*states, 0), strict=True):
            assert one.dtype == torch.float32 and torch.equal(one, other)
        if crop and (window is None or own.get_seq_length() < window):
            for cache in (halves, own):
                cache.crop(-min(crop, count))
        assert halves.layers[0]._kv is not None, "it stays in float16"
        assert halves.get_seq_length() == own.get_seq_length()
        assert halves.get_mask_sizes(3, 0) == own.get_mask_sizes(3, 0)
    exact = torch.randn(1, 2, 5, 8, generator=generator)
    for one, other in zip(halves.update(exact, -exact, 0), own.update(exact, -exact, 0), strict=True):
        assert torch.equal(one, other.to(torch.float16).to(torch.float32)) and not torch.equal(one, other)
    assert torch.equal(halves.layers[0].values, own.layers[0].values.to(torch.float16).to(torch.float32))


def test_an_empty_compiled_layer_takes_any_number_of_sequences() -> None:
    for first in (None, torch.ones(1, 2, 3, 8)):
        cache = DynamicCache()
        assert kv.adopt(cache, [kv.Grouped(2, 8)], [None]) is not None
        if first is not None:
            cache.update(first, first, 0)
            cache.reset()
        assert cache.get_seq_length() == 0
        states = torch.rand(3, 2, 4, 8)
        keys, values = cache.update(states, -states, 0)
        assert torch.equal(keys, states) and torch.equal(values, -states)
        assert kv.adopt(cache, [kv.Grouped(2, 8)], [None]) is None, "three sequences"


def test_gradients_pass_through_a_cache_that_was_adopted() -> None:
    cache = DynamicCache()
    assert kv.adopt(cache, [kv.Grouped(2, 8)], [None]) is not None
    with torch.no_grad():
        cache.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), 0)
    states = torch.rand(1, 2, 4, 8, requires_grad=True)
    keys, values = cache.update(states, states, 0)
    (1e-9 * (keys + values)).sum().backward()
    assert states.grad is not None and torch.allclose(states.grad, torch.full_like(states, 2e-9)), "float16 has no such"


def test_layers_of_different_lengths_are_left_to_the_modules() -> None:
    """As an interrupt between two of the modules' layers leaves them."""
    cache, layouts = DynamicCache(), [kv.Grouped(2, 8)] * 2
    assert kv.adopt(cache, layouts, [None, None]) is not None
    cache.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), 0)
    assert kv.adopt(cache, layouts, [None, None]) is None
    cache.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), 1)
    assert kv.adopt(cache, layouts, [None, None]) is not None


@pytest.mark.parametrize("name", NAMED + OTHERS)
def test_what_is_planned_for_a_token_is_what_a_token_takes(name: str) -> None:
    """In the cache, by either way of computing; windows are planned as if they grew."""
    with running(case_of(name).pack(4), context=64) as engine, torch.no_grad():
        config, length = engine.model.config, 2
        compiled, plain = DynamicCache(config=config), DynamicCache(config=config)
        engine.model(LONG[:, :length], past_key_values=compiled)
        with modules_only(engine):
            engine.model(LONG[:, :length], past_key_values=plain)
        halves = [layer._kv.pair() for layer in compiled.layers]
        taken = sum(one.numel() * one.element_size() for pair in halves for one in pair)
        assert taken == length * footprint.kv_nbytes_per_token(config, 4, 16)
        taken = sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in plain.layers)
        assert taken == length * footprint.kv_nbytes_per_token(config, 4, None)
        assert engine.plan.kv_cache == 64 * footprint.kv_nbytes_per_token(config, 4, 16)


def test_without_the_compiled_step_more_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = case_of("mixtral").pack(4)
    with running(packed) as engine:
        compiled = engine.plan
    monkeypatch.setenv("GREENROOM_DECODE", "modules")
    with running(packed) as engine:
        assert engine.plan.kv_cache == 2 * compiled.kv_cache and engine.plan.working_set > compiled.working_set


def test_an_interrupt_while_room_grows_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = torch.rand(2, 256, 8), torch.rand(2, 256, 8)
    held = kv.CompiledKV(keys, values, None, forget=False)
    held.length = held.capacity
    before, made = [one.clone() for one in held.pair()], []

    def interrupted(*shape: int) -> torch.Tensor:
        made.append(shape)
        if len(made) == 2:
            raise KeyboardInterrupt
        return torch.zeros(shape, dtype=torch.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "_room", interrupted)
        with pytest.raises(KeyboardInterrupt):
            held.place()
    assert all(map(torch.equal, held.pair(), before))
    held.place()
    assert held.capacity > 256 and all(map(torch.equal, held.pair(), before))


def test_a_cache_that_may_be_rolled_back_is_left_alone(mixtral: Engine) -> None:
    """It keeps more than a window's positions while it records."""
    with torch.no_grad():
        past = mixtral.model(PROMPT, use_cache=True).past_key_values
        parts = mixtral.decode._parts
        assert parts is not None and kv.adopt(past, parts.layouts, parts.windows) is not None
        past.layers[1].record_past = True
        assert kv.adopt(past, parts.layouts, parts.windows) is None


def test_large_keys_are_bounded() -> None:
    held = kv.CompiledKV(torch.full((1, 3, 8), 1e6), torch.full((1, 3, 8), -1e6), None, forget=False)
    keys, values = held.pair()
    assert keys.isfinite().all() and values.isfinite().all() and keys.max() == 65504


# --- the same to the last bit


def test_memory_threads_and_guesses_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = case_of("qwen2_moe").pack(4)
    found = []
    for slots, prefetch, count in ((10, 0, 1), (0, 0, 1), (1, 2, 2), (3, 1, 3)):
        monkeypatch.setattr(threads, "_ours", count)
        with running(packed, experts_per_layer=slots, prefetch=prefetch) as engine:
            found.append(decoded(engine.model))
            assert engine.decode.steps == len(FORCED)
    assert all(torch.equal(one, found[0]) for one in found[1:])
    assert not torch.equal(found[0], by_modules_of(packed)), "the modules' rounding is the same: nothing was compared"


def by_modules_of(packed: PackedModel) -> torch.Tensor:
    with running(packed) as engine:
        return by_modules(engine)


@contextlib.contextmanager
def choosing() -> "Iterator[Any]":
    """The extension, whose instruction set may be chosen meanwhile."""
    core: Any = native.extension()
    best = core.active()
    try:
        yield core
    finally:
        core.choose(best)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "gpt_oss"])
def test_every_instruction_set_decodes(name: str) -> None:
    with choosing() as core:
        for isa in core.available():
            assert core.choose(isa)
            with running(case_of(name).pack(16)) as engine:
                assert distance(decoded(engine.model), by_modules(engine, rounded=True)) < TOLERANCE
                got = read(engine, 13, ids=LONG[:, :31])
                assert engine.decode.reason == "" and engine.decode.prompts == 3
                with modules_only(engine):
                    assert distance(got, read(engine, 13, ids=LONG[:, :31], rounded=True)) < PROMPT_TOLERANCE


def test_long_contexts_cross_spans() -> None:
    """Beyond one span of 512 positions, and at its edges."""
    ids = torch.randint(families.FIRST_ID, families.LAST_ID, (1, 1030), generator=torch.Generator().manual_seed(5))
    with running(case_of("deepseek_v2").pack(16), context=1100) as engine, torch.no_grad():
        engine.model.config.max_position_embeddings = 2048
        for length in (510, 1023):
            out = engine.model(
                ids[:, :length], past_key_values=DynamicCache(config=engine.model.config), use_cache=True
            )
            past = copy.deepcopy(out.past_key_values)
            for token in ids[0, length : length + 4].tolist():
                fast = engine.model(torch.tensor([[token]]), past_key_values=out.past_key_values).logits
            engine.decode.enabled = False
            for token in ids[0, length : length + 4].tolist():
                slow = engine.model(torch.tensor([[token]]), past_key_values=past).logits
            engine.decode.enabled = True
            assert distance(fast, slow) < TOLERANCE
        assert engine.decode.steps == 8
