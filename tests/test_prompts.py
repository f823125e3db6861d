"""Prompts in pieces: what is cut, how, and what is left whole. tests/test_families.py compares answers."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from greenroom import planner, seam
from greenroom.config import EngineSettings
from greenroom.engine import Engine
from greenroom.packed import PackedModel
from greenroom.prompts import Prompts
from test_decode import rounding_cache


class Echo(nn.Module):
    """Notes its calls; its hidden states are the tokens, and the cache counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PreTrainedConfig(use_cache=True)
        self.calls: list[dict[str, Any]] = []

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        self.calls.append({"input_ids": input_ids, **others})
        hidden = input_ids[..., None].float()
        if (cache := others.get("past_key_values")) is not None:
            cache.update(hidden[:, None], hidden[:, None], 0)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)

    @property
    def widths(self) -> "list[int]":
        return [call["input_ids"].shape[1] for call in self.calls]


def tokens(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(rows * columns).view(rows, columns)


@torch.no_grad()
def test_pieces_have_their_part_of_what_is_given() -> None:
    base = Echo()
    Prompts(base, 8, continues=True)
    ids, mask, cache = tokens(2, 11), tokens(2, 11) > 2, DynamicCache()
    positions = torch.arange(11).expand(4, 2, 11)
    out = base.forward(
        ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, mm_encoder_outputs={}
    )
    assert base.widths == [4, 4, 3], "eight tokens of two sequences"
    assert torch.equal(out.last_hidden_state, ids[..., None].float()) and out.past_key_values is cache
    for call, start in zip(base.calls, (0, 4, 8), strict=True):
        end = start + call["input_ids"].shape[1]
        assert torch.equal(call["input_ids"], ids[:, start:end])
        assert torch.equal(call["attention_mask"], mask[:, :end])
        assert torch.equal(call["position_ids"], positions[..., start:end])
        assert call["use_cache"] is True
    base.forward(tokens(2, 5), attention_mask=torch.ones(2, 16), past_key_values=cache)
    assert base.widths[3:] == [4, 1] and [one["attention_mask"].shape[1] for one in base.calls[3:]] == [15, 16]


@pytest.mark.parametrize(
    "others",
    [
        {"past_key_values": None, "use_cache": False},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"return_dict": False},
        {"attention_mask": torch.zeros(1, 1, 11, 11)},
        {"attention_mask": {"full_attention": None}},
        {"pixel_values": torch.zeros(1, 3)},
        {"mm_encoder_outputs": {"image": torch.zeros(1, 3)}},
        {"inputs_embeds": torch.zeros(1, 11, 4)},
    ],
    ids=lambda others: "-".join(others),
)
@torch.no_grad()
def test_what_cannot_be_cut_is_not(others: "dict[str, Any]") -> None:
    base = Echo()
    Prompts(base, 8, continues=True)
    base.forward(tokens(1, 11), **{"past_key_values": DynamicCache(), **others})
    assert base.widths == [11]


@torch.no_grad()
def test_what_the_configuration_wants_is_not_cut() -> None:
    base = Echo()
    Prompts(base, 8, continues=True)
    base.config.output_hidden_states = True
    base.forward(tokens(1, 11), past_key_values=DynamicCache())
    assert base.widths == [11]


def test_who_looks_on_or_learns_sees_the_whole() -> None:
    base = Echo()
    Prompts(base, 8, continues=True)
    base.forward(tokens(1, 11), past_key_values=DynamicCache())
    with torch.no_grad():
        handle = base.register_forward_hook(lambda *_: None)
        base.forward(tokens(1, 11), past_key_values=DynamicCache())
        handle.remove()
        assert base.widths == [11, 11]
        base.forward(tokens(1, 11), past_key_values=DynamicCache())
    assert base.widths == [11, 11, 8, 3]


@torch.no_grad()
def test_a_model_that_forgets_continues_token_by_token() -> None:
    base = Echo()
    Prompts(base, 8, continues=False)
    cache = DynamicCache()
    base.forward(tokens(1, 11), past_key_values=cache)
    base.forward(tokens(1, 3), past_key_values=cache)
    assert base.widths == [11, 1, 1, 1]


