// Attention of one token over cached keys and values, over the operations V of one instruction set; included once by
// each instruction set's translation unit, like rows.h and under the same rules.
//
// Keys lie in blocks of kPositions positions, a block dimension by dimension, so that scores of neighbouring positions
// are lanes of one vector and no sum runs across lanes. Values lie position by position. Both are float16.
#pragma once

#include <cstring>

#include "activation.h"
#include "matrix.h"

namespace greenroom {
namespace {

constexpr int kHeadTile = 4;  // query heads that share what is loaded of a key or value

// scores[n][position] of one block
template <class V, int N>
void score_block(const std::uint8_t* block, const float* const* q, int dim, float* const* scores) {
    constexpr int count = kPositions / V::kWidth;
    typename V::F sums[N][count];
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < count; ++i) sums[n][i] = V::zero();
    for (int d = 0; d < dim; ++d) {
        typename V::F keys[count];
        for (int i = 0; i < count; ++i)
            keys[i] = V::template from_halves<true>(block + 2 * (d * kPositions + i * V::kWidth));
        for (int n = 0; n < N; ++n) {
            const auto x = V::set1(q[n][d]);
            for (int i = 0; i < count; ++i) sums[n][i] = V::fma(keys[i], x, sums[n][i]);
        }
    }
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < count; ++i) V::store(scores[n] + i * V::kWidth, sums[n][i]);
}

// out[n][column .. column + 2 vectors) += weights[n][p] * values[p]
template <class V, int N>
void mix_columns(const std::uint8_t* values, int value_dim, int column, const float* const* weights, int positions,
                 float* const* out) {
    typename V::F sums[N][2];
    for (int n = 0; n < N; ++n) sums[n][0] = sums[n][1] = V::zero();
    for (int p = 0; p < positions; ++p) {
        const std::uint8_t* from = values + 2 * (static_cast<std::int64_t>(p) * value_dim + column);
        const auto first = V::template from_halves<true>(from);
        const auto second = V::template from_halves<true>(from + 2 * V::kWidth);
        for (int n = 0; n < N; ++n) {
            const auto weight = V::set1(weights[n][p]);
            sums[n][0] = V::fma(first, weight, sums[n][0]);
            sums[n][1] = V::fma(second, weight, sums[n][1]);
        }
    }
    for (int n = 0; n < N; ++n) {
        V::store(out[n] + column, sums[n][0]);
        V::store(out[n] + column + V::kWidth, sums[n][1]);
    }
}

// The columns that do not fill two vectors.
template <class V>
void mix_tail(const std::uint8_t* values, int value_dim, int column, const float* weights, int positions, float* out) {
    for (; column < value_dim; ++column) {
        float sum = 0.0f;
        for (int p = 0; p < positions; ++p) {
            std::uint8_t padded[2 * V::kWidth] = {};
            std::memcpy(padded, values + 2 * (static_cast<std::int64_t>(p) * value_dim + column), 2);
            float lanes[V::kWidth];
            V::store(lanes, V::template from_halves<true>(padded));
            sum += weights[p] * lanes[0];
        }
        out[column] = sum;
    }
}

// Up to kHeadTile heads over one span; scores is scratch of kHeadTile rows of kSpan floats.
template <class V, int N>
void attend_tile(const Span& span, int head, float* scores) {
    const float* q[N];
    float *rows[N], *out[N];
    for (int n = 0; n < N; ++n) {
        q[n] = span.q + static_cast<std::int64_t>(head + n) * span.key_dim;
        rows[n] = scores + n * kSpan;
        out[n] = span.out + static_cast<std::int64_t>(head + n) * span.value_dim;
    }
    for (int at = 0; at < span.last; at += kPositions) {
        float* block[N];
        for (int n = 0; n < N; ++n) block[n] = rows[n] + at;
        score_block<V, N>(span.keys + 2 * static_cast<std::int64_t>(at) * span.key_dim, q, span.key_dim, block);
    }
    const int positions = span.last - span.first;
    const float* weights[N];
    for (int n = 0; n < N; ++n) {
        float* row = rows[n] + span.first;
        float highest = row[0], sum = 0.0f;
        for (int p = 1; p < positions; ++p) highest = row[p] > highest ? row[p] : highest;
        for (int p = 0; p < positions; ++p) row[p] = exponential(row[p] - highest);
        for (int p = 0; p < positions; ++p) sum += row[p];
        span.highest[head + n] = highest;
        span.sum[head + n] = sum;
        weights[n] = row;
    }
    const std::uint8_t* values = span.values + 2 * static_cast<std::int64_t>(span.first) * span.value_dim;
    int column = 0;
    for (; column + 2 * V::kWidth <= span.value_dim; column += 2 * V::kWidth)
        mix_columns<V, N>(values, span.value_dim, column, weights, positions, out);
    for (int n = 0; n < N; ++n) mix_tail<V>(values, span.value_dim, column, weights[n], positions, out[n]);
}

template <class V>
void mix(const std::uint8_t* values, int value_dim, const float* weights, int positions, float* out) {
    int column = 0;
    for (; column + 2 * V::kWidth <= value_dim; column += 2 * V::kWidth)
        mix_columns<V, 1>(values, value_dim, column, &weights, positions, &out);
    mix_tail<V>(values, value_dim, column, weights, positions, out);
}

template <class V>
void attend(const Span& span) {
    alignas(64) float scores[kHeadTile * kSpan];
    for (int head = 0; head < span.heads; head += kHeadTile) switch (span.heads - head) {
            case 1: attend_tile<V, 1>(span, head, scores); break;
            case 2: attend_tile<V, 2>(span, head, scores); break;
            case 3: attend_tile<V, 3>(span, head, scores); break;
            default: attend_tile<V, kHeadTile>(span, head, scores); break;
        }
}

}  // namespace
}  // namespace greenroom
