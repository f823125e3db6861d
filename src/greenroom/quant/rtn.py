"""Round to nearest: a grid from a group's smallest to its largest weight."""

import torch

SMALLEST_SCALE = 2.0**-100
"""Scale of a group of zeros; weights below it round to nothing, far under the smallest bfloat16 a model uses."""


def solve(weights: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero, float32 [n], of groups float32 [group_size, n] for codes 0..top: weight = scale * (code - zero).

    scale = (max - min) / top and zero = -min / scale. The zero is kept within -top..2 top by widening the scale of
    groups that lie far from 0: the zeros of a row share 256 levels, and one near-constant group must not spread them.
    A constant group comes out exact, at one end of its grid.
    """
    low, high = weights.amin(0), weights.amax(0)
    far = torch.maximum(low, -high) / top
    scale = torch.maximum(high / top - low / top, far).clamp_(min=SMALLEST_SCALE)
    return scale, (-low / scale).clamp_(-top, 2 * top)
