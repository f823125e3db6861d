"""What greenroom knows of transformers' modelling internals; no other file touches them.

transformers ≥ 5 sends the experts of 64 modelling files through one seam: modules decorated with
`use_experts_implementation` call `fn(module, hidden_states, top_k_index, top_k_weights)`, `fn` being registered by
name in `ALL_EXPERTS_FUNCTIONS`. This file finds those modules, says what their tensors mean, and finds what stays
dense: linears, routers, the output head. Unknown combinations are refused here, before a byte is packed.
"""

import contextlib
import copy
import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import activations
from transformers.integrations import moe
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers import AutoHfQuantizer

from greenroom.errors import CheckpointError, GreenroomError, UnsupportedModelError

IMPLEMENTATION = "greenroom"
"""Name of our function in `ALL_EXPERTS_FUNCTIONS`."""

_SEAM_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")


ServeExperts = Callable[[int, nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, experts module, hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k]) → [T, H]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertParameter:
    """One fused parameter of an experts module, seen for a single expert.

    `rows` × `cols` is (out_features, in_features) for a matrix and 1 × features for a bias; `transposed` says that
    transformers stores the matrix as (in_features, out_features).
    """

    name: str
    rows: int
    cols: int
    is_bias: bool
    transposed: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsModule:
    """A module behind the seam: `name` is its path, e.g. `model.layers.3.mlp.experts`."""

    name: str
    num_experts: int
    parameters: tuple[ExpertParameter, ...]


def _forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Our function behind the seam: hand the call to whoever serves this model's experts."""
    out: torch.Tensor = module.greenroom_serve(
        module.greenroom_layer, module, hidden_states, top_k_index, top_k_weights
    )
    return out


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)


def load_config(folder: Path) -> Any:
    """The transformers config of a local model folder.

    Raises CheckpointError where there is none, UnsupportedModelError for an unknown model type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: give a Hugging Face model folder or a hub id")
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}): fetch the checkpoint again") from error
    if not isinstance(raw, dict) or not raw.get("model_type"):
        raise UnsupportedModelError(f"{path} names no model_type: fetch the checkpoint again")
    if "auto_map" in raw and raw.get("model_type") not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(f"{folder}: {raw.get('model_type')} runs custom code, which greenroom does not")
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # configuration classes validate themselves, each in its own way
        raise UnsupportedModelError(
            f"{path}: transformers {transformers.__version__} cannot read this configuration ({_first_line(error)}): "
            "fetch the checkpoint again, or update transformers"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def model_class(config: Any) -> Any:
    """The class that `config.architectures` names, else the one AutoModelForCausalLM would take."""
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    mapping = transformers.AutoModelForCausalLM._model_mapping
    if type(config) in mapping:
        return mapping[type(config)]
    raise UnsupportedModelError(
        f"no model class for architectures={getattr(config, 'architectures', None)} "
        f"(model_type {config.model_type}) in transformers {transformers.__version__}"
    )


def dequantizer(config: Any, folder: Path) -> Any:
    """transformers' quantizer set to dequantise, for checkpoints that are published in fp8 or mxfp4; else None.

    Raises UnsupportedModelError for other quantised checkpoints.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
    if method not in ("fp8", "mxfp4"):
        raise UnsupportedModelError(
            f"{folder} is already quantised ({method}): greenroom packs 16- and 32-bit, fp8 and mxfp4 checkpoints, "
            "so take another"
        )
    quantizer = AutoHfQuantizer.from_config({**settings, "quant_method": method}, pre_quantized=True)
    quantizer.quantization_config.dequantize = True
    return quantizer


