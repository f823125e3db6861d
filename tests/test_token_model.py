"""Tokens that pass a model without its own code around the layers: the same bits, and that code for everything else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeModelOutputWithPast

from greenroom import static_kv, token_model
from greenroom.engine import Engine
from on_device import Engines
from samples import some
from test_engine import EXPERTS, LAYERS, SHORT, same
from test_layer_steps import TOKENS, ahead, wrong
from test_tiers import out_of_memory_at

LONG = TOKENS * 2


pytestmark = pytest.mark.usefixtures("small_rooms")


def around(engine: Engine, wanted: bool = True) -> Engine:
    """`wanted`: tokens may pass without the model's own code."""
    assert engine.around is not None
    engine.around.enabled = wanted
    return ahead(engine)


@pytest.fixture
def both(device_engines: Engines) -> "Callable[..., tuple[Engine, Engine]]":
    """Two engines, of which one leaves all tokens to the model's own code."""
    return lambda **options: tuple(around(device_engines(**options), wanted) for wanted in (True, False))  # type: ignore[return-value]


@torch.no_grad()
def going_on(engine: Engine, tokens: "list[int]" = LONG, **how: Any) -> "list[torch.Tensor]":
    """Logits of tokens after a prompt that is shorter than any room."""
    out, found = engine.model(SHORT[:, :3], use_cache=True), []
    for number, token in enumerate(tokens):
        given = {name: value(4 + number) for name, value in how.items()}
        out = engine.model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True, **given)
        found.append(out.logits)
    return found


@pytest.mark.parametrize("slots", some([0, 2, 4, EXPERTS], [2]))
def test_it_does_not_show(both: Any, slots: int) -> None:
    engine, plain = both(experts_per_layer=slots)
    for _ in range(3):
        assert same(going_on(engine), going_on(plain))
    assert engine.around.tokens > 0 or slots == 0
    assert plain.around.tokens == 0 and engine.around.reason == ""
    assert engine.metrics().hits == plain.metrics().hits and engine.metrics().misses == plain.metrics().misses


def test_every_token_that_follows_another_passes(both: Any) -> None:
    """But for the first after room has grown."""
    engine, plain = both(experts_per_layer=EXPERTS)
    assert same(going_on(engine), going_on(plain))
    rooms = len({static_kv.room_for(3 + number, None) for number in range(len(LONG))})
    assert engine.around.tokens == len(LONG) - rooms
    assert engine.steps.replayed >= LAYERS * len(LONG)


@pytest.mark.parametrize(
    "attention,window,ring",
    some(
        [
            ("eager", None, True),
            *((kind, size, True) for kind in ("eager", "sdpa") for size in (6, 13)),
            ("eager", 6, False),
            ("sdpa", 6, False),
        ],
        [("sdpa", 6, True), ("eager", 6, False)],
    ),
)
def test_masks_of_every_kind(both: Any, attention: str, window: "int | None", ring: bool) -> None:
    """Rings that are full and others, windows over all that is kept, and masks that are there or not."""
    found = []
    for engine in both(experts_per_layer=EXPERTS):
        engine.model.set_attn_implementation(attention)
        if ring:
            engine.model.config.sliding_window = window
            found.append(going_on(engine))
        else:
            with torch.no_grad():
                cache = engine.model(SHORT[:, :3], use_cache=True).past_key_values
                engine.model.config.sliding_window = window
                found.append([
                    engine.model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits
                    for token in LONG
                ])  # fmt: skip
        passed = engine.around.tokens
        assert (passed > len(LONG) // 3) == engine.around.enabled or not ring
    assert same(*found)


@pytest.mark.parametrize("how", some([{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"do_sample": False}], []))
def test_generation_of_every_kind(both: Any, how: "dict[str, Any]") -> None:
    prompt = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8]])
    found = []
    for engine in both(experts_per_layer=EXPERTS):
        found += [engine.model.generate(prompt, max_new_tokens=20, **how) for _ in range(2)]
        if "do_sample" in how:
            assert (engine.around.tokens > 20) == engine.around.enabled
    assert all(torch.equal(one, found[0]) for one in found)


