"""A Mixtral checkpoint's weights with more experts than it has, behind other routers, in either engine's formats.

As `greenroom.demo` makes a model of experts from a dense one: an expert is one of the checkpoint's, in turn, plus
Gaussian noise relative to each of its three matrices; a router is random. All else is the checkpoint's. Nothing of it
is written anywhere: experts are made when asked for, the same each time.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import gguf
import numpy as np
import torch

from benchmarks.weights import layer_of
from greenroom.checkpoint import Checkpoint
from greenroom.expert_records import balanced
from greenroom.packed import ExpertsEntry
from greenroom.quant import Format, quantize, quantize_into
from greenroom.threads import in_order

NOISE = 0.02
"""Standard deviation, relative to that of the matrix: the demo's own."""
ROUTER_GAIN = 4.0
"""Standard deviation of a router's logits."""
_MATRICES = ("gate", "up", "down")

T = TypeVar("T")


class Upcycled:
    """The weights of the checkpoint in `folder` with `experts` in each layer, of so much relative `noise`."""

    def __init__(self, folder: Path, experts: int, noise: float) -> None:
        self._checkpoint = Checkpoint(folder)
        self._experts, self._noise = experts, noise
        self._groups = {name: group for group in self._checkpoint.dense_groups() for name in group.shapes}
        paths = ["lm_head", *(name.removesuffix(".weight") for name in self._groups)]
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(self._checkpoint.experts))
        self._names = {f"{known.get_name(path)}.weight": f"{path}.weight" for path in paths}
        # the experts of a layer are made of the same few matrices
        self._layer = functools.lru_cache(maxsize=1)(self._read_layer)

    def records(self, entry: ExpertsEntry) -> "Iterator[torch.Tensor]":
        """Experts rounded as `greenroom pack` does."""
        layer = layer_of(entry.module)
        self._layer(layer)  # read by one thread
        return self._of_all(functools.partial(self._record, entry, layer))

    def linear(self, path: str, rows: int, cols: int, format: Format) -> torch.Tensor:
        """The checkpoint's, rounded; the embedding's weights where the head is tied to it."""
        return quantize(self._dense(f"{path}.weight"), format)

    def plain(self, name: str, size: "tuple[int, ...]") -> torch.Tensor:
        """The checkpoint's, but for routers."""
        return self._dense(name).to(torch.bfloat16).contiguous()

    def ggml(self, name: str, size: "tuple[int, ...]", kind: gguf.GGMLQuantizationType) -> "Iterator[np.ndarray]":
        """The same, rounded by the gguf package; query and key in llama.cpp's order of rows."""
        if "_exps" not in name:
            return iter([gguf.quantize(self._in_llamas_order(self._names[name]).numpy(), kind)])
        layer, matrix = layer_of(name), name.removesuffix("_exps.weight").rpartition("_")[2]
        self._layer(layer)  # read by one thread
        return self._of_all(lambda expert: gguf.quantize(self._matrix(layer, expert, matrix).numpy(), kind))

    def _of_all(self, make: "Callable[[int], T]") -> "Iterator[T]":
        """What `make` makes of each expert, one on each core."""
        return in_order(make, range(self._experts), len(os.sched_getaffinity(0)))

    def _record(self, entry: ExpertsEntry, layer: int, expert: int) -> torch.Tensor:
        gate, up, down = (self._matrix(layer, expert, name) for name in _MATRICES)
        weights = {"gate_up_proj": torch.cat((gate, up)), "down_proj": down}
        weights = balanced(self._checkpoint, self._checkpoint.experts[layer], weights, entry.tensors[0].format)
        record = torch.zeros(entry.record_nbytes, dtype=torch.uint8)
        for tensor in entry.tensors:
            quantize_into(weights[tensor.name], tensor.format, tensor.part(record))
        return record

    def _matrix(self, layer: int, expert: int, name: str) -> torch.Tensor:
        """One of an expert's `_MATRICES`, float32."""
        source = self._layer(layer)
        weight = source[expert % len(source)][name]
        number = (layer * self._experts + expert) * len(_MATRICES) + _MATRICES.index(name)
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
        return noise.mul_(self._noise * weight.std()).add_(weight)

    def _read_layer(self, layer: int) -> "list[dict[str, torch.Tensor]]":
        """The checkpoint's own experts: matrix → float32."""
        module, found = self._checkpoint.experts[layer], []
        for expert in range(module.num_experts):
            own = self._checkpoint.expert(module, expert)
            gate, up = own["gate_up_proj"].float().chunk(2)
            found.append({"gate": gate, "up": up, "down": own["down_proj"].float()})
        return found

    def _dense(self, name: str) -> torch.Tensor:
        """What is no expert's, by transformers' name."""
        name = self._checkpoint.tied.get(name, name)
        if name.endswith(".gate.weight"):
            generator = torch.Generator().manual_seed(layer_of(name))
            hidden = self._groups[name].shapes[name][1]
            return torch.randn(self._experts, hidden, generator=generator) * (ROUTER_GAIN / math.sqrt(hidden))
        return self._checkpoint.dense(self._groups[name])[name]

    def _in_llamas_order(self, name: str) -> torch.Tensor:
        """A dense tensor, float32. llama.cpp rotates rows (0, 1), (2, 3), … of a head, transformers i and i + half."""
        weight, config = self._dense(name).to(torch.bfloat16).float(), self._checkpoint.config
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = heads.get(name.split(".")[-2])
        if count is None:
            return weight
        return weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
