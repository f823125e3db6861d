"""Pairs of token and expert: which slot serves them, and the sum of what they gave."""

import triton
import triton.language as tl


@triton.jit
def lookup(table, index, slots, missing, experts, pairs, BLOCK: tl.constexpr):
    """See `kernels.device.lookup`. One program."""
    pair = tl.arange(0, BLOCK)
    within = pair < pairs
    expert = tl.load(index + pair, mask=within, other=-1)
    known = (expert >= 0) & (expert < experts)
    slot = tl.load(table + expert, mask=known, other=-1)
    absent = known & (slot < 0)
    tl.store(slots + pair, slot, mask=within)
    tl.store(missing + 1 + pair, tl.where(absent, expert, -1).to(tl.int32), mask=within)
    tl.store(missing, tl.sum(absent.to(tl.int32), 0))


@triton.jit
def combine(rows, places, weights, out, width, K: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr):
    """Σ_j weights[t, j] · rows[places[t, j]], j ascending, as float32 [T, width]; −1 adds nothing.

    OWN: each pair has a row of its own, and places only say which are there. Grid: (T, blocks of columns).
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(K):
        place = tl.load(places + token * K + j).to(tl.int64)
        weight = tl.load(weights + token * K + j).to(tl.float32)
        there = place >= 0
        if OWN:
            place = token * K + j
        row = tl.load(rows + place * width + column, mask=column < tl.where(there, width, 0), other=0.0)
        total += tl.where(there, weight * row, 0.0)
    tl.store(out + token * width + column, total, mask=within)
