"""A skeleton's parameters, buffers and submodules, by name."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from greenroom.seam.architecture import quiet


def tensors(module: nn.Module) -> "Iterator[tuple[str, torch.Tensor]]":
    """All parameters and buffers by name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


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


def share(model: Any, name: str, other: str) -> None:
    """Tie the weight `name` to the weight `other`."""
    assign(model, name, tensor(model, other))


def replace(model: Any, path: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule at `path`."""
    parent, _, leaf = path.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = module.eval()


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


def dtype_of(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype a dense tensor runs in: `dtype`, or float32 where the family insists on it."""
    if any(pattern in name for pattern in model._get_dtype_plan(dtype)):
        return torch.float32
    return dtype