def test_generate_bounds_what_a_prompt_takes(packed4: PackedModel) -> None:
    """Experts see no more tokens at once than the plan has room for, however the model is called."""
    longest = 0

    def note(layer: int, x: torch.Tensor, *_: Any) -> None:
        nonlocal longest
        longest = max(longest, len(x))

    settings = EngineSettings(experts_per_layer=2, prompt_chunk=16, context=64)
    engine = Engine(packed4, settings)
    engine.runner.observer = note
    for rows in (1, 2, 3):
        engine.model.generate(tokens(rows, 20) + 4, max_new_tokens=2, do_sample=False)
        assert 0 < longest <= 16
        longest = 0
    with torch.no_grad():
        engine.model(tokens(1, 20) + 4, logits_to_keep=1)
        assert 0 < longest <= 16, "a cache that the model makes"
        engine.model(tokens(1, 20) + 4, use_cache=False)
        assert longest == 20, "whoever wants all of it has it"
    engine.close()


@pytest.mark.parametrize("wanted", ["output_hidden_states", "output_router_logits"])
def test_who_asked_once_for_more_is_served_as_before(packed4: PackedModel, wanted: str) -> None:
    """transformers leaves hooks in place that do nothing; the modules' own way was taken for good."""
    engine = Engine(packed4, EngineSettings(experts_per_layer=2, prompt_chunk=16, context=64))
    ids, seen = tokens(1, 20) + 4, []
    with torch.no_grad():
        want = engine.model(ids).logits
        for _ in range(2):
            assert torch.equal(engine.model(ids).logits, want)
            assert getattr(engine.model(ids, **{wanted: True}), wanted.removeprefix("output_"))
        assert engine.model.base_model.layers[0].mlp._forward_hooks or engine.model.base_model.layers[0]._forward_hooks
        steps = engine.decode.steps
        engine.model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert engine.decode.steps == steps + 2
        engine.model.base_model.layers[1].register_forward_hook(lambda *_: seen.append(1))
        engine.model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert engine.decode.steps == steps + 2 and len(seen) == 3 and "hooked" in str(engine.decode)
    engine.close()


def test_scores_are_planned_where_attention_makes_them(packed4: PackedModel) -> None:
    config = seam.load_config(packed4.folder)
    settings = EngineSettings(vram=8 << 30, ram=8 << 30, context=4096)

    def taken(settings: EngineSettings, element_size: int) -> int:
        found = [
            planner.make_plan(
                packed4.manifest, config, settings, runtime=0, budget=8 << 30, element_size=element_size, scores=scores
            ).working_set
            for scores in (False, True)
        ]
        return found[1] - found[0]

    numbers = 3 * config.num_attention_heads * 512 * 4096
    assert taken(settings, 2) == 2 * numbers
    on_cpu = EngineSettings(ram=8 << 30, context=4096)
    assert taken(on_cpu, 4) == 0, "compiled"
    assert taken(on_cpu, 2) == 2 * numbers, "modules compute in float16"
    assert not seam.makes_scores(config)


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("change", ["attention", "forward", "top_k", "gate", "data", "act_fn", "_apply_gate"])
def test_changed_modules_are_seen(packed4: PackedModel, change: str, length: int) -> None:
    """By the compiled way as by the modules: it holds copies, and addresses, of what they were."""
    engine = Engine(packed4, EngineSettings(experts_per_layer=6, context=64))
    ids, layer = tokens(1, length) + 4, engine.model.base_model.layers[1]
    with torch.no_grad():
        before, prompts = engine.model(ids).logits, engine.decode.prompts
        if change == "attention":
            layer.self_attn = copy.deepcopy(layer.self_attn)
            layer.self_attn.k_proj, layer.self_attn.v_proj = layer.self_attn.v_proj, layer.self_attn.k_proj
        elif change == "forward":
            own = layer.mlp.forward
            layer.mlp.forward = lambda hidden: -own(hidden)
        elif change == "top_k":
            layer.mlp.gate.top_k = 1
        elif change == "data":
            layer.mlp.gate.weight.data = -layer.mlp.gate.weight.data
        elif change == "act_fn":
            layer.mlp.experts.act_fn = nn.GELU()
        elif change == "_apply_gate":
            layer.mlp.experts._apply_gate = lambda both: -both.chunk(2, dim=-1)[1]
        else:
            layer.mlp.gate.weight.mul_(-1)
        engine.decode.enabled = False
        compiled = change in ("attention", "top_k", "gate", "data")
        want = engine.model(ids, past_key_values=rounding_cache(engine) if compiled else None).logits
        engine.decode.enabled = True
        for _ in range(2):
            got = engine.model(ids).logits
            assert torch.allclose(got, want, atol=(5e-4 if compiled else 1e-4) * float(want.abs().max()))
        assert not torch.allclose(before, want, atol=1e-2 * float(want.abs().max()))
        if length > 1 and change != "act_fn":
            assert (engine.decode.prompts == prompts + 2) == (change not in ("forward", "_apply_gate"))
    engine.close()
