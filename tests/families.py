"""Small random models of every family whose experts sit behind transformers' experts seam.

A family is one folder of ``transformers/models`` whose modelling file carries ``@use_experts_implementation``.
``FAMILIES[name].build()`` gives a float32 CPU model of a few hundred kilobytes whose experts carry weight in the
output: an expert dropped, swapped or read wrongly moves the logits far beyond rounding.  Every parameter and every
persistent float buffer holds a bfloat16-representable value, so a round trip through bfloat16 is exact.

A config is the class's defaults with ``TEXT`` (or ``TOWER``, for vision and audio sub-configs) applied wherever the
class has the field, then the family's own differences.  ``VARIANTS`` holds further classes of the same folders.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VOCAB = 128
FIRST_ID, LAST_ID = 4, 100  # ordinary tokens; below are pad, bos and eos, above image and audio placeholders

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    # experts, under each of the names the families give them
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "swiglu_limit": 1.0,  # low enough that the experts' clamp acts
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    # attention that is neither plain nor full
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 64,  # above every test length: ties among few indexed keys would break by memory layout
    "index_head_dim": 16,
    "index_n_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}

TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "image_size": 16,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "max_position_embeddings": 64,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "adapter_out_dim": 64,
    "projection_hidden_dim": 48,
    "projection_intermediate_size": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    # deepstack, convolutional stems and audio
    "deepstack_visual_indexes": [0],
    "output_channels": 16,
    "downsample_channels": [16, 32],
    "mlp_dim": 48,
    "global_attn_indexes": [0],
    "posemb_grid_size": 4,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "d_model": 32,
    "num_mel_bins": 16,
    "feature_size": 16,
    "output_dim": 64,
    "output_proj_dims": 64,
    "max_source_positions": 64,
    "downsample_hidden_size": 8,
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "subsampling_conv_channels": [8, 4],
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One modelling class, how to make a small one of it, and what to feed it."""

    name: str
    build: Callable[[], PreTrainedModel]
    inputs: Callable[[PreTrainedModel], dict[str, Tensor]]
    generates: bool  # `generate(input_ids=…)` applies to the class and returns token ids


def families_on_seam() -> list[str]:
    """Name the folders of the installed transformers whose modelling file carries the experts decorator."""
    import transformers

    models = Path(transformers.__file__).parent / "models"
    files = models.glob("*/modeling_*.py")
    return sorted({f.parent.name for f in files if re.search(r"^@use_experts_implementation\b", f.read_text(), re.M)})


def seam_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Collect the modules the experts decorator was put on, by name."""
    marks = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")
    return {name: m for name, m in model.named_modules() if all(hasattr(m, mark) for mark in marks)}


def logits(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """Run the model once and return the float output to compare."""
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state


# 1-D parameters and buffers that a fresh model leaves at zero and a trained one does not
_NUDGED = re.compile(r"(correction_bias|expert_bias|expert_biases|sinks?)$|(^|\.)(e_score|sink)", re.I)
# parameters of two or more dimensions that are not the matrix of a linear map
_KEPT = re.compile(r"(A_log|dt_bias|(^|[._])norm\d*\.weight|layernorm\.weight)$", re.I)


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Give every matrix random weights under which the experts decide the output, then round to bfloat16 values.

    Norms outside the experts and the 1-D parameters of state-space layers keep what the model's own initialisation
    gave them; with everything drawn from one small normal the experts would contribute less than a test's tolerance.
    """
    owner = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    seam = seam_modules(model).values()
    transposed = {id(p) for m in seam if m.is_transposed for p in m.parameters(recurse=False)}
    expert_norms = {id(p) for m in seam for p in m.parameters() if p.ndim == 1}

    def normal(name: str, t: Tensor, std: float) -> None:
        g = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        t.copy_(torch.randn(t.shape, generator=g) * std)

    for name, p in model.named_parameters():
        module = owner[id(p)]
        if id(p) in expert_norms:
            normal(name, p, 0.3)
            p.add_(1.0)
        elif _KEPT.search(name):
            pass
        elif _NUDGED.search(name):
            normal(name, p, 0.05)
        elif isinstance(module, nn.Embedding):
            normal(name, p, 1.0)
        elif name.endswith("bias") and (p.ndim > 1 or isinstance(module, nn.Linear)):
            normal(name, p, 0.2)
        elif p.ndim >= 2:
            fan_in = p.shape[-2] if id(p) in transposed else p[0].numel() if p.ndim > 3 else p.shape[-1]
            normal(name, p, 1.25 * fan_in**-0.5)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and _NUDGED.search(name):
            normal(name, buffer, 0.05)
        elif name.endswith("tid2eid"):  # token id -> its experts, a table that only a checkpoint fills
            experts = model.get_submodule(name.removesuffix(".tid2eid")).num_experts
            scores = torch.empty(len(buffer), experts)
            normal(name, scores, 1.0)
            buffer.copy_(scores.topk(buffer.shape[1]).indices)

    persistent = {id(t) for t in model.state_dict(keep_vars=True).values()}
    for t in [*model.parameters(), *model.buffers()]:
        if id(t) in persistent and t.is_floating_point():
            t.copy_(t.bfloat16())


