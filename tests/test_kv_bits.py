"""Keys and values in 8 bits: what is held, what is computed with it, and where there is no such thing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

import families
import greenroom
from greenroom import footprint, threads
from greenroom.config import EngineSettings
from greenroom.decode.blocks import Blocks, nbytes_per_position
from greenroom.engine import Engine
from greenroom.errors import ConfigError
from greenroom.kernels import native
from samples import some
from test_cli import refused
from test_decode import LONG, NAMED, PROMPT_TOLERANCE, by_modules, choosing, decoded, modules_only, read, running
from test_families import ALL, Case, case_of, distance

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension is not built")

TOLERANCE = 8e-3
"""largest |difference| / largest |logit|: what differs by 1e-5 may be rounded to the next of 8 bits, and so on;
measured 2e-4 to 4e-3. Not rounded at all differs by more."""
LATENT = {
    name: families._family(f"{name}_of_32", its.build.args[1], folder=name, **{**its.build.args[3], "kv_lora_rank": 32})
    for name, its in ((name, ALL[name]) for name in NAMED if name.startswith("deepseek"))
}
"""Whose latents have groups of their own, as all published ones have: what is scored is then what is mixed."""


def case_with_whole_groups(name: str) -> Case:
    if name not in LATENT:
        return case_of(name)
    ALL[LATENT[name].name] = LATENT[name]
    return case_of(LATENT[name].name)


def numbers(heads: int, count: int, dim: int, seed: int) -> torch.Tensor:
    """Of a size that changes from one position and dimension to the next."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(2 * torch.randn(heads, count, dim, generator=generator))
    return torch.randn(heads, count, dim, generator=generator) * sizes


# --- what is held


@given(
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 8, 33, 72, 128]),
    pieces=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    keys=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_number_is_as_near_as_its_group_allows(
    heads: int, dim: int, pieces: "list[int]", keys: bool, seed: int
) -> None:
    """At any position, whatever was put before and after it."""
    x = numbers(heads, sum(pieces), dim, seed)
    blocks, start = Blocks(heads, 300, dim, 8, keys), 0
    for piece in x.split(pieces, dim=1):
        blocks.put(start, piece)
        start += piece.shape[1]
    found = blocks.get(0, start)
    for group, its in zip(x.split(native.GROUP, 2), found.split(native.GROUP, 2), strict=True):
        largest = group.abs().amax(dim=2, keepdim=True)
        assert ((group - its).abs() <= largest / 127 * 0.51).all()
        assert (its.abs().amax(dim=2, keepdim=True) / largest - 1).abs().max() < 0.005
    first = start // 2
    assert torch.equal(blocks.get(first, start), found[:, first:])
    again = Blocks(heads, 300, dim, 8, keys)
    again.put(0, found)
    assert torch.equal(again.get(0, start), found), "what was rounded once stays"
    assert torch.equal(blocks.moved(first, start, 900).get(0, start - first), found[:, first:])
    assert torch.equal(blocks.moved(0, start, 900).get(0, start), found)


@pytest.mark.parametrize("keys", [True, False])
def test_what_is_too_large_is_bounded_and_no_number_stays_none(keys: bool) -> None:
    x = torch.zeros(1, 4, 40)
    x[0, 1], x[0, 2, 3], x[0, 3, 35] = 1e6, float("nan"), -float("inf")
    blocks = Blocks(1, 4, 40, 8, keys)
    blocks.put(0, x)
    found = blocks.get(0, 4)[0]
    assert (found[0] == 0).all() and torch.allclose(found[1], torch.tensor(65504.0), rtol=0.004)
    assert found[2, :32].isnan().all() and (found[2, 32:] == 0).all()
    assert found[3, 35] < -65000 and (found[3, :35] == 0).all()


@pytest.mark.parametrize("bits", [16, 8])
def test_room_is_what_is_planned(bits: int) -> None:
    for dim in (33, 128):
        blocks = Blocks(2, 320, dim, bits, keys=True)
        assert blocks._bytes.numel() == 2 * 320 * nbytes_per_position(dim, bits)
    assert nbytes_per_position(128, 8) == 136, "8.5 bits a number"


# --- what is computed with it


@pytest.mark.parametrize("name", NAMED)
def test_the_compiled_decoder_holds_what_the_modules_hold(name: str) -> None:
    """To the last byte but for what is on the edge between two, and not what 16 bits would be."""
    with running(case_of(name).pack(16), context=64, kv_bits=8) as engine, torch.no_grad():
        caches = []
        for enabled in (True, False):
            cache = DynamicCache(config=engine.model.config)
            assert engine.decode.prove() == "" and engine.decode._adopt(cache) is not None
            engine.decode.enabled = enabled
            engine.model(LONG[:, :25], past_key_values=cache)
            caches.append([layer._kv.pair() for layer in cache.layers])
        engine.decode.enabled = True
        for one, other in zip(*caches, strict=True):
            for x, y in zip(one, other, strict=True):
                assert x.dtype == torch.float32 and (x == y).float().mean() > 0.98
                assert (x != x.to(torch.float16).to(torch.float32)).any(), "these are float16s"


@pytest.mark.parametrize("name", NAMED)
def test_a_family_decodes_like_its_modules(name: str) -> None:
    with running(case_with_whole_groups(name).pack(16), kv_bits=8) as engine:
        want, plain = by_modules(engine, rounded=True), by_modules(engine)
        got = decoded(engine.model)
        assert engine.decode.reason == "" and engine.decode.prompts == 1
        assert distance(got, want) < TOLERANCE < distance(got, plain)


