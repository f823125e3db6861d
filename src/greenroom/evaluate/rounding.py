"""Weights as a packed model would hold them: rounded to the formats of its manifest and back, without packing.

Covers: a transform for `Original`, and linears that hold several roundings at once, so that one pass through the layers
computes models that differ in their attention alone. Sizes come from the same manifest, so figures and bytes belong
together.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from greenroom import seam
from greenroom.checkpoint import Checkpoint
from greenroom.expert_records import balanced
from greenroom.packed import LinearEntry, Manifest
from greenroom.quant import Format, dequantize, quantize


def rounded(weight: torch.Tensor, format: Format) -> torch.Tensor:
    """The matrix `weight` [rows, cols] packed and unpacked, float32."""
    return dequantize(quantize(weight.contiguous(), format), weight.shape[0], weight.shape[1], format)


class Rounding:
    """An `original.Transform` that gives every weight what `manifest` says, but leaves the linears `except_for` be."""

    def __init__(self, manifest: Manifest, except_for: "set[str]") -> None:
        self._formats = {
            f"{linear.module}.weight": linear.format for linear in manifest.linears if linear.module not in except_for
        }
        self._experts = {
            (entry.module, tensor.name): tensor.format for entry in manifest.experts for tensor in entry.tensors
        }
        self._plain = {entry.name: getattr(torch, entry.dtype) for entry in manifest.tensors}

    def __call__(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The value to compute with."""
        format = self._formats.get(name) or self._expert_format(name)
        if format is not None:
            return rounded(value, format)
        return value.to(self._plain.get(name, value.dtype))

    def of_expert(
        self, checkpoint: Checkpoint, module: seam.ExpertsModule, expert: int, weights: "dict[str, torch.Tensor]"
    ) -> "dict[str, torch.Tensor]":
        """An `original.ExpertTransform`: what packing does to an expert before it rounds."""
        return balanced(checkpoint, module, weights, self._experts[module.name, "down_proj"])

    def _expert_format(self, name: str) -> "Format | None":
        path, _, parameter = name.rpartition(".")
        return self._experts.get((path.rpartition(".")[0], parameter))


class SharesLinear(nn.Module):
    """A linear rounded in several ways: equal shares of the batch, in order, are multiplied with one of them each."""

    def __init__(self, linear: nn.Linear, ways: "Sequence[Callable[[torch.Tensor], torch.Tensor]]") -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.ways = linear.weight, linear.bias, tuple(ways)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, ..., in_features] → [B, ..., out_features], where B is a multiple of the number of ways."""
        shares = x.chunk(len(self.ways))
        products = [F.linear(share, way(self.weight), self.bias) for share, way in zip(shares, self.ways, strict=True)]
        return torch.cat(products)


def differing(manifests: "Sequence[Manifest]") -> "dict[str, list[Format]]":
    """Path → formats, one per manifest, of the linears that are not the same in all of them."""
    columns: list[tuple[LinearEntry, ...]] = list(zip(*(one.linears for one in manifests), strict=True))
    return {
        column[0].module: [entry.format for entry in column]
        for column in columns
        if len({entry.format for entry in column}) > 1
    }
