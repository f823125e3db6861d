// Rows of a packed matrix times vectors in integers, over the operations V of one instruction set. Included once by each
// translation unit that uses it, and internal to it, like rows.h, and for the same reason without the standard library.
//
// A vector is rounded to 16-bit integers, x = xs * (256 hi + lo), with one xs for each panel of 512 columns and signed
// bytes hi and lo. A row's codes q are bytes, too, so that a group's sum of q (256 hi + lo) is exact, and
//
//     row . x = sum over panels of xs * (sum over groups of scale * D)  -  sum over groups of scale * zero * X
//
// where D is that exact sum and X the group's sum of x as rounded. (Where an instruction set multiplies signed bytes alone,
// codes of 8 bits and their zeros are both less 128: decode_groups.) Rounding x is the one approximation beyond float32's:
// at most max |x| / 65278 an element, for random vectors 3e-5 of their norm, and never above 2e-4 of a panel's: less than
// a sixth of what bfloat16 costs.
//
// Codes are read a vector's width at a time: a chunk. At 4 bits 64 bytes hold two blocks of 64 columns; the low halves of
// the bytes are the first 32 columns of both blocks, the high halves the last 32. hi and lo are stored in that order.
// Where codes are multiplied as words, the 16-bit integers themselves are stored, columns of even number first.
#pragma once

#include "rows.h"

#ifndef GREENROOM_UNROLL  // before the loop over a chunk's sums
#define GREENROOM_UNROLL
#endif

namespace greenroom {
namespace {

constexpr std::int64_t kPanel = 512;
constexpr std::int64_t kAhead = 16 << 10;  // bytes of codes that are fetched early, at least
constexpr float kTop = 32639.0f;  // so that hi and lo are signed bytes

// How codes of BITS bits, in groups of GROUP columns, fill a chunk of V's vectors.
template <class V, int BITS, int GROUP>
struct Chunk {
    static constexpr int width = V::kBytes;
    static constexpr int low = BITS == 3 ? 2 : BITS;                        // bits that lie as shifted lanes
    static constexpr int lane = 8 * low < width ? 8 * low : width;         // columns of a block side by side in a vector
    static constexpr int vectors = 64 / lane;                               // of codes, unpacked
    static constexpr int blocks = width / lane;
    static constexpr int columns = blocks * kBlock;
    static constexpr int nbytes = columns * BITS / 8;                       // packed
    static constexpr int sums = GROUP >= 64 ? 1 : 64 / GROUP < vectors ? 64 / GROUP : vectors;  // of whole groups each
    static constexpr int per_sum = vectors / sums;                          // vectors
    // Multiplied as words: 8 bits, and 2 where each vector has a sum, which costs two more products where codes are bytes.
    static constexpr bool words = V::kWords && (BITS == 8 || (BITS == 2 && per_sum == 1));
    // A vector with a sum of its own may keep its codes where they lie in the byte: `shift` bits up, made good by the scale.
    static constexpr bool in_place = (V::kInPlace || words) && per_sum == 1 && vectors > 1 && BITS != 3 && BITS != 8;
    static constexpr int shift(int group) { return in_place ? low * (group * GROUP % 64 / lane) : 0; }
    static constexpr int groups = columns <= GROUP ? 1 : columns / GROUP;   // that it has a part of

    // The group, counted from the chunk's first, that a 32-bit element of a sum belongs to.
    static constexpr int group(int sum, int element) {
        const int byte = 4 * element;
        return (byte / lane * 64 + sum * per_sum * lane + byte % lane) / GROUP;
    }
};

template <class C, int ELEMENTS>
struct GroupOf {
    alignas(64) std::int32_t index[C::sums][ELEMENTS];
    constexpr GroupOf() : index() {
        for (int s = 0; s < C::sums; ++s)
            for (int e = 0; e < ELEMENTS; ++e) index[s][e] = C::group(s, e);
    }
};

// What makes good that a group's codes lie shifted, for the groups of a block, repeated.
template <class C>
struct Factors {
    alignas(64) float value[32];  // and the inverse of each
    constexpr Factors() : value() {
        for (int g = 0; g < 16; ++g) {
            value[16 + g] = static_cast<float>(1 << C::shift(g));
            value[g] = 1.0f / value[16 + g];
        }
    }
};

// Where the parts of a prepared vector lie: hi and lo, a vector's width of each in turn, padded to whole chunks; xs per
// panel; X per group.
struct Prepared {
    std::int64_t panels, scales, sums, nbytes;

