"""Half-quadratic quantization: the zero point that makes a group's error sparse.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models": min_z phi(W - Q^-1(Q(W))) with
phi the l_p norm, p = 0.7, by alternating, for a fixed scale s (here the inverse: codes per weight),

    W_q = clamp(round(W s + z))      W_r = (W_q - z) / s      x = W - W_r
    W_e = sign(x) relu(|x| - |x|^(p-1) / beta)
    z   = mean over the group of W_q - (W - W_e) s            beta <- 1.01 beta, from 10

Errors are measured in steps of the grid (U = W s + const), not in the weights' own units: in those,
|x|^(p-1) / beta exceeds |x| for every error below 0.17, W_e is 0 throughout, and the norm would play no part.
"""

import math

import torch

from greenroom.quant.scratch import Scratch

BETA = 10.0
BETA_GROWTH = 1.01
ITERATIONS = 20
_POWER = -0.3  # p - 1
# The bits of a float32, read as an integer, are about 2^23 (log2 x + 127 - 0.043): scaling them is a power function.
_POWER_BIAS = (1 - _POWER) * (127 - 0.043) * 2**23


def bound(values: torch.Tensor, beta: float, out: torch.Tensor) -> torch.Tensor:
    """values^-0.3 / beta to within 6 %, for float32 values >= 0 (large but finite at 0); out is alike.

    Several times faster than torch.pow, and every step gives the same bits wherever a value lies in a vector register.
    """
    out.copy_(values.view(torch.int32)).mul_(_POWER).add_(_POWER_BIAS - math.log2(beta) * 2**23)
    return out.view(torch.int32).copy_(out).view(torch.float32)


def solve(units: torch.Tensor, top: int, scratch: Scratch) -> torch.Tensor:
    """Zeros float32 [n] for groups float32 [group_size, n] given in steps of their grid, starting at zero 0.

    Each group stops on its own, once its mean |x| no longer falls, so it does not matter which groups share a call.
    """
    count = units.shape[1]
    found = units.new_zeros(count)
    zero, best = found, torch.full_like(found, torch.inf)
    where = torch.arange(count, device=units.device)  # the groups still moving
    beta = BETA
    for _ in range(ITERATIONS):
        total, clipped = _errors(units, zero, top, beta, scratch)
        better = total < best
        found[where] = torch.where(better, zero, found[where])
        moving = int(better.sum())
        if moving == 0:
            break
        # x - W_e is x clipped, so the mean of W_q - (U - W_e) = z - (x - W_e) is:
        zero, best = zero - clipped / units.shape[0], torch.where(better, total, -1.0)
        beta *= BETA_GROWTH
        if 3 * moving < 2 * units.shape[1]:  # leave behind the groups that stopped
            kept = better.nonzero().squeeze(1)
            units, zero, best, where = units.index_select(1, kept), zero[kept], best[kept], where[kept]
            scratch = Scratch(units.shape[0], moving, units.device)
    return found


def _errors(
    units: torch.Tensor, zero: torch.Tensor, top: int, beta: float, scratch: Scratch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Group sums [n] of |x| and of x - W_e, which is x clipped to +-|x|^(p-1) / beta."""
    x = torch.add(units, zero, out=scratch.second)
    x.sub_(torch.round(x, out=scratch.codes).clamp_(0, top))
    limit = bound(torch.abs(x, out=scratch.first), beta, out=scratch.codes)
    torch.minimum(x, limit, out=x)
    torch.maximum(x, limit.neg_(), out=x)
    return scratch.fold_both()
