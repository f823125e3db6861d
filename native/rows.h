// Rows of a packed matrix times vectors in float32, over the operations V of one instruction set. Each instruction set's
// translation unit includes this once; everything is internal to it, so that no function compiled for a newer machine
// can stand in for one that an older machine calls. For the same reason nothing here uses the standard library.
//
// A row's codes are unpacked a block of 64 at a time into weights, w = q s + c with c = -s z, and each block is used
// for up to kTile vectors while it is in registers.
#pragma once

#include <cstring>

#include "halves.h"
#include "matrix.h"

#define GREENROOM_INLINE inline __attribute__((always_inline))

namespace greenroom {
namespace {

constexpr int kTile = 4;
constexpr int kGroupsAhead = 1024;  // whose codes are fetched early
constexpr int kValuesAhead = 4096;  // bytes of 16-bit values, likewise

// The four-fold sums of one vector: kept apart while a row is read, so that additions need not wait for each other.
template <class V>
struct Sums {
    static constexpr int kCount = 4;
    typename V::F sum[kCount];

    void clear() {
        for (int i = 0; i < kCount; ++i) sum[i] = V::zero();
    }
    float total() const { return V::reduce(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3]))); }
};

template <class V, int N>
inline void add_block(const typename V::F* weights, const std::uint8_t* const* x, std::int64_t column, Sums<V>* sums) {
    constexpr int count = kBlock / V::kWidth;
    for (int v = 0; v < N; ++v)
        for (int i = 0; i < count; ++i) {
            auto& sum = sums[v].sum[i % Sums<V>::kCount];
            sum = V::fma(weights[i], V::load(reinterpret_cast<const float*>(x[v]) + column + i * V::kWidth), sum);
        }
}

// Fetches the codes of groups that decode_groups will want.
inline void fetch_groups(const Matrix& matrix, std::int64_t row, int rows) {
    const std::int64_t first = row * matrix.groups + kGroupsAhead;
    for (std::int64_t byte = 0; byte < rows * matrix.groups; byte += 64) {
        __builtin_prefetch(matrix.scale_codes + first + byte);
        __builtin_prefetch(matrix.zero_codes + first + byte);
    }
}

// factor * scale of every group of a row, and -scale * zero, up to the last bit, for take(group, kWidth of them). factor:
// 16 powers of two, repeated every kWidth, and their inverses; or null. Reads a vector's width of codes, of which a
// matrix has enough behind its last (row_params), and what is made of those past the last group is finite.
template <class V, class Take>
GREENROOM_INLINE void decode_groups(const Matrix& matrix, std::int64_t row, const float* factor, float* scale, const Take& take) {
    const std::uint8_t* params = matrix.row_params + row * 8;
    typename V::F scale_min, scale_step, zero_min, zero_step;
    V::set_bfloat16(params, false, &scale_min, &scale_step);
    V::set_bfloat16(params + 4, true, &zero_min, &zero_step);
    if (factor) {
        const auto factors = V::load(factor), inverse = V::load(factor + 16);
        scale_min = V::mul(scale_min, factors), scale_step = V::mul(scale_step, factors);
        zero_min = V::mul(zero_min, inverse), zero_step = V::mul(zero_step, inverse);
    }
    if (V::kSigned && matrix.bits == 8) zero_min = V::add(zero_min, V::set1(128.0f));  // as the codes come less 128
    const std::uint8_t* scale_codes = matrix.scale_codes + row * matrix.groups;
    const std::uint8_t* zero_codes = matrix.zero_codes + row * matrix.groups;
    for (std::int64_t group = 0; group < matrix.groups; group += V::kWidth) {
        const auto s = V::fma(scale_step, V::from_bytes(scale_codes + group), scale_min);
        const auto z = V::fma(zero_step, V::from_bytes(zero_codes + group), zero_min);
        V::store(scale + group, s);
        take(group, V::mul(s, z));
    }
}

// SUB: columns that share a scale, within a block. LOG_SPAN: blocks per group as a power of two.
template <class V, int BITS, int SUB, int N>
void packed_row(const Matrix& matrix, std::int64_t row, const std::uint8_t* const* x, float* const* y, const float* scale,
                const float* offset, int log_span) {
    constexpr int groups = kBlock / SUB;
    const std::uint8_t* codes = matrix.codes + row * matrix.code_row_bytes;
    const std::int64_t blocks = (matrix.cols + kBlock - 1) / kBlock;
    Sums<V> sums[N];
    for (int v = 0; v < N; ++v) sums[v].clear();
    for (std::int64_t block = 0; block < blocks; ++block) {
        const std::int64_t group = SUB == kBlock ? block >> log_span : block * groups;
        typename V::F weights[kBlock / V::kWidth];
        V::template unpack<BITS, SUB>(codes + block * 8 * BITS, scale + group, offset + group, weights);
        add_block<V, N>(weights, x, block * kBlock, sums);
    }
    for (int v = 0; v < N; ++v) y[v][row] = sums[v].total();
}

