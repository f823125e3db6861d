"""Layers captured for single tokens: the same bits as without, and what cannot be captured is noticed and served."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from greenroom import static_kv
from greenroom.device import CaptureError, FakeDevice
from greenroom.engine import Engine
from greenroom.static_kv import NotServedError, StaticKV, adopt, room_for
from greenroom.token_inputs import Sights
from on_device import Engines
from samples import some
from test_engine import EXPERTS, LAYERS, SHORT, same
from test_layer_steps import TOKENS, ahead, decoded

# --- the same bits


def graphs(engine: Engine, wanted: bool = True) -> Engine:
    assert engine.steps is not None
    engine.steps.graphs = wanted
    return ahead(engine)


@pytest.mark.usefixtures("small_rooms")
@pytest.mark.parametrize("slots", some([0, 2, 4, EXPERTS], [2]))
def test_graphs_do_not_show(device_engines: Engines, slots: int) -> None:
    expected = decoded(ahead(device_engines(experts_per_layer=EXPERTS), False).model)
    engine, eager = (
        graphs(device_engines(experts_per_layer=slots)),
        graphs(device_engines(experts_per_layer=slots), False),
    )
    for _ in range(3):
        assert same(decoded(engine.model), expected)
        assert same(decoded(eager.model), expected)
    assert engine.steps.replayed > LAYERS and eager.steps.replayed == 0
    assert engine.metrics().hits == eager.metrics().hits
    assert str(engine.steps) == f"{engine.steps.replayed} layers as graphs" and str(eager.steps) == ""


def test_every_layer_is_a_graph_where_all_is_there(device_engines: Engines) -> None:
    engine = graphs(device_engines(experts_per_layer=EXPERTS))
    decoded(engine.model)
    before = engine.steps.replayed
    decoded(engine.model)
    assert engine.steps.replayed - before == LAYERS * (len(TOKENS))


@pytest.mark.parametrize(
    "how", some([{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"do_sample": False}], [{"num_beams": 2}])
)
@pytest.mark.usefixtures("small_rooms")
def test_generation_of_every_kind(device_engines: Engines, how: "dict[str, Any]") -> None:
    """Beams reorder the cache, guessed tokens are cropped from it; both ask for plain tensors in between."""
    prompt = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8]])
    found = []
    for wanted in (True, False):
        engine = graphs(device_engines(experts_per_layer=EXPERTS), wanted)
        found += [engine.model.generate(prompt, max_new_tokens=20, **how) for _ in range(2)]
    assert all(torch.equal(one, found[0]) for one in found)


def test_conversations_in_turns(device_engines: Engines) -> None:
    """Two caches take the layers' memory from each other."""
    engine, plain = graphs(device_engines(experts_per_layer=EXPERTS)), graphs(device_engines(), False)
    found = []
    for one in (engine, plain):
        with torch.no_grad():
            caches = [one.model(SHORT[:, :n], use_cache=True).past_key_values for n in (3, 7)]
            for token in TOKENS:
                for cache in caches:
                    out = one.model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                    found.append(out.logits)
    half = len(found) // 2
    assert same(found[:half], found[half:])


# --- what is not captured


def test_a_hook_is_called(device_engines: Engines) -> None:
    engine = graphs(device_engines(experts_per_layer=EXPERTS))
    expected = decoded(engine.model)
    calls: list[int] = []
    handle = engine.model.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    assert same(decoded(engine.model), expected) and len(calls) == len(TOKENS) + 1
    handle.remove()
    before = engine.steps.replayed
    assert same(decoded(engine.model), expected) and engine.steps.replayed > before + 2 * len(TOKENS)


@pytest.mark.parametrize("number", some(range(LAYERS), [1]))
def test_a_layer_that_is_captured_late_hands_on_new_values(device_engines: Engines, number: int) -> None:
    """The next layer was captured with memory of its own, and copies from one tensor at every token."""
    expected = decoded(graphs(device_engines(experts_per_layer=EXPERTS)).model)
    engine = graphs(device_engines(experts_per_layer=EXPERTS))
    handle = engine.model.model.layers[number].self_attn.register_forward_hook(lambda *_: None)
    assert same(decoded(engine.model), expected)
    handle.remove()
    before = engine.steps.replayed
    assert same(decoded(engine.model), expected)
    assert engine.steps.replayed == before + LAYERS * len(TOKENS)


