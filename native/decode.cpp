#include "decode.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "pool.h"

namespace greenroom {
namespace {

constexpr std::int64_t kAloneNbytes = 64 << 10;   // of cache: below, waking a thread takes longer
constexpr std::int64_t kAloneNumbers = 16 << 10;  // of queries

// x [count] in whole numbers below 2^15, two by two `stride` apart, which times what is returned are x.
float to_words(const float* x, int count, std::int16_t* words, std::int64_t stride) {
    const float largest = largest_magnitude(x, count);
    const bool usable = largest > 0.0f && std::isfinite(largest);
    for (int i = 0; i < count; ++i) {
        const float word = usable ? x[i] * (32767.0f / largest) + kWhole - kWhole : 0.0f;
        words[i / 2 * stride + i % 2] = static_cast<std::int16_t>(word);
    }
    return largest / 32767.0f;
}

// The attention of all query heads over first <= p <= length. Spans are cut by position alone, and put together in
// their order, so that the number of threads never shows.
void attend_all(const float* q, int heads, int kv_heads, int key_dim, int value_dim, const float* sinks,
                const KeyValues& cache, AttentionScratch& scratch, float* out, int threads) {
    const std::int64_t last = cache.length + 1, first_span = cache.first / kSpan, spans = (last + kSpan - 1) / kSpan - first_span;
    const int group = heads / kv_heads, slices = (group + kHeadsAtOnce - 1) / kHeadsAtOnce;
    const std::int64_t size = value_dim + 2;  // a head's sums over a span, then highest and sum
    const std::int64_t key_nbytes = cached_nbytes(key_dim, cache.bits), value_nbytes = cached_nbytes(value_dim, cache.bits);
    const std::int64_t stride = 2 * heads;
    if (cache.bits == 8) {
        scratch.words.assign(static_cast<std::size_t>((key_dim + 1) / 2 * stride), 0);
        scratch.units.resize(static_cast<std::size_t>(heads));
        parallel_for(heads, heads * key_dim < kAloneNumbers ? 1 : threads, [&](std::int64_t head) {
            std::int16_t* words = scratch.words.data() + 2 * head;
            scratch.units[static_cast<std::size_t>(head)] = to_words(q + head * key_dim, key_dim, words, stride);
        });
    }
    float* sums = sized(scratch.partial, spans * heads * size);
    float* highest = sums + spans * heads * value_dim;
    float* total = highest + spans * heads;
    const auto body = [&](std::int64_t item) {
        const std::int64_t number = item % spans, slice = item / spans % slices, kv_head = item / spans / slices;
        const std::int64_t start = (first_span + number) * kSpan;
        const std::int64_t head = kv_head * group + slice * kHeadsAtOnce, at = number * heads + head;
        Span span;
        span.q = q + head * key_dim;
        if (cache.bits == 8) span.words = scratch.words.data() + 2 * head, span.units = scratch.units.data() + head;
        span.heads = static_cast<int>(std::min<std::int64_t>(kHeadsAtOnce, (kv_head + 1) * group - head));
        span.stride = stride, span.key_dim = key_dim, span.value_dim = value_dim, span.bits = cache.bits;
        span.keys = cache.keys + kv_head * cache.head_nbytes(key_dim) + start / kPositions * key_nbytes;
        span.values = cache.values + kv_head * cache.head_nbytes(value_dim) + start / kPositions * value_nbytes;
        span.first = static_cast<int>(std::max<std::int64_t>(cache.first - start, 0));
        span.last = static_cast<int>(std::min<std::int64_t>(last - start, kSpan));
        span.out = sums + at * value_dim, span.highest = highest + at, span.sum = total + at;
        active().attend(span);
    };
    const std::int64_t nbytes = (last - cache.first) / kPositions * kv_heads * (key_nbytes + value_nbytes);
    parallel_for(spans * slices * kv_heads, nbytes < kAloneNbytes ? 1 : threads, body);

    for (int head = 0; head < heads; ++head) {
        float top = sinks != nullptr ? sinks[head] : highest[head], sum = 0.0f;
        for (std::int64_t s = 0; s < spans; ++s) top = std::max(top, highest[s * heads + head]);
        float* to = out + static_cast<std::int64_t>(head) * value_dim;
        std::fill(to, to + value_dim, 0.0f);
        for (std::int64_t s = 0; s < spans; ++s) {
            const std::int64_t at = s * heads + head;
            const float factor = std::exp(highest[at] - top);
            sum += factor * total[at];
            for (int d = 0; d < value_dim; ++d) to[d] += factor * sums[at * value_dim + d];
        }
        if (sinks != nullptr) sum += std::exp(sinks[head] - top);
        for (int d = 0; d < value_dim; ++d) to[d] /= sum;
    }
}

void multiply(const Weights& weights, const float* x, float* out, int threads) {
    linear(x, 1, weights.packed, weights.shape, weights.bias, out, threads);
}

// The nearest float16 of a number from 0 to 1, of two the even one.
float rounded_to_float16(float x) {
    int exponent;
    std::frexp(x, &exponent);  // x < 2^exponent
    const float step = std::ldexp(1.0f, std::max(exponent - 11, -24));
    return std::nearbyint(x / step) * step;
}

}  // namespace

Decoder::Decoder(std::vector<DecoderLayer> layers, std::int64_t width, float* hidden, float* normed)
    : layers_(std::move(layers)), width_(width), hidden_(hidden), normed_(normed) {
    projected_.resize(static_cast<std::size_t>(width));
    shared_.resize(static_cast<std::size_t>(width));
}

Chosen Decoder::attend(std::size_t layer, const KeyValues& cache, const float* cosine, const float* sine, int threads) {
    const DecoderLayer& it = layers_.at(layer);
    normalize(it.before_attention, hidden_, width_, normed_);
    const float* added = it.attention ? attention(*it.attention, cache, cosine, sine, threads)
                                      : latent_attention(*it.latent_attention, cache, cosine, sine, threads);
    for (std::int64_t i = 0; i < width_; ++i) hidden_[i] += added[i];
    normalize(it.before_mlp, hidden_, width_, normed_);
    if (it.router) return route(*it.router, threads);
    mlp(*it.mlp, projected_.data(), threads);
    for (std::int64_t i = 0; i < width_; ++i) hidden_[i] += projected_[static_cast<std::size_t>(i)];
    return {};
}

const float* Decoder::attention(const Attention& it, const KeyValues& cache, const float* cosine, const float* sine,
                                int threads) {
    const int dim = it.head_dim;
    float* q = sized(a_, it.heads * dim);
    float* k = sized(b_, 2 * it.kv_heads * dim);
    float* v = k + it.kv_heads * dim;
    const Linear projections[] = {{it.query.packed, it.query.shape, it.query.bias, q},
                                  {it.key.packed, it.key.shape, it.key.bias, k},
                                  {it.value.packed, it.value.shape, it.value.bias, v}};
    linears(normed_, 1, projections, 3, threads);
    finish_heads(it, q, k, v, cosine, sine);
    for (int i = 0; i < it.heads * dim; ++i) q[i] *= it.scale;
    for (int head = 0; head < it.kv_heads; ++head) {
        put_key(cache, head, cache.length, k + head * dim, dim);
        put_value(cache, head, cache.length, v + head * dim, dim);
    }
    float* mixed = sized(c_, it.heads * dim);
    attend_all(q, it.heads, it.kv_heads, dim, dim, it.sinks, cache, scratch_, mixed, threads);
    multiply(it.output, mixed, projected_.data(), threads);
    return projected_.data();
}

const float* Decoder::latent_attention(const LatentAttention& it, const KeyValues& cache, const float* cosine,
                                       const float* sine, int threads) {
    const int head_dim = it.nope_dim + it.rotary_dim, key_dim = it.latent_dim + it.rotary_dim;
    float* q = sized(a_, it.heads * head_dim);
    float* latent = sized(b_, key_dim);
    if (it.query_down) {
        float* down = sized(c_, it.query_down.shape.rows);
        const Linear projections[] = {{it.query_down.packed, it.query_down.shape, it.query_down.bias, down},
                                      {it.latent.packed, it.latent.shape, it.latent.bias, latent}};
        linears(normed_, 1, projections, 2, threads);
        normalize(it.query_norm, down, it.query_down.shape.rows, down);
        multiply(it.query, down, q, threads);
    } else {
        const Linear projections[] = {{it.query.packed, it.query.shape, it.query.bias, q},
                                      {it.latent.packed, it.latent.shape, it.latent.bias, latent}};
        linears(normed_, 1, projections, 2, threads);
    }
    normalize(it.latent_norm, latent, it.latent_dim, latent);
    rotate(it.rotation, latent + it.latent_dim, it.rotary_dim, cosine, sine);
    put_key(cache, 0, cache.length, latent, key_dim);
    put_value(cache, 0, cache.length, latent, it.latent_dim);

    // a head's query in the latent's space: nope . key_up, then the rotated part as it is
    float* absorbed = sized(c_, static_cast<std::int64_t>(it.heads) * (key_dim + it.latent_dim));
    float* mixed = absorbed + it.heads * key_dim;
    parallel_for(it.heads, threads, [&](std::int64_t head) {
        float *from = q + head * head_dim, *to = absorbed + head * key_dim;
        rotate(it.rotation, from + it.nope_dim, it.rotary_dim, cosine, sine);
        active().mix(it.key_up + 2 * head * it.nope_dim * it.latent_dim, it.latent_dim, from, it.nope_dim, to);
        std::copy_n(from + it.nope_dim, it.rotary_dim, to + it.latent_dim);
        for (int i = 0; i < key_dim; ++i) to[i] *= it.scale;
    });
    attend_all(absorbed, it.heads, 1, key_dim, it.latent_dim, nullptr, cache, scratch_, mixed, threads);
    float* values = sized(a_, it.heads * it.value_dim);
    parallel_for(it.heads, threads, [&](std::int64_t head) {
        active().mix(it.value_up + 2 * head * it.latent_dim * it.value_dim, it.value_dim, mixed + head * it.latent_dim,
                     it.latent_dim, values + head * it.value_dim);
    });
    multiply(it.output, values, projected_.data(), threads);
    return projected_.data();
}

void Decoder::mlp(const Mlp& it, float* out, int threads) {
    const std::int64_t inner = it.gate.shape.rows;
    float* gate = sized(a_, 2 * inner);
    float* up = gate + inner;
    const Linear projections[] = {{it.gate.packed, it.gate.shape, it.gate.bias, gate},
                                  {it.up.packed, it.up.shape, it.up.bias, up}};
    linears(normed_, 1, projections, 2, threads);
    active().activate({Function::silu, Order::halves, 1.0f, INFINITY, 0.0f}, gate, up, 1, gate, inner);
    multiply(it.down, gate, out, threads);
    if (!it.scale) return;
    float logit;
    multiply(it.scale, normed_, &logit, 1);
    const float factor = sigmoid(logit);
    for (std::int64_t i = 0; i < width_; ++i) out[i] *= factor;
}

Chosen Decoder::route(const Router& it, int threads) {
    float* logits = sized(a_, it.weights.shape.rows);
    multiply(it.weights, normed_, logits, threads);
    logits_.assign(logits, logits + it.weights.shape.rows);
    corrected_ = it.correction != nullptr;
    return choose(it, logits);
}

std::vector<float> Decoder::shares() const {
    std::vector<float> out = logits_;
    if (out.empty()) return out;
    if (corrected_) {
        float sum = 0.0f;
        for (float& share : out) sum += share = sigmoid(share);
        for (float& share : out) share /= sum;
    } else {
        softmax(out.data(), static_cast<std::int64_t>(out.size()));
    }
    for (float& share : out) share = rounded_to_float16(share);
    return out;
}

std::vector<int> Decoder::foresee(std::size_t layer, int count, int threads) {
    const DecoderLayer& it = layers_.at(layer);
    if (!it.router) return {};
    const std::int64_t experts = it.router->weights.shape.rows;
    float* logits = sized(a_, experts + width_);
    float* seen = logits + experts;
    normalize(it.before_mlp, hidden_, width_, seen);
    multiply(it.router->weights, seen, logits, threads);
    return ranked(*it.router, logits, count);
}

void Decoder::shared(std::size_t layer, int threads) {
    const DecoderLayer& it = layers_.at(layer);
    if (it.router && it.mlp) mlp(*it.mlp, shared_.data(), threads);
}

void Decoder::combine(std::size_t layer, const float* outputs, const std::vector<float>& weights) {
    float* sum = projected_.data();
    std::fill(sum, sum + width_, 0.0f);
    for (std::size_t e = 0; e < weights.size(); ++e)
        for (std::int64_t i = 0; i < width_; ++i)
            sum[i] += outputs[static_cast<std::int64_t>(e) * width_ + i] * weights[e];
    const DecoderLayer& it = layers_.at(layer);
    if (it.router && it.mlp)
        for (std::int64_t i = 0; i < width_; ++i) sum[i] += shared_[static_cast<std::size_t>(i)];
    for (std::int64_t i = 0; i < width_; ++i) hidden_[i] += sum[i];
}

std::vector<Foreseen> Decoder::foresee_all(std::size_t layer, const Foresight& foresight, int threads) {
    std::vector<Foreseen> found;
    if (foresight.experts == 0) return found;
    for (std::size_t ahead = layer + 1; ahead < layers_.size() && static_cast<int>(found.size()) < foresight.layers; ++ahead)
        if (layers_[ahead].router) found.push_back({ahead, foresee(ahead, foresight.experts, threads)});
    return found;
}

Walked Decoder::walk(std::size_t first, std::size_t last, const std::vector<KeyValues>& caches, const float* cosine,
                     const float* sine, const std::vector<Records>& records, const Foresight& foresight,
                     const Lacks& lacks, bool with_shares, float* outputs, int threads) {
    using Clock = std::chrono::steady_clock;
    static constexpr std::int64_t kFirstRow = 0;
    const auto there = [&](std::size_t layer, const std::vector<int>& experts) {
        const auto& at = records.at(layer).at;
        return std::all_of(experts.begin(), experts.end(), [&](int e) { return at.at(static_cast<std::size_t>(e)) != nullptr; });
    };
    passed_.clear();  // what a walk left that ended with an error
    std::chrono::duration<double> foreseeing{0};
    int layers = 0;
    const auto walked = [&](std::size_t end) { return Walked{end, foreseeing.count() / std::max(layers, 1)}; };
    std::vector<Task> tasks;
    for (std::size_t layer = first; layer < last; ++layer) {
        Chosen chosen = attend(layer, caches.at(layer), cosine, sine, threads);
        if (!layers_.at(layer).router) continue;
        const auto start = Clock::now();
        const std::vector<Foreseen> foreseen = foresee_all(layer, foresight, threads);
        foreseeing += Clock::now() - start, ++layers;
        const bool all = there(layer, chosen.experts) &&
                         std::all_of(foreseen.begin(), foreseen.end(), [&](const Foreseen& it) { return there(it.layer, it.experts); });
        if (!all && !(lacks(layer, chosen, foreseen) && there(layer, chosen.experts))) return walked(layer);
        tasks.clear();
        for (int expert : chosen.experts)
            tasks.push_back({records[layer].at[static_cast<std::size_t>(expert)], &kFirstRow, 1,
                             outputs + static_cast<std::int64_t>(tasks.size()) * width_});
        shared(layer, threads);
        experts(normed_, tasks, records[layer].layout, threads);
        combine(layer, outputs, chosen.weights);
        passed_.push_back({layer, std::move(chosen), with_shares ? shares() : std::vector<float>()});
    }
    return walked(last);
}

void Decoder::finish(const Norm& norm) { normalize(norm, hidden_, width_, normed_); }

}  // namespace greenroom
