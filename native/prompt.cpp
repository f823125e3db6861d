#include "prompt.h"

#include <algorithm>
#include <cmath>

#include "pool.h"

namespace greenroom {
namespace {

constexpr std::int64_t kTokensAtOnce = 8;  // of what is done to one after another

// Causal attention of all heads, cut into what shares a key-value head. `all` describes the first token's heads of the
// first key-value head; key_head and value_head: numbers between key-value heads, or bytes where they are cached. Cut by
// numbers of tokens and heads alone, so that the number of threads never shows.
void attend_all(const Queries& all, std::int64_t tokens, int heads, int kv_heads, std::int64_t key_head,
                std::int64_t value_head, int threads) {
    const std::int64_t group = heads / kv_heads, at_once = std::min<std::int64_t>(group, kRows), slices = (group + at_once - 1) / at_once;
    const std::int64_t step = kRows / at_once, blocks = (tokens + step - 1) / step;
    parallel_for(kv_heads * slices * blocks, threads, [&](std::int64_t item) {
        const std::int64_t block = item % blocks, slice = item / blocks % slices, kv_head = item / blocks / slices;
        const std::int64_t head = kv_head * group + slice * at_once, token = block * step;
        std::vector<float> scratch(static_cast<std::size_t>(Queries::scratch_floats(all.key_dim, all.value_dim) + 16));
        Queries its = all;
        its.tokens = static_cast<int>(std::min(step, tokens - token));
        its.heads = static_cast<int>(std::min(at_once, group - slice * at_once));
        its.q += token * all.q_stride + head * all.key_dim;
        its.out += token * all.out_stride + head * all.value_dim;
        if (all.cached_keys != nullptr) its.cached_keys += kv_head * key_head, its.cached_values += kv_head * value_head;
        else its.keys += kv_head * key_head, its.values += kv_head * value_head;
        its.position += token;
        if (all.sinks != nullptr) its.sinks += head;
        its.scratch = scratch.data() + (64 - reinterpret_cast<std::uintptr_t>(scratch.data()) % 64) % 64 / sizeof(float);
        active().attend_causally(its);
    });
}

Linear linear_of(const Weights& weights, float* out) { return {weights.packed, weights.shape, weights.bias, out}; }

}  // namespace

Prompt::Prompt(const std::vector<DecoderLayer>& layers, std::int64_t width, std::int64_t count, float* hidden, float* normed,
               const float* cosine, const float* sine, bool rough)
    : layers_(layers), width_(width), count_(count), hidden_(hidden), normed_(normed), cosine_(cosine), sine_(sine), rough_(rough) {}

template <class Body>
void Prompt::each(int threads, const Body& body) const {
    parallel_for((count_ + kTokensAtOnce - 1) / kTokensAtOnce, threads, [&](std::int64_t item) {
        const std::int64_t last = std::min((item + 1) * kTokensAtOnce, count_);
        for (std::int64_t token = item * kTokensAtOnce; token < last; ++token) body(token);
    });
}

void Prompt::normalize_all(const Norm& norm, int threads) {
    each(threads, [&](std::int64_t token) { normalize(norm, hidden_ + token * width_, width_, normed_ + token * width_); });
}

void Prompt::add(const float* rows, int threads) {
    each(threads, [&](std::int64_t token) {
        float* to = hidden_ + token * width_;
        for (std::int64_t i = 0; i < width_; ++i) to[i] += rows[token * width_ + i];
    });
}

void Prompt::attend(std::size_t layer, const KeyValues& cache, std::int64_t window, std::int64_t* experts, float* weights, int threads) {
    const DecoderLayer& it = layers_.at(layer);
    normalize_all(it.before_attention, threads);
    if (it.attention) attention(*it.attention, cache, window, threads);
    else latent_attention(*it.latent_attention, cache, window, threads);
    normalize_all(it.before_mlp, threads);
    if (it.router) return route(*it.router, experts, weights, threads);
    mlp(*it.mlp, threads);
    add(out_.data(), threads);
}

void Prompt::attention(const Attention& it, const KeyValues& cache, std::int64_t window, int threads) {
    const int count = static_cast<int>(count_);
    const std::int64_t dim = it.head_dim, wide = it.heads * dim, narrow = it.kv_heads * dim;
    float *q = sized(q_, count_ * wide), *k = sized(a_, 2 * count_ * narrow), *v = k + count_ * narrow;
    const Linear projections[] = {linear_of(it.query, q), linear_of(it.key, k), linear_of(it.value, v)};
    linears(normed_, count, projections, 3, threads, rough_);
    each(threads, [&](std::int64_t token) {
        const std::int64_t turn = token * it.rotary_dim / 2;
        float *its_q = q + token * wide, *its_k = k + token * narrow, *its_v = v + token * narrow;
        finish_heads(it, its_q, its_k, its_v, cosine_ + turn, sine_ + turn);
        for (std::int64_t i = 0; i < wide; ++i) its_q[i] *= it.scale;
        for (std::int64_t head = 0; head < it.kv_heads; ++head) {
            put_key(cache, head, cache.length + token, its_k + head * dim, dim);
            put_value(cache, head, cache.length + token, its_v + head * dim, dim);
        }
    });
    Queries all{};
    all.q = q, all.q_stride = wide, all.out = q, all.out_stride = wide;
    all.key_dim = all.value_dim = it.head_dim;
    all.cached_keys = cache.keys, all.cached_values = cache.values, all.bits = cache.bits;
    all.position = cache.length, all.window = window, all.sinks = it.sinks;
    attend_all(all, count_, it.heads, it.kv_heads, cache.head_nbytes(dim), cache.head_nbytes(dim), threads);
    const Linear output = linear_of(it.output, sized(out_, count_ * width_));
    linears(q, count, &output, 1, threads, rough_);
    add(out_.data(), threads);
}

void Prompt::latent_attention(const LatentAttention& it, const KeyValues& cache, std::int64_t window, int threads) {
    const int count = static_cast<int>(count_);
    const std::int64_t head_dim = it.nope_dim + it.rotary_dim, wide = it.heads * head_dim, narrow = it.latent_dim + it.rotary_dim;
    float *q = sized(q_, count_ * wide), *latent = sized(a_, count_ * narrow);
    if (it.query_down) {
        const std::int64_t rank = it.query_down.shape.rows;
        float* down = sized(b_, count_ * rank);
        const Linear projections[] = {linear_of(it.query_down, down), linear_of(it.latent, latent)};
        linears(normed_, count, projections, 2, threads, rough_);
        each(threads, [&](std::int64_t token) { normalize(it.query_norm, down + token * rank, rank, down + token * rank); });
        const Linear up = linear_of(it.query, q);
        linears(down, count, &up, 1, threads, rough_);
    } else {
        const Linear projections[] = {linear_of(it.query, q), linear_of(it.latent, latent)};
        linears(normed_, count, projections, 2, threads, rough_);
    }
    each(threads, [&](std::int64_t token) {
        const float *cosine = cosine_ + token * it.rotary_dim / 2, *sine = sine_ + token * it.rotary_dim / 2;
        float *its_q = q + token * wide, *its = latent + token * narrow;
        for (int head = 0; head < it.heads; ++head) rotate(it.rotation, its_q + head * head_dim + it.nope_dim, it.rotary_dim, cosine, sine);
        for (std::int64_t i = 0; i < wide; ++i) its_q[i] *= it.scale;
        normalize(it.latent_norm, its, it.latent_dim, its);
        rotate(it.rotation, its + it.latent_dim, it.rotary_dim, cosine, sine);
        put_key(cache, 0, cache.length + token, its, narrow);
        put_value(cache, 0, cache.length + token, its, it.latent_dim);
    });
    attend_expanded(it, cache, window, threads);
}

// Attention over keys and values that are made of the cached latents, each head's own.
void Prompt::attend_expanded(const LatentAttention& it, const KeyValues& cache, std::int64_t window, int threads) {
    const std::int64_t length = cache.length + count_, key_dim = it.latent_dim + it.rotary_dim;
    const std::int64_t head_dim = it.nope_dim + it.rotary_dim, both = it.nope_dim + it.value_dim, wide = it.heads * both;
    float *up = sized(a_, length * wide), *keys = sized(b_, it.heads * length * head_dim);
    float *latents = sized(out_, length * key_dim), *turned = latents + length * it.latent_dim;
    parallel_for((length + kPositions - 1) / kPositions, threads, [&](std::int64_t block) {
        const std::int64_t first = block * kPositions, there = std::min<std::int64_t>(length - first, kPositions);
        active().widen_values(cache.values + block * cached_nbytes(it.latent_dim, cache.bits), it.latent_dim, cache.bits,
                              static_cast<int>(there), latents + first * it.latent_dim);
        float its[kPositions];
        for (int d = 0; d < it.rotary_dim; ++d) {
            active().widen_keys(cache.keys + block * cached_nbytes(key_dim, cache.bits), static_cast<int>(key_dim), cache.bits,
                                it.latent_dim + d, it.latent_dim + d + 1, its, kPositions);
            for (std::int64_t p = 0; p < there; ++p) turned[(first + p) * it.rotary_dim + d] = its[p];
        }
    });
    const Linear ups = linear_of(it.up, up);
    linears(latents, static_cast<int>(length), &ups, 1, threads, rough_);
    parallel_for(it.heads, threads, [&](std::int64_t head) {
        for (std::int64_t p = 0; p < length; ++p) {
            float* to = keys + (head * length + p) * head_dim;
            std::copy_n(up + p * wide + head * both, it.nope_dim, to);
            std::copy_n(turned + p * it.rotary_dim, it.rotary_dim, to + it.nope_dim);
        }
    });
    const std::int64_t out_dim = it.heads * it.value_dim;
    std::vector<float> mixed(static_cast<std::size_t>(count_ * out_dim));
    Queries all{};
    all.q = q_.data(), all.q_stride = it.heads * head_dim, all.out = mixed.data(), all.out_stride = out_dim;
    all.key_dim = static_cast<int>(head_dim), all.value_dim = it.value_dim;
    all.keys = keys, all.key_stride = head_dim, all.values = up + it.nope_dim, all.value_stride = wide;
    all.position = cache.length, all.window = window;
    attend_all(all, count_, it.heads, it.heads, length * head_dim, both, threads);
    const Linear output = linear_of(it.output, sized(out_, count_ * width_));
    linears(mixed.data(), static_cast<int>(count_), &output, 1, threads, rough_);
    add(out_.data(), threads);
}

void Prompt::mlp(const Mlp& it, int threads) {
    const int count = static_cast<int>(count_);
    const std::int64_t inner = it.gate.shape.rows;
    float *gate = sized(a_, 2 * count_ * inner), *up = gate + count_ * inner, *out = sized(out_, count_ * width_);
    const Linear projections[] = {linear_of(it.gate, gate), linear_of(it.up, up)};
    linears(normed_, count, projections, 2, threads, rough_);
    each(threads, [&](std::int64_t token) {
        float* its = gate + token * inner;
        active().activate({Function::silu, Order::halves, 1.0f, INFINITY, 0.0f}, its, up + token * inner, 1, its, inner);
    });
    const Linear down = linear_of(it.down, out);
    linears(gate, count, &down, 1, threads, rough_);
    if (!it.scale) return;
    float* logits = sized(a_, count_);
    const Linear scale = linear_of(it.scale, logits);
    linears(normed_, count, &scale, 1, threads, rough_);
    each(threads, [&](std::int64_t token) {
        const float factor = sigmoid(logits[token]);
        for (std::int64_t i = 0; i < width_; ++i) out[token * width_ + i] *= factor;
    });
}

void Prompt::route(const Router& it, std::int64_t* experts, float* weights, int threads) {
    const std::int64_t size = it.weights.shape.rows, top_k = it.top_k;
    float* logits = sized(a_, count_ * size);
    const Linear gate = linear_of(it.weights, logits);
    linears(normed_, static_cast<int>(count_), &gate, 1, threads, rough_);
    each(threads, [&](std::int64_t token) {
        const Chosen chosen = choose(it, logits + token * size);
        std::vector<std::size_t> order(chosen.experts.size());
        for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
        std::stable_sort(order.begin(), order.end(), [&](std::size_t i, std::size_t j) { return chosen.weights[i] > chosen.weights[j]; });
        for (std::size_t i = 0; i < order.size(); ++i) {
            experts[token * top_k + static_cast<std::int64_t>(i)] = chosen.experts[order[i]];
            weights[token * top_k + static_cast<std::int64_t>(i)] = chosen.weights[order[i]];
        }
    });
}

void Prompt::combine(std::size_t layer, const float* outputs, int threads) {
    const DecoderLayer& it = layers_.at(layer);
    add(outputs, threads);
    if (!it.router || !it.mlp) return;
    mlp(*it.mlp, threads);
    add(out_.data(), threads);
}

}  // namespace greenroom
