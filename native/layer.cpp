#include "layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace greenroom {
namespace {

constexpr int kLanes = 16;         // sums that are kept side by side, so that compilers can use vectors

float inverse_root_mean_square(const float* x, std::int64_t count, float eps) {
    float sums[kLanes] = {};
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) sums[lane] += x[i + lane] * x[i + lane];
    float sum = 0.0f;
    for (; i < count; ++i) sum += x[i] * x[i];
    for (float lane : sums) sum += lane;
    return 1.0f / std::sqrt(sum / static_cast<float>(count) + eps);
}

std::uint16_t to_half(float value) {
    if (value != value) return 0x7e00u;
    value = std::clamp(value, -65504.0f, 65504.0f);
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const std::uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits < 0x38800000u) {  // below 2^-14: float16's spacing is 2^-24 there, as float32's is in [0.5, 1)
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        const float shifted = magnitude + 0.5f;
        std::uint32_t rounded;
        std::memcpy(&rounded, &shifted, 4);
        return static_cast<std::uint16_t>(sign | (rounded - 0x3f000000u));
    }
    bits += 0xfffu + (bits >> 13 & 1u);
    return static_cast<std::uint16_t>(sign | (bits - 0x38000000u) >> 13);
}

// x [dim] into halves `step` apart.
void put_halves(std::uint8_t* to, std::int64_t step, const float* x, std::int64_t dim) {
    for (std::int64_t i = 0; i < dim; ++i) {
        const std::uint16_t half = to_half(x[i]);
        std::memcpy(to + 2 * i * step, &half, 2);
    }
}

// The nearest bfloat16, of two the even one, and its bits.
float to_bfloat16(float value, std::uint16_t* half) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value == value) bits += 0x7fffu + (bits >> 16 & 1u);
    *half = static_cast<std::uint16_t>(bits >> 16);
    bits &= 0xffff0000u;
    std::memcpy(&value, &bits, 4);
    return value;
}

// x [dim] into bytes, `step` from one to the next of two and `two_step` from two to two, and the scale of each group
// kPositions apart: its largest number is 127 of it.
void put_bytes(std::uint8_t* to, std::int64_t step, std::int64_t two_step, std::uint8_t* scales, const float* x,
               std::int64_t dim) {
    for (std::int64_t start = 0; start < dim; start += kCachedGroup, scales += 2 * kPositions) {
        const std::int64_t end = std::min<std::int64_t>(start + kCachedGroup, dim);
        std::uint16_t half;
        const float scale = to_bfloat16(std::min(largest_magnitude(x + start, end - start), 65504.0f) / 127.0f, &half);
        std::memcpy(scales, &half, 2);
        for (std::int64_t i = start; i < end; ++i) {
            const float code = scale > 0.0f ? std::clamp(x[i] / scale, -127.0f, 127.0f) : 0.0f;
            to[i / 2 * two_step + i % 2 * step] = static_cast<std::uint8_t>(static_cast<std::int32_t>(code + kWhole - kWhole));
        }
    }
}

// The block of a position, all of a head's number of dimensions.
std::int64_t block_offset(const KeyValues& cache, std::int64_t kv_head, std::int64_t position, std::int64_t dim) {
    return kv_head * cache.head_nbytes(dim) + position / kPositions * cached_nbytes(dim, cache.bits);
}

void normalize_heads(const Norm& norm, float* x, int heads, int dim, bool each) {
    if (norm.weight == nullptr) return;
    if (!each) return normalize(norm, x, static_cast<std::int64_t>(heads) * dim, x);
    for (int head = 0; head < heads; ++head) normalize(norm, x + head * dim, dim, x + head * dim);
}

// The `count` largest, largest first; the first of equals.
std::vector<int> largest(const float* x, int size, int count) {
    std::vector<int> order(static_cast<std::size_t>(size));
    for (int i = 0; i < size; ++i) order[static_cast<std::size_t>(i)] = i;
    const auto before = [x](int i, int j) { return x[i] > x[j] || (x[i] == x[j] && i < j); };
    std::partial_sort(order.begin(), order.begin() + count, order.end(), before);
    order.resize(static_cast<std::size_t>(count));
    return order;
}

// -infinity for experts outside the best groups
void keep_groups(const Router& it, std::vector<float>& choice) {
    const int size = static_cast<int>(choice.size()) / it.groups;
    std::vector<float> scores(static_cast<std::size_t>(it.groups));
    for (int group = 0; group < it.groups; ++group) {
        const float* members = choice.data() + group * size;
        float& score = scores[static_cast<std::size_t>(group)];
        score = 0.0f;
        for (int member : largest(members, size, it.group_by_two ? 2 : 1)) score += members[member];
    }
    std::vector<bool> kept(scores.size());
    for (int group : largest(scores.data(), it.groups, it.top_groups)) kept[static_cast<std::size_t>(group)] = true;
    for (std::size_t i = 0; i < choice.size(); ++i)
        if (!kept[i / static_cast<std::size_t>(size)]) choice[i] = -INFINITY;
}

