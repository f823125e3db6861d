"""Rows of packed matrices times single vectors on matrix units: what decoding one token asks of a GPU that has them.

Two codes lie in the halves of a word where one mask leaves them, as float16 so small that they have no leading one:
code · 2^(at − 24), exact. One multiply-add makes two weights of them, scale · (code − zero) as float16, where the scale
is relative to the row's largest: so nothing depends on how large weights are. Matrix units then multiply in float16
and sum in float32.

`mma.m16n8k16` wants rows and columns spread over a warp. Here each thread keeps what it has read, four columns of two
rows, and hands in its own four activations: in the result, sums of four threads over their own columns lie on the
diagonals, and what else is there is left alone. An eighth of the matrix units' work is of use; memory stays the floor.
"""

import triton
import triton.language as tl

from greenroom.kernels.gpu import bits

ACTIVATION = tl.constexpr(0.0625)
"""Activations are multiplied by it before they are float16, which then reaches to 10^6."""
UNSCALED = tl.constexpr(16.0 * (1 << 9))
"""What takes that back, and the scales' own factor, 2^(15 − 24)."""
LARGEST = tl.constexpr(65504.0)
"""of a float16"""
_STEP = tl.constexpr("""{
    .reg .b32 a0, a1, a2, a3;
    fma.rn.f16x2 a0, $4, $8, $9;
    fma.rn.f16x2 a1, $6, $10, $11;
    fma.rn.f16x2 a2, $5, $8, $9;
    fma.rn.f16x2 a3, $7, $10, $11;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
        {$0, $1, $2, $3}, {a0, a1, a2, a3}, {$12, $13}, {$14, $15, $16, $17};
}""")
_STEP_TAKES = tl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,f,f,f,f")
_DIAGONAL = tl.constexpr("""{
    .reg .b32 lane, part;
    .reg .pred mine, second;
    mov.u32 lane, %laneid;
    shr.u32 part, lane, 3;
    and.b32 lane, lane, 7;
    setp.ge.u32 second, lane, 4;
    and.b32 lane, lane, 3;
    setp.eq.u32 mine, part, lane;
    selp.f32 $0, $3, $2, second;
    selp.f32 $1, $5, $4, second;
    selp.f32 $0, $0, 0f00000000, mine;
    selp.f32 $1, $1, 0f00000000, mine;
}""")
_DIAGONAL_TAKES = tl.constexpr("=&f,=&f,f,f,f,f")