    Prepared(const Matrix& matrix, std::int64_t chunk_columns) {
        const std::int64_t columns = (matrix.cols + chunk_columns - 1) / chunk_columns * chunk_columns;
        panels = (columns + kPanel - 1) / kPanel;
        scales = 2 * columns;
        sums = scales + (panels * 4 + 63) / 64 * 64;
        nbytes = sums + padded_groups(matrix) * 4;
    }
};

inline float largest(const float* x, std::int64_t count) {  // magnitude; a NaN counts as larger than any number
    std::int32_t found = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        std::int32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        found = bits > found ? bits : found;
    }
    float magnitude;
    std::memcpy(&magnitude, &found, 4);
    return magnitude;
}

// to[i] = x[i] / scale to the nearest integer, at most `steps`, and the scale. What is infinite or no number makes the scale no number.
inline float round_panel(const float* x, std::int64_t count, float steps, std::int32_t* to) {
    const float top = largest(x, count);
    const bool finite = top <= 3.4028235e38f;
    const float scale = top / steps, inverse = finite && scale >= 1e-37f ? 1.0f / scale : 0.0f;
    for (std::int64_t i = 0; i < count; ++i) {
        const float value = (finite ? x[i] : 0.0f) * inverse + 12582912.0f;  // 1.5 * 2^23: the sum's last bit counts ones
        std::int32_t bits;
        std::memcpy(&bits, &value, 4);
        to[i] = bits - 0x4b400000;
    }
    return finite ? scale : __builtin_nanf("");
}

// A vector's scale per panel and sum per group, padded with zeros; place(column, rounded) gets each panel's integers.
template <int GROUP, class Place>
void round_vector(const Matrix& matrix, const float* x, std::int64_t panels, float* scales, float* sums, const Place& place) {
    for (std::int64_t g = matrix.groups; g < padded_groups(matrix); ++g) sums[g] = 0.0f;
    for (std::int64_t panel = 0; panel < panels; ++panel) {
        const std::int64_t start = panel * kPanel, left = matrix.cols - start;
        alignas(64) std::int32_t rounded[kPanel] = {};
        if (left > 0) scales[panel] = round_panel(x + start, left < kPanel ? left : kPanel, kTop, rounded);
        else scales[panel] = 0.0f;
        for (std::int64_t g = 0; g < kPanel / GROUP && start / GROUP + g < matrix.groups; ++g) {
            std::int32_t sum = 0;
            for (int i = 0; i < GROUP; ++i) sum += rounded[g * GROUP + i];
            sums[start / GROUP + g] = static_cast<float>(sum) * scales[panel];
        }
        place(start, rounded);
    }
}

// A value's two bytes, of the column `i` in a vector of NBYTES columns.
template <class C, int NBYTES>
inline void place(std::int32_t value, int i, std::uint8_t* to) {
    if constexpr (C::words) {
        const std::int16_t word = static_cast<std::int16_t>(value);
        std::memcpy(to + i % 2 * NBYTES + i / 2 * 2, &word, 2);
    } else {
        const std::int32_t hi = (value + 128) >> 8;
        to[i] = static_cast<std::uint8_t>(hi);
        to[NBYTES + i] = static_cast<std::uint8_t>(value - 256 * hi);
    }
}

template <class C, int NBYTES, int GROUP>
void prepare_integers(const Matrix& matrix, const float* x, std::uint8_t* prepared) {
    const Prepared at(matrix, C::columns);
    float* scales = reinterpret_cast<float*>(prepared + at.scales);
    float* sums = reinterpret_cast<float*>(prepared + at.sums);
    round_vector<GROUP>(matrix, x, at.panels, scales, sums, [&](std::int64_t start, const std::int32_t* rounded) {
        const std::int64_t stored = at.scales / 2 - start < kPanel ? at.scales / 2 - start : kPanel;
        std::uint8_t* to = prepared + 2 * start;
        for (std::int64_t chunk = 0; chunk < stored; chunk += C::columns)
            for (int v = 0; v < C::vectors; ++v, to += 2 * NBYTES)
                for (int b = 0; b < C::blocks; ++b)
                    for (int i = 0; i < C::lane; ++i)
                        place<C, NBYTES>(rounded[chunk + b * 64 + v * C::lane + i], b * C::lane + i, to);
    });
}

// R rows from `row` on times N vectors, as the sums are made: see the formula above.
template <class V, int BITS, int GROUP, int R, int N>
struct Tile {
    using C = Chunk<V, BITS, GROUP>;
    using F = typename V::F;
    static constexpr GroupOf<C, V::kWidth> group_of{};

