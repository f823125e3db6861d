"""Which kernels compute experts over slots: those of `device` where they can, else the definition in `slots`.

The choice depends on the device and on the layer's experts alone.
"""

import warnings
from collections.abc import Sequence
from typing import Protocol

import torch

from greenroom.kernels import device, products, slots
from greenroom.kernels.reference import Activation
from greenroom.packed import RecordTensor


class SlotsKernel(Protocol):
    """Computes experts that lie in an `arena` uint8 [buffers, record_nbytes] on a device. See `slots`."""

    def pairs(
        self,
        x: torch.Tensor,
        arena: torch.Tensor,
        slots: torch.Tensor,
        layout: "Sequence[RecordTensor]",
        activation: Activation,
        out: torch.Tensor,
    ) -> None:
        """Each pair's expert applied to its token, where its slot is not −1."""
        ...

    def prompt(
        self,
        x: torch.Tensor,
        arena: torch.Tensor,
        spans: "Sequence[tuple[int, int, int]]",
        rows: torch.Tensor,
        layout: "Sequence[RecordTensor]",
        activation: Activation,
        out: torch.Tensor,
    ) -> None:
        """The same for many tokens, of the experts in `spans`."""
        ...

    def combine(
        self, out: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, own: bool = False
    ) -> torch.Tensor:
        """The weighted sum of pairs."""
        ...


def choose(place: torch.device) -> SlotsKernel:
    """The kernels for a device. Warns where a GPU has to do with the definition, which is many times slower."""
    if place.type == "cpu":
        return slots
    if reason := device.unusable(place):
        warnings.warn(f"experts on the GPU are computed by torch, slowly: {reason}", RuntimeWarning, stacklevel=2)
        return slots
    return Compiled()


def describe(place: torch.device) -> str:
    """The same, for people."""
    return "reference (torch) over slots" if place.type == "cpu" else device.describe(place)


class Compiled:
    """`device`'s kernels, but for experts that they decline."""

    def pairs(
        self,
        x: torch.Tensor,
        arena: torch.Tensor,
        places: torch.Tensor,
        layout: "Sequence[RecordTensor]",
        activation: Activation,
        out: torch.Tensor,
    ) -> None:
        """See `slots.pairs`."""
        if device.declines(layout, activation):
            slots.pairs(x, arena, places, layout, activation, out)
        else:
            device.pairs(x, arena, places, layout, activation.kind, out)

    def prompt(
        self,
        x: torch.Tensor,
        arena: torch.Tensor,
        spans: "Sequence[tuple[int, int, int]]",
        rows: torch.Tensor,
        layout: "Sequence[RecordTensor]",
        activation: Activation,
        out: torch.Tensor,
    ) -> None:
        """See `slots.prompt`."""
        if device.declines(layout, activation):
            slots.prompt(x, arena, spans, rows, layout, activation, out)
            return
        ours = [device.Span(*span) for span in spans if device.multiplies(span[2], x.device)]
        if ours:
            device.prompt(x, arena, ours, rows, layout, activation.kind, out)
        theirs = [span for span in spans if not device.multiplies(span[2], x.device)]
        products.prompt(x, arena, theirs, rows, layout, activation, out)

    def combine(
        self, out: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, own: bool = False
    ) -> torch.Tensor:
        """See `slots.combine`."""
        return device.combine(out, places, weights, own)
