"""Tiles of packed matrices as float16, for matrix units: what `halves` is for single vectors.

The words of a tile are read as they lie, two at a time give pairs of codes, and one multiply-add makes weights of a
pair. A byte's place in its word and a code's in its byte choose a *plane*: neighbouring words of a plane are the
columns that are multiplied at once, and vectors are arranged so (`place`).
"""

import triton
import triton.language as tl

from greenroom.kernels.gpu import bits, halves

CHUNKS = tl.constexpr(8)
"""Of a row, read at once."""
_CODES = """
    .reg .b32 low, high;
    prmt.b32 low, $4, $5, 0x5410;
    prmt.b32 high, $4, $5, 0x7632;
    and.b32 $0, low, $8;
    and.b32 $2, high, $8;
    shr.u32 low, low, 8;
    shr.u32 high, high, 8;
    and.b32 $1, low, $8;
    and.b32 $3, high, $8;
"""
_TOPS = """
    .reg .b32 top, one;
    prmt.b32 top, $9, $10, 0x5410;
    and.b32 one, top, $11;
    or.b32 $0, $0, one;
    shr.u32 one, top, 1;
    and.b32 one, one, $11;
    or.b32 $1, $1, one;
    shr.u32 one, top, 2;
    and.b32 one, one, $11;
    or.b32 $2, $2, one;
    shr.u32 one, top, 3;
    and.b32 one, one, $11;
    or.b32 $3, $3, one;
"""
_SCALED = """
    fma.rn.f16x2 $0, $0, $6, $7;
    fma.rn.f16x2 $1, $1, $6, $7;
    fma.rn.f16x2 $2, $2, $6, $7;
    fma.rn.f16x2 $3, $3, $6, $7;
"""
_WEIGHTS = tl.constexpr("{" + _CODES + _SCALED + "}")
_TAKES = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,r")
_WEIGHTS_3 = tl.constexpr("{" + _CODES + _TOPS + _SCALED + "}")
_TAKES_3 = tl.constexpr(_TAKES.value + ",r,r,r")