@pytest.mark.slow
def test_inference_mode_comes_and_goes(device_engines: Engines) -> None:
    """What it makes cannot be written without it; also where a layer has to be taken again."""
    expected = decoded(ahead(device_engines(experts_per_layer=EXPERTS), False).model)
    for slots in (2, EXPERTS):
        engine = graphs(device_engines(experts_per_layer=slots))
        for mode in (True, False, True, False):
            with torch.inference_mode(mode):
                assert same(decoded(engine.model), expected)
        assert engine.steps.replayed > LAYERS


def test_hidden_states_are_kept(device_engines: Engines) -> None:
    """Who collects what layers give finds this token's there, not the last one's."""
    found = []
    for wanted in (True, False):
        engine = graphs(device_engines(experts_per_layer=EXPERTS), wanted)
        out = engine.model.generate(
            SHORT, max_new_tokens=6, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
        )
        found.append([layer for step in out.hidden_states for layer in step])
    assert same(*found)


@pytest.mark.parametrize("reads", some(["item", "mask", "new"], ["mask"]))
def test_a_layer_that_needs_the_host_is_served_eagerly(
    device_engines: Engines, monkeypatch: pytest.MonkeyPatch, reads: str
) -> None:
    """Negative control of the rules: values read on the host, a shape that depends on them, values sent."""
    plain = graphs(device_engines(experts_per_layer=EXPERTS))
    expected = decoded(plain.model)
    engine = graphs(device_engines(experts_per_layer=EXPERTS))
    gate = engine.model.model.layers[1].mlp.gate
    real = gate.forward

    def forward(x: torch.Tensor) -> Any:
        if reads == "item":
            assert x.abs().max().item() > 0
        elif reads == "mask":
            assert len(x[x > 0])
        else:
            x = x + torch.tensor([0.0])
        return real(x)

    monkeypatch.setattr(gate, "forward", forward)
    for _ in range(2):
        assert same(decoded(engine.model), expected)
    assert engine.steps.replayed > 0 and "; not layer 1: " in str(engine.steps)


