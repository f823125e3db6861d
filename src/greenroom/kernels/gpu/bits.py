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
def parts(column, LANES: tl.constexpr):
    """Where a column's code lies below 16 bits: chunk, word, byte, lane."""
    SPAN: tl.constexpr = 64 // LANES  # columns of a lane in a block
    lane, within = column % 64 // SPAN, column % SPAN
    return column // 64 * (4 // LANES) + within // 16, within % 16 // 4, within % 4, lane


@triton.jit
def place(column, BITS: tl.constexpr):
    """Where an arranged vector holds a column: in tiles of 32 chunks, a plane of 32 for every word, byte and lane."""
    LANES: tl.constexpr = 1 if BITS >= 8 else 4 if BITS == 3 else 8 // BITS  # codes of a byte
    PARTS: tl.constexpr = 2 if BITS == 16 else 4
    if BITS == 16:
        chunk, word, part, lane = column // 8, column % 8 // 2, column % 2, 0
    else:
        chunk, word, part, lane = parts(column, LANES)
    plane = (word * PARTS + part) * LANES + lane
    return (chunk // TILE * (4 * PARTS * LANES) + plane) * TILE + chunk % TILE


@triton.jit
def four(words, start, first, chunks):
    """Four words of each of a tile's chunks from `first` on, int32 [n, TILE]; rows begin at `start` [n, 1]."""
    word = tl.arange(0, 4 * TILE)
    here = (tl.minimum(first + word // 4, chunks - 1) * 4 + word % 4)[None, :]
    even, odd = tl.split(tl.reshape(tl.load(words + start + here), [start.shape[0], TILE, 2, 2]))
    word_0, word_2 = tl.split(even)
    word_1, word_3 = tl.split(odd)
    return word_0, word_1, word_2, word_3


@triton.jit
def six(words, start, first, chunks):
    """The same of chunks of 24 bytes, of which pairs of words are what is aligned: the last two hold the high bits."""
    two = tl.arange(0, 2 * TILE)
    couple = words + start + (tl.minimum(first + two // 2, chunks - 1) * 6 + two % 2)[None, :]
    word_0, word_1 = tl.split(tl.reshape(tl.load(couple), [start.shape[0], TILE, 2]))
    word_2, word_3 = tl.split(tl.reshape(tl.load(couple + 2), [start.shape[0], TILE, 2]))
    high_0, high_1 = tl.split(tl.reshape(tl.load(couple + 4), [start.shape[0], TILE, 2]))
    return word_0, word_1, word_2, word_3, high_0, high_1


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
