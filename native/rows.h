// Rows of a packed matrix times vectors, over the operations V of one instruction set. Each instruction set's
// translation unit includes this once; everything is internal to it, so that no function compiled for a newer machine
// can stand in for one that an older machine calls. For the same reason nothing here uses the standard library.
//
// A row's codes are unpacked a block of 64 at a time into weights, w = q s + c with c = -s z, and each block is used
// for up to kTile vectors while it is in registers.
#pragma once

#include <cstring>

#include "matrix.h"

namespace greenroom {
namespace {

constexpr int kTile = 4;

inline float bfloat16_at(const std::uint8_t* bytes) {
    std::uint16_t half;
    std::memcpy(&half, bytes, 2);
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

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
inline void add_block(const typename V::F* weights, const float* const* x, std::int64_t column, Sums<V>* sums) {
    constexpr int count = kBlock / V::kWidth;
    for (int v = 0; v < N; ++v)
        for (int i = 0; i < count; ++i) {
            auto& sum = sums[v].sum[i % Sums<V>::kCount];
            sum = V::fma(weights[i], V::load(x[v] + column + i * V::kWidth), sum);
        }
}

// scale and -scale * zero of every group of a row. Each operation rounds on its own, as the format wants it.
template <class V>
void decode_groups(const Matrix& matrix, std::int64_t row, float* scale, float* offset) {
    const std::uint8_t* params = matrix.row_params + row * 8;
    const auto scale_min = V::set1(bfloat16_at(params)), scale_step = V::set1(bfloat16_at(params + 2));
    const auto zero_min = V::set1(bfloat16_at(params + 4)), zero_step = V::set1(bfloat16_at(params + 6));
    const std::uint8_t* scale_codes = matrix.scale_codes + row * matrix.groups;
    const std::uint8_t* zero_codes = matrix.zero_codes + row * matrix.groups;
    for (std::int64_t group = 0; group < matrix.groups; group += V::kWidth) {
        std::uint8_t tail[2][V::kWidth] = {};
        const std::uint8_t *scales = scale_codes + group, *zeros = zero_codes + group;
        if (matrix.groups - group < V::kWidth) {
            std::memcpy(tail[0], scales, static_cast<std::size_t>(matrix.groups - group));
            std::memcpy(tail[1], zeros, static_cast<std::size_t>(matrix.groups - group));
            scales = tail[0], zeros = tail[1];
        }
        const auto s = V::add(scale_min, V::mul(scale_step, V::from_bytes(scales)));
        const auto z = V::add(zero_min, V::mul(zero_step, V::from_bytes(zeros)));
        V::store(scale + group, s);
        V::store(offset + group, V::sub(V::zero(), V::mul(s, z)));
    }
}

// SUB: columns that share a scale, within a block. LOG_SPAN: blocks per group as a power of two.
template <class V, int BITS, int SUB, int N>
void packed_row(const Matrix& matrix, std::int64_t row, const float* const* x, float* const* y, const float* scale,
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
void plain_row(const Matrix& matrix, std::int64_t row, const float* const* x, float* const* y) {
    const std::uint8_t* values = matrix.codes + row * matrix.code_row_bytes;
    Sums<V> sums[N];
    for (int v = 0; v < N; ++v) sums[v].clear();
    for (std::int64_t column = 0; column < matrix.cols; column += kBlock) {
        std::uint8_t tail[2 * kBlock] = {};
        const std::uint8_t* block = values + 2 * column;
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
void row_of(const Matrix& matrix, std::int64_t row, const float* const* x, float* const* y, const float* scale,
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

template <class V, int BITS>
void rows_of(const Matrix& matrix, std::int64_t first, std::int64_t last, const float* const* x, int count,
             float* const* y, float* scratch) {
    float *scale = scratch, *offset = scratch + padded_groups(matrix);
    for (std::int64_t row = first; row < last; ++row) {
        if constexpr (BITS != 16) decode_groups<V>(matrix, row, scale, offset);
        for (int v = 0; v < count; v += kTile) switch (count - v) {
                case 1: row_of<V, BITS, 1>(matrix, row, x + v, y + v, scale, offset); break;
                case 2: row_of<V, BITS, 2>(matrix, row, x + v, y + v, scale, offset); break;
                case 3: row_of<V, BITS, 3>(matrix, row, x + v, y + v, scale, offset); break;
                default: row_of<V, BITS, kTile>(matrix, row, x + v, y + v, scale, offset); break;
            }
    }
}

template <class V>
void rows(const Matrix& matrix, std::int64_t first, std::int64_t last, const float* const* x, int count,
          float* const* y, float* scratch) {
    switch (matrix.bits) {
        case 2: return rows_of<V, 2>(matrix, first, last, x, count, y, scratch);
        case 3: return rows_of<V, 3>(matrix, first, last, x, count, y, scratch);
        case 4: return rows_of<V, 4>(matrix, first, last, x, count, y, scratch);
        case 8: return rows_of<V, 8>(matrix, first, last, x, count, y, scratch);
        default: return rows_of<V, 16>(matrix, first, last, x, count, y, scratch);
    }
}

}  // namespace
}  // namespace greenroom
