"""The benchmark's demo: the same upcycled model in greenroom's and llama.cpp's formats, and the text it reads."""

import dataclasses
import json
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from benchmarks import cpu, gguf_file, packed_folder, peer
from benchmarks.cells import Cell
from benchmarks.demo import DEMO, Demo
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM

from greenroom.packed import ExpertsEntry, PackedModel
from greenroom.packing import pack
from greenroom.quant import dequantize

FOUR_BITS = DEMO.pairings["4"]
OWN = 2
"""Experts in each layer of the checkpoint."""
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INSIDE = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
}
WORDS = ("the", "model", "experts", "memory")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral with a tied head and a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("source")
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=OWN,
        num_experts_per_tok=2,
        rms_norm_eps=DEMO.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": DEMO.rope_theta},
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"?": 0, **{word: i + 1 for i, word in enumerate(WORDS)}}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Demo:
    """With so much noise that no expert passes for another."""
    return Demo(
        name="tiny-demo",
        family="mixtral",
        layers=2,
        hidden=64,
        intermediate=96,
        experts=5,
        top_k=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocab=128,
        rope_theta=DEMO.rope_theta,
        norm_eps=DEMO.norm_eps,
        checkpoint=lambda: folder,
        noise=1.0,
    )


@pytest.fixture(scope="module")
def packed(tiny: Demo, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    path = tmp_path_factory.mktemp("packed") / "model"
    packed_folder.write(path, tiny, FOUR_BITS)
    return PackedModel(path)


@pytest.fixture(scope="module")
def file(tiny: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    gguf_file.write(path, tiny, FOUR_BITS)
    return path


def experts(packed: PackedModel, entry: ExpertsEntry) -> "list[dict[str, torch.Tensor]]":
    """Each expert's matrices, float32."""
    raw = (packed.folder / entry.file).read_bytes()
    found = []
    for expert in range(entry.num_experts):
        start = entry.offset + expert * entry.record_nbytes
        record = torch.frombuffer(bytearray(raw[start : start + entry.record_nbytes]), dtype=torch.uint8)
        found.append({t.name: dequantize(t.part(record), t.rows, t.cols, t.format) for t in entry.tensors})
    return found


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def function(matrices: "dict[str, torch.Tensor]") -> torch.Tensor:
    """What an expert makes of some inputs: packing scales its matrices against each other."""
    gate, up = (torch.eye(64) @ matrices["gate_up_proj"].T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ matrices["down_proj"].T


def dequantized(file: Path) -> "dict[str, torch.Tensor]":
    """A GGUF file's tensors, float32, by its own names."""
    return {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).view(
            *tensor.shape.tolist()[::-1]
        )
        for tensor in gguf.GGUFReader(file).tensors
    }


def for_transformers(file: Path, shape: Demo) -> "dict[str, torch.Tensor]":
    """The same as a state of transformers' model."""
    values = dequantized(file)
    names = {f"model.layers.{layer}": f"blk.{layer}" for layer in range(shape.layers)}
    found = {ours: values.pop(theirs) for ours, theirs in OUTSIDE.items()}
    for ours, theirs in names.items():
        found |= {f"{ours}.{name}": values.pop(f"{theirs}.{own}") for name, own in INSIDE.items()}
        for name, heads in (("q_proj", shape.heads), ("k_proj", shape.kv_heads)):
            rows = found[f"{ours}.self_attn.{name}.weight"].view(heads, -1, 2, shape.hidden)
            found[f"{ours}.self_attn.{name}.weight"] = rows.transpose(1, 2).reshape(-1, shape.hidden)
        gate, up, down = (values.pop(f"{theirs}.ffn_{part}_exps.weight") for part in ("gate", "up", "down"))
        found[f"{ours}.mlp.experts.gate_up_proj"] = torch.cat((gate, up), dim=1)
        found[f"{ours}.mlp.experts.down_proj"] = down
    assert not values
    return found


def test_without_noise_it_is_what_packing_makes_of_the_checkpoint(tmp_path: Path, tiny: Demo, folder: Path) -> None:
    wanted = pack(folder, tmp_path / "wanted", expert_bits=4, group_size=32, attention_bits=4, head_bits=4).manifest
    packed_folder.write(tmp_path / "same", dataclasses.replace(tiny, experts=OWN, noise=0.0), FOUR_BITS)
    packed_folder.write(tmp_path / "noisy", dataclasses.replace(tiny, experts=OWN, noise=DEMO.noise), FOUR_BITS)
    same, noisy = (PackedModel(tmp_path / name).manifest for name in ("same", "noisy"))
    assert [entry.crc32 for entry in same.experts] == [entry.crc32 for entry in wanted.experts]
    assert {e.module: (e.format, e.crc32) for e in same.linears} == {
        e.module: (e.format, e.crc32) for e in wanted.linears
    }
    plain = {entry.name: entry.crc32 for entry in same.tensors if "gate" not in entry.name}
    assert plain == {entry.name: entry.crc32 for entry in wanted.tensors if "gate" not in entry.name}
    for ours, theirs in zip(noisy.experts, wanted.experts, strict=True):  # the control
        assert not set(ours.crc32) & set(theirs.crc32)


def test_experts_are_the_checkpoint_s_in_turn_and_no_two_alike(tmp_path: Path, tiny: Demo, folder: Path) -> None:
    packed_folder.write(tmp_path / "model", dataclasses.replace(tiny, noise=DEMO.noise), FOUR_BITS)
    packed = PackedModel(tmp_path / "model")
    assert packed.verify() == []
    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer, entry in enumerate(packed.manifest.experts):
        assert len(set(entry.crc32)) == entry.num_experts == tiny.experts
        own = model.model.layers[layer].mlp.experts
        own_experts = [{name: getattr(own, name)[i] for name in ("gate_up_proj", "down_proj")} for i in range(OWN)]
        for expert, found in enumerate(experts(packed, entry)):
            near, far = (function(own_experts[(expert + other) % OWN]) for other in (0, 1))
            with torch.no_grad():
                assert distance(function(found), near) < 0.2 < 1 < distance(function(found), far)


def test_noise_is_relative_to_each_matrix_and_its_own(file: Path, folder: Path, tiny: Demo) -> None:
    found = for_transformers(file, tiny)
    own = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    noises = []
    for layer in range(tiny.layers):
        for name, count in (("gate_up_proj", 2), ("down_proj", 1)):
            path = f"model.layers.{layer}.mlp.experts.{name}"
            for expert in range(tiny.experts):
                matrices = zip(found[path][expert].chunk(count), own[path][expert % OWN].chunk(count), strict=True)
                for matrix, source in matrices:
                    noises.append((matrix - source).flatten() / source.std())
    noise = torch.stack(noises)
    assert noise.std(dim=1).sub(tiny.noise).abs().max() < 0.1
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.1


def test_routers_are_random_and_of_the_demo_s_spread(packed: PackedModel, tiny: Demo) -> None:
    routers = [packed.read_tensor(e).float() for e in packed.manifest.tensors if e.name.endswith("mlp.gate.weight")]
    assert [tuple(router.shape) for router in routers] == [(tiny.experts, tiny.hidden)] * tiny.layers
    x = torch.randn(256, tiny.hidden, generator=torch.Generator().manual_seed(0))
    for router in routers:
        assert float((x @ router.T).std()) == pytest.approx(4.0, rel=0.2)
    assert distance(routers[0], routers[1]) > 1


def test_the_gguf_file_holds_the_same_model(packed: PackedModel, file: Path, tiny: Demo) -> None:
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"F16", "F32", "Q4_0"}
    assert [name for name, kind in kinds.items() if kind == "F16"] == ["token_embd.weight"]
    theirs = for_transformers(file, tiny)
    packed_linears = packed.read_linears()
    for entry in packed.manifest.linears:
        found = dequantize(packed_linears[entry.module], entry.rows, entry.cols, entry.format)
        assert distance(theirs.pop(f"{entry.module}.weight"), found) < 0.2
    for plain in packed.manifest.tensors:
        assert torch.equal(theirs.pop(plain.name), packed.read_tensor(plain).float())
    for layer in packed.manifest.experts:
        found = [theirs.pop(f"{layer.module}.{name}") for name in ("gate_up_proj", "down_proj")]
        made = [function({"gate_up_proj": one, "down_proj": two}) for one, two in zip(*found, strict=True)]
        ours = [function(matrices) for matrices in experts(packed, layer)]
        for expert in range(tiny.experts):
            assert distance(made[expert], ours[expert]) < 0.3 < 1 < distance(made[expert], ours[expert - 1])
    assert not theirs


def test_query_and_key_stand_in_llama_cpp_s_order(packed: PackedModel, file: Path, tiny: Demo) -> None:
    """Pairs that are rotated together stand half a head apart in transformers, side by side in llama.cpp."""
    theirs, ours = dequantized(file), packed.read_linears()
    entry = next(entry for entry in packed.manifest.linears if entry.module.endswith("0.self_attn.k_proj"))
    wanted = dequantize(ours[entry.module], entry.rows, entry.cols, entry.format)
    half = tiny.head_dim // 2
    order = [
        head * tiny.head_dim + side * half + pair
        for head in range(tiny.kv_heads)
        for pair in range(half)
        for side in (0, 1)
    ]
    assert distance(theirs["blk.0.attn_k.weight"], wanted[order]) < 0.2
    assert distance(theirs["blk.0.attn_k.weight"], wanted) > 1  # the control


def test_files_are_the_same_each_time(tmp_path: Path, packed: PackedModel, file: Path, tiny: Demo) -> None:
    packed_folder.write(tmp_path / "again", tiny, FOUR_BITS)
    gguf_file.write(tmp_path / "again.gguf", tiny, FOUR_BITS)
    assert PackedModel(tmp_path / "again").manifest == packed.manifest
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()
    gguf_file.write(tmp_path / "other.gguf", dataclasses.replace(tiny, noise=1.01), FOUR_BITS)  # the control
    assert (tmp_path / "other.gguf").read_bytes() != file.read_bytes()


def test_lifelike_tokens_are_text_and_uniform_ones_are_not(tiny: Demo) -> None:
    def sequence(kind: str, number: int) -> "list[int]":
        cell = Cell(shape=tiny, pairing=FOUR_BITS, fits=0.5, routing=kind, prompt=8, tokens=4)
        return [token for part in cell.sequence(number).values() for token in part]

    text = tiny.token_ids("lifelike", 0, 4096 + 2 * 44)
    assert sequence("lifelike", 0) + sequence("lifelike", 1) == text[4096:]
    assert set(text) == set(range(1 + len(WORDS))) and text.count(0) > len(text) / 2
    chance = tiny.token_ids("uniform", 0, 4096 + 2 * 44)
    assert sequence("uniform", 0) + sequence("uniform", 1) == chance[4096:]
    assert set(chance) == set(range(tiny.vocab)) and np.bincount(chance).max() < 80


def test_a_full_run_has_the_demo_at_its_one_width_and_a_quick_one_has_not() -> None:
    def widths(*flags: str) -> "list[str]":
        cells = cpu._cells(cpu._options([*flags, "--only", "ram"]))
        return [cell.pairing.name for cell in cells if cell.shape is DEMO]

    assert widths() == ["4"] and widths("--quick") == []


@pytest.mark.slow
def test_llama_cpp_computes_what_transformers_does_with_these_weights(file: Path, folder: Path, tiny: Demo) -> None:
    python = peer.python_of(peer.default_folder())
    if not python.exists():
        pytest.skip("llama.cpp is not built: python -m benchmarks.peer")
    tokens = tiny.token_ids("uniform", 0, 48)
    script = """
import json, sys, llama_worker
model = llama_worker.Model(sys.argv[1], threads=1, context=512, repack=False)
for token in json.loads(sys.argv[2]):
    model.feed([token])
    print(json.dumps(model.logits().tolist()))
"""
    done = subprocess.run(
        [python, "-c", script, file, json.dumps(tokens)],
        env={"PYTHONPATH": str(Path(cpu.__file__).parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = torch.tensor([json.loads(line) for line in done.stdout.splitlines()])
    sizes = {"num_local_experts": tiny.experts, "tie_word_embeddings": False}
    model = MixtralForCausalLM(MixtralConfig.from_pretrained(folder, **sizes)).float()

    def correlation(weights: "dict[str, torch.Tensor]") -> float:
        model.load_state_dict(weights)
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        return float(torch.corrcoef(torch.stack((logits.flatten(), found.flatten())))[0, 1])

    weights = for_transformers(file, tiny)
    assert correlation(weights) > 0.99  # llama.cpp rounds activations to 8 bits
    query = "model.layers.0.self_attn.q_proj.weight"
    unpaired = weights[query].view(tiny.heads, 2, -1, tiny.hidden).transpose(1, 2).reshape(-1, tiny.hidden)
    assert correlation({**weights, query: unpaired}) < 0.97  # the control