@triton.jit
def narrowed(x):
    """float16 of what multiplies packed weights here; what is no number stays so."""
    x = tl.clamp(x * ACTIVATION, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return x.to(tl.float16)


@triton.jit
def place(column, BITS: tl.constexpr):
    """Where an arranged vector of float16 holds a column: in tiles of 32 chunks, for every word, lane and odd or even
    byte a plane of 32 pairs."""
    LANES: tl.constexpr = 1 if BITS == 8 else 4 if BITS == 3 else 8 // BITS
    chunk, word, byte, lane = bits.parts(column, LANES)
    plane = (word * LANES + lane) * 2 + byte % 2
    return ((chunk // bits.TILE * (8 * LANES) + plane) * bits.TILE + chunk % bits.TILE) * 2 + byte // 2


@triton.jit
def both(value, ASM: tl.constexpr):
    """int32: float16 of a float32 in both halves."""
    if ASM:
        made = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $1, $1;", "=r,f", [value], tl.int32, True, 1)
    else:
        half = value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        made = half | half << 16
    return made


@triton.jit
def _low(word):
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _products(codes, scale, offset, x):
    """float32: both halves' weights, rounded, times both of x."""
    first = (_low(codes) * _low(scale) + _low(offset)).to(tl.float16).to(tl.float32) * _low(x)
    codes, scale, offset, x = codes >> 16, scale >> 16, offset >> 16, x >> 16
    return first + (_low(codes) * _low(scale) + _low(offset)).to(tl.float16).to(tl.float32) * _low(x)


@triton.jit
def step(
    even_0, even_1, odd_0, odd_1, even_scale, even_offset, odd_scale, odd_offset, x_0, x_1,
    c_0, c_1, c_2, c_3, ASM: tl.constexpr,
):  # fmt: skip
    """Sums c after four columns of two rows: codes, scales, offsets and activations are pairs of float16."""
    if ASM:
        c_0, c_1, c_2, c_3 = tl.inline_asm_elementwise(
            _STEP, _STEP_TAKES,
            [even_0, even_1, odd_0, odd_1, even_scale, even_offset, odd_scale, odd_offset, x_0, x_1,
             c_0, c_1, c_2, c_3],
            (tl.float32, tl.float32, tl.float32, tl.float32), True, 1,
        )  # fmt: skip
    else:
        c_0 += _products(even_0, even_scale, even_offset, x_0) + _products(even_1, even_scale, even_offset, x_1)
        c_2 += _products(odd_0, odd_scale, odd_offset, x_0) + _products(odd_1, odd_scale, odd_offset, x_1)
    return c_0, c_1, c_2, c_3


@triton.jit
def _sums(c_0, c_1, c_2, c_3, ASM: tl.constexpr):
    """What `step` has summed, a row's in the threads that hold it."""
    if ASM:
        c_0, c_2 = tl.inline_asm_elementwise(
            _DIAGONAL, _DIAGONAL_TAKES, [c_0, c_1, c_2, c_3], (tl.float32, tl.float32), True, 1
        )
    return tl.sum(c_0, 1), tl.sum(c_2, 1)


@triton.jit
def _spread(high, lane: tl.constexpr):
    """A lane's high bits: those of bytes 0 and 1 of word w at 4 w, those of bytes 2 and 3 at 16 + 4 w."""
    if lane % 2 == 0:
        made = high & 0x3333 | high << 14 & 0x33330000
    else:
        made = high >> 16 & 0x3333 | high >> 2 & 0x33330000
    return made


@triton.jit
def _codes(word, spread, w: tl.constexpr, byte: tl.constexpr, lane: tl.constexpr, BITS: tl.constexpr):
    """Codes of bytes `byte` and `byte` + 2 of a lane, as float16 without a leading one: code · 2^(at − 24)."""
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    at: tl.constexpr = LOW * lane
    made = (word >> 8 * byte) & (((1 << LOW) - 1) * 65537 << at)
    if BITS == 3:
        here: tl.constexpr = 4 * w + byte
        raised = spread << (at + 2 - here) if at + 2 > here else spread >> (here - at - 2)
        made |= raised & (65537 << at + 2)
    return made


@triton.jit
def row(pairs, rows):
    """Of each row: its largest scale; [n, 1] scale_min and scale_step as shares of it · 2^15, zero_min, zero_step."""
    scale_min, scale_step, zero_min, zero_step = bits.row_params(pairs, rows)
    largest = tl.maximum(tl.abs(scale_min), tl.abs(scale_min + 255.0 * scale_step))
    share = 32768.0 / tl.where(largest > 1e-30, largest, 1.0)  # less is nothing, and its inverse would be no number
    return largest, (scale_min * share)[:, None], (scale_step * share)[:, None], zero_min[:, None], zero_step[:, None]


@triton.jit
def _loaded(pointers, BYTE: tl.constexpr, ASM: tl.constexpr):
    """int32 of constant memory, a byte or a word each. A load of Triton's own would choose which thread gets which, and
    these belong where the words are."""
    if ASM:
        code: tl.constexpr = "ld.global.nc.u8 $0, [$1];" if BYTE else "ld.global.nc.b32 $0, [$1];"
        found = tl.inline_asm_elementwise(code, "=r,l", [pointers.to(tl.int64)], tl.int32, True, 1)
    else:
        found = tl.load(pointers if BYTE else pointers.to(tl.pointer_type(tl.int32))).to(tl.int32)
    return found


@triton.jit
def _quads(codes, of_row, chunk, QUADS: tl.constexpr, ASM: tl.constexpr):
    """Where a chunk has four groups, their codes lie in one word; elsewhere this is not used."""
    if QUADS:
        found = _loaded(codes + of_row + (chunk * 4)[None, :], False, ASM)
    else:
        found = of_row
    return found


@triton.jit
def group_codes(
    codes, of_row, quads, chunk,
    lane: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, QUADS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """float32 [n, chunks]: what the groups of a lane have there; QUADS: it lies in `quads`."""
    if QUADS:
        found = quads >> 8 * lane & 255
    else:
        group = bits.unit(chunk, 0 if GROUP >= 64 else lane, LANES) // GROUP  # the same load for all lanes of a group
        found = _loaded(codes + of_row + group[None, :], True, ASM)
    return found.to(tl.float32)


@triton.jit
def _factors(
    scales, zeros, of_row, scale_quads, zero_quads, scale_min, scale_step, zero_min, zero_step, chunk,
    lane: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, QUADS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Scale · 2^(24 − at) and −scale · zero of a lane's groups, pairs of float16; scale_min and scale_step are those of
    `row`."""
    at: tl.constexpr = (2 if BITS == 3 else BITS) * lane
    scale = scale_min + scale_step * group_codes(scales, of_row, scale_quads, chunk, lane, GROUP, LANES, QUADS, ASM)
    zero = zero_min + zero_step * group_codes(zeros, of_row, zero_quads, chunk, lane, GROUP, LANES, QUADS, ASM)
    if BITS >= 4:
        scale = scale.to(tl.float16).to(tl.float32)  # so that what it loses is lost of code − zero, not of large codes
    return both(scale * (1.0 / (1 << at)), ASM), both(zero * (scale * (-1.0 / (1 << 24))), ASM)


@triton.jit
def times(
    matrix,  # pointer to bytes: one packed matrix, 2 to 8 bits
    even, odd,  # int32 [HALF]: rows
    x,  # pointer to int32: one arranged vector, pairs of float16
    scale_codes, zero_codes, row_params,  # offsets in bytes of the matrix' parts
    groups, chunks,
    BITS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """float32 [HALF] twice: even and odd rows of the matrix times what was `narrowed` to x."""
    LANES: tl.constexpr = 1 if BITS == 8 else 4 if BITS == 3 else 8 // BITS
    WORDS: tl.constexpr = 6 if BITS == 3 else 4
    QUADS: tl.constexpr = GROUP == 16 and LANES == 4
    words = matrix.to(tl.pointer_type(tl.int32))
    scales, zeros = matrix + scale_codes, matrix + zero_codes
    pairs = (matrix + row_params).to(tl.pointer_type(tl.int32))
    even_largest, even_min, even_step, even_zero, even_zero_step = row(pairs, even)
    odd_largest, odd_min, odd_step, odd_zero, odd_zero_step = row(pairs, odd)
    even_start, odd_start = (even * (chunks * WORDS))[:, None], (odd * (chunks * WORDS))[:, None]
    even_groups, odd_groups = (even * groups)[:, None], (odd * groups)[:, None]
    c_0 = tl.zeros([HALF, bits.TILE], tl.float32)
    c_1, c_2, c_3 = c_0, c_0, c_0
    for first in range(0, chunks, bits.TILE):
        chunk = tl.minimum(first + tl.arange(0, bits.TILE), chunks - 1)  # what is beyond meets zeros of x
        if BITS == 3:
            even_w0, even_w1, even_w2, even_w3, even_h0, even_h1 = bits.six(words, even_start, first, chunks)
            odd_w0, odd_w1, odd_w2, odd_w3, odd_h0, odd_h1 = bits.six(words, odd_start, first, chunks)
        else:
            even_w0, even_w1, even_w2, even_w3 = bits.four(words, even_start, first, chunks)
            odd_w0, odd_w1, odd_w2, odd_w3 = bits.four(words, odd_start, first, chunks)
            even_h0, even_h1, odd_h0, odd_h1 = even_w0, even_w0, odd_w0, odd_w0
        even_scales = _quads(scales, even_groups, chunk, QUADS, ASM)
        even_zeros = _quads(zeros, even_groups, chunk, QUADS, ASM)
        odd_scales = _quads(scales, odd_groups, chunk, QUADS, ASM)
        odd_zeros = _quads(zeros, odd_groups, chunk, QUADS, ASM)
        values = x + first * (8 * LANES) + tl.arange(0, bits.TILE)[None, :]
        for lane in tl.static_range(LANES):
            even_scale, even_offset = _factors(
                scales, zeros, even_groups, even_scales, even_zeros, even_min, even_step, even_zero, even_zero_step,
                chunk, lane, BITS, GROUP, LANES, QUADS, ASM,
            )  # fmt: skip
            odd_scale, odd_offset = _factors(
                scales, zeros, odd_groups, odd_scales, odd_zeros, odd_min, odd_step, odd_zero, odd_zero_step,
                chunk, lane, BITS, GROUP, LANES, QUADS, ASM,
            )  # fmt: skip
            even_high, odd_high = even_h0, odd_h0
            if BITS == 3:
                even_high = _spread(even_h0 if lane < 2 else even_h1, lane)
                odd_high = _spread(odd_h0 if lane < 2 else odd_h1, lane)
            for w in tl.static_range(4):
                even_word = even_w0 if w == 0 else even_w1 if w == 1 else even_w2 if w == 2 else even_w3
                odd_word = odd_w0 if w == 0 else odd_w1 if w == 1 else odd_w2 if w == 2 else odd_w3
                plane = (w * LANES + lane) * 2
                c_0, c_1, c_2, c_3 = step(
                    _codes(even_word, even_high, w, 0, lane, BITS), _codes(even_word, even_high, w, 1, lane, BITS),
                    _codes(odd_word, odd_high, w, 0, lane, BITS), _codes(odd_word, odd_high, w, 1, lane, BITS),
                    even_scale, even_offset, odd_scale, odd_offset,
                    tl.load(values + plane * bits.TILE), tl.load(values + (plane + 1) * bits.TILE),
                    c_0, c_1, c_2, c_3, ASM,
                )  # fmt: skip
    even_sum, odd_sum = _sums(c_0, c_1, c_2, c_3, ASM)
    return even_sum * (even_largest * UNSCALED), odd_sum * (odd_largest * UNSCALED)