@torch.no_grad()
def realign(model: nn.Module) -> None:
    """Copy every weight to memory of its own.

    Weights mapped from a file start at odd addresses, where some matrix kernels sum in another order: without this
    a reloaded model agrees with the saved one to a few parts in 10^7, with it exactly.
    """
    for p in model.parameters():
        p.data = p.data.clone()


def _config(cls: type[PreTrainedConfig], own: dict[str, Any], tower: bool = False) -> PreTrainedConfig:
    """Make a small config: the shared sizes where the class has the field, then the family's own differences."""
    from transformers import CONFIG_MAPPING

    fields = {f.name for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    if not cls.sub_configs:
        values = {k: v for k, v in (TOWER if tower else TEXT).items() if k in fields}
        if "kv_lora_rank" in fields:  # latent attention has one key and one value per query head
            values["num_key_value_heads"] = values["num_attention_heads"]
    else:  # every placeholder token inside the small vocabulary, no two alike
        names = sorted(k for k in fields if re.search(r"token_(id|index)$", k))
        values = {k: LAST_ID + 1 + i for i, k in enumerate(names)}
    for key, sub in cls.sub_configs.items():
        nested = dict(own.get(key) or {})
        if own.get(key, 0) is None:
            continue
        if "model_type" in nested:
            sub = CONFIG_MAPPING[nested.pop("model_type")]
        values[key] = _config(sub, nested, tower=tower or not re.search("text|thinker|talker", key))
    return cls(**values | {k: v for k, v in own.items() if k not in cls.sub_configs or v is None})


def _build(folder: str, model_class: str, seed: int, own: dict[str, Any]) -> PreTrainedModel:
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    cls = getattr(module, model_class)
    # "eager" is the modelling file's own loop, the reading every other implementation is held to
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # what `randomise` leaves alone may be random as well
        model = cls._from_config(_config(cls.config_class, own), dtype=torch.float32, experts_implementation="eager")
    randomise(model, seed)
    return model.eval()


def _ids(model: PreTrainedModel) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    return {"input_ids": torch.randint(FIRST_ID, LAST_ID, (2, 9), generator=g)}


def _canvas(model: PreTrainedModel) -> dict[str, Tensor]:
    """Fix the canvas that a block of diffusion would otherwise start from at random."""
    g = torch.Generator().manual_seed(8)
    return _ids(model) | {"decoder_input_ids": torch.randint(FIRST_ID, LAST_ID, (2, 6), generator=g)}


def _ernie_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Mark some tokens as vision's, which go to experts of their own, narrower than the text's."""
    kinds = torch.zeros(2, 9, dtype=torch.int32)
    kinds[:, 2:6] = 1
    return _ids(model) | {"moe_mm_token_type_ids": kinds}


def _image(model: PreTrainedModel) -> dict[str, Tensor]:
    """Put one image of 4 by 4 patches, four tokens once merged, into each sequence."""
    ids = _ids(model)["input_ids"]
    ids[:, 2:6] = model.config.image_token_id
    pixels = torch.randn(2 * 4 * 4, 3 * 4 * 4, generator=torch.Generator().manual_seed(9))
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}


def _embeddings(model: PreTrainedModel) -> dict[str, Tensor]:
    return {"inputs_embeds": torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(9))}


def _family(
    name: str,
    model_class: str,
    *,
    folder: str | None = None,
    inputs: Callable[[PreTrainedModel], dict[str, Tensor]] = _ids,
    generates: bool = True,
    **own: Any,
) -> Family:
    build = functools.partial(_build, folder or name, model_class, zlib.crc32(name.encode()) % 1000, own)
    return Family(name=name, build=build, inputs=inputs, generates=generates)


def _rope(**own: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10_000.0} | own


_SPARSE = ["dense", "sparse", "sparse"]
_SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
_HYBRID = ["linear_attention", "full_attention", "linear_attention"]
_DOTS3_NOTE = {
    "shared_experts_intermediate_size": 32,
    "sliding_window": 5,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_GEMMA4 = {
    "enable_moe_block": True,
    "global_head_dim": 32,
    "layer_types": _SLIDING,
    "sliding_window": 5,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}
_SWA = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "rel_extent": 16}
_OCR = {"text_config": {"num_key_value_heads": 4, "mlp_layer_types": _SPARSE}}
_INKLING2 = {
    "unpadded_vocab_size": 120,
    "mlp_gate_softcap": 1.5,
    "mlp_up_softcap": 1.5,
    "sliding_window_size": 5,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    **_SWA,
}
_MINIMAX_M3 = {"dense_intermediate_size": 96}
_QWEN4 = {
    "num_hidden_layers": 4,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 1,
    "ple_layer_ids": [2],
    "ple_embed_dim": 64,
    "heads_per_ngram": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "make_ngram_vocab_size_divisible_by": 8,
}

_ALL: list[Family] = [
    _family("afmoe", "AfmoeForCausalLM", sliding_window=5),
    _family("aria", "AriaForConditionalGeneration", vision_config={"model_type": "idefics3_vision"}),
    _family("axk1", "AXK1ForCausalLM"),
    _family("axk2", "AXK2ForCausalLM"),
    _family("bailing_hybrid", "BailingHybridForCausalLM", num_hidden_layers=4, layer_group_size=2),
    _family("beam", "BeamForCausalLM", sliding_window=5, mlp_layer_types=_SPARSE, layer_types=_SLIDING),
    _family("cohere2_moe", "Cohere2MoeForCausalLM", logit_scale=1.0),
    _family("deepseek_ocr2", "DeepseekOcr2ForConditionalGeneration", **_OCR),
    _family("deepseek_v2", "DeepseekV2ForCausalLM"),
    _family("deepseek_v3", "DeepseekV3ForCausalLM", n_routed_experts=12, n_group=4, topk_group=2),
    _family("deepseek_v32", "DeepseekV32ForCausalLM"),
    _family(
        "deepseek_v4",
        "DeepseekV4ForCausalLM",
        mlp_layer_types=["hash_moe", "moe", "moe"],
        num_key_value_heads=1,
        o_groups=2,
        o_lora_rank=16,
        sliding_window=5,
        partial_rotary_factor=0.5,
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    ),
    # encoder and decoder hold the same expert weights, in modules of their own; `generate` returns no token ids alone
    _family(
        "diffusion_gemma",
        "DiffusionGemmaForBlockDiffusion",
        generates=False,
        inputs=_canvas,
        vision_config={"model_type": "gemma4_vision"},
        text_config={"global_head_dim": 16, "sliding_window": 5, "layer_types": _SLIDING},
        canvas_length=6,
    ),
    _family("dots1", "Dots1ForCausalLM"),
    # the vision experts' config is a copy that `set_experts_implementation` does not reach; `from_pretrained` does
    _family(
        "dots3_note",
        "Dots3NoteForConditionalGeneration",
        inputs=_image,
        vision_config={"num_hidden_layers": 2, "pyramid_num_routed": [-1, 4], "mlp_layer_types": None},
        text_config=_DOTS3_NOTE,
    ),
    _family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM"),
    _family(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeForConditionalGeneration",
        inputs=_ernie_inputs,
        text_config={"moe_intermediate_size": [40, 24], "rope_parameters": _rope(mrope_section=[3, 3, 2])},
    ),
    _family("exaone_moe", "ExaoneMoeForCausalLM"),
    _family("flex_olmo", "FlexOlmoForCausalLM", num_experts=7),
    _family("flint", "FlintForCausalLM", mlp_only_layers=[0], layer_types=_SLIDING, sliding_window=5),
    _family("gemma4", "Gemma4ForConditionalGeneration", text_config=_GEMMA4),
    _family("glm4_moe", "Glm4MoeForCausalLM", hidden_size=72, n_routed_experts=9),
    _family("glm4_moe_lite", "Glm4MoeLiteForCausalLM"),
    _family(
        "glm4v_moe",
        "Glm4vMoeForConditionalGeneration",
        text_config={"rope_parameters": _rope(mrope_section=[2, 1, 1], partial_rotary_factor=0.5)},
    ),
    _family(
        "glm5_next",
        "Glm5NextForConditionalGeneration",
        text_config={
            "num_hidden_layers": 4,
            "qk_rope_head_dim": 0,
            "index_kpool": 2,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        },
    ),
    _family("glm_moe_dsa", "GlmMoeDsaForCausalLM"),
    _family(
        "gpt_oss", "GptOssForCausalLM", hidden_size=48, intermediate_size=40, num_local_experts=6, sliding_window=5
    ),
    _family("granitemoe", "GraniteMoeForCausalLM"),
    _family("granitemoe_swa", "GraniteMoeSWAForCausalLM"),
    _family(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    _family("granitemoeshared", "GraniteMoeSharedForCausalLM"),
    _family("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM"),
    _family("hy_v3", "HYV3ForCausalLM"),
    _family("hy_v4", "HYV4ForCausalLM"),
    # the text model: the vision tower of InklingForConditionalGeneration needs scipy
    _family(
        "inkling",
        "InklingForCausalLM",
        mlp_layer_types=_SPARSE,
        logits_mup_width_multiplier=1.0,
        sliding_window_size=5,
        layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"],
        **_SWA,
    ),
    _family(
        "inkling2",
        "Inkling2ForConditionalGeneration",
        text_config=_INKLING2,
    ),
    _family("jamba", "JambaForCausalLM", num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1),
    _family("kimi_linear", "KimiLinearForCausalLM", layer_types=_HYBRID),
    _family("kolibri1", "Kolibri1ForCausalLM"),
    _family("laguna", "LagunaForCausalLM"),
    _family("lfm2_moe", "Lfm2MoeForCausalLM", layer_types=["conv", "full_attention", "conv"]),
    _family("mellum", "MellumForCausalLM"),
    _family("mimo_v2_flash", "MiMoV2FlashForCausalLM"),
    _family("minimax", "MiniMaxForCausalLM", block_size=4, layer_types=_HYBRID),
    _family("minimax_m2", "MiniMaxM2ForCausalLM"),
    _family(
        "minimax_m3_vl",
        "MiniMaxM3SparseForConditionalGeneration",
        projector_hidden_size=48,
        text_config=_MINIMAX_M3,
    ),
    _family("mistral4", "Mistral4ForCausalLM"),
    _family("mistral_large4", "MistralLarge4ForConditionalGeneration", vision_config={"model_type": "pixtral"}),
    _family("mixtral", "MixtralForCausalLM", hidden_size=96, intermediate_size=80, num_local_experts=6, head_dim=24),
    _family(
        "muse_spark",
        "MuseSparkForConditionalGeneration",
        text_config={"moe_hidden_size": 48, "output_multiplier": 1.0, "sliding_window": 5},
        audio_config={"patch_sizes": [4], "hidden_sizes": [16], "depths": [1]},
        out_hidden_size=64,
        projector_hidden_size=48,
    ),
    _family(
        "nemotron_h",
        "NemotronHForCausalLM",
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "moe"],
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=8,
        moe_shared_expert_intermediate_size=32,
    ),
    _family("olmoe", "OlmoeForCausalLM", hidden_size=80, intermediate_size=56, num_experts=12, num_experts_per_tok=4),
    _family("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification", generates=False),
    _family("phimoe", "PhimoeForCausalLM", num_local_experts=5),
    _family("qwen2_moe", "Qwen2MoeForCausalLM", num_experts=10, num_experts_per_tok=3),
    _family("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", text_config={"layer_types": _HYBRID}),
    _family("qwen3_moe", "Qwen3MoeForCausalLM", hidden_size=48, moe_intermediate_size=24),
    _family("qwen3_next", "Qwen3NextForCausalLM", layer_types=_HYBRID),
    _family("qwen3_omni_moe", "Qwen3OmniMoeThinkerForConditionalGeneration", vision_start_token_id=LAST_ID),
    _family("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
    _family(
        "qwen4_exp",
        "Qwen4ExpForConditionalGeneration",
        text_config=_QWEN4,
    ),
    _family("solar_open", "SolarOpenForCausalLM"),
    _family("unlimited_ocr", "UnlimitedOcrForConditionalGeneration", **_OCR),
    _family("zaya", "ZayaForCausalLM", num_experts_per_tok=1, router_hidden_size=32),
]

FAMILIES: dict[str, Family] = {f.name: f for f in _ALL}
VARIANTS: dict[str, Family] = {
    f.name: f
    for f in [
        _family("aria_text", "AriaTextForCausalLM", folder="aria"),
        _family("dots3_note_text", "Dots3NoteForCausalLM", folder="dots3_note", **_DOTS3_NOTE),
        _family("gemma4_text", "Gemma4ForCausalLM", folder="gemma4", **_GEMMA4),
        _family("inkling2_text", "Inkling2ForCausalLM", folder="inkling2", **_INKLING2),
        _family("minimax_m3_vl_text", "MiniMaxM3VLForCausalLM", folder="minimax_m3_vl", **_MINIMAX_M3),
        _family("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", folder="qwen3_5_moe", layer_types=_HYBRID),
        # part of a speech model, with a config that AutoConfig does not know; it takes the thinker's hidden states
        _family(
            "qwen3_omni_moe_talker",
            "Qwen3OmniMoeTalkerForConditionalGeneration",
            folder="qwen3_omni_moe",
            inputs=_embeddings,
            thinker_hidden_size=64,
            text_config={"shared_expert_intermediate_size": 32},
            spatial_merge_size=2,
            generates=False,
            vision_start_token_id=LAST_ID,
        ),
        _family("qwen4_exp_text", "Qwen4ExpForCausalLM", folder="qwen4_exp", **_QWEN4),
    ]
}
UNSERVED: dict[str, str] = {}  # folder -> why none of its classes runs here
