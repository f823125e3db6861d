"""Rows of packed matrices times single vectors: what decoding one token asks.

Memory is the floor, and at 2 to 4 bits a multiprocessor has four to six instructions a weight to reach it. So a code
costs a part of a shift, one mask that also makes it a float (`one`), and a multiply-add: per unit of columns,
Σ x (1 + code / 2^n) and Σ x give Σ x (code − zero), and scales apply to sums. With n ≤ 9 that loses less than 2^-15 of
a code. A program is one warp that reads a few rows at once: nothing waits for another warp, and a vector's activations,
arranged as the warp reads them (`bits.place`), serve all of its rows.
"""

import triton
import triton.language as tl

from greenroom.kernels.gpu import bits, gates, halves, tiles


@triton.jit
def weight(shifted, high, one, bit: tl.constexpr, lane: tl.constexpr, BITS: tl.constexpr):
    """1 + code / 2^n of a lane of words that `times` has shifted; bit: where `high` holds the top of a 3-bit code."""
    if BITS == 3:
        raised = (high << (16 + 2 * lane - bit)) if bit < 16 + 2 * lane else (high >> (bit - 16 - 2 * lane))
        low = (
            shifted & (3 << (14 + 2 * lane)) ^ one
        )  # not |, which compilers would sort so that a mask costs its own operation
        made = raised & (4 << (14 + 2 * lane)) | low
    else:
        made = shifted & ((1 << BITS) - 1 << (15 + BITS * lane)) | one
    return made.to(tl.float32, bitcast=True)


