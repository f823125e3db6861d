// Causal attention of many tokens, over the operations V of one instruction set; included once by each instruction set's
// translation unit, like rows.h and under the same rules.
//
// Rows lie along vectors: scores are kept [keys, rows] and sums [value_dim, rows], so that the softmax is arithmetic
// between vectors, keys and values are read as they lie, and both products are one function. Keys come a tile at a time,
// cached ones widened first; what was summed before is scaled down when a row's highest score grows (arXiv:2205.14135).
#pragma once

#include "activation.h"
#include "cached.h"
#include "matrix.h"

namespace greenroom {
namespace {

constexpr int kTileDeep = 6;        // rows of `a` that share what is loaded of `b`
constexpr float kUnseen = -1e30f;   // below any score, and finite

// out[i][r] = out[i][r] * factor[r] + sum over k of a[i][k] b[k][r], or the sum alone. a: N rows, of which k are
// `step` apart; b, out: [_, kRows].
template <class V, int N>
void multiply_tile(const float* a, std::int64_t stride, std::int64_t step, int count, const float* b, const float* factor,
                   float* out) {
    constexpr int W = V::kWidth, C = V::kRegisters == 32 ? 4 : 2;
    for (int column = 0; column < kRows; column += C * W) {
        typename V::F sums[N][C];
        for (int n = 0; n < N; ++n)
            for (int c = 0; c < C; ++c)
                sums[n][c] = factor == nullptr ? V::zero() : V::mul(V::load(out + n * kRows + column + c * W), V::load(factor + column + c * W));
        for (int k = 0; k < count; ++k) {
            typename V::F its[C];
            for (int c = 0; c < C; ++c) its[c] = V::load(b + k * kRows + column + c * W);
            for (int n = 0; n < N; ++n) {
                const auto x = V::set1(a[n * stride + k * step]);
                for (int c = 0; c < C; ++c) sums[n][c] = V::fma(its[c], x, sums[n][c]);
            }
        }
        for (int n = 0; n < N; ++n)
            for (int c = 0; c < C; ++c) V::store(out + n * kRows + column + c * W, sums[n][c]);
    }
}

// The same for any number of rows of `a`.
template <class V>
void multiply_tiles(const float* a, std::int64_t stride, std::int64_t step, int rows, int count, const float* b,
                    const float* factor, float* out) {
    for (; rows > 0; rows -= kTileDeep, a += kTileDeep * stride, out += kTileDeep * kRows) switch (rows) {
            case 1: multiply_tile<V, 1>(a, stride, step, count, b, factor, out); break;
            case 2: multiply_tile<V, 2>(a, stride, step, count, b, factor, out); break;
            case 3: multiply_tile<V, 3>(a, stride, step, count, b, factor, out); break;
            case 4: multiply_tile<V, 4>(a, stride, step, count, b, factor, out); break;
            case 5: multiply_tile<V, 5>(a, stride, step, count, b, factor, out); break;
            default: multiply_tile<V, kTileDeep>(a, stride, step, count, b, factor, out); break;
        }
}

// Some positions' keys or values in float32: `from`, positions `stride` and dimensions `step` apart.
struct Positions {
    const float* from;
    std::int64_t stride, step;
};

template <class V>
Positions tile_of_keys(const Queries& it, int start, int count, float* scratch) {
    if (it.cached_keys == nullptr) return {it.keys + start * it.key_stride, it.key_stride, 1};
    const std::int64_t nbytes = cached_nbytes(it.key_dim, it.bits);
    for (int first = 0; first < count; first += kPositions)
        widen_keys<V>(it.cached_keys + (start + first) / kPositions * nbytes, it.key_dim, it.bits, 0, it.key_dim, scratch + first, kKeysAtOnce);
    return {scratch, 1, kKeysAtOnce};
}

template <class V>
Positions tile_of_values(const Queries& it, int start, int count, float* scratch) {
    if (it.cached_values == nullptr) return {it.values + start * it.value_stride, it.value_stride, 1};
    const std::int64_t nbytes = cached_nbytes(it.value_dim, it.bits);
    for (int first = 0; first < count; first += kPositions)
        widen_values<V>(it.cached_values + (start + first) / kPositions * nbytes, it.value_dim, it.bits,
                        count - first < kPositions ? count - first : kPositions, scratch + first * it.value_dim);
    return {scratch, it.value_dim, 1};
}

// What each row has seen so far.
struct Softmax {
    alignas(64) float highest[kRows], sum[kRows], factor[kRows];
    alignas(64) std::int32_t first[kRows], last[kRows];  // keys that it sees
};

// Scores [count, kRows] of the keys from `start` on become weights. `all`: every row sees all of them.
inline void weigh(float* scores, int start, int count, bool all, Softmax& rows) {
    alignas(64) float top[kRows];
    for (int r = 0; r < kRows; ++r) top[r] = rows.highest[r];
    for (int k = 0; k < count; ++k) {
        float* its = scores + k * kRows;
        if (!all)
            for (int r = 0; r < kRows; ++r) its[r] = start + k >= rows.first[r] && start + k <= rows.last[r] ? its[r] : kUnseen;
        for (int r = 0; r < kRows; ++r) top[r] = its[r] > top[r] ? its[r] : top[r];
    }
    for (int r = 0; r < kRows; ++r) rows.factor[r] = exponential(rows.highest[r] - top[r]);
    for (int r = 0; r < kRows; ++r) rows.highest[r] = top[r];
    for (int r = 0; r < kRows; ++r) rows.sum[r] *= rows.factor[r];
    for (int k = 0; k < count; ++k) {
        float* its = scores + k * kRows;
        for (int r = 0; r < kRows; ++r) its[r] = exponential(its[r] - top[r]);
        if (!all)  // a row that has seen nothing yet has no highest to be below
            for (int r = 0; r < kRows; ++r) its[r] = start + k >= rows.first[r] && start + k <= rows.last[r] ? its[r] : 0.0f;
        for (int r = 0; r < kRows; ++r) rows.sum[r] += its[r];
    }
}

template <class V>
void attend_causally(const Queries& it) {
    float *q = it.scratch, *sums = q + kRows * it.key_dim, *scores = sums + kRows * it.value_dim;
    float *keys = scores + kRows * kKeysAtOnce, *values = keys + kKeysAtOnce * it.key_dim;
    Softmax rows;
    for (int r = 0; r < kRows; ++r) {  // what is not there repeats the last
        const int there = r < it.tokens * it.heads ? r : it.tokens * it.heads - 1, token = there / it.heads, head = there % it.heads;
        const float* from = it.q + token * it.q_stride + head * it.key_dim;
        for (int d = 0; d < it.key_dim; ++d) q[d * kRows + r] = from[d];
        rows.highest[r] = it.sinks == nullptr ? kUnseen : it.sinks[head];
        rows.sum[r] = it.sinks == nullptr ? 0.0f : 1.0f;
        rows.last[r] = static_cast<std::int32_t>(it.position + token);
        const std::int64_t first = it.window == 0 ? 0 : it.position + token + 1 - it.window;
        rows.first[r] = static_cast<std::int32_t>(first < 0 ? 0 : first);
    }
    for (int i = 0; i < kRows * it.value_dim; ++i) sums[i] = 0.0f;
    for (int start = rows.first[0] / kPositions * kPositions; start <= rows.last[kRows - 1]; start += kKeysAtOnce) {
        const int left = rows.last[kRows - 1] + 1 - start, count = left < kKeysAtOnce ? left : kKeysAtOnce;
        const Positions key = tile_of_keys<V>(it, start, count, keys);
        multiply_tiles<V>(key.from, key.stride, key.step, count, it.key_dim, q, nullptr, scores);
        weigh(scores, start, count, start >= rows.first[kRows - 1] && start + count - 1 <= rows.last[0], rows);
        const Positions value = tile_of_values<V>(it, start, count, values);
        multiply_tiles<V>(value.from, value.step, value.stride, it.value_dim, count, scores, rows.factor, sums);
    }
    for (int r = 0; r < it.tokens * it.heads; ++r) {
        float* to = it.out + r / it.heads * it.out_stride + r % it.heads * it.value_dim;
        for (int d = 0; d < it.value_dim; ++d) to[d] = sums[d * kRows + r] / rows.sum[r];
    }
}

}  // namespace
}  // namespace greenroom