// Makes scores of logits; gives what experts are chosen by.
std::vector<float> preferences(const Router& it, float* logits) {
    const int experts = static_cast<int>(it.weights.shape.rows);
    if (it.scores == Router::Scores::softmax) softmax(logits, experts);
    if (it.scores == Router::Scores::sigmoid)
        for (int i = 0; i < experts; ++i) logits[i] = sigmoid(logits[i]);

    std::vector<float> choice(logits, logits + experts);
    if (it.correction != nullptr)
        for (int i = 0; i < experts; ++i) choice[static_cast<std::size_t>(i)] += it.correction[i];
    if (it.groups > 1) keep_groups(it, choice);
    return choice;
}

}  // namespace

void normalize(const Norm& norm, const float* x, std::int64_t count, float* out) {
    const float factor = inverse_root_mean_square(x, count, norm.eps);
    for (std::int64_t i = 0; i < count; ++i) out[i] = norm.weight[i] * (x[i] * factor);
}

void finish_heads(const Attention& it, float* q, float* k, float* v, const float* cosine, const float* sine) {
    const int dim = it.head_dim;
    normalize_heads(it.query_norm, q, it.heads, dim, it.norm_each_head);
    normalize_heads(it.key_norm, k, it.kv_heads, dim, it.norm_each_head);
    if (it.clip > 0.0f) {
        for (int i = 0; i < it.heads * dim; ++i) q[i] = std::clamp(q[i], -it.clip, it.clip);
        for (int i = 0; i < it.kv_heads * dim; ++i) k[i] = std::clamp(k[i], -it.clip, it.clip);
        for (int i = 0; i < it.kv_heads * dim; ++i) v[i] = std::clamp(v[i], -it.clip, it.clip);
    }
    for (int head = 0; head < it.heads; ++head) rotate(it.rotation, q + head * dim, it.rotary_dim, cosine, sine);
    for (int head = 0; head < it.kv_heads; ++head) rotate(it.rotation, k + head * dim, it.rotary_dim, cosine, sine);
}

void rotate(Rotation rotation, float* x, int dim, const float* cosine, const float* sine) {
    const int half = dim / 2;
    if (rotation == Rotation::halves) {
        for (int i = 0; i < half; ++i) {
            const float first = x[i], second = x[i + half];
            x[i] = first * cosine[i] - second * sine[i];
            x[i + half] = second * cosine[i] + first * sine[i];
        }
        return;
    }
    for (int i = 0; i < half; ++i) {
        const float first = x[2 * i], second = x[2 * i + 1];
        x[2 * i] = first * cosine[i] - second * sine[i];
        x[2 * i + 1] = second * cosine[i] + first * sine[i];
    }
    if (rotation == Rotation::pairs) return;
    std::vector<float> turned(x, x + dim);
    for (int i = 0; i < half; ++i) x[i] = turned[2 * i], x[i + half] = turned[2 * i + 1];
}

Chosen choose(const Router& it, float* logits) {
    Chosen chosen{ranked(it, logits, it.top_k), {}};
    std::sort(chosen.experts.begin(), chosen.experts.end());

    for (int expert : chosen.experts) chosen.weights.push_back(logits[expert]);
    if (it.scores == Router::Scores::softmax_of_chosen) softmax(chosen.weights.data(), it.top_k);
    float sum = 0.0f;
    for (float weight : chosen.weights) sum += weight;
    for (float& weight : chosen.weights) weight = (it.normalize ? weight / sum : weight) * it.scale;
    return chosen;
}

std::vector<int> ranked(const Router& it, float* logits, int count) {
    const int experts = static_cast<int>(it.weights.shape.rows);
    return largest(preferences(it, logits).data(), experts, std::min(count, experts));
}

void put_key(const KeyValues& cache, std::int64_t kv_head, std::int64_t position, const float* x, std::int64_t dim) {
    const std::int64_t lane = position % kPositions;
    std::uint8_t* block = cache.keys + block_offset(cache, kv_head, position, dim);
    if (cache.bits == 16) put_halves(block + 2 * lane, kPositions, x, dim);
    else put_bytes(block + 2 * lane, 1, 2 * kPositions, cached_scales(block, dim, 0) + 2 * lane, x, dim);
}

void put_value(const KeyValues& cache, std::int64_t kv_head, std::int64_t position, const float* x, std::int64_t dim) {
    const std::int64_t lane = position % kPositions;
    std::uint8_t* block = cache.values + block_offset(cache, kv_head, position, dim);
    if (cache.bits == 16) put_halves(block + 2 * lane * dim, 1, x, dim);
    else put_bytes(block + lane / 2 * 2 * dim + lane % 2, 2, 4, cached_scales(block, dim, 0) + 2 * lane, x, dim);
}

float largest_magnitude(const float* x, std::int64_t count) {
    float largest = 0.0f;
    for (std::int64_t i = 0; i < count; ++i)
        if (!(std::abs(x[i]) <= largest) && largest == largest) largest = std::abs(x[i]);
    return largest;
}

float* sized(std::vector<float>& buffer, std::int64_t count) {
    if (buffer.size() < static_cast<std::size_t>(count)) buffer.resize(static_cast<std::size_t>(count));
    return buffer.data();
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

void softmax(float* x, std::int64_t count) {
    const float highest = *std::max_element(x, x + count);
    float sum = 0.0f;
    for (std::int64_t i = 0; i < count; ++i) sum += x[i] = std::exp(x[i] - highest);
    for (std::int64_t i = 0; i < count; ++i) x[i] /= sum;
}

}  // namespace greenroom
