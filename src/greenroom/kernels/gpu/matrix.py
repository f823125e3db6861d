"""Rows of packed matrices times several vectors: prompts, and decoding a few tokens at once.

A tile of weights is read once, dequantised once and multiplied on the matrix units with all the vectors that use its
expert: up to BM of them. Weights and vectors are rounded to the activations' dtype as the reference does; sums are
float32.
"""

import triton
import triton.language as tl

from greenroom.kernels.gpu import bits, gates, halves, tiles


@triton.jit
def weights(
    matrix, rows, first, scale_codes, zero_codes, scale_min, scale_step, zero_min, zero_step, groups, chunks,
    lane: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """float32 [BN, 16 · UNITS]: a lane of the chunks from `first` on; rows int32 [BN], row parameters [BN, 1]."""
    LANES: tl.constexpr = 1 if BITS == 8 else 4 if BITS == 3 else 8 // BITS
    CHUNK: tl.constexpr = 24 if BITS == 3 else 16
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    chunk = first + tl.arange(0, UNITS)
    there = (chunk < chunks)[None, :]
    column = tl.arange(0, 16)[None, None, :]
    start = rows[:, None] * (chunks * CHUNK) + (chunk * CHUNK)[None, :]
    codes = tl.load(matrix + start[:, :, None] + column, mask=there[:, :, None], other=0).to(tl.int32)
    codes = codes >> (LOW * lane) & ((1 << LOW) - 1)
    if BITS == 3:
        high = tl.load(matrix + start[:, :, None] + 16 + 2 * lane + column // 8, mask=there[:, :, None], other=0)
        codes |= (high.to(tl.int32) >> column % 8 & 1) << 2
    group = rows[:, None] * groups + (bits.unit(chunk, lane, LANES) // GROUP)[None, :]
    scale = scale_min + scale_step * tl.load(matrix + scale_codes + group, mask=there, other=0).to(tl.float32)
    zero = zero_min + zero_step * tl.load(matrix + zero_codes + group, mask=there, other=0).to(tl.float32)
    made = codes.to(tl.float32) * scale[:, :, None] - (zero * scale)[:, :, None]
    return tl.reshape(made, [BN, UNITS * 16])


@triton.jit
def times(
    matrix, rows,  # pointer to bytes, int32 [BN]
    x, members,  # pointer to a vector of cols each, and whether it is there: [BM]
    cols, scale_codes, zero_codes, row_params, groups, chunks,
    BITS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """float32 [BM, BN]: vectors times rows of the matrix."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    LANES: tl.constexpr = 1 if BITS == 8 else 4 if BITS == 3 else 8 // BITS
    total = tl.zeros([BM, BN], tl.float32)
    pairs = (matrix + row_params).to(tl.pointer_type(tl.int32))
    scale_min, scale_step, zero_min, zero_step = bits.row_params(pairs, rows)
    lane_column = tl.arange(0, 16 * UNITS)
    for first in range(0, chunks, UNITS):
        for lane in tl.static_range(LANES):
            column = bits.unit(first + lane_column // 16, lane, LANES) + lane_column % 16
            vectors = tl.load(x[:, None] + column[None, :], mask=members[:, None] & (column < cols)[None, :], other=0.0)
            weight = weights(
                matrix, rows, first, scale_codes, zero_codes,
                scale_min[:, None], scale_step[:, None], zero_min[:, None], zero_step[:, None], groups, chunks,
                lane, BITS, GROUP, BN, UNITS,
            )  # fmt: skip
            total = tl.dot(vectors, tl.trans(weight.to(DTYPE)), total, input_precision="ieee")
    return total


@triton.jit
def times_raw(
    matrix, rows, x, members, cols,
    IS_FLOAT16: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As `times`, of 16-bit values."""
    values = matrix.to(tl.pointer_type(tl.int16)) + rows.to(tl.int64)[:, None] * cols
    total = tl.zeros([BM, BN], tl.float32)
    for first in range(0, cols, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        within = (column < cols)[None, :]
        vectors = tl.load(x[:, None] + column[None, :], mask=members[:, None] & within, other=0.0)
        raw = tl.load(values + column[None, :], mask=within, other=0).to(tl.int32)
        weight = bits.half(raw, IS_FLOAT16).to(x.dtype.element_ty)
        total = tl.dot(vectors, tl.trans(weight), total, input_precision="ieee")
    return total


@triton.jit
def dequantised(
    matrix, out,  # pointer to bytes; [.., cols] from row `start` on
    start, matrix_rows, cols, scale_codes, zero_codes, row_params, groups, chunks,
    BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Rows of a matrix below 16 bits as out's dtype. Grid: (tiles of BN rows, tiles of UNITS chunks)."""
    LANES: tl.constexpr = 1 if BITS == 8 else 4 if BITS == 3 else 8 // BITS
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(start + row, matrix_rows - 1)
    first = tl.program_id(1) * UNITS
    pairs = (matrix + row_params).to(tl.pointer_type(tl.int32))
    scale_min, scale_step, zero_min, zero_step = bits.row_params(pairs, rows)
    lane_column = tl.arange(0, 16 * UNITS)
    within = (start + row < matrix_rows)[:, None]
    for lane in tl.static_range(LANES):
        column = bits.unit(first + lane_column // 16, lane, LANES) + lane_column % 16
        weight = weights(
            matrix, rows, first, scale_codes, zero_codes,
            scale_min[:, None], scale_step[:, None], zero_min[:, None], zero_step[:, None], groups, chunks,
            lane, BITS, GROUP, BN, UNITS,
        )  # fmt: skip
        here = out + row.to(tl.int64)[:, None] * cols + column[None, :]
        tl.store(here, weight.to(out.dtype.element_ty), mask=within & (column < cols)[None, :])


@triton.jit
def sharers(slots, pair, tokens, K: tl.constexpr, KS: tl.constexpr, BM: tl.constexpr):
    """int32 [BM]: each token's pair that has the slot of `pair`, or −1."""
    token = tl.arange(0, BM)[:, None]
    j = tl.arange(0, KS)[None, :]
    every = tl.load(slots + token * K + j, mask=(token < tokens) & (j < K), other=-1)
    return tl.max(tl.where(every == tl.load(slots + pair), token * K + j, -1), 1)


@triton.jit
def products(
    x,  # [n, width]: as they are, or arranged in float16 for `tiles`
    arena,  # uint8, records of record_nbytes
    slots,  # int32 [tokens, K], or None
    tasks,  # int32 [programs, 3]: slot, first pair, pairs; or None
    vectors,  # int32 [pairs]: a pair's vector in x; None: pair // per_vector
    out,  # [pairs, out_width]: as they are, or arranged for the tiles of OUT_BITS
    record_nbytes, offset, bias,  # in bytes: of a record, and within it of the matrix and of its bias
    tokens, per_vector, cols, width, out_width,
    matrix_rows, outputs,
    scale_codes, zero_codes, row_params, groups, chunks,
    BITS: tl.constexpr, GROUP: tl.constexpr, IS_FLOAT16: tl.constexpr,
    BIAS: tl.constexpr, BIAS_IS_FLOAT16: tl.constexpr, K: tl.constexpr, KS: tl.constexpr,
    HALVES: tl.constexpr, ASM: tl.constexpr, OUT_BITS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UNITS: tl.constexpr,
    FORM: tl.constexpr, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, PLUS: tl.constexpr,
):  # fmt: skip
    """Each expert's matrix times the vectors of its pairs, and what comes after.

    Grid: (tiles of BN rows, tasks), or (tiles, pairs): then the first pair of each slot works for all that share it.
    """
    if tasks is not None:
        task = tasks + 3 * tl.program_id(1)
        slot = tl.load(task).to(tl.int64)
        number = tl.arange(0, BM)
        pair = tl.where(number < tl.load(task + 2), tl.load(task + 1) + number, -1)
    else:
        first = tl.program_id(1)
        slot = tl.load(slots + first).to(tl.int64)
        pair = sharers(slots, first, tokens, K, KS, BM)
        leader = tl.min(tl.where(pair >= 0, pair, tokens * K), 0)
        if (slot < 0) | (leader != first):
            return
    members = pair >= 0
    pair = tl.maximum(pair, 0)
    if vectors is not None:
        vector = tl.load(vectors + pair, mask=members, other=0).to(tl.int64)
    else:
        vector = (pair // per_vector).to(tl.int64)
    record = arena + slot * record_nbytes
    COUNT: tl.constexpr = BN if FORM == "alone" else BN // 2
    tile = tl.arange(0, BN) + tl.program_id(0) * BN
    if FORM == "halves":  # gate and up of an output are neighbours here
        tile = tile // 2 + tile % 2 * outputs
    rows = tl.minimum(tile, matrix_rows - 1)
    x = x + vector * width
    if HALVES:
        y = tiles.times(
            record + offset, rows, x, members, scale_codes, zero_codes, row_params, groups, chunks,
            BITS, GROUP, BM, BN, ASM,
        )  # fmt: skip
    elif BITS == 16:
        y = times_raw(record + offset, rows, x, members, cols, IS_FLOAT16, BM, BN, 16 * UNITS)
    else:
        y = times(
            record + offset, rows, x, members, cols, scale_codes, zero_codes, row_params, groups, chunks,
            BITS, GROUP, BM, BN, UNITS,
        )  # fmt: skip
    if BIAS:
        raw = tl.load((record + bias).to(tl.pointer_type(tl.int16)) + rows).to(tl.int32)
        y += bits.half(raw, BIAS_IS_FLOAT16)[None, :]
    if FORM == "alone":
        y = gates.apply(y, FUNCTION, ALPHA)
    else:
        gate, up = tl.split(tl.reshape(y, [BM, COUNT, 2]))
        y = gates.gated(gate, up, FUNCTION, ALPHA, LIMIT, PLUS)
    column = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    place = column
    if OUT_BITS:
        place = tiles.place(column, OUT_BITS)
        y = halves.narrowed(y)
    here = out + pair.to(tl.int64)[:, None] * out_width + place[None, :]
    tl.store(here, y, mask=members[:, None] & (column < outputs)[None, :])