ASKED: "list[tuple[dict[str, Any], bool]]" = [
    ({"attention_mask": lambda length: torch.ones(1, length, dtype=torch.int64)}, True),
    ({"position_ids": lambda length: torch.tensor([[length - 1]])}, True),
    ({"position_ids": lambda length: torch.tensor([[length + 8]])}, True),
    ({"attention_mask": lambda length: torch.arange(length)[None] > 0}, False),
    ({"output_router_logits": lambda length: True}, False),
    ({"output_hidden_states": lambda length: True}, False),
]


@pytest.mark.parametrize(
    "how,passes",
    some(ASKED, [ASKED[3]]),
)
def test_what_is_asked_for(both: Any, how: "dict[str, Any]", passes: bool) -> None:
    engine, plain = both(experts_per_layer=EXPERTS)
    assert same(going_on(engine, **how), going_on(plain, **how))
    assert (engine.around.tokens > 0) == passes
    assert same(going_on(engine), going_on(plain))


@pytest.mark.slow
def test_what_changes_on_the_way(both: Any) -> None:
    """Arguments, the configuration, hooks and modes come and go between tokens."""
    found, calls = [], []
    for engine in both(experts_per_layer=EXPERTS):
        found.append(going_on(engine))
        handle = engine.model.model.norm.register_forward_hook(lambda *_: calls.append(1))
        found[-1] += going_on(engine, TOKENS)
        handle.remove()
        found[-1] += going_on(engine, TOKENS, attention_mask=lambda length: torch.ones(1, length))
        for mode in (True, False):
            with torch.inference_mode(mode):
                found[-1] += going_on(engine, TOKENS)
        engine.model.config.output_hidden_states = True
        with torch.no_grad():
            cache = engine.model(SHORT, use_cache=True).past_key_values
            out = engine.model(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
        found[-1] += out.hidden_states
    assert same(*found) and len(calls) == 2 * (len(TOKENS) + 1)


def test_conversations_in_turns(both: Any) -> None:
    found = []
    for engine in both(experts_per_layer=EXPERTS):
        with torch.no_grad():
            caches = [engine.model(SHORT[:, :n], use_cache=True).past_key_values for n in (3, 7)]
            for turn in (1, 3, 1, 5):
                for cache in caches:
                    for token in TOKENS[:turn]:
                        out = engine.model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                        found.append(out.logits)
    half = len(found) // 2
    assert same(found[:half], found[half:])


def test_results_are_kept(both: Any) -> None:
    """Who keeps hidden states finds each token's there."""
    found = []
    for engine in both(experts_per_layer=EXPERTS):
        with torch.no_grad():
            cache = engine.model(SHORT, use_cache=True).past_key_values
            outs = [engine.model.model(input_ids=torch.tensor([[t]]), past_key_values=cache) for t in TOKENS]
        found.append([out.last_hidden_state for out in outs])
        assert all(type(out) is type(outs[0]) and out.past_key_values is cache for out in outs)
        assert all(set(out) == set(outs[0]) for out in outs)
    assert same(*found)


@pytest.mark.parametrize("at", some([{20}, {35, 36}, {50}], []))
def test_out_of_memory_on_the_way(both: Any, monkeypatch: pytest.MonkeyPatch, at: "set[int]") -> None:
    engine, plain = both(experts_per_layer=4)
    expected = going_on(plain)
    assert same(going_on(engine), expected)
    with monkeypatch.context() as patch:
        calls = out_of_memory_at(patch, engine.runner._slots_kernel, "combine", at)
        assert same(going_on(engine), expected)
    assert len(calls) > max(at)
    before = engine.around.tokens
    assert same(going_on(engine), expected) and engine.around.tokens > before


@pytest.mark.slow
def test_no_memory_for_its_graphs(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token has passed: it is not lost, and the next ones go the model's own way."""
    engine, plain = both(experts_per_layer=EXPERTS)

    def fails(plan: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.around, "_enter", fails)
        assert same(going_on(engine), going_on(plain))
        assert engine.around.tokens == 0 and engine.around.reason == "no memory"
    assert same(going_on(engine), going_on(plain)) and engine.around.tokens > 0 and not engine.around.reason


def test_a_missing_expert_that_is_not_noticed_shows(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    engine, plain = both(experts_per_layer=2)
    expected = going_on(plain)
    assert same(going_on(engine), expected)
    monkeypatch.setattr(engine.runner, "settle", wrong(engine.runner))
    assert not same(going_on(engine), expected)


# --- what is not captured


def changed(base: Any, change: str) -> "Callable[..., Any]":
    """Mixtral's forward, and something more."""
    calls = [0]

    def forward(
        input_ids: torch.Tensor, position_ids: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> MoeModelOutputWithPast:
        hidden = base.embed_tokens(input_ids + 1 if change == "other rows" else input_ids)
        if past_key_values is None:
            past_key_values = DynamicCache(config=base.config)
        if position_ids is None or change == "length":
            position_ids = torch.arange(input_ids.shape[1])[None] + past_key_values.get_seq_length()
        if change == "count":
            calls[0] += 1
            position_ids = position_ids + calls[0]
        if change == "read":
            position_ids = position_ids + int(position_ids.max() > 6)
        if change == "scale":
            hidden = hidden * 2
        mask = create_causal_mask(base.config, hidden, kwargs.get("attention_mask"), past_key_values)
        rotary = base.rotary_emb(hidden, position_ids=position_ids)
        for layer in base.layers[: 2 if change == "skip" else None]:
            hidden = layer(
                hidden, attention_mask=mask, past_key_values=past_key_values, position_embeddings=rotary, use_cache=True
            )
            if change == "between":
                hidden = hidden * 2
        hidden = base.norm(hidden)
        if change == "after":
            hidden = hidden + 1
        more = {"hidden_states": (hidden,)} if change == "more" else {}
        return MoeModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values, **more)

    return forward


@pytest.mark.parametrize(
    "change,reason",
    some(
        [
            ("nothing", ""),
            ("scale", ""),
            ("other rows", "other rows"),
            ("length", "its length"),
            ("count", "when it was captured"),
            ("read", "moves values"),
            ("between", ""),
            ("after", "more than a norm"),
            ("more", "more than hidden states"),
        ],
        [("scale", ""), ("length", "its length"), ("read", "moves values")],
    ),
)
def test_a_model_that_does_more(both: Any, change: str, reason: str) -> None:
    found = []
    for engine in both(experts_per_layer=EXPERTS):
        engine.around._forward = changed(engine.model.model, change)
        found.append(going_on(engine))
        if engine.around.enabled:
            assert reason in engine.around.reason and bool(reason) == bool(engine.around.reason)
            assert (engine.around.tokens > len(LONG) // 2) == (change in ("nothing", "scale"))
            assert (engine.around.reason in engine.placement()) and bool(str(engine.around)) == bool(reason)
    assert same(*found) or change == "count"  # it is called more often


def test_a_mask_that_is_another_as_a_graph(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a cache that says something else than transformers' own."""
    engine, plain = both(experts_per_layer=EXPERTS)
    for one in (engine, plain):
        one.model.set_attn_implementation("eager")
    monkeypatch.setattr(token_model._Past, "get_query_offset", lambda past, layer_idx=0: past._position - 1)
    assert same(going_on(engine), going_on(plain))
    assert engine.around.tokens == 0 and "gives its layers something else" in engine.around.reason


@pytest.mark.parametrize("what", ["before", "after"])
def test_a_part_that_is_left_out_shows(both: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Negative control."""
    monkeypatch.setattr(static_kv, "SMALLEST", 64)
    engine, plain = both(experts_per_layer=EXPERTS)
    expected = going_on(plain, TOKENS)
    assert same(going_on(engine, TOKENS), expected)
    getattr(engine.around._plan, what).replay = lambda: None
    assert not same(going_on(engine, TOKENS), expected)


def test_it_is_not_taken_while_gradients_are_wanted(both: Any) -> None:
    engine, _ = both(experts_per_layer=EXPERTS)
    going_on(engine)
    before = engine.around.tokens
    cache = engine.model(SHORT, use_cache=True).past_key_values
    engine.model(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    assert engine.around.tokens == before
