"""A transformers model whose dense linears run from packed bits and whose experts are served from outside.

Builds the model's skeleton, gives it the packed model's dense weights and leaves its experts to a function
`serve(layer, module, hidden_states, top_k_index, top_k_weights)`. Does not know where experts come from.
"""

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from greenroom import kernels, seam
from greenroom.errors import ConfigError, PackedModelError
from greenroom.packed import LinearEntry, PackedModel, TensorEntry
from greenroom.prefetch import Router
from greenroom.quant import dequantize


class PackedLinear(nn.Module):
    """A linear that multiplies from its packed bits: x [..., in_features] → [..., out_features]."""

    packed: torch.Tensor
    bias: "nn.Parameter | None"

    def __init__(
        self, packed: torch.Tensor, entry: LinearEntry, dtype: torch.dtype, bias: "nn.Parameter | None"
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = entry.cols, entry.rows
        self.format, self._dtype = entry.format, dtype
        self.register_buffer("packed", packed, persistent=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weight [out_features, in_features]: for modelling code that reads it instead of calling."""
        return dequantize(self.packed, self.out_features, self.in_features, self.format, self._dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x @ weight.T + bias."""
        flat = x.reshape(-1, self.in_features)
        out = kernels.linear(flat, self.packed, self.out_features, self.in_features, self.format, self.bias)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format.name}"


class MappedEmbedding(nn.Module):
    """An embedding whose 16-bit rows stay in the packed file, mapped in RAM: a token touches one row of it."""

    weight: torch.Tensor

    def __init__(self, packed: PackedModel, entry: TensorEntry, dtype: torch.dtype, padding_idx: "int | None") -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = entry.shape
        self.padding_idx, self._dtype = padding_idx, dtype
        self.register_buffer("weight", _map(packed, entry), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [..., embedding_dim] of `ids`, in the model's dtype."""
        return F.embedding(ids.cpu(), self.weight).to(self._dtype).to(ids.device)

    def _apply(self, fn: Any, recurse: bool = True) -> "MappedEmbedding":
        """Stay where the file is mapped when the model moves to a device."""
        return self


def _map(packed: PackedModel, entry: TensorEntry) -> torch.Tensor:
    with (packed.folder / entry.file).open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    mapping.madvise(mmap.MADV_RANDOM)  # no readahead: one row a token is wanted
    dtype = getattr(torch, entry.dtype)
    count = entry.nbytes // dtype.itemsize
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=entry.offset).view(entry.shape)


def build(packed: PackedModel, config: Any, dtype: torch.dtype, serve: seam.ServeExperts) -> Any:
    """The model of `packed` and its transformers `config`, in `dtype`, its experts served by `serve`.

    Raises PackedModelError where the packed model and transformers' modelling code do not fit together.
    """
    manifest = packed.manifest
    model = seam.skeleton(config, dtype)
    _check_complete(model, packed)
    experts = seam.experts_modules(model)
    layers = _layers_of(packed, experts)
    embeddings = {entry.name: entry for entry in manifest.tensors if entry.mappable}
    tensors = {
        entry.name: _cast(packed.read_tensor(entry), seam.dtype_of(model, entry.name, dtype))
        for entry in manifest.tensors
        if entry.name not in embeddings
    }
    served = {f"{entry.module}.weight" for entry in manifest.linears} | embeddings.keys() | manifest.tied.keys()
    served |= {f"{module.name}.{parameter.name}" for module in experts for parameter in module.parameters}
    seam.materialize(model, tensors, served)
    replaced: dict[str, nn.Module] = {}
    for name, entry in embeddings.items():
        path = name.removesuffix(".weight")
        packed.check_tensor(entry)
        padding_idx = model.get_submodule(path).padding_idx
        replaced[path] = MappedEmbedding(packed, entry, dtype, padding_idx)
    packed_linears = packed.read_linears()
    for linear in manifest.linears:
        bias = model.get_submodule(linear.module)._parameters.get("bias")
        replaced[linear.module] = PackedLinear(packed_linears[linear.module], linear, dtype, bias)
    for name, other in manifest.tied.items():
        if other in tensors:
            seam.share(model, name, other)
        elif (owner := other.rpartition(".")[0]) in replaced:
            replaced[name.rpartition(".")[0]] = replaced[owner]
    for path, module in replaced.items():
        seam.replace(model, path, module)
    seam.serve_experts(model, experts, layers, serve)
    _check_nothing_is_left(model, packed)
    return model


def keep_from_copies(model: Any, folder: Path) -> None:
    """Refuse what would write or copy a model without its experts, which are not in its memory."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise ConfigError(f"a packed model is a folder already: copy {folder}, or load it once more")

    for name in ("save_pretrained", "push_to_hub", "__deepcopy__", "__reduce_ex__"):
        setattr(model, name, refuse)


def keep_in_place(model: Any, dtype: torch.dtype, place: torch.device) -> None:
    """Refuse what would cast a model or move it (`half`, `to`, …), which its packed weights would not follow; what asks
    for the `dtype` and `place` that it has does nothing, also to what is kept in another dtype."""

    def unchanged(fn: "Callable[[torch.Tensor], torch.Tensor]", recurse: bool = True) -> Any:
        one = torch.empty(0, dtype=dtype, device=place)
        try:
            other = fn(one)
            same = (other.dtype, other.device) == (one.dtype, one.device)
        except (RuntimeError, AssertionError):  # a device that this torch does not have
            same = False
        if not same:
            raise ConfigError(
                f"a packed model stays {str(dtype).removeprefix('torch.')} on {place.type}: load it with dtype= for "
                "other activations, with vram= for a GPU"
            )
        return model

    model._apply = unchanged


def routers(model: Any, packed: PackedModel) -> "list[Router | None]":
    """Each MoE layer's gate, for guessing; None where it is not a plain matrix."""
    found: list[Router | None] = []
    for entry in packed.manifest.experts:
        gate = seam.router(model, entry.module, entry.num_experts, entry.tensors[0].cols)
        norm = seam.norm_before(model, entry.module)
        found.append(None if gate is None else Router(gate.weight, gate.bias, gate.correction, norm))
    return found


def _layers_of(packed: PackedModel, experts: "list[seam.ExpertsModule]") -> "dict[str, int]":
    """Module name → index of its entry in the manifest; modules that share weights share the entry."""
    index = {entry.module: number for number, entry in enumerate(packed.manifest.experts)}
    layers = {}
    for module in experts:
        owner = packed.manifest.tied.get(f"{module.name}.down_proj", f"{module.name}.down_proj").rpartition(".")[0]
        entry = packed.manifest.experts[index[owner]] if owner in index else None
        shapes = None if entry is None else [(t.name, t.rows, t.cols) for t in entry.tensors]
        wanted = [(parameter.name, parameter.rows, parameter.cols) for parameter in module.parameters]
        if entry is None or entry.num_experts != module.num_experts or shapes != wanted:
            raise PackedModelError(
                f"{packed.folder}: the packed experts do not fit {module.name} of this transformers' "
                f"{type(module).__name__}: delete the packed folder and pack again"
            )
        layers[module.name] = index[owner]
    return layers


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _check_complete(model: Any, packed: PackedModel) -> None:
    """Every weight that transformers' model wants is packed, and nothing else: its names change between versions."""
    manifest = packed.manifest
    packed_names = {entry.name for entry in manifest.tensors} | manifest.tied.keys()
    packed_names |= {f"{entry.module}.weight" for entry in manifest.linears}
    packed_names |= {f"{entry.module}.{tensor.name}" for entry in manifest.experts for tensor in entry.tensors}
    wrong = sorted(set(seam.required_weights(model)) - packed_names) + sorted(packed_names - model.state_dict().keys())
    if wrong:
        raise PackedModelError(
            f"{packed.folder} and this transformers' {type(model).__name__} disagree on {wrong[0]}: delete the packed "
            "folder and pack again"
        )


def _check_nothing_is_left(model: Any, packed: PackedModel) -> None:
    left = [name for name, tensor in seam.tensors(model) if tensor.is_meta]
    if left:
        raise PackedModelError(
            f"{packed.folder} holds no weight for {left[0]}: delete the packed folder and pack again"
        )