@triton.jit
def place(column, BITS: tl.constexpr):
    """Where an arranged vector holds a column: in tiles of CHUNKS chunks, for every byte and lane a plane of words."""
    LANES: tl.constexpr = 1 if BITS == 8 else 4 if BITS == 3 else 8 // BITS
    chunk, word, byte, lane = bits.parts(column, LANES)
    if BITS == 3:
        word = word % 2 * 2 + word // 2  # as `_words` has them
    plane = byte * LANES + lane
    return (chunk // CHUNKS * (4 * LANES) + plane) * (4 * CHUNKS) + chunk % CHUNKS * 4 + word


@triton.jit
def _words(matrix, rows, first, chunks, BITS: tl.constexpr, BN: tl.constexpr):
    """int32 [BN, CHUNKS, 4] words of the chunks from `first` on, and [BN, CHUNKS] twice the high bits that 3 bits
    have."""
    words = matrix.to(tl.pointer_type(tl.int32))
    if BITS == 3:  # 24 bytes a chunk: pairs are what is aligned
        two = tl.arange(0, 2 * CHUNKS)
        there = (first + two // 2 < chunks)[None, :]
        couple = words + (rows * (chunks * 6))[:, None] + ((first + two // 2) * 6 + two % 2)[None, :]
        low = tl.reshape(tl.load(couple, mask=there, other=0), [BN, CHUNKS, 2])
        high = tl.reshape(tl.load(couple + 2, mask=there, other=0), [BN, CHUNKS, 2])
        top_0, top_1 = tl.split(tl.reshape(tl.load(couple + 4, mask=there, other=0), [BN, CHUNKS, 2]))
        found = tl.reshape(tl.join(low, high), [BN, CHUNKS, 4])  # words 0, 2, 1, 3
    else:
        word = first * 4 + tl.arange(0, 4 * CHUNKS)
        here = words + (rows * (chunks * 4))[:, None] + word[None, :]
        found = tl.reshape(tl.load(here, mask=(word < chunks * 4)[None, :], other=0), [BN, CHUNKS, 4])
        top_0 = tl.zeros([BN, CHUNKS], tl.int32)
        top_1 = top_0
    return found, top_0, top_1


@triton.jit
def _made(codes, scale, offset):
    """float16 weights of codes at the places where their masks left them."""
    value = codes.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (value * scale.to(tl.float32) + offset.to(tl.float32)).to(tl.float16)


@triton.jit
def weights(
    words, top_0, top_1, scale, offset, lane: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr
):
    """float16 [BN, CHUNKS, 4] four times: bytes 0 to 3 of a lane; scale · 2^24 and offset float16 [BN, CHUNKS, 1]."""
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    at: tl.constexpr = LOW * lane
    mask: tl.constexpr = (1 << LOW) - 1 << at
    scale = tl.broadcast_to(scale, [BN, CHUNKS, 4])
    offset = tl.broadcast_to(offset, [BN, CHUNKS, 4])
    top = words
    if BITS == 3:  # byte b's bit at at + 2 + b
        word = tl.arange(0, 4)
        shift = 16 * (lane % 2) + 4 * (word % 2 * 2 + word // 2)
        top = ((top_0 if lane < 2 else top_1)[:, :, None] >> shift[None, None, :]) << (at + 2)
    if ASM:
        masks = tl.full([BN, CHUNKS, 4], mask, tl.int16)
        if BITS == 3:
            tops = tl.full([BN, CHUNKS, 4], 4 << at, tl.int16)
            w_0, w_1, w_2, w_3 = tl.inline_asm_elementwise(
                _WEIGHTS_3, _TAKES_3, [words, scale, offset, masks, top, tops],
                (tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
            )  # fmt: skip
        else:
            w_0, w_1, w_2, w_3 = tl.inline_asm_elementwise(
                _WEIGHTS, _TAKES, [words, scale, offset, masks],
                (tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
            )  # fmt: skip
    else:
        c_0, c_1, c_2, c_3 = words & mask, (words >> 8) & mask, (words >> 16) & mask, (words >> 24) & mask
        if BITS == 3:
            c_0, c_1 = c_0 | top & (4 << at), c_1 | (top >> 1) & (4 << at)
            c_2, c_3 = c_2 | (top >> 2) & (4 << at), c_3 | (top >> 3) & (4 << at)
        w_0, w_1 = _made(c_0, scale, offset), _made(c_1, scale, offset)
        w_2, w_3 = _made(c_2, scale, offset), _made(c_3, scale, offset)
    return w_0, w_1, w_2, w_3


@triton.jit
def times(
    matrix, rows,  # pointer to bytes, int32 [BN]
    x, members,  # pointer to an arranged vector each, and whether it is there: [BM]
    scale_codes, zero_codes, row_params, groups, chunks,
    BITS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """float32 [BM, BN]: vectors that were `narrowed` times rows of a matrix of 2 to 8 bits."""
    LANES: tl.constexpr = 1 if BITS == 8 else 4 if BITS == 3 else 8 // BITS
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    pairs = (matrix + row_params).to(tl.pointer_type(tl.int32))
    largest, scale_min, scale_step, zero_min, zero_step = halves.row(pairs, rows)
    of_row = (rows * groups)[:, None]
    k = tl.arange(0, 4 * CHUNKS)[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = tl.minimum(first + tl.arange(0, CHUNKS), chunks - 1)  # what is beyond meets zeros of x
        words, top_0, top_1 = _words(matrix, rows, first, chunks, BITS, BN)
        values = x[:, None] + first * (16 * LANES) + k
        for lane in tl.static_range(LANES):
            scale_code = halves.group_codes(matrix + scale_codes, of_row, of_row, chunk, lane, GROUP, LANES, False, ASM)
            zero_code = halves.group_codes(matrix + zero_codes, of_row, of_row, chunk, lane, GROUP, LANES, False, ASM)
            scale = ((scale_min + scale_step * scale_code) * (1.0 / (1 << LOW * lane))).to(tl.float16)
            zero = zero_min + zero_step * zero_code
            offset = (zero * (scale.to(tl.float32) * (-1.0 / (1 << 24 - LOW * lane)))).to(tl.float16)
            w_0, w_1, w_2, w_3 = weights(
                words, top_0, top_1, scale[:, :, None], offset[:, :, None], lane, BITS, BN, ASM
            )
            for byte in tl.static_range(4):
                weight = w_0 if byte == 0 else w_1 if byte == 1 else w_2 if byte == 2 else w_3
                vectors = tl.load(values + (byte * LANES + lane) * (4 * CHUNKS), mask=members[:, None], other=0.0)
                total = tl.dot(vectors, tl.trans(tl.reshape(weight, [BN, 4 * CHUNKS])), total)
    return total * (largest * halves.UNSCALED)[None, :]
