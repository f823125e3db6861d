"""The original checkpoint as a transformers model whose weights are read when they are needed.

A decoder layer's dense weights are read when its forward is called and dropped after it; experts go through the seam
and are read one at a time; what lies outside the layers is read on first use. So the model never has to fit in memory,
and whatever a family does between its layers is its own code. Arithmetic is float32 by transformers' own functions,
with no kernel of greenroom.
"""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from greenroom import seam
from greenroom.checkpoint import Checkpoint
from greenroom.errors import UnsupportedModelError
from greenroom.original.head import Head
from greenroom.threads import kept_from_torch, lent_to_torch

_EXPERT_ROWS = 2048
"""Tokens that go through an expert at a time: bounds its activations."""
_HEAD_ROWS = 8192
"""Rows of a large stored matrix that are held in float32 at a time."""

Transform = Callable[[str, torch.Tensor], torch.Tensor]
"""(name of a weight, its value as read) → the value to compute with. An expert's weights are called
`<experts module>.<expert>.<parameter>` and come as [out_features, in_features], biases as [1, features]; all others
have the model's own names and shapes."""
ExpertTransform = Callable[[Checkpoint, seam.ExpertsModule, int, "dict[str, torch.Tensor]"], "dict[str, torch.Tensor]"]
"""(checkpoint, module, expert, its parameters as `Checkpoint.expert` gives them) → those that `Transform` then sees."""