@pytest.mark.parametrize("name", NAMED)
def test_a_prompt_is_read_like_its_modules_read_it(name: str) -> None:
    with running(case_of(name).pack(16), context=256, kv_bits=8) as engine:
        ids = LONG[:, :31]
        with modules_only(engine):
            want, plain = read(engine, ids=ids, rounded=True), read(engine, ids=ids)
        for ends in ((), (2,), (7, 9, 25)):
            assert distance(read(engine, *ends, ids=ids), want) < 4 * PROMPT_TOLERANCE < distance(plain, want)
        assert distance(read(engine, ids=ids, cached=False), want) < 4 * PROMPT_TOLERANCE


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "gpt_oss"])
def test_every_instruction_set_decodes(name: str) -> None:
    with choosing() as core:
        for isa in core.available():
            assert core.choose(isa)
            with running(case_with_whole_groups(name).pack(16), kv_bits=8) as engine:
                assert distance(decoded(engine.model), by_modules(engine, rounded=True)) < TOLERANCE


def test_long_contexts_cross_spans_and_blocks() -> None:
    ids = torch.randint(families.FIRST_ID, families.LAST_ID, (1, 1030), generator=torch.Generator().manual_seed(5))
    with running(case_of("qwen3_moe").pack(16), context=1100, kv_bits=8) as engine, torch.no_grad():
        engine.model.config.max_position_embeddings = 2048
        want = None
        for enabled in (False, True):
            engine.decode.enabled = enabled
            cache = DynamicCache(config=engine.model.config)
            assert engine.decode._adopt(cache) is not None
            engine.model(ids[:, :1021], past_key_values=cache)
            found = [engine.model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(1021, 1030)]
            want = found if want is None else want
        assert engine.decode.steps == 9 and want is not None
        assert max(distance(one, other) for one, other in zip(found, want, strict=True)) < TOLERANCE


@pytest.mark.parametrize("name", some(["qwen2_moe", "deepseek_v3", "gpt_oss"], ["qwen2_moe"]))
def test_memory_threads_and_guesses_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, found = case_of(name).pack(4), []
    for slots, prefetch, count in ((10, 0, 1), (0, 0, 1), (1, 2, 2), (3, 1, 3)):
        monkeypatch.setattr(threads, "_ours", count)
        with running(packed, experts_per_layer=slots, prefetch=prefetch, kv_bits=8) as engine:
            found.append(decoded(engine.model))
    assert all(torch.equal(one, found[0]) for one in found[1:])
    with running(packed) as engine:
        assert not torch.equal(decoded(engine.model), found[0]), "16 bits would have given the same"


def test_what_was_cropped_does_not_show() -> None:
    """Least of all what is no number."""
    with running(case_of("mixtral").pack(4), kv_bits=8) as engine, torch.no_grad():
        cache = engine.model(LONG[:, :20], use_cache=True).past_key_values
        want = engine.model(LONG[:, 20:21], past_key_values=cache).logits
        cache.crop(-1)
        for layer in cache.layers:
            for blocks in layer._kv._pair:
                blocks.put(20, torch.full((blocks.heads, 12, blocks.dim), float("nan")))
        assert torch.equal(engine.model(LONG[:, 20:21], past_key_values=cache).logits, want)
        again = engine.model(LONG[:, 21:22], past_key_values=cache).logits
        assert again.isfinite().all()
        values = cache.layers[0]._kv._pair[1]
        values.put(3, torch.full((values.heads, 1, values.dim), float("nan")))
        assert engine.model(LONG[:, 22:23], past_key_values=cache).logits.isnan().all(), "nothing would have shown"


# --- what it takes, and who may ask for it


@pytest.mark.parametrize("name", NAMED)
def test_what_is_planned_for_a_token_is_what_a_token_takes(name: str) -> None:
    with running(case_of(name).pack(4), kv_bits=8) as engine, torch.no_grad():
        config = engine.model.config
        cache = engine.model(LONG[:, :3], use_cache=True, past_key_values=DynamicCache(config=config)).past_key_values
        taken = sum(
            blocks.heads * nbytes_per_position(blocks.dim, blocks.bits)
            for layer in cache.layers
            for blocks in layer._kv._pair
        )
        assert taken == footprint.kv_nbytes_per_token(config, 4, 8)
        assert engine.plan.kv_cache == 64 * taken
    with running(case_of(name).pack(4)) as engine:
        assert 64 * taken < 0.6 * engine.plan.kv_cache


def test_families_without_the_compiled_decoder_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    packed = case_of("jamba").pack(4)
    with pytest.raises(ConfigError, match=r"kv_bits 8 is for the compiled decoder.*modules"):
        Engine(packed, EngineSettings(experts_per_layer=2, context=64, kv_bits=8))
    assert "kv_bits 8 is for the compiled decoder" in refused(capsys, "bench", str(packed.folder), "--kv-bits", "8")


@pytest.mark.parametrize("others", [{"kv_bits": 4}, {"kv_bits": 8.0}, {"kv_bits": 8, "vram": "8GiB"}])
def test_load_refuses_what_cannot_be(others: "dict[str, Any]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREENROOM_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="kv_bits"):
        greenroom.load("demo", **others)