def test_a_layer_that_counts_on_the_host_is_noticed(device_engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that changes from call to call would be the first one's in every replay."""
    engine = graphs(device_engines(experts_per_layer=EXPERTS))
    norm, calls = engine.model.model.layers[0].input_layernorm, [0]
    real = norm.forward

    def forward(x: torch.Tensor) -> Any:
        calls[0] += 1
        return real(x) * calls[0]

    monkeypatch.setattr(norm, "forward", forward)
    with pytest.raises(AssertionError, match="when it was captured"):
        decoded(engine.model)


def test_memory_that_moves_is_noticed() -> None:
    device, tensors = FakeDevice(), [torch.ones(2)]
    captured = device.capture(lambda: tensors[0] * 2)
    captured.replay()
    assert captured.result.tolist() == [2, 2]
    tensors[0].fill_(3)
    captured.replay()
    assert captured.result.tolist() == [6, 6]
    tensors[0] = torch.ones(2)
    with pytest.raises(AssertionError, match="outside"):
        captured.replay()


def test_what_a_replay_tells_is_there_when_its_event_has_come() -> None:
    device, tensor = FakeDevice(), torch.ones(2)
    captured = device.capture(lambda: [tensor * 2], told=lambda result: result)
    for number in range(2):
        tensor.fill_(number)
        event = captured.replay()
        assert captured.back[0].tolist() == [-1, -1]
        tensor.fill_(9)  # later than the copy
        device.synchronise(event)
        assert captured.back[0].tolist() == [2 * number, 2 * number]


def test_captured_is_not_computed() -> None:
    captured = FakeDevice().capture(lambda: torch.ones(2) + 1)
    assert captured.result.tolist() != [2, 2]


@pytest.mark.parametrize("read", [torch.Tensor.tolist, bool, float, torch.nonzero, torch.unique, lambda x: x[x > 0]])
def test_what_waits_is_refused(read: Any) -> None:
    tensor = torch.ones(1)
    with pytest.raises(CaptureError):
        FakeDevice().capture(lambda: read(tensor))
    FakeDevice().capture(lambda: tensor + 1)


def test_a_cache_that_is_asked_for_more_is_served_as_before(
    device_engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = graphs(device_engines(experts_per_layer=EXPERTS))
    expected = decoded(engine.model)
    engine = graphs(device_engines(experts_per_layer=EXPERTS))
    attention = engine.model.model.layers[2].self_attn
    real = attention.forward

    def forward(*args: Any, past_key_values: Any, **kwargs: Any) -> Any:
        assert len(past_key_values.layers) in (2, 3)
        return real(*args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(attention, "forward", forward)
    found = decoded(engine.model)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert "layer 2: it asks its cache for layers" in str(engine.steps)


# --- keys and values


def twin(window: "int | None") -> "tuple[DynamicCache, DynamicCache]":
    caches = []
    for _ in range(2):
        cache = DynamicCache()
        cache.layers.append(DynamicLayer() if window is None else DynamicSlidingWindowLayer(window))
        cache.layer_class_to_replicate = None
        caches.append(cache)
    return caches[0], caches[1]


def seen(mask: torch.Tensor, keys: torch.Tensor) -> "list[float]":
    """Keys that the mask shows, in any order."""
    return sorted(keys[0, 0, mask[0, 0, 0] == 0, 0].tolist())


@settings(max_examples=150, deadline=None)
@given(
    window=st.sampled_from([None, 2, 3, 6, 11]),
    events=st.lists(st.one_of(st.integers(1, 5), st.just(-1), st.just(0)), min_size=1, max_size=30),
)
def test_what_is_lent_comes_back(window: "int | None", events: "list[int]") -> None:
    """Prompts of 1 to 5 tokens, single tokens (0), and crops (−1), against transformers' own layer."""
    before, static_kv.SMALLEST = static_kv.SMALLEST, 4
    try:
        ours, theirs = twin(window)
        holder, sights, now = StaticKV(0), Sights(torch.device("cpu")), 0
        for event in events:
            if event == -1:
                if now > 1 and (window is None or now < window):
                    ours.layers[0].crop(-1), theirs.layers[0].crop(-1)
                    now -= 1
                continue
            count = event or 1
            new = torch.arange(now, now + count, dtype=torch.float32).view(1, 1, count, 1).expand(1, 2, count, 3)
            keys, _ = theirs.layers[0].update(new, new + 100)
            layer = adopt(ours, 0) if event == 0 else None
            if layer is None:
                ours.layers[0].update(new, new + 100)
            else:
                assert layer.get_seq_length() == now
                holder.hold(layer)
                assert holder.room == room_for(now, window)
                sight = sights.of(holder.room, window, False)
                sight.show(now, None, new)
                holder.slot = sight.slot
                found, _ = holder.update(new, new + 100, 0)
                layer.put()
                wanted = keys[..., -window:, :] if window else keys
                assert seen(sight.mask, found) == wanted[0, 0, :, 0].tolist()
            now += count
            assert ours.layers[0].get_seq_length() == theirs.layers[0].get_seq_length() == now
            if event == 5:
                assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)
        assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys) if now else True
        assert torch.equal(ours.layers[0].values, theirs.layers[0].values) if now else True
    finally:
        static_kv.SMALLEST = before


@pytest.mark.parametrize("window,length", [(None, 3), (8, 3), (4, 3), (4, 4), (4, 9)])
def test_a_mask_goes_where_the_positions_are(window: "int | None", length: int) -> None:
    first = 0 if window is None else max(length + 1 - window, 0)
    given_mask = torch.arange(first, length + 1, dtype=torch.float32).view(1, 1, 1, -1)
    room = min(window or 8, 8)
    sight = Sights(torch.device("cpu")).of(room, window, True)
    sight.show(length, given_mask, given_mask)
    found = {int(p) % room: float(p) for p in given_mask.flatten()}
    for place, value in enumerate(sight.mask[0, 0, 0].tolist()):
        assert value == found.get(place, torch.finfo(torch.float32).min)


def test_a_layer_that_writes_elsewhere_is_not_served() -> None:
    with pytest.raises(NotServedError, match="layer 1"):
        StaticKV(0).update(torch.ones(1), torch.ones(1), 1)
