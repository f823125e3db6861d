"""What is dense in a model: the head, embeddings, the linears of its decoder layers."""

import re
from typing import Any

from torch import nn

from greenroom.errors import UnsupportedModelError
from greenroom.seam.experts import ExpertsModule, experts_modules


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
    widths = {module.name.rpartition(".")[0]: module.num_experts for module in experts}
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


def stacked_layers(model: Any, experts: "list[str]") -> "list[nn.Module]":
    """All layers of the stacks that hold the modules `experts`."""
    stacks = dict.fromkeys(_stack(name) for name in experts)
    found = [model.get_submodule(path) for path in stacks]
    return [layer for stack in found if isinstance(stack, nn.ModuleList) for layer in stack]


def owner(model: Any, layers: "list[nn.Module]") -> Any:
    """The module that passes hidden states through exactly these layers, or None."""
    for module in model.modules():
        if any(isinstance(child, nn.ModuleList) and list(child) == layers for child in module.children()):
            return module
    return None


def _stack(path: str) -> str:
    """`model.layers` of `model.layers.3.mlp.experts`: the path up to the first index."""
    parts = path.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[:index])


def _narrow(linear: nn.Linear) -> bool:
    return linear.out_features * 16 <= linear.in_features


def _decides(name: str, linear: nn.Linear, widths: "dict[str, int]") -> bool:
    """Whether a linear is a router or a gate: inside an MoE block, as wide as its experts or one scalar."""
    for block, num_experts in widths.items():
        if name.startswith(f"{block}."):
            parts = name[len(block) + 1 :].split(".")
            routes = any("router" in part or part == "gate" for part in parts)
            return routes or linear.out_features in (1, num_experts, num_experts + 1)
    return False