@triton.jit
def scaled(
    sums, inputs, matrix, of_row, scale_codes, zero_codes, scale_min, scale_step, zero_min, zero_step, chunk,
    lane: tl.constexpr, LANES: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Σ x · weight [ROWS, CHUNKS] of a lane from Σ x (1 + code / 2^n) and Σ x."""
    n: tl.constexpr = 23 - (14 + 2 * lane if BITS == 3 else 15 + BITS * lane)
    group = of_row + (bits.unit(chunk, 0 if GROUP >= 64 else lane, LANES) // GROUP)[None, :]
    scale = scale_min + scale_step * tl.load(matrix + scale_codes + group).to(tl.float32)
    zero = zero_min + zero_step * tl.load(matrix + zero_codes + group).to(tl.float32)
    return scale * (2**n * (sums - inputs) - zero * inputs)


@triton.jit
def times(
    matrix,  # pointer to bytes: one packed matrix
    rows,  # int32 [ROWS]
    x,  # pointer to float32: one arranged vector
    scale_codes, zero_codes, row_params,  # offsets in bytes of the matrix' parts
    groups, chunks,
    one,  # 1.0 as bits
    BITS: tl.constexpr, GROUP: tl.constexpr, IS_FLOAT16: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS]: rows of the matrix times x."""
    LANES: tl.constexpr = 1 if BITS >= 8 else 4 if BITS == 3 else 8 // BITS
    PARTS: tl.constexpr = 2 if BITS == 16 else 4  # values of a lane in a word
    WORDS: tl.constexpr = 6 if BITS == 3 else 4
    FIRST: tl.constexpr = 14 if BITS == 3 else 15
    words = matrix.to(tl.pointer_type(tl.int32))
    start_of_row = (rows * (chunks * WORDS))[:, None]
    total = tl.zeros([ROWS, bits.TILE], tl.float32)
    if BITS != 16:
        pairs = (matrix + row_params).to(tl.pointer_type(tl.int32))
        scale_min, scale_step, zero_min, zero_step = bits.row_params(pairs, rows)
        scale_min, scale_step, zero_min, zero_step = (
            scale_min[:, None], scale_step[:, None], zero_min[:, None], zero_step[:, None]
        )  # fmt: skip
        of_row = (rows * groups)[:, None]
    for first in range(0, chunks, bits.TILE):
        chunk = tl.minimum(first + tl.arange(0, bits.TILE), chunks - 1)  # what is beyond meets zeros of x
        if BITS == 3:
            word_0, word_1, word_2, word_3, high_0, high_1 = bits.six(words, start_of_row, first, chunks)
        else:
            word_0, word_1, word_2, word_3 = bits.four(words, start_of_row, first, chunks)
            high_0, high_1 = word_0, word_0
        sum_0 = tl.zeros([ROWS, bits.TILE], tl.float32)
        sum_1, sum_2, sum_3 = sum_0, sum_0, sum_0
        in_0 = tl.zeros([1, bits.TILE], tl.float32)
        in_1, in_2, in_3 = in_0, in_0, in_0
        values = x + first * (4 * PARTS * LANES) + tl.arange(0, bits.TILE)[None, :]
        for w in tl.static_range(4):
            word = word_0 if w == 0 else word_1 if w == 1 else word_2 if w == 2 else word_3
            for part in tl.static_range(PARTS):
                plane = (w * PARTS + part) * LANES
                if BITS == 16:
                    value = tl.load(values + plane * bits.TILE)
                    sum_0 += bits.half(word >> (16 * part), IS_FLOAT16) * value
                else:
                    shifted = (word >> (8 * part - FIRST)) if 8 * part > FIRST else (word << (FIRST - 8 * part))
                    value = tl.load(values + plane * bits.TILE)
                    sum_0 += weight(shifted, high_0, one, 4 * w + part, 0, BITS) * value
                    in_0 += value
                    if LANES > 1:
                        value = tl.load(values + (plane + 1) * bits.TILE)
                        sum_1 += weight(shifted, high_0, one, 16 + 4 * w + part, 1, BITS) * value
                        in_1 += value
                    if LANES > 2:
                        value = tl.load(values + (plane + 2) * bits.TILE)
                        sum_2 += weight(shifted, high_1, one, 4 * w + part, 2, BITS) * value
                        in_2 += value
                        value = tl.load(values + (plane + 3) * bits.TILE)
                        sum_3 += weight(shifted, high_1, one, 16 + 4 * w + part, 3, BITS) * value
                        in_3 += value
        if BITS == 16:
            total += sum_0
        else:
            for lane in tl.static_range(LANES):
                sums = sum_0 if lane == 0 else sum_1 if lane == 1 else sum_2 if lane == 2 else sum_3
                inputs = in_0 if lane == 0 else in_1 if lane == 1 else in_2 if lane == 2 else in_3
                total += scaled(
                    sums, inputs, matrix, of_row, scale_codes, zero_codes, scale_min, scale_step, zero_min, zero_step,
                    chunk, lane, LANES, BITS, GROUP,
                )  # fmt: skip
    return tl.sum(total, 1)


@triton.jit
def arranged(vector, column, y, BITS: tl.constexpr):
    """Where an arranged vector holds a column, and what of it, in the vector's dtype: see `halves` for float16."""
    if vector.dtype.element_ty == tl.float16:
        place = halves.place(column, BITS)
        y = halves.narrowed(y)
    else:
        place = bits.place(column, BITS)
    return vector + place, y


@triton.jit
def arrange(x, out, cols, width, BITS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """Vectors x [n, cols] as out [n, width], as `products` here or (TILES) of `matrix` reads them; 0 elsewhere.

    Grid: (n, blocks of columns).
    """
    vector = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + vector * cols + column, mask=column < cols, other=0.0).to(tl.float32)
    if TILES:
        place, value = out + vector * width + tiles.place(column, BITS), halves.narrowed(value)
    else:
        place, value = arranged(out + vector * width, column, value, BITS)
    tl.store(place, value, mask=column < width)


@triton.jit
def products(
    x,  # [n, width], arranged: float32, or pairs of float16 as int32 [n, width / 2] for `halves`
    arena,  # uint8, records of record_nbytes
    slots,  # int32 [pairs], or None where there is one record alone
    out,  # [pairs, out_width]: arranged for OUT_BITS, in float32 or float16, or as it is where that is 0
    record_nbytes, offset, bias,  # in bytes: of a record, and within it of the matrix and of its bias
    per_vector,  # pairs that share a vector, one after another
    width, out_width,
    matrix_rows, outputs,
    scale_codes, zero_codes, row_params, groups, chunks, one,
    BITS: tl.constexpr, GROUP: tl.constexpr, IS_FLOAT16: tl.constexpr, ROWS: tl.constexpr,
    HALVES: tl.constexpr, ASM: tl.constexpr,
    BIAS: tl.constexpr, BIAS_IS_FLOAT16: tl.constexpr, OUT_BITS: tl.constexpr,
    FORM: tl.constexpr, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, PLUS: tl.constexpr,
):  # fmt: skip
    """Each pair's matrix times its vector, and what comes after. Grid: (pairs, tiles of ROWS rows)."""
    pair = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + pair).to(tl.int64) if slots is not None else 0
    if slot < 0:
        return
    record = arena + slot * record_nbytes
    COUNT: tl.constexpr = ROWS if FORM == "alone" else ROWS // 2
    tile = tl.arange(0, ROWS) + tl.program_id(1) * ROWS
    if FORM == "halves":  # gate and up of an output are neighbours here
        tile = tile // 2 + tile % 2 * outputs
    rows = tl.minimum(tile, matrix_rows - 1)
    if HALVES:
        even, odd = tl.split(tl.reshape(rows, [ROWS // 2, 2]))
        y_even, y_odd = halves.times(
            record + offset, even, odd, x + pair // per_vector * (width // 2), scale_codes, zero_codes, row_params,
            groups, chunks, BITS, GROUP, ROWS // 2, ASM,
        )  # fmt: skip
        y = tl.reshape(tl.join(y_even, y_odd), [ROWS])
    else:
        y = times(
            record + offset, rows, x + pair // per_vector * width, scale_codes, zero_codes, row_params,
            groups, chunks, one, BITS, GROUP, IS_FLOAT16, ROWS,
        )  # fmt: skip
    if BIAS:
        y += bits.half(tl.load((record + bias).to(tl.pointer_type(tl.int16)) + rows).to(tl.int32), BIAS_IS_FLOAT16)
    if FORM == "alone":
        y = gates.apply(y, FUNCTION, ALPHA)
    else:
        gate, up = tl.split(tl.reshape(y, [COUNT, 2]))
        y = gates.gated(gate, up, FUNCTION, ALPHA, LIMIT, PLUS)
    column = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    here = out + pair * out_width
    if OUT_BITS == 0:
        tl.store(here + column, y, mask=column < outputs)
    else:
        place, y = arranged(here, column, y, OUT_BITS)
        tl.store(place, y, mask=column < outputs)
        if tl.program_id(1) == tl.num_programs(1) - 1:
            for start in range(outputs, out_width, 128):
                padding = start + tl.arange(0, 128)
                beyond, zero = arranged(here, padding, tl.zeros([128], tl.float32), OUT_BITS)
                tl.store(beyond, zero, mask=padding < out_width)
