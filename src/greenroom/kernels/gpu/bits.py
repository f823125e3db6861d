"""Codes, scales and zeros out of packed bytes: the device's side of quant/bits.py and quant/layout.py.

A row's codes are read in *chunks* of 16 bytes (24 at 3 bits: 16 with the low bits, 8 with the high ones), four words
each. Word w, byte i and lane s of a chunk hold column 16 u + 4 w + i, where u is the chunk's *unit* of that lane: 16
neighbouring columns, which share a scale whatever the group size.
"""

import triton
import triton.language as tl

TILE = tl.constexpr(32)
"""Chunks that a warp reads at once."""


@triton.jit
def unit(chunk, lane: tl.constexpr, LANES: tl.constexpr):
    """The first column of a chunk's unit."""
    share: tl.constexpr = 4 // LANES  # chunks in a block of 64 columns
    return chunk // share * 64 + lane * (64 // LANES) + chunk % share * 16


@triton.jit
def place(column, BITS: tl.constexpr):
    """Where an arranged vector holds a column: in tiles of 32 chunks, a plane of 32 for every word, byte and lane."""
    LANES: tl.constexpr = 1 if BITS >= 8 else 4 if BITS == 3 else 8 // BITS  # codes of a byte
    PARTS: tl.constexpr = 2 if BITS == 16 else 4
    if BITS == 16:
        chunk, word, part, lane = column // 8, column % 8 // 2, column % 2, 0
    else:
        SPAN: tl.constexpr = 64 // LANES  # columns of a lane in a block
        lane, within = column % 64 // SPAN, column % SPAN
        chunk, word, part = column // 64 * (4 // LANES) + within // 16, within % 16 // 4, within % 4
    plane = (word * PARTS + part) * LANES + lane
    return (chunk // TILE * (4 * PARTS * LANES) + plane) * TILE + chunk % TILE


@triton.jit
def half(bits, IS_FLOAT16: tl.constexpr):
    """float32 of raw 16-bit values, in the low half of int32: float16 or bfloat16."""
    if IS_FLOAT16:
        value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = (bits << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit
def row_params(params, rows):
    """scale_min, scale_step, zero_min, zero_step of rows: float32, from bfloat16 [rows, 4] as int32 pairs."""
    scale = tl.load(params + 2 * rows)
    zero = tl.load(params + 2 * rows + 1)
    return half(scale, False), half(scale >> 16, False), half(zero, False), half(zero >> 16, False)