def skeleton(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model on the meta device: every module and shape, no bytes."""
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    try:
        with torch.device("meta"), quiet():
            return model_class(config)._from_config(config, dtype=dtype).eval()
    except GreenroomError:
        raise
    except Exception as error:  # modelling code meets sizes that cannot be, or packages that are not there
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} cannot build a {config.model_type} model from this config.json "
            f"({_first_line(error)}): fetch the checkpoint again, or install what it asks for"
        ) from error


def experts_modules(model: Any, dense_too: bool = False) -> list[ExpertsModule]:
    """All modules behind the seam, in order of the model's layers.

    Raises UnsupportedModelError where there is none, unless `dense_too` allows that, or a module has parameters that
    are not understood.
    """
    found = [
        _describe(name, module)
        for name, module in model.named_modules()
        if all(hasattr(module, flag) for flag in _SEAM_FLAGS)
    ]
    if not found and not dense_too:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no experts behind transformers' experts seam: it is dense, or a family that "
            f"transformers {transformers.__version__} does not route through it; there is nothing to offload"
        )
    return found


_FUNCTIONS: "dict[Any, str]" = {nn.SiLU: "silu", nn.ReLU: "relu", F.silu: "silu", F.relu: "relu"}
"""Activation modules and functions by what they compute."""
for _name, _kind in {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
}.items():
    if hasattr(activations, _name):
        _FUNCTIONS[getattr(activations, _name)] = _kind

_GATES = {
    "gpt_oss.GptOssExperts": "swigluoai_interleaved:{alpha}:{limit}",
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": "swigluoai:{alpha}:{limit}",
    "minimax_m3_vl.MiniMaxM3VLExperts": "swigluoai:{swiglu_alpha}:{swiglu_limit}",
    "deepseek_v4.DeepseekV4Experts": "clamped_silu_and_mul:{limit}",
    "hy_v4.HYV4Experts": "clamped_silu_and_mul:{swiglu_limit}",
    "glm5_next.Glm5NextTextExperts": "clamped_silu_and_mul:{swiglu_limit}",
}
"""Classes with a gate of their own, and the kind it is, from the module's numbers."""


def activation_kind(module: Any) -> str:
    """What an experts module computes between its two products, as `kernels.Activation.kind` names it; "" for what is
    not one of transformers' own functions and gates, and for anything with a hook."""
    act = getattr(module, "act_fn", None)
    if getattr(act, "_forward_hooks", None) or getattr(act, "_forward_pre_hooks", None):
        return ""
    function = _FUNCTIONS.get(type(act) if isinstance(act, nn.Module) else act, "")
    if not module.has_gate:
        return function
    gate = getattr(type(module), "_apply_gate", None)
    if gate is None or "_apply_gate" in vars(module):
        return ""
    if gate is getattr(moe, "_default_apply_gate", None):
        return f"{function}_and_mul" if function and module.is_concatenated else ""
    return _own_gate(module, gate, function)


def _own_gate(module: Any, gate: Any, function: str) -> str:
    family = gate.__module__.removeprefix("transformers.models.").partition(".")[0]
    kind = _GATES.get(f"{family}.{gate.__qualname__.removesuffix('._apply_gate')}", "")
    if not kind or (hasattr(module, "act_fn") and function != "silu"):
        return ""
    numbers = {name: value for name, value in vars(module).items() if isinstance(value, int | float)}
    try:
        return kind.format_map(numbers)
    except KeyError:
        return ""


def _describe(name: str, module: nn.Module) -> ExpertsModule:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    matrices = (first, "down_proj")
    biases = tuple(f"{matrix}_bias" for matrix in matrices) if module.has_bias else ()
    own = dict(module.named_parameters(recurse=False))
    children = {child for child, _ in module.named_children()} - {"act_fn"}
    allowed_children = {"post_expert_norm"} if module.has_post_expert_norm else set()
    if own.keys() != {*matrices, *biases} or any(
        True for child in children - allowed_children if any(True for _ in getattr(module, child).parameters())
    ):
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) has parameters {sorted(own)} and submodules {sorted(children)}, where "
            f"greenroom understands {sorted({*matrices, *biases})}: please report this family"
        )
    if any(own[matrix].ndim != 3 for matrix in matrices):
        raise UnsupportedModelError(f"{name}: expected stacked [experts, out, in] weights")
    parameters = [_matrix(matrix, own[matrix].shape, bool(module.is_transposed)) for matrix in matrices]
    parameters += [
        ExpertParameter(name=bias, rows=1, cols=own[bias].shape[1], is_bias=True, transposed=False) for bias in biases
    ]
    return ExpertsModule(name=name, num_experts=own["down_proj"].shape[0], parameters=tuple(parameters))


def _matrix(name: str, shape: torch.Size, transposed: bool) -> ExpertParameter:
    rows, cols = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
    return ExpertParameter(name=name, rows=rows, cols=cols, is_bias=False, transposed=transposed)


