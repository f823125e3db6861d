// Attention of one token over cached keys and values, over the operations V of one instruction set; included once by
// each instruction set's translation unit, like rows.h and under the same rules.
//
// Keys lie in blocks of kPositions positions, a block dimension by dimension, so that scores of neighbouring positions
// are lanes of one vector and no sum runs across lanes. Values lie position by position. Here both are float16; bytes.h
// has them in 8 bits.
#pragma once

#include <cstring>

#include "activation.h"
#include "halves.h"
#include "matrix.h"

namespace greenroom {
namespace {

// Query heads that share what is loaded of a key or value: as many as registers hold two vectors of sums of.
template <class V>
constexpr int head_tile() {
    return V::kWidth == 16 && V::kRegisters == 32 ? 8 : 4;
}

constexpr int kBlocksAhead = 1;  // blocks of positions between what is computed and what is fetched

template <int N>
struct Count {
    static constexpr int value = N;
};

// scores[n][position] of one block, no more positions at a time than registers hold sums of
template <class V, int N>
void score_block(const std::uint8_t* block, const float* const* q, int dim, float* const* scores, bool first_tile) {
    constexpr int most = V::kRegisters == 32 ? 4 : 2, count = kPositions / V::kWidth < most ? kPositions / V::kWidth : most;
    const std::int64_t ahead = first_tile ? kBlocksAhead * 2 * kPositions * dim : 0;
    for (int first = 0; first < kPositions; first += count * V::kWidth) {
        typename V::F sums[N][count];
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < count; ++i) sums[n][i] = V::zero();
        for (int d = 0; d < dim; ++d) {
            const std::uint8_t* from = block + 2 * (d * kPositions + first);
            __builtin_prefetch(from + ahead);
            typename V::F keys[count];
            for (int i = 0; i < count; ++i) keys[i] = V::template from_halves<true>(from + 2 * i * V::kWidth);
            for (int n = 0; n < N; ++n) {
                const auto x = V::set1(q[n][d]);
                for (int i = 0; i < count; ++i) sums[n][i] = V::fma(keys[i], x, sums[n][i]);
            }
        }
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < count; ++i) V::store(scores[n] + first + i * V::kWidth, sums[n][i]);
    }
}

// out[n][column .. column + C vectors) += weights[n * kSpan + p] * values[p]. A block's columns are taken one strip after
// another; what is fetched meanwhile are as many lines of a later block one after another, as the hardware's own fetching
// wants them.
template <class V, int N, int C>
void mix_columns(const std::uint8_t* values, int value_dim, int column, const float* weights, int positions,
                 float* const* out, bool first_tile) {
    typename V::F sums[N][C];
    for (int n = 0; n < N; ++n)
        for (int c = 0; c < C; ++c) sums[n][c] = V::load(out[n] + column + c * V::kWidth);
    const std::int64_t ahead = first_tile ? kBlocksAhead * 2 * kPositions * value_dim : 0;
    for (int p = 0; p < positions; ++p) {
        const std::uint8_t* from = values + 2 * (static_cast<std::int64_t>(p) * value_dim + column);
        __builtin_prefetch(values + ahead + 2 * (static_cast<std::int64_t>(column) * positions + p * C * V::kWidth));
        typename V::F its[C];
        for (int c = 0; c < C; ++c) its[c] = V::template from_halves<true>(from + 2 * c * V::kWidth);
        for (int n = 0; n < N; ++n) {
            const auto weight = V::set1(weights[n * kSpan + p]);
            for (int c = 0; c < C; ++c) sums[n][c] = V::fma(its[c], weight, sums[n][c]);
        }
    }
    for (int n = 0; n < N; ++n)
        for (int c = 0; c < C; ++c) V::store(out[n] + column + c * V::kWidth, sums[n][c]);
}