template <class V, bool FLOAT16, int N>
void plain_row(const Matrix& matrix, std::int64_t row, const std::uint8_t* const* x, float* const* y) {
    const std::uint8_t* values = matrix.codes + row * matrix.code_row_bytes;
    Sums<V> sums[N];
    for (int v = 0; v < N; ++v) sums[v].clear();
    for (std::int64_t column = 0; column < matrix.cols; column += kBlock) {
        std::uint8_t tail[2 * kBlock] = {};
        const std::uint8_t* block = values + 2 * column;
        for (int i = 0; i < 2 * kBlock; i += 64) __builtin_prefetch(block + kValuesAhead + i);
        if (matrix.cols - column < kBlock) {
            std::memcpy(tail, block, static_cast<std::size_t>(2 * (matrix.cols - column)));
            block = tail;
        }
        typename V::F weights[kBlock / V::kWidth];
        for (int i = 0; i < kBlock / V::kWidth; ++i)
            weights[i] = V::template from_halves<FLOAT16>(block + 2 * i * V::kWidth);
        add_block<V, N>(weights, x, column, sums);
    }
    for (int v = 0; v < N; ++v) y[v][row] = sums[v].total();
}

template <class V, int BITS, int N>
void row_of(const Matrix& matrix, std::int64_t row, const std::uint8_t* const* x, float* const* y, const float* scale,
            const float* offset) {
    if constexpr (BITS == 16) {
        matrix.is_float16 ? plain_row<V, true, N>(matrix, row, x, y) : plain_row<V, false, N>(matrix, row, x, y);
    } else {
        switch (matrix.group_size) {
            case 16: return packed_row<V, BITS, 16, N>(matrix, row, x, y, scale, offset, 0);
            case 32: return packed_row<V, BITS, 32, N>(matrix, row, x, y, scale, offset, 0);
            case 64: return packed_row<V, BITS, 64, N>(matrix, row, x, y, scale, offset, 0);
            default: return packed_row<V, BITS, 64, N>(matrix, row, x, y, scale, offset, 1);
        }
    }
}

// The functions of an Isa for matrices of BITS bits; a prepared vector is the vector, with zeros up to a whole block.
template <class V, int BITS>
struct Float {
    static constexpr int rows_at_once = 4, most_vectors = 32;
    static constexpr bool for_many = false;

    static std::int64_t prepared_nbytes(const Matrix& matrix) { return (matrix.cols + kBlock - 1) / kBlock * kBlock * 4; }
    static std::int64_t scratch_floats(const Matrix& matrix) { return 2 * padded_groups(matrix); }

    static void prepare(const Matrix& matrix, const float* x, std::uint8_t* prepared) {
        std::memcpy(prepared, x, static_cast<std::size_t>(matrix.cols) * 4);
        std::memset(prepared + matrix.cols * 4, 0, static_cast<std::size_t>(prepared_nbytes(matrix) - matrix.cols * 4));
    }

    static void rows(const Matrix& matrix, std::int64_t first, std::int64_t last, const std::uint8_t* const* x,
                     int count, float* const* y, float* scratch) {
        float *scale = scratch, *offset = scratch + padded_groups(matrix);
        for (std::int64_t row = first; row < last; ++row) {
            if constexpr (BITS != 16) {
                if ((row - first) % kTile == 0) fetch_groups(matrix, row, kTile);
                decode_groups<V>(matrix, row, nullptr, scale,
                                 [&](std::int64_t group, typename V::F value) { V::store(offset + group, value); });
            }
            for (int v = 0; v < count; v += kTile) switch (count - v) {
                    case 1: row_of<V, BITS, 1>(matrix, row, x + v, y + v, scale, offset); break;
                    case 2: row_of<V, BITS, 2>(matrix, row, x + v, y + v, scale, offset); break;
                    case 3: row_of<V, BITS, 3>(matrix, row, x + v, y + v, scale, offset); break;
                    default: row_of<V, BITS, kTile>(matrix, row, x + v, y + v, scale, offset); break;
                }
        }
    }
};

template <class K>
constexpr Kernel kernel_of() {
    return {K::prepared_nbytes, K::prepare, K::rows, K::scratch_floats, K::rows_at_once, K::most_vectors, K::for_many};
}

template <class V>
Kernel float_kernel(int bits) {
    switch (bits) {
        case 2: return kernel_of<Float<V, 2>>();
        case 3: return kernel_of<Float<V, 3>>();
        case 4: return kernel_of<Float<V, 4>>();
        case 8: return kernel_of<Float<V, 8>>();
        default: return kernel_of<Float<V, 16>>();
    }
}

}  // namespace
}  // namespace greenroom