def output_head(model: Any) -> "str | None":
    """Path of the plain linear that makes the logits, or None."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    return str(next(name for name, module in model.named_modules() if module is head))


def plain_embeddings(model: Any) -> "list[str]":
    """Paths of embeddings that only look rows up; those that also scale or sum are left to transformers."""
    return [name for name, module in model.named_modules() if type(module) is nn.Embedding]


def required_weights(model: Any) -> "list[str]":
    """Names that a checkpoint has to provide, or tie to another; transformers initialises the others."""
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return [name for name in model.state_dict() if not any(pattern.search(name) for pattern in optional)]


def packable_linears(model: Any, experts: list[ExpertsModule]) -> list[str]:
    """Paths of the plain linears of the decoder stack that run from packed bits: attention, shared and dense MLPs.

    Left at 16 bits: routers, shared-expert gates and other narrow projections (they decide much and hardly weigh), and
    everything outside the layers that hold experts (of a dense model: outside its decoder layers), such as vision
    towers.
    """
    stacks = {_stack(module.name) for module in experts} or {decoder_layers(model)}
    widths = {_block(module.name): module.num_experts for module in experts}
    names = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{stack}.") for stack in stacks)
        if type(module) is nn.Linear and inside and not _narrow(module) and not _decides(name, module, widths):
            names.append(name)
    return names


def in_attention(path: str) -> bool:
    """Whether a module belongs to attention, by the names that transformers gives it."""
    return any("attn" in part or "attention" in part for part in path.split("."))


def decoder_layers(model: Any) -> str:
    """Path of the list of decoder layers: the one that holds experts, else the one as long as the config says.

    Raises UnsupportedModelError where there is no such list.
    """
    experts = experts_modules(model, dense_too=True)
    if experts:
        return _stack(experts[-1].name)
    count = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0) or 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return str(name)
    raise UnsupportedModelError(f"{type(model).__name__} has no list of {count} decoder layers: please report it")


def _narrow(linear: nn.Linear) -> bool:
    return linear.out_features * 16 <= linear.in_features


def _stack(path: str) -> str:
    """`model.layers` of `model.layers.3.mlp.experts`: the path up to the first index."""
    parts = path.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[:index])


def _block(path: str) -> str:
    return path.rpartition(".")[0]


def stacked_layers(model: Any, experts: "list[str]") -> "list[nn.Module]":
    """All layers of the stacks that hold the modules `experts`."""
    stacks = dict.fromkeys(_stack(name) for name in experts)
    found = [model.get_submodule(path) for path in stacks]
    return [layer for stack in found if isinstance(stack, nn.ModuleList) for layer in stack]


def _decides(name: str, linear: nn.Linear, widths: "dict[str, int]") -> bool:
    """Whether a linear is a router or a gate: inside an MoE block, as wide as its experts or one scalar."""
    for block, num_experts in widths.items():
        if name.startswith(f"{block}."):
            parts = name[len(block) + 1 :].split(".")
            routes = any("router" in part or part == "gate" for part in parts)
            return routes or linear.out_features in (1, num_experts, num_experts + 1)
    return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """A router found beside experts: `weight` [num_experts, hidden]; `bias` [num_experts] is added to its logits,
    `correction` [num_experts] to their sigmoid; None where the family has none."""

    weight: torch.Tensor
    bias: "torch.Tensor | None" = None
    correction: "torch.Tensor | None" = None


def router(model: Any, experts: str, num_experts: int, hidden: int) -> "Gate | None":
    """The gate beside the module `experts`, if it is a plain matrix.

    Found by shape, so that prefetching needs no per-family code; None where that is ambiguous.
    """
    block = model.get_submodule(_block(experts))
    own = experts.rpartition(".")[2] + "."
    beside = {name: value for name, value in tensors(block) if not name.startswith(own)}
    weights = [name for name, value in beside.items() if tuple(value.shape) == (num_experts, hidden)]
    if len(weights) != 1:
        return None
    vectors = {name: value.reshape(-1) for name, value in beside.items() if value.numel() == num_experts}
    corrections = [value for name, value in vectors.items() if name.endswith(("correction_bias", "expert_bias"))]
    return Gate(
        weight=beside[weights[0]],
        bias=vectors.get(weights[0].removesuffix("weight") + "bias"),
        correction=corrections[0] if len(corrections) == 1 else None,
    )


def norm_before(model: Any, experts: str) -> "torch.Tensor | None":
    """The weight [hidden] of the norm whose output the gate beside `experts` reads, where it is a plain RMS norm: found
    by the name that most families share, and by what it computes."""
    layer = model.get_submodule(_block(experts).rpartition(".")[0])
    norm = getattr(layer, "post_attention_layernorm", None)
    weight = getattr(norm, "weight", None)
    if norm is None or not isinstance(weight, torch.Tensor) or weight.ndim != 1:
        return None
    one = torch.linspace(-1.0, 1.0, weight.numel(), device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        made, wanted = norm(one), weight * one / one.square().mean().sqrt()
    return weight if torch.allclose(made, wanted, rtol=0.05, atol=1e-3) else None


def tensors(module: nn.Module) -> "Iterator[tuple[str, torch.Tensor]]":
    """All parameters and buffers by name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def serve_experts(model: Any, experts: "list[ExpertsModule]", layers: "dict[str, int]", serve: ServeExperts) -> None:
    """Send the model's experts through `serve` as layers `layers[module name]`, and drop their (meta) parameters."""
    model.set_experts_implementation(IMPLEMENTATION)
    for spec in experts:
        module = model.get_submodule(spec.name)
        if module.config._experts_implementation != IMPLEMENTATION:  # some modules hold a copy of the config
            module.config._experts_implementation = IMPLEMENTATION
        for parameter in spec.parameters:
            del module._parameters[parameter.name]
        module.greenroom_layer, module.greenroom_serve = layers[spec.name], serve


