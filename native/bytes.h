// Attention of one token over keys and values cached in 8 bits, over the operations V of one instruction set; included
// once by each instruction set's translation unit, like rows.h and under the same rules.
//
// Products are of whole numbers, two at a time: of keys two dimensions side by side, with queries that are whole numbers
// below 2^15; of values two positions, with their softmax weights, which take the values' scales along and are rounded
// to as many bits. So each sum is exact up to the end of a group or block, where its scale comes in.
#pragma once

#include "attention.h"

namespace greenroom {
namespace {

constexpr float kMostWord = 32767.0f;

// scores[n][position] of one block; words, units: of queries, see Span
template <class V, int N>
void score_bytes(const std::uint8_t* block, const std::int16_t* words, std::int64_t stride, const float* units, int dim,
                 float* const* scores, bool first_tile) {
    constexpr int most = V::kRegisters == 32 ? 4 : 2, count = kPositions / V::kWidth < most ? kPositions / V::kWidth : most;
    const std::int64_t ahead = first_tile ? kBlocksAhead * cached_nbytes(dim, 8) : 0;
    for (int start = 0; start < dim; start += kCachedGroup)
        for (int first = 0; first < kPositions; first += count * V::kWidth) {
            typename V::Pairs sums[N][count];
            for (int n = 0; n < N; ++n)
                for (int i = 0; i < count; ++i) sums[n][i] = V::no_pairs();
            for (int d = start; d < dim && d < start + kCachedGroup; d += 2) {
                const std::uint8_t* from = block + d * kPositions + 2 * first;
                __builtin_prefetch(from + ahead);
                typename V::Words keys[count];
                for (int i = 0; i < count; ++i) keys[i] = V::words(from + 2 * i * V::kWidth);
                for (int n = 0; n < N; ++n) {
                    const auto x = V::pair(words + d / 2 * stride + 2 * n);
                    for (int i = 0; i < count; ++i) sums[n][i] = V::add_pairs(sums[n][i], keys[i], x);
                }
            }
            const std::uint8_t* scales = cached_scales(block, dim, start) + 2 * first;
            __builtin_prefetch(scales + ahead);
            for (int i = 0; i < count; ++i) {
                const auto scale = V::template from_halves<false>(scales + 2 * i * V::kWidth);
                for (int n = 0; n < N; ++n) {
                    float* to = scores[n] + first + i * V::kWidth;
                    const auto part = V::mul(V::from_pairs(sums[n][i]), V::mul(scale, V::set1(units[n])));
                    V::store(to, start == 0 ? part : V::add(V::load(to), part));
                }
            }
        }
}

// The largest scale of positions first <= p < last of a block, all groups; none of it is a number if one is none.
template <class V>
float largest_scale(const std::uint8_t* block, int dim, int first, int last) {
    const auto larger = [](float a, float b) { return b > a || b != b ? b : a; };
    float lanes[kPositions] = {}, scales[kPositions];
    for (int start = 0; start < dim; start += kCachedGroup) {
        const std::uint8_t* from = cached_scales(block, dim, start);
        for (int p = 0; p < kPositions; p += V::kWidth) V::store(scales + p, V::template from_halves<false>(from + 2 * p));
        for (int p = 0; p < kPositions; ++p) lanes[p] = larger(lanes[p], scales[p]);
    }
    for (int p = 0; p < first; ++p) lanes[p] = 0.0f;
    for (int p = last; p < kPositions; ++p) lanes[p] = 0.0f;
    for (int half = kPositions / 2; half > 0; half /= 2)
        for (int p = 0; p < half; ++p) lanes[p] = larger(lanes[p], lanes[p + half]);
    return lanes[0];
}

// out[n][column .. column + C vectors) += unit * words[n][p] * values[p], of a block
template <class V, int N, int C>
void mix_bytes(const std::uint8_t* values, int dim, int column, const std::int16_t (*words)[kPositions], float unit,
               float* const* out, bool first_tile) {
    typename V::Pairs sums[N][C];
    for (int n = 0; n < N; ++n)
        for (int c = 0; c < C; ++c) sums[n][c] = V::no_pairs();
    const std::int64_t ahead = first_tile ? kBlocksAhead * cached_nbytes(dim, 8) : 0;
    for (int p = 0; p < kPositions; p += 2) {
        const std::uint8_t* from = values + p * dim + 2 * column;
        __builtin_prefetch(values + ahead + column * kPositions + p * C * V::kWidth);
        typename V::Words its[C];
        for (int c = 0; c < C; ++c) its[c] = V::words(from + 2 * c * V::kWidth);
        for (int n = 0; n < N; ++n) {
            const auto weights = V::pair(words[n] + p);
            for (int c = 0; c < C; ++c) sums[n][c] = V::add_pairs(sums[n][c], its[c], weights);
        }
    }
    for (int n = 0; n < N; ++n)
        for (int c = 0; c < C; ++c) {
            float* to = out[n] + column + c * V::kWidth;
            V::store(to, V::fma(V::from_pairs(sums[n][c]), V::set1(unit), V::load(to)));
        }
}

// out[n] += weights[n * kSpan + p] * values[p] for positions first <= p < last of a block; weights are 0 elsewhere in it
template <class V, int N>
void mix_block(const std::uint8_t* values, int dim, const float* weights, int first, int last, float* const* out,
               bool first_tile) {
    constexpr int C = V::kWidth == 4 && V::kRegisters == 32 ? 4 : 2, strip = C * V::kWidth;
    static_assert(kCachedGroup % strip == 0, "one scale for a strip");
    const float largest = largest_scale<V>(values, dim, first, last), unit = largest / kMostWord;
    if (largest == 0.0f) return;
    for (int start = 0; start < dim; start += kCachedGroup) {
        alignas(64) std::int16_t words[N][kPositions];
        float scales[kPositions];
        const std::uint8_t* from = cached_scales(values, dim, start);
        __builtin_prefetch(from + (first_tile ? kBlocksAhead * cached_nbytes(dim, 8) : 0));
        for (int p = 0; p < kPositions; p += V::kWidth)
            V::store(scales + p, V::mul(V::template from_halves<false>(from + 2 * p), V::set1(kMostWord / largest)));
        for (int p = 0; p < first; ++p) scales[p] = 0.0f;  // what lies there may be anything
        for (int p = last; p < kPositions; ++p) scales[p] = 0.0f;
        for (int n = 0; n < N; ++n)
            for (int p = 0; p < kPositions; p += V::kWidth)
                V::store_words(words[n] + p, V::mul(V::load(weights + n * kSpan + p), V::load(scales + p)));
        int column = start;
        for (; column + strip <= dim && column < start + kCachedGroup; column += strip)
            mix_bytes<V, N, C>(values, dim, column, words, unit, out, first_tile);
        for (; column < dim && column < start + kCachedGroup; ++column)  // what does not fill them
            for (int n = 0; n < N; ++n) {
                std::int32_t sum = 0;
                for (int p = 0; p < kPositions; ++p)
                    sum += words[n][p] * static_cast<std::int8_t>(values[(p / 2 * dim + column) * 2 + p % 2]);
                out[n][column] += static_cast<float>(sum) * unit;
            }
    }
}

template <class V>
void attend_bytes(const Span& span) {
    alignas(64) float scores[kHeadsAtOnce][kSpan];
    for (int at = 0; at < span.last; at += kPositions)
        by_tiles<head_tile<V>()>(0, span.heads, [&](int head, auto count) {
            float* to[count.value];
            for (int n = 0; n < count.value; ++n) to[n] = scores[head + n] + at;
            const std::uint8_t* block = span.keys + at / kPositions * cached_nbytes(span.key_dim, 8);
            score_bytes<V, count.value>(block, span.words + 2 * head, span.stride, span.units + head, span.key_dim, to,
                                        head == 0);
        });
    const int start = span.first / kPositions * kPositions, end = (span.last + kPositions - 1) / kPositions * kPositions;
    for (int head = 0; head < span.heads; ++head) {
        exponentials(scores[head] + span.first, span.last - span.first, span.highest + head, span.sum + head);
        for (int p = start; p < span.first; ++p) scores[head][p] = 0.0f;
        for (int p = span.last; p < end; ++p) scores[head][p] = 0.0f;
    }
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(span.heads) * span.value_dim; ++i) span.out[i] = 0.0f;
    for (int at = start; at < end; at += kPositions)
        by_tiles<head_tile<V>()>(0, span.heads, [&](int head, auto count) {
            float* out[count.value];
            for (int n = 0; n < count.value; ++n) out[n] = span.out + static_cast<std::int64_t>(head + n) * span.value_dim;
            const int first = span.first > at ? span.first - at : 0, last = span.last - at < kPositions ? span.last - at : kPositions;
            const std::uint8_t* values = span.values + at / kPositions * cached_nbytes(span.value_dim, 8);
            mix_block<V, count.value>(values, span.value_dim, scores[head] + at, first, last, out, head == 0);
        });
}

template <class V>
void attend(const Span& span) {
    if (span.bits == 16) attend_halves<V>(span);
    else attend_bytes<V>(span);
}

}  // namespace
}  // namespace greenroom