OnExperts = Callable[[seam.ExpertsModule, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(the module whose weights they have, hidden states float32 [T, hidden], top_k_index [T, k], top_k_weights [T, k])"""


class StoredEmbedding(nn.Module):
    """An embedding that keeps its rows as they are stored and gives float32."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.weight = embedding.padding_idx, embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [..., embedding_dim] of `ids`."""
        return F.embedding(ids, self.weight).float()


class StoredLinear(nn.Module):
    """A linear that keeps its weight as it is stored and multiplies in float32, some rows at a time."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] → [..., out_features]."""
        out = x.new_empty(*x.shape[:-1], self.out_features)
        for start in range(0, self.out_features, _HEAD_ROWS):
            rows = slice(start, start + _HEAD_ROWS)
            out[..., rows] = F.linear(x, self.weight[rows].float())
        return out if self.bias is None else out + self.bias.float()


class Original:
    """A checkpoint folder, dense or with experts, that runs in bounded memory. Use it as a context manager.

    `model` is the transformers model; calling `model.base_model` streams the weights once. `transform`, where given,
    sees every weight that is read, `of_expert` an expert's before. Raises CheckpointError or UnsupportedModelError
    where the folder does not hold a whole model.
    """

    def __init__(
        self, folder: Path, transform: "Transform | None" = None, of_expert: "ExpertTransform | None" = None
    ) -> None:
        self.checkpoint = Checkpoint(folder, dense_too=True)
        self.model: Any = seam.skeleton(self.checkpoint.config)
        if self.model.base_model is self.model:
            raise UnsupportedModelError(f"{type(self.model).__name__} has no part without its head: please report it")
        self.on_layer: Callable[[], None] = lambda: None
        """called after each decoder layer"""
        self.on_experts: Callable[[seam.ExpertsModule, torch.Tensor, torch.Tensor, torch.Tensor], None] = lambda *_: (
            None
        )
        """called before a layer's experts compute"""
        self._transform, self._of_expert = transform, of_expert
        self._groups = {name: group for group in self.checkpoint.dense_groups() for name in group.shapes}
        self._names = [*self._groups, *(name for name in self.checkpoint.tied if self._source(name) in self._groups)]
        self._serve_experts()
        self._keep_as_stored()
        self._meta = {name: seam.tensor(self.model, name) for name in self._names}
        self._read_when_called()

    def __enter__(self) -> "Original":
        return self

    def __exit__(self, *exception: object) -> None:
        self.checkpoint.shards.close()

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return len(self._stack)

    @property
    def layer_nbytes(self) -> int:
        """Bytes that weights take at most while a layer runs: its dense part in float32, and one expert."""
        dense = max(4 * sum(self._numel(name) for name in self._inside(index)) for index in range(self.layers))
        experts = [4 * sum(p.rows * p.cols for p in module.parameters) for module in self.checkpoint.experts]
        largest_read = max((group.nbytes for group in self._groups.values()), default=0)
        return dense + 2 * max(experts, default=0) + largest_read

    @property
    def outer_nbytes(self) -> int:
        """Bytes as stored of what lies outside the decoder layers: embeddings, norms, the head."""
        inside = {
            id(self._groups[name]) for i in range(self.layers) for name in self._inside(i) if name in self._groups
        }
        groups = {id(group): group.nbytes for group in self._groups.values() if id(group) not in inside}
        return sum(groups.values())

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """What the head sees, float32 [B, T, hidden], of token `ids` [B, T]: every layer's weights are read once."""
        with torch.no_grad(), lent_to_torch():
            out = self.model.base_model(input_ids=ids, use_cache=False)
        self._output = type(out)
        states: torch.Tensor = out.last_hidden_state
        return states

    @property
    def head(self) -> Head:
        """What makes logits of `states`, once there are any; reads its weights on first use."""
        return Head(self.model, self._output)

    def drop_outer(self) -> None:
        """Forget what lies outside the layers; it is read again when it is needed."""
        inside = {name for index in range(self.layers) for name in self._inside(index)}
        self._drop(name for name in self._names if name not in inside)

    def _serve_experts(self) -> None:
        model, checkpoint = self.model, self.checkpoint
        modules = seam.experts_modules(model, dense_too=True)
        self.stack_name = seam.decoder_layers(model)
        """path of the list of decoder layers"""
        self._stack = model.get_submodule(self.stack_name)
        self._experts = {module.name: module for module in checkpoint.experts}
        owners = [checkpoint.tied.get(f"{module.name}.down_proj", "").rpartition(".")[0] for module in modules]
        self._owners = [owner or module.name for owner, module in zip(owners, modules, strict=True)]
        served = {f"{module.name}.{parameter.name}" for module in modules for parameter in module.parameters}
        seam.materialize(model, {}, {*self._names, *served})
        if modules:
            layers = {module.name: number for number, module in enumerate(modules)}
            seam.serve_experts(model, modules, layers, self._serve)

    def _keep_as_stored(self) -> None:
        """Large matrices outside the layers stay in the dtype of the file."""
        for name in seam.plain_embeddings(self.model):
            seam.replace(self.model, name, StoredEmbedding(self.model.get_submodule(name)))
        head = seam.output_head(self.model)
        if head is not None:
            seam.replace(self.model, head, StoredLinear(self.model.get_submodule(head)))

    def _read_when_called(self) -> None:
        for index, layer in enumerate(self._stack):
            layer.forward = functools.partial(self._run_layer, self._inside(index), layer.forward)
        inside = {name for index in range(self.layers) for name in self._inside(index)}
        owned: dict[str, list[str]] = {}
        for name in self._names:
            if name not in inside:
                owned.setdefault(name.rpartition(".")[0], []).append(name)
        for path, names in owned.items():
            module = self.model.get_submodule(path)
            module.register_forward_pre_hook(lambda *_, names=names: self._read(names))

    def _run_layer(self, names: "list[str]", forward: Any, *args: Any, **others: Any) -> Any:
        self._read(names)
        try:
            out = forward(*args, **others)
        finally:
            self._drop(names)
        self.on_layer()
        return out

    def _inside(self, index: int) -> "list[str]":
        return [name for name in self._names if name.startswith(f"{self.stack_name}.{index}.")]

    def _source(self, name: str) -> str:
        return self.checkpoint.tied.get(name, name)

    def _numel(self, name: str) -> int:
        return int(self._meta[name].numel())

    def _read(self, names: "list[str]") -> None:
        """Give the model those of the weights `names` that it does not have."""
        wanted: dict[int, list[str]] = {}
        for name in names:
            if seam.tensor(self.model, name).is_meta:
                wanted.setdefault(self._groups[self._source(name)].number, []).append(name)
        for same in wanted.values():
            values = self.checkpoint.dense(self._groups[self._source(same[0])])
            for name in same:
                seam.assign(self.model, name, self._value(name, values[self._source(name)]))

    def _value(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if self._transform is not None:
            value = self._transform(name, value)
        stored = isinstance(self.model.get_submodule(name.rpartition(".")[0]), StoredEmbedding | StoredLinear)
        return value.float() if value.is_floating_point() and not stored else value

    def _drop(self, names: "Iterable[str]") -> None:
        for name in names:
            seam.assign(self.model, name, self._meta[name])

    def _serve(
        self, layer: int, module: Any, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """A `seam.ServeExperts` that reads each expert, computes with it and forgets it, in ascending order."""
        spec = self._experts[self._owners[layer]]
        self.on_experts(spec, x, top_k_index, top_k_weights)
        out = torch.zeros_like(x)
        for expert in range(spec.num_experts):
            rows, places = torch.where(top_k_index == expert)
            if not len(rows):
                continue
            weights = self._expert(spec, expert)
            for some, place in zip(torch.split(rows, _EXPERT_ROWS), torch.split(places, _EXPERT_ROWS), strict=True):
                output = seam.expert_output(module, weights, x[some]) * top_k_weights[some, place, None]
                with kept_from_torch():  # its threads take longer to start than to add
                    out.index_add_(0, some, output.to(out.dtype))
            del weights, output  # before the next one's are read
        return out

    def _expert(self, spec: seam.ExpertsModule, expert: int) -> "dict[str, torch.Tensor]":
        """One expert's parameters in float32, [out_features, in_features], biases [1, features]."""
        tensors = self.checkpoint.expert(spec, expert)
        if self._of_expert is not None:
            tensors = self._of_expert(self.checkpoint, spec, expert, tensors)
        if self._transform is not None:
            tensors = {name: self._transform(f"{spec.name}.{expert}.{name}", value) for name, value in tensors.items()}
        return {name: value.float() for name, value in tensors.items()}