def expert_output(module: Any, weights: "dict[str, torch.Tensor]", x: torch.Tensor) -> torch.Tensor:
    """One expert by its definition, with the module's own gate: x [n, hidden] → [n, hidden], unweighted.

    `weights`: parameter name → [rows, cols] as `ExpertParameter` has them, in x's dtype.
    """

    def product(name: str, x: torch.Tensor) -> torch.Tensor:
        bias = weights[f"{name}_bias"][0] if module.has_bias else None
        return F.linear(x, weights[name], bias)

    inner = product("gate_up_proj" if module.has_gate else "up_proj", x)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    out = product("down_proj", inner)
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    return out


def materialize(model: Any, values: "dict[str, torch.Tensor]", served: "set[str]") -> None:
    """Give the skeleton its dense weights, and its non-persistent buffers as transformers initialises them.

    `values`: full names to values, used as they are. `served`: names that are replaced later (packed linears, experts,
    tied weights) and stay on the meta device. What is in neither is initialised like transformers does for a key that
    a checkpoint lacks.
    """
    for name, value in values.items():
        assign(model, name, value)
    for name, tensor in list(tensors(model)):
        if name in served:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        elif name not in values and tensor.is_meta:
            assign(model, name, torch.empty_like(tensor, device="cpu"), initialised=False)
    with torch.no_grad(), quiet():
        model.initialize_weights()


def replace(model: Any, path: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule at `path`."""
    parent, _, leaf = path.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = module.eval()


def share(model: Any, name: str, other: str) -> None:
    """Tie the weight `name` to the weight `other`."""
    assign(model, name, tensor(model, other))


def tensor(model: Any, name: str) -> torch.Tensor:
    """The parameter or buffer called `name`."""
    path, _, leaf = name.rpartition(".")
    value: torch.Tensor = getattr(model.get_submodule(path), leaf)
    return value


def assign(model: Any, name: str, value: torch.Tensor, initialised: bool = True) -> None:
    """Give the parameter or buffer called `name` this value."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        value = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        module._parameters[leaf] = value
    else:
        module._buffers[leaf] = value
    value._is_hf_initialized = initialised  # type: ignore[attr-defined]


def load_generation_config(model: Any, folder: Path) -> None:
    """Let the model generate as its authors set it, where they did."""
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)


def dtype_of(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype a dense tensor runs in: `dtype`, or float32 where the family insists on it."""
    if any(pattern in name for pattern in model._get_dtype_plan(dtype)):
        return torch.float32
    return dtype


@contextlib.contextmanager
def quiet() -> "Iterator[None]":
    """Silence transformers' own warnings while greenroom does what they warn about."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
