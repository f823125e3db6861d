"""The modules behind transformers' experts seam: what their tensors mean, and who computes in their place."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from greenroom.errors import UnsupportedModelError

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
    out = _product(module, weights, "down_proj", expert_inner(module, weights, x))
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    return out


def expert_inner(module: Any, weights: "dict[str, torch.Tensor]", x: torch.Tensor) -> torch.Tensor:
    """What one expert's second product is given: x [n, hidden] → [n, intermediate]; `weights` as above."""
    inner = _product(module, weights, "gate_up_proj" if module.has_gate else "up_proj", x)
    return module._apply_gate(inner) if module.has_gate else module.act_fn(inner)  # type: ignore[no-any-return]


def _product(module: Any, weights: "dict[str, torch.Tensor]", name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weights[name], weights[f"{name}_bias"][0] if module.has_bias else None)