// out[n] += weights[n * kSpan + p] * values[p], of a block
template <class V, int N>
void mix_rows(const std::uint8_t* values, int value_dim, const float* weights, int positions, float* const* out,
              bool first_tile) {
    constexpr int C = V::kWidth == 4 && V::kRegisters == 32 ? 4 : 2;
    int column = 0;
    for (; column + C * V::kWidth <= value_dim; column += C * V::kWidth)
        mix_columns<V, N, C>(values, value_dim, column, weights, positions, out, first_tile);
    for (; column < value_dim; ++column)  // what does not fill them
        for (int p = 0; p < positions; ++p) {
            const float value = float16_at(values + 2 * (static_cast<std::int64_t>(p) * value_dim + column));
            for (int n = 0; n < N; ++n) out[n][column] += weights[n * kSpan + p] * value;
        }
}

// row[p] becomes e^(row[p] - highest); gives highest and the sum. Kept side by side, so that they are vectors.
inline void exponentials(float* row, int count, float* highest, float* sum) {
    constexpr int lanes = 16;
    float tops[lanes], sums[lanes] = {};
    for (float& top : tops) top = row[0];
    int p = 0;
    for (; p + lanes <= count; p += lanes)
        for (int i = 0; i < lanes; ++i) tops[i] = row[p + i] > tops[i] ? row[p + i] : tops[i];
    for (; p < count; ++p) tops[0] = row[p] > tops[0] ? row[p] : tops[0];
    float top = tops[0];
    for (float other : tops) top = other > top ? other : top;
    for (p = 0; p < count; ++p) row[p] = exponential(row[p] - top);
    for (p = 0; p + lanes <= count; p += lanes)
        for (int i = 0; i < lanes; ++i) sums[i] += row[p + i];
    for (; p < count; ++p) sums[0] += row[p];
    float total = 0.0f;
    for (float part : sums) total += part;
    *highest = top;
    *sum = total;
}

// body(head, Count) for tiles of N heads, and for one of those that are left.
template <int N, class Body>
void by_tiles(int head, int heads, const Body& body) {
    if constexpr (N > 0) {
        for (; head + N <= heads; head += N) body(head, Count<N>{});
        by_tiles<N - 1>(head, heads, body);
    }
}

template <class V>
void attend_halves(const Span& span) {
    alignas(64) float scores[kHeadsAtOnce][kSpan];
    for (int at = 0; at < span.last; at += kPositions)
        by_tiles<head_tile<V>()>(0, span.heads, [&](int head, auto count) {
            const float* q[count.value];
            float* to[count.value];
            for (int n = 0; n < count.value; ++n) {
                q[n] = span.q + static_cast<std::int64_t>(head + n) * span.key_dim;
                to[n] = scores[head + n] + at;
            }
            const std::uint8_t* block = span.keys + 2 * static_cast<std::int64_t>(at) * span.key_dim;
            score_block<V, count.value>(block, q, span.key_dim, to, head == 0);
        });
    for (int head = 0; head < span.heads; ++head)
        exponentials(scores[head] + span.first, span.last - span.first, span.highest + head, span.sum + head);
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(span.heads) * span.value_dim; ++i) span.out[i] = 0.0f;
    for (int at = span.first; at < span.last; at += kPositions)
        by_tiles<head_tile<V>()>(0, span.heads, [&](int head, auto count) {
            float* out[count.value];
            for (int n = 0; n < count.value; ++n) out[n] = span.out + static_cast<std::int64_t>(head + n) * span.value_dim;
            const int positions = span.last - at < kPositions ? span.last - at : kPositions;
            const std::uint8_t* values = span.values + 2 * static_cast<std::int64_t>(at) * span.value_dim;
            mix_rows<V, count.value>(values, span.value_dim, scores[head] + at, positions, out, head == 0);
        });
}

template <class V>
void mix(const std::uint8_t* values, int value_dim, const float* weights, int positions, float* out) {
    for (int i = 0; i < value_dim; ++i) out[i] = 0.0f;
    for (int at = 0; at < positions; at += kPositions)
        mix_rows<V, 1>(values + 2 * static_cast<std::int64_t>(at) * value_dim, value_dim, weights + at,
                       positions - at < kPositions ? positions - at : kPositions, &out, true);
}

}  // namespace
}  // namespace greenroom
