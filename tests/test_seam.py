"""What greenroom takes from transformers' modelling code: which models it refuses, what it packs, where gates are."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import families
from families import FAMILIES, VARIANTS
from greenroom import seam
from greenroom.checkpoint import Checkpoint
from greenroom.errors import CheckpointError, UnsupportedModelError
from greenroom.packed import PackedModel
from greenroom.packing import pack
from greenroom.prefetch import Router
from samples import some

ALL = {**FAMILIES, **VARIANTS}
NO_GATE = {
    "gemma4": "the gate of the per-layer embeddings is as large here, so which is the router is not clear",
    "gemma4_text": "the same",
    "inkling": "the gate also scores the shared experts",
    "muse_spark": "the gate reads a wider state than the experts do",
    "zaya": "the gate is a small network",
}
"""Families whose layers are never guessed."""
OTHER_RANK = {
    "deepseek_v3": "experts are chosen within groups",
    "deepseek_v4": "some layers route by token id; scores are square roots of softplus",
    "diffusion_gemma": "the gate scales the state by weights of its own",
    "ernie4_5_moe": "the correction bias has another shape",
    "ernie4_5_vl_moe": "the correction bias has another shape",
    "kolibri1": "the correction bias is added before the sigmoid",
}
"""Families whose gate is found, and where its plain matrix does not always rank the experts as the model does."""
EXACT = sorted(ALL.keys() - NO_GATE.keys() - OTHER_RANK.keys())


@pytest.fixture(autouse=True)
def known_to_transformers(request: pytest.FixtureRequest) -> None:
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    if name is not None and ALL[name].build.args[0] not in families.families_on_seam():
        pytest.skip(f"transformers {transformers.__version__} has no {name} behind the seam")


def refused(folder: Path) -> str:
    """The one line with which packing the folder is refused."""
    with pytest.raises(UnsupportedModelError) as error:
        pack(folder, folder.parent / "packed")
    assert "\n" not in str(error.value)
    assert not (folder.parent / "packed").exists()
    return str(error.value)


# --- models that are refused


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    assert "LlamaForCausalLM has no experts" in refused(tmp_path / "dense")


def test_a_mixture_of_experts_beside_the_seam_is_refused(tmp_path: Path) -> None:
    config = transformers.JetMoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_key_value_heads=1,
        kv_channels=16,
        num_local_experts=4,
    )
    if "jetmoe" in families.families_on_seam():
        pytest.skip("this transformers has put jetmoe behind the seam")
    transformers.JetMoeForCausalLM(config).save_pretrained(tmp_path / "jetmoe")
    assert "JetMoeForCausalLM has no experts behind transformers' experts seam" in refused(tmp_path / "jetmoe")


def test_an_unknown_parameter_beside_the_experts_is_refused() -> None:
    model = FAMILIES["mixtral"].build()
    model.model.layers[1].mlp.experts.register_parameter("scale", nn.Parameter(torch.ones(6)))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.experts .*'scale'"):
        seam.experts_modules(model)


def test_an_unknown_submodule_of_the_experts_is_refused() -> None:
    model = FAMILIES["mixtral"].build()
    model.model.layers[0].mlp.experts.norm = nn.LayerNorm(4)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp\.experts .*'norm'"):
        seam.experts_modules(model)


# --- which linears run from packed bits

DECIDE = {
    "mixtral": ["model.layers.0.mlp.gate"],
    "qwen2_moe": ["model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"],
    "deepseek_v3": ["model.layers.1.mlp.gate"],
    "jamba": ["model.layers.1.feed_forward.router"],
    "granitemoe": ["model.layers.0.block_sparse_moe.router"],
}
WEIGH = {
    "mixtral": ["model.layers.0.self_attn.q_proj"],
    "qwen2_moe": ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.shared_expert.gate_proj"],
    "deepseek_v3": ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.shared_experts.down_proj"],
    "jamba": ["model.layers.0.mamba.in_proj", "model.layers.1.self_attn.k_proj"],
    "granitemoe": ["model.layers.0.self_attn.v_proj"],
}


@pytest.mark.parametrize("name", sorted(DECIDE))
def test_what_decides_stays_at_16_bits_and_what_weighs_is_packed(name: str) -> None:
    model = FAMILIES[name].build()
    packed = seam.packable_linears(model, seam.experts_modules(model))
    for path in DECIDE[name]:
        assert any(True for _ in model.get_submodule(path).parameters()), f"{path} is not a gate of this model"
        assert not [other for other in packed if other == path or other.startswith(f"{path}.")]
    assert set(WEIGH[name]) <= set(packed)


def test_a_gate_is_stored_as_a_plain_tensor(tmp_path: Path) -> None:
    FAMILIES["qwen2_moe"].build().save_pretrained(tmp_path / "saved")
    manifest = pack(tmp_path / "saved", tmp_path / "packed", attention_bits=4).manifest
    plain = {entry.name for entry in manifest.tensors}
    assert {"model.layers.0.mlp.gate.weight", "model.layers.0.mlp.shared_expert_gate.weight"} <= plain
    assert "model.layers.0.mlp.shared_expert.gate_proj" in {entry.module for entry in manifest.linears}


# --- gates, as prefetching reads them


@pytest.mark.parametrize("name", EXACT)
def test_the_gate_ranks_experts_as_the_model_does(name: str) -> None:
    agreeing, model = agreement(name)
    assert agreeing and all(share == 1.0 for share in agreeing.values()), agreeing
    packed = seam.packable_linears(model, seam.experts_modules(model))
    gates = {id(gate_of(model, spec).weight) for spec in seam.experts_modules(model)}
    assert not [path for path in packed if id(model.get_submodule(path).weight) in gates]


@pytest.mark.parametrize("name", sorted(OTHER_RANK))
def test_some_gates_rank_nearly_as_the_model_does(name: str) -> None:
    agreeing, _ = agreement(name)
    assert None not in agreeing.values()
    assert min(agreeing.values()) < 1.0, "it is exact: take it off the list"


@pytest.mark.parametrize("name", sorted(NO_GATE))
def test_some_gates_are_not_found(name: str) -> None:
    agreeing, _ = agreement(name)
    assert set(agreeing.values()) == {None}, "it is found: take it off the list"


def gate_of(model: nn.Module, spec: seam.ExpertsModule) -> "seam.Gate | None":
    return seam.router(model, spec.name, spec.num_experts, spec.parameters[0].cols)


def agreement(name: str) -> "tuple[dict[str, float | None], transformers.PreTrainedModel]":
    """Experts module → the share of tokens that go to the gate's top-k on what the experts see; None: no gate.

    Norms are uneven and biases large: a gate that has one, or reads another norm's output, must not pass for plain.
    """
    model = ALL[name].build()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path or path.endswith("scale"):
                parameter *= torch.empty_like(parameter).uniform_(0.5, 2.0, generator=generator)
            elif path.endswith("bias"):
                parameter *= 8
    calls: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    specs = {spec.name: spec for spec in seam.experts_modules(model)}
    for path in specs:

        def note(module: nn.Module, args: tuple, kwargs: dict, path: str = path) -> None:
            hidden, index = [*args, *kwargs.values()][:2]
            calls[path] = (hidden, index)

        model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
    families.logits(model, **ALL[name].inputs(model))
    shares = {}
    for path, (hidden, index) in calls.items():
        gate = gate_of(model, specs[path])
        shares[path] = (
            None
            if gate is None
            else same_experts(Router(gate.weight, gate.bias, gate.correction).scores(hidden), index)
        )
    return shares, model


def same_experts(scores: torch.Tensor, index: torch.Tensor) -> float:
    guessed = scores.topk(index.shape[1]).indices
    return float((guessed.sort().values == index.sort().values).all(1).double().mean())


# --- how a checkpoint names its experts


@pytest.mark.parametrize(
    "name",
    some(["mixtral", "qwen2_moe", "jamba", "deepseek_v4", "nemotron_h", "ernie4_5_vl_moe"], ["mixtral", "nemotron_h"]),
)
def test_stacked_and_separate_experts_pack_to_the_same_records(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    save_stacked(model, tmp_path / "stacked")
    model.save_pretrained(tmp_path / "separate")
    assert any(re.search(r"experts\.\d", key) for key in load_file(tmp_path / "separate" / "model.safetensors"))
    loaded = type(model).from_pretrained(tmp_path / "stacked", dtype=torch.float32).eval()
    want = families.logits(model, **inputs)
    torch.testing.assert_close(families.logits(loaded, **inputs), want, rtol=0, atol=1e-4)  # it is a checkpoint
    separate = pack(tmp_path / "separate", tmp_path / "from-separate")
    stacked = pack(tmp_path / "stacked", tmp_path / "from-stacked")
    assert records(separate) == records(stacked)


def save_stacked(model: transformers.PreTrainedModel, folder: Path) -> None:
    """A checkpoint under the model's own names, which transformers loads too."""
    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def records(packed: PackedModel) -> "dict[str, bytes]":
    return {entry.module: (packed.folder / entry.file).read_bytes() for entry in packed.manifest.experts}