    const std::uint8_t* codes;
    std::int64_t row_nbytes, groups, ahead;
    const float* scale;
    const std::uint8_t* const* x;
    F sum[R][N];

    // Rows one after another are what a short set of registers holds, as long as codes are not wanted for several vectors.
    static constexpr bool apart = V::rows_apart && (N == 1 || C::per_sum > 2);

    // A chunk from `column` on. WHOLE: all its bytes are the row's.
    template <bool WHOLE>
    GREENROOM_INLINE void add(std::int64_t column) {
        if constexpr (apart) {
            for (int r = 0; r < R; ++r) {
                add_row<WHOLE>(r, column);
                asm volatile("" ::: "memory");  // else the compiler mixes rows
            }
        } else {
            add_together<WHOLE>(column);
        }
    }

    template <bool WHOLE>
    GREENROOM_INLINE void add_row(int r, std::int64_t column) {
        typename V::template Packed<BITS> packed;
        load<WHOLE>(packed, r, column);
        const F scales = V::template load_groups<C::groups>(scale + r * groups + column / GROUP);
        for (int i = 0; i < C::sums; ++i) {
            typename V::I q[C::per_sum];
            for (int v = 0; v < C::per_sum; ++v) q[v] = packed.template codes<C::in_place>(i * C::per_sum + v);
            const F s = V::template pick<C::groups>(scales, group_of.index[i]);
            for (int n = 0; n < N; ++n) sum[r][n] = V::fma(dot(q, planes(n, column, i)), s, sum[r][n]);
        }
    }

    // Sums of the same row stand apart in the stream of instructions, because each waits for the one before.
    template <bool WHOLE>
    GREENROOM_INLINE void add_together(std::int64_t column) {
        typename V::template Packed<BITS> packed[R];
        F scales[R];
        for (int r = 0; r < R; ++r) {
            load<WHOLE>(packed[r], r, column);
            scales[r] = V::template load_groups<C::groups>(scale + r * groups + column / GROUP);
        }
        GREENROOM_UNROLL for (int i = 0; i < C::sums; ++i) {
            typename V::I q[R][C::per_sum];
            F s[R];
            for (int r = 0; r < R; ++r) {
                for (int v = 0; v < C::per_sum; ++v) q[r][v] = packed[r].template codes<C::in_place>(i * C::per_sum + v);
                s[r] = V::template pick<C::groups>(scales[r], group_of.index[i]);
            }
            for (int n = 0; n < N; ++n)
                for (int r = 0; r < R; ++r)
                    sum[r][n] = V::fma(dot(q[r], planes(n, column, i)), s[r], sum[r][n]);
        }
    }

