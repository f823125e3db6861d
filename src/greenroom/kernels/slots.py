"""The definition of what `device` computes over slots, in torch, wherever its tensors are: experts one after another by
`reference`. Serves where the compiled kernels for a device do not; signatures are theirs, with the whole activation.
"""

from collections.abc import Sequence

import torch

from greenroom.kernels import reference
from greenroom.kernels.reference import Activation, ExpertTask
from greenroom.packed import RecordTensor


def pairs(
    x: torch.Tensor,
    arena: torch.Tensor,
    slots: torch.Tensor,
    layout: "Sequence[RecordTensor]",
    activation: Activation,
    out: torch.Tensor,
) -> None:
    """out float32 [T, k, H]: out[t, j] becomes slot slots[t, j]'s expert applied to x[t]; −1 leaves it as it is."""
    for (token, place), slot in _entries(slots):
        if slot >= 0:
            task = ExpertTask(arena[slot], torch.tensor([token], device=x.device))
            out[token, place] = reference.experts(x, [task], layout, activation)[0][0].to(out.dtype)


def prompt(
    x: torch.Tensor,
    arena: torch.Tensor,
    spans: "Sequence[tuple[int, int, int]]",
    rows: torch.Tensor,
    layout: "Sequence[RecordTensor]",
    activation: Activation,
    out: torch.Tensor,
) -> None:
    """out float32 [P, H]: out[p] becomes expert(x[rows[p]]) for the pairs p of `spans`: (slot, start, count)."""
    for slot, start, count in spans:
        task = ExpertTask(arena[slot], rows[start : start + count].long())
        out[start : start + count] = reference.experts(x, [task], layout, activation)[0].to(out.dtype)


def combine(out: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, own: bool = False) -> torch.Tensor:
    """float32 [T, H]: Σ_j weights[t, j] · out[places[t, j]], j ascending; −1 adds nothing.

    own: out [T · k, H] is as `pairs` left it, a row for each pair, and `places` only says which to add: its slots do.
    """
    if own:
        places = torch.where(places >= 0, torch.arange(places.numel(), device=places.device).view(places.shape), -1)
    total = out.new_zeros((places.shape[0], out.shape[1]))
    for j in range(places.shape[1]):
        place = places[:, j].long()
        weighted = out[place.clamp_min(0)] * weights[:, j, None].to(out.dtype)
        total += torch.where(place[:, None] >= 0, weighted, 0.0)
    return total


def _entries(slots: torch.Tensor) -> "list[tuple[tuple[int, int], int]]":
    return [((t, j), slot) for t, row in enumerate(slots.tolist()) for j, slot in enumerate(row)]