# --- incomplete checkpoints


def without(checkpoint: Path, folder: Path, pattern: str) -> Path:
    """A copy of the checkpoint that lacks the tensors matching `pattern`."""
    shutil.copytree(checkpoint, folder)
    shard = folder / "model.safetensors"
    weights = load_file(shard)
    kept = {key: value for key, value in weights.items() if not re.search(pattern, key)}
    assert kept.keys() < weights.keys()
    save_file(kept, shard, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "gone, named",
    [
        (
            r"layers\.1\..*experts\.3\.",
            r"holds 5 experts for model\.layers\.1\.mlp\.experts\.\w+ where the model has 6",
        ),
        (r"layers\.1\..*experts\.3\.w2", r"holds 5 experts for model\.layers\.1\.mlp\.experts\.down_proj"),
        (r"layers\.1\..*experts\.5\.w3", r"holds 5 experts for model\.layers\.1\.mlp\.experts\.gate_up_proj"),
        (r"layers\.2\..*experts\.", r"no weight for model\.layers\.2\.mlp\.experts\.gate_up_proj and 1 more"),
        (r"layers\.2\..*experts\.\d\.w2", r"no weight for model\.layers\.2\.mlp\.experts\.down_proj:"),
        (r"layers\.0\..*q_proj", r"no weight for model\.layers\.0\.self_attn\.q_proj\.weight:"),
        (r"^model\.norm", r"no weight for model\.norm\.weight:"),
        (r"layers\.1\..*gate\.weight", r"no weight for model\.layers\.1\.mlp\.gate\.weight:"),
        (r"lm_head", r"no weight for lm_head\.weight:"),
    ],
)
def test_an_incomplete_checkpoint_is_refused_by_name(checkpoint: Path, tmp_path: Path, gone: str, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        Checkpoint(without(checkpoint, tmp_path / "incomplete", gone))


def test_a_checkpoint_lacking_one_source_of_all_its_gates_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        pack(without(checkpoint, tmp_path / "incomplete", r"layers\.0\..*\.w3"), tmp_path / "packed")


def test_an_expert_of_another_shape_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    folder = without(checkpoint, tmp_path / "odd", r"layers\.0\..*experts\.2\.w2")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.block_sparse_moe.experts.2.w2.weight"] = torch.zeros(96, 79)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.experts\.down_proj\[2\] has shape \(96, 79\)"):
        pack(folder, tmp_path / "packed")


def test_an_unknown_model_type_is_refused_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unknown"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no_such_model"}))
    assert "no_such_model" in refused(folder)