    template <bool WHOLE, class Packed>
    GREENROOM_INLINE void load(Packed& packed, int r, std::int64_t column) const {
        const std::int64_t byte = column / 8 * BITS;
        if (N == 1)  // lines in the order in which they lie: the memory's own guesses join in
            for (int i = 0; i < C::nbytes; i += C::nbytes > V::kBytes ? 48 : 64) __builtin_prefetch(codes + ahead + R * byte + r * C::nbytes + i);
        packed.load(codes + r * row_nbytes + byte, WHOLE ? C::nbytes : row_nbytes - byte);
    }

    GREENROOM_INLINE static F dot(const typename V::I* q, const std::uint8_t* planes) {
        if constexpr (C::words) return V::template dot_words<C::per_sum>(q, planes);
        else return V::template dot<C::per_sum>(q, planes);
    }

    GREENROOM_INLINE const std::uint8_t* planes(int n, std::int64_t column, int i) const {
        return x[n] + 2 * column + i * C::per_sum * 2 * V::kBytes;
    }
};

// begun: offset holds its part of the product, a register a row.
template <class V, int BITS, int GROUP, int R, int N>
void integer_tile(const Matrix& matrix, std::int64_t row, const std::uint8_t* const* x, float* const* y,
                  const float* scale, const float* offset, bool begun) {
    using C = Chunk<V, BITS, GROUP>;
    using F = typename V::F;
    const Prepared at(matrix, C::columns);
    const std::int64_t groups = padded_groups(matrix), columns = at.scales / 2;
    const std::int64_t whole = matrix.code_row_bytes / C::nbytes * C::columns;
    Tile<V, BITS, GROUP, R, N> tile{matrix.codes + row * matrix.code_row_bytes, matrix.code_row_bytes, groups,
                                     matrix.code_row_bytes * R > kAhead ? matrix.code_row_bytes * R : kAhead, scale, x, {}};
    F total[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) total[r][n] = N == 1 && begun ? V::load(offset + r * V::kWidth) : V::zero();
    for (std::int64_t g = 0; !(N == 1 && begun) && g < matrix.groups; g += V::kWidth)
        for (int n = 0; n < N; ++n) {
            const F sums = V::load(reinterpret_cast<const float*>(x[n] + at.sums) + g);
            for (int r = 0; r < R; ++r) total[r][n] = V::fma(V::load(offset + r * groups + g), sums, total[r][n]);
        }
    for (std::int64_t panel = 0; panel < at.panels; ++panel) {
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) tile.sum[r][n] = V::zero();
        std::int64_t column = panel * kPanel;
        const std::int64_t end = column + kPanel < columns ? column + kPanel : columns;
        for (; column < (end < whole ? end : whole); column += C::columns) tile.template add<true>(column);
        for (; column < end; column += C::columns) tile.template add<false>(column);
        for (int n = 0; n < N; ++n) {
            const F xs = V::set1(reinterpret_cast<const float*>(x[n] + at.scales)[panel]);
            for (int r = 0; r < R; ++r) total[r][n] = V::fma(tile.sum[r][n], xs, total[r][n]);
        }
    }
    for (int n = 0; n < N; ++n)
        if constexpr (R == 4) V::reduce4(total[0][n], total[1][n], total[2][n], total[3][n], y[n] + row);
        else for (int r = 0; r < R; ++r) y[n][row + r] = V::reduce(total[r][n]);
}

template <class V, int BITS, int GROUP, int R>
void integer_rows(const Matrix& matrix, std::int64_t row, const std::uint8_t* const* x, int count, float* const* y,
                  const float* scale, const float* offset) {
    int n = 0;
    constexpr int T = V::tile_vectors;
    if constexpr (R > V::tile_rows_of_several) {  // several vectors' sums leave room for fewer rows
        if (count == 1) return integer_tile<V, BITS, GROUP, R, 1>(matrix, row, x, y, scale, offset, true);
        constexpr int fewer = V::tile_rows_of_several;
        for (int r = 0; r < R; r += fewer)
            integer_rows<V, BITS, GROUP, fewer>(matrix, row + r, x, count, y, scale + r * padded_groups(matrix), offset + r * padded_groups(matrix));
        return;
    }
    for (; n + T <= count; n += T) integer_tile<V, BITS, GROUP, R, T>(matrix, row, x + n, y + n, scale, offset, false);
    if constexpr (T > 3)
        for (; n + 4 <= count; n += 4) integer_tile<V, BITS, GROUP, R, 4>(matrix, row, x + n, y + n, scale, offset, false);
    switch (count - n) {
        case 1: return integer_tile<V, BITS, GROUP, R, 1>(matrix, row, x + n, y + n, scale, offset, count == 1);
        case 2: return integer_tile<V, BITS, GROUP, R, 2>(matrix, row, x + n, y + n, scale, offset, false);
        case 3: return integer_tile<V, BITS, GROUP, R, 3>(matrix, row, x + n, y + n, scale, offset, false);
    }
}

