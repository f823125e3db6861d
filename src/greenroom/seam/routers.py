"""What stands beside experts and decides: a router's matrix, and the norm that it reads."""

import dataclasses
from typing import Any

import torch

from greenroom.seam.weights import tensors


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
    block = model.get_submodule(experts.rpartition(".")[0])
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
    layer = model.get_submodule(experts.rpartition(".")[0].rpartition(".")[0])
    norm = getattr(layer, "post_attention_layernorm", None)
    weight = getattr(norm, "weight", None)
    if norm is None or not isinstance(weight, torch.Tensor) or weight.ndim != 1:
        return None
    one = torch.linspace(-1.0, 1.0, weight.numel(), device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        made, wanted = norm(one), weight * one / one.square().mean().sqrt()
    return weight if torch.allclose(made, wanted, rtol=0.05, atol=1e-3) else None