template <class V, int BITS, int GROUP>
struct Integer {
    using C = Chunk<V, BITS, GROUP>;
    using F = typename V::F;
    static constexpr int rows_at_once = 4, most_vectors = 32;
    static constexpr bool for_many = true;

    static std::int64_t prepared_nbytes(const Matrix& matrix) { return Prepared(matrix, C::columns).nbytes; }
    static std::int64_t scratch_floats(const Matrix& matrix) { return 4 * V::tile_rows * (padded_groups(matrix) + V::kWidth); }
    static void prepare(const Matrix& matrix, const float* x, std::uint8_t* to) {
        prepare_integers<C, V::kBytes, GROUP>(matrix, x, to);
    }
    // A row's scales, and its offsets: for a single vector with these sums its part of the product at once.
    static void decode_row(const Matrix& matrix, std::int64_t row, const float* sums, float* scale, float* offset) {
        static constexpr Factors<C> factors;
        const float* factor = C::in_place ? factors.value : nullptr;
        if (sums == nullptr)
            return decode_groups<V>(matrix, row, factor, scale, [&](std::int64_t group, F value) { V::store(offset + group, value); });
        F total = V::zero();
        decode_groups<V>(matrix, row, factor, scale, [&](std::int64_t group, F value) { total = V::fma(value, V::load(sums + group), total); });
        V::store(offset, total);
    }
    static void rows(const Matrix& matrix, std::int64_t first, std::int64_t last, const std::uint8_t* const* x,
                     int count, float* const* y, float* scratch) {
        constexpr int R = V::tile_rows;
        const std::int64_t groups = padded_groups(matrix), stride = count == 1 ? V::kWidth : groups;
        const float* sums = reinterpret_cast<const float*>(x[0] + Prepared(matrix, C::columns).sums);
        float *scale = scratch, *offset = scratch + 2 * R * groups;  // of these rows and the next
        int turn = 0;
        const auto decode = [&](std::int64_t row, int slot) {
            fetch_groups(matrix, row, R);
            for (int r = 0; r < R && row + r < last; ++r)
                decode_row(matrix, row + r, count == 1 ? sums : nullptr, scale + (slot * R + r) * groups, offset + (slot * R + r) * stride);
        };
        decode(first, 0);
        for (; first + R <= last; first += R, turn ^= 1) {
            decode(first + R, turn ^ 1);  // early, so that what is stored here is in the cache when it is needed
            integer_rows<V, BITS, GROUP, R>(matrix, first, x, count, y, scale + turn * R * groups, offset + turn * R * stride);
        }
        for (int r = 0; first < last; ++first, ++r)
            integer_rows<V, BITS, GROUP, 1>(matrix, first, x, count, y, scale + (turn * R + r) * groups,
                                            offset + (turn * R + r) * stride);
    }
};

template <class V, int BITS>
Kernel integer_kernel(int group_size) {
    switch (group_size) {
        case 16: return kernel_of<Integer<V, BITS, 16>>();
        case 32: return kernel_of<Integer<V, BITS, 32>>();
        case 64: return kernel_of<Integer<V, BITS, 64>>();
        default: return kernel_of<Integer<V, BITS, 128>>();
    }
}

}  // namespace
}  // namespace greenroom
