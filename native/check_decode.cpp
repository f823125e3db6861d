// Runs the decoder's parts on every instruction set of this machine, over buffers of exactly the size they should have,
// to be built with sanitizers like check.cpp. Attention is compared with double precision here, whole layers with
// transformers' modules in tests/test_decode.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "decode.h"
#include "prompt.h"

using namespace greenroom;

namespace {

int failures = 0, checks = 0;
std::mt19937 random_bits(7);

void expect(bool holds, const char* what, int a, int b, const char* isa) {
    ++checks;
    if (holds) return;
    ++failures;
    std::printf("FAILED %s: %d, %d, %s\n", what, a, b, isa);
}

float number() { return static_cast<float>(static_cast<int>(random_bits() % 2001) - 1000) / 1000.0f; }

// A float16 of magnitude below 2 and its value: sign, exponent 7 to 15, ten bits.
std::uint16_t half(double* value) {
    const unsigned bits = random_bits(), sign = bits & 1, exponent = 7 + bits / 2 % 9, fraction = bits >> 8 & 1023;
    *value = (sign ? -1.0 : 1.0) * std::ldexp(1.0 + fraction / 1024.0, static_cast<int>(exponent) - 15);
    return static_cast<std::uint16_t>(sign << 15 | exponent << 10 | fraction);
}

template <class T>
std::unique_ptr<T[]> array(std::int64_t count) {
    return std::unique_ptr<T[]>(new T[static_cast<std::size_t>(count)]());
}

// Numbers of one position that a cache holds exactly in 16 and in 8 bits: up to 127 of each group's own power of two.
void fill(float* x, int dim) {
    for (int start = 0; start < dim; start += kCachedGroup) {
        const int count = std::min(dim - start, kCachedGroup);
        const float step = std::ldexp(1.0f, -6 - static_cast<int>(random_bits() % 3));
        for (int i = 0; i < count; ++i) x[start + i] = step * static_cast<float>(static_cast<int>(random_bits() % 255) - 127);
        x[start + static_cast<int>(random_bits() % 32) % count] = random_bits() % 2 ? 127.0f * step : -127.0f * step;
    }
}

// Keys [length, key_dim] and values [length, value_dim], and a cache of them in buffers that end where they may.
struct Filled {
    std::unique_ptr<float[]> keys, values;
    std::unique_ptr<std::uint8_t[]> cached_keys, cached_values;

    Filled(int length, int key_dim, int value_dim, int bits) : keys(array<float>(length * key_dim)), values(array<float>(length * value_dim)) {
        const std::int64_t blocks = (length + kPositions - 1) / kPositions;
        cached_keys = array<std::uint8_t>(blocks * cached_nbytes(key_dim, bits));
        cached_values = array<std::uint8_t>(bits == 16 ? 2 * length * value_dim : blocks * cached_nbytes(value_dim, bits));
        const KeyValues cache{cached_keys.get(), cached_values.get(), blocks * kPositions, bits, 0, 0};
        for (int p = 0; p < length; ++p) {
            fill(keys.get() + p * key_dim, key_dim), fill(values.get() + p * value_dim, value_dim);
            put_key(cache, 0, p, keys.get() + p * key_dim, key_dim), put_value(cache, 0, p, values.get() + p * value_dim, value_dim);
        }
    }
};

// sharpness: how many times as far apart as usual scores are
void check_attend(const Isa& isa, int bits, int heads, int key_dim, int value_dim, int first, int last, float sharpness = 1.0f) {
    const Filled filled(last, key_dim, value_dim, bits);
    const float *k = filled.keys.get(), *v = filled.values.get();
    const int even_dim = key_dim + key_dim % 2;
    auto q = array<float>(heads * key_dim), out = array<float>(heads * value_dim), highest = array<float>(heads), sum = array<float>(heads);
    auto words = array<std::int16_t>(even_dim * heads);
    auto units = array<float>(heads);
    for (int head = 0; head < heads; ++head) {
        units[head] = sharpness / std::sqrt(static_cast<float>(key_dim)) / 32767.0f;
        for (int d = 0; d < key_dim; ++d) {
            const auto word = static_cast<std::int16_t>(d == head ? 32767 : static_cast<int>(random_bits() % 65535) - 32767);
            words[(d / 2 * heads + head) * 2 + d % 2] = word, q[head * key_dim + d] = units[head] * word;
        }
    }
    isa.attend({q.get(), words.get(), units.get(), 2 * heads, heads, key_dim, value_dim, bits, filled.cached_keys.get(), filled.cached_values.get(),
                first, last, out.get(), highest.get(), sum.get()});
    double worst = 0.0;
    for (int head = 0; head < heads; ++head) {
        std::vector<double> mixed(static_cast<std::size_t>(value_dim));
        double total = 0.0;
        for (int p = first; p < last; ++p) {
            double score = 0.0;
            for (int d = 0; d < key_dim; ++d) score += static_cast<double>(q[head * key_dim + d]) * static_cast<double>(k[p * key_dim + d]);
            const double weight = std::exp(score - static_cast<double>(highest[head]));
            total += weight;
            for (int d = 0; d < value_dim; ++d) mixed[static_cast<std::size_t>(d)] += weight * static_cast<double>(v[p * value_dim + d]);
        }
        worst = std::max(worst, std::abs(total / static_cast<double>(sum[head]) - 1.0));
        for (int d = 0; d < value_dim; ++d)
            worst = std::max(worst, std::abs(mixed[static_cast<std::size_t>(d)] - static_cast<double>(out[head * value_dim + d])) / total);
    }
    const double rounded = bits == 8 ? 3e-5 * std::sqrt(last - first) : 0.0;  // weights have 15 bits there
    expect(worst < 1e-5 * static_cast<double>(sharpness) + rounded, "attend", heads, last, isa.name);
}

void check_mix(const Isa& isa, int value_dim, int positions) {
    auto values = array<std::uint16_t>(positions * value_dim);
    auto weights = array<float>(positions), out = array<float>(value_dim);
    std::vector<double> want(static_cast<std::size_t>(value_dim));
    for (int p = 0; p < positions; ++p) {
        weights[p] = number();
        for (int d = 0; d < value_dim; ++d) {
            double value;
            values[p * value_dim + d] = half(&value);
            want[static_cast<std::size_t>(d)] += static_cast<double>(weights[p]) * value;
        }
    }
    isa.mix(reinterpret_cast<std::uint8_t*>(values.get()), value_dim, weights.get(), positions, out.get());
    double worst = 0.0;
    for (int d = 0; d < value_dim; ++d) worst = std::max(worst, std::abs(want[static_cast<std::size_t>(d)] - static_cast<double>(out[d])));
    expect(worst < 1e-5 * positions, "mix", value_dim, positions, isa.name);
}

// Rows of `tokens` tokens and `heads` heads over `position` keys before them, in buffers that end where they should.
// bits: of a cache, or 0 where there is none.
void check_causal(const Isa& isa, int tokens, int heads, int key_dim, int value_dim, int position, int window, bool sunk, int bits) {
    const bool cached = bits != 0;
    const Filled filled(position + tokens, key_dim, value_dim, cached ? bits : 16);
    const float *keys = filled.keys.get(), *values = filled.values.get();
    const int length = position + tokens;
    auto q = array<float>(tokens * heads * key_dim), out = array<float>(tokens * heads * value_dim), sinks = array<float>(heads);
    for (int i = 0; i < tokens * heads * key_dim; ++i) q[i] = 3.0f * number() / std::sqrt(static_cast<float>(key_dim));
    for (int head = 0; head < heads; ++head) sinks[head] = 5.0f * number();
    const std::size_t floats = static_cast<std::size_t>(Queries::scratch_floats(key_dim, value_dim) + 15) / 16 * 16;
    std::unique_ptr<float, void (*)(void*)> scratch(static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float))), std::free);
    isa.attend_causally({q.get(), tokens, heads, key_dim, value_dim, cached ? filled.cached_keys.get() : nullptr,
                         cached ? filled.cached_values.get() : nullptr, bits, cached ? nullptr : keys, cached ? nullptr : values,
                         heads * key_dim, key_dim, value_dim, heads * value_dim, position, window, sunk ? sinks.get() : nullptr,
                         out.get(), scratch.get()});
    double worst = 0.0, hidden = 0.0;  // the second: had each token seen the one after it, too
    for (int token = 0; token < tokens; ++token)
        for (int head = 0; head < heads; ++head) {
            const int last = position + token, first = window == 0 ? 0 : std::max(last + 1 - window, 0);
            for (int more = 0; more < 2 && last + more < length; ++more) {
                std::vector<double> mixed(static_cast<std::size_t>(value_dim));
                double total = sunk ? std::exp(static_cast<double>(sinks[head])) : 0.0;
                for (int p = first; p <= last + more; ++p) {
                    double score = 0.0;
                    for (int d = 0; d < key_dim; ++d) score += static_cast<double>(q[(token * heads + head) * key_dim + d]) * static_cast<double>(keys[p * key_dim + d]);
                    total += std::exp(score);
                    for (int d = 0; d < value_dim; ++d) mixed[static_cast<std::size_t>(d)] += std::exp(score) * static_cast<double>(values[p * value_dim + d]);
                }
                double& error = more == 0 ? worst : hidden;
                for (int d = 0; d < value_dim; ++d)
                    error = std::max(error, std::abs(mixed[static_cast<std::size_t>(d)] / total - static_cast<double>(out[(token * heads + head) * value_dim + d])));
            }
        }
    expect(worst < 1e-5, "causal attention", tokens, position, isa.name);
    if (tokens > 1) expect(hidden > 1e-3, "causal attention: what comes after is hidden", tokens, position, isa.name);
}

// Keeps what descriptions point to.
struct Memory {
    std::vector<std::unique_ptr<std::uint8_t[]>> bytes;
    std::vector<std::unique_ptr<float[]>> floats;

    Weights matrix(std::int64_t rows, std::int64_t cols) {
        const Shape shape{rows, cols, 16, 0, true};
        bytes.push_back(array<std::uint8_t>(shape.nbytes()));
        for (std::int64_t i = 0; i < rows * cols; ++i) {
            double value;
            const std::uint16_t bits = half(&value);
            std::memcpy(bytes.back().get() + 2 * i, &bits, 2);
        }
        return {bytes.back().get(), shape, nullptr};
    }
    const float* vector(std::int64_t count) {
        floats.push_back(array<float>(count));
        for (std::int64_t i = 0; i < count; ++i) floats.back()[i] = number();
        return floats.back().get();
    }
};

constexpr int kWidth = 40, kHeads = 6, kKvHeads = 2, kDim = 12, kLatent = 20, kRotary = 8;

DecoderLayer grouped(Memory& memory) {
    DecoderLayer layer;
    Attention attention;
    attention.query = memory.matrix(kHeads * kDim, kWidth), attention.key = memory.matrix(kKvHeads * kDim, kWidth);
    attention.value = memory.matrix(kKvHeads * kDim, kWidth), attention.output = memory.matrix(kWidth, kHeads * kDim);
    attention.query.bias = memory.vector(kHeads * kDim);
    attention.query_norm = {memory.vector(kDim), 1e-5f}, attention.key_norm = {memory.vector(kDim), 1e-5f};
    attention.norm_each_head = true, attention.clip = 8.0f, attention.scale = 0.3f, attention.sinks = memory.vector(kHeads);
    attention.heads = kHeads, attention.kv_heads = kKvHeads, attention.head_dim = kDim, attention.rotary_dim = kRotary;
    layer.attention = attention;
    Router router;
    router.weights = memory.matrix(12, kWidth), router.correction = memory.vector(12), router.scores = Router::Scores::sigmoid;
    router.top_k = 3, router.groups = 4, router.top_groups = 2, router.group_by_two = true, router.normalize = true;
    layer.router = router;
    layer.mlp = Mlp{memory.matrix(28, kWidth), memory.matrix(28, kWidth), memory.matrix(kWidth, 28), memory.matrix(1, kWidth)};
    return layer;
}

DecoderLayer latent(Memory& memory) {
    DecoderLayer layer;
    LatentAttention attention;
    attention.query_down = memory.matrix(16, kWidth), attention.query = memory.matrix(kHeads * (kDim + kRotary), 16);
    attention.latent = memory.matrix(kLatent + kRotary, kWidth), attention.output = memory.matrix(kWidth, kHeads * kDim);
    attention.query_norm = {memory.vector(16), 1e-5f}, attention.latent_norm = {memory.vector(kLatent), 1e-5f};
    attention.up = memory.matrix(kHeads * 2 * kDim, kLatent);
    attention.key_up = memory.matrix(kHeads * kDim, kLatent).packed;
    attention.value_up = memory.matrix(kHeads * kLatent, kDim).packed;
    attention.heads = kHeads, attention.nope_dim = kDim, attention.rotary_dim = kRotary, attention.latent_dim = kLatent;
    attention.value_dim = kDim, attention.rotation = Rotation::pairs_to_halves, attention.scale = 0.3f;
    layer.latent_attention = attention;
    layer.mlp = Mlp{memory.matrix(28, kWidth), memory.matrix(28, kWidth), memory.matrix(kWidth, 28), {}};
    return layer;
}

std::vector<float> decode(const std::vector<DecoderLayer>& layers, const float* norm, int tokens, int threads, int bits) {
    std::vector<float> hidden(kWidth), normed(kWidth), outputs(3 * kWidth, 0.25f), seen;
    const float cosine[] = {1.0f, 0.5f, 0.25f, 0.0f}, sine[] = {0.0f, 0.5f, 0.75f, 1.0f};
    Decoder decoder(layers, kWidth, hidden.data(), normed.data());
    const std::int64_t capacity = (tokens + kPositions - 1) / kPositions * kPositions;
    auto keys = array<std::uint16_t>(2 * capacity * (kLatent + kRotary)), values = array<std::uint16_t>(2 * capacity * kLatent);
    auto more_keys = array<std::uint16_t>(2 * capacity * (kLatent + kRotary)), more_values = array<std::uint16_t>(2 * capacity * kLatent);
    const auto bytes = [](auto& it) { return reinterpret_cast<std::uint8_t*>(it.get()); };
    for (int token = 0; token < tokens; ++token) {
        for (int i = 0; i < kWidth; ++i) hidden[static_cast<std::size_t>(i)] = static_cast<float>((token * 7 + i * 3) % 11 - 5);
        const std::int64_t first = token > 100 ? token - 70 : 0;
        const Chosen chosen = decoder.attend(0, {bytes(keys), bytes(values), capacity, bits, first, token}, cosine, sine, threads);
        for (int expert : decoder.foresee(0, 1 + token % 20, threads)) seen.push_back(static_cast<float>(expert));
        decoder.shared(0, threads);
        decoder.combine(0, outputs.data(), chosen.weights);
        decoder.attend(1, {bytes(more_keys), bytes(more_values), capacity, bits, 0, token}, cosine, sine, threads);
        decoder.finish({norm, 1e-5f});
        seen.insert(seen.end(), normed.begin(), normed.end());
    }
    return seen;
}

// The same with experts, layer by layer or in walks, of which those that `there` lacks are computed in between, or
// brought while it walks.
std::vector<float> walk(const std::vector<DecoderLayer>& layers, const Records& records, const Records* there, int tokens,
                        int threads, bool brings = false) {
    static const std::int64_t kFirstRow = 0;
    std::vector<float> hidden(kWidth), normed(kWidth), outputs(3 * kWidth), seen;
    const float cosine[] = {1.0f, 0.5f, 0.25f, 0.0f}, sine[] = {0.0f, 0.5f, 0.75f, 1.0f};
    Decoder decoder(layers, kWidth, hidden.data(), normed.data());
    std::vector<std::unique_ptr<std::uint16_t[]>> memory;
    for (int i = 0; i < 4; ++i) memory.push_back(array<std::uint16_t>(2 * kPositions * (kLatent + kRotary)));
    const auto bytes = [&](std::size_t number) { return reinterpret_cast<std::uint8_t*>(memory[number].get()); };
    const auto serve = [&](std::size_t layer, const Chosen& chosen) {
        decoder.shared(layer, threads);
        std::vector<Task> tasks;
        for (std::size_t e = 0; e < chosen.experts.size(); ++e)
            tasks.push_back({records.at[static_cast<std::size_t>(chosen.experts[e])], &kFirstRow, 1, outputs.data() + e * kWidth});
        experts(normed.data(), tasks, records.layout, threads);
        decoder.combine(layer, outputs.data(), chosen.weights);
    };
    const auto see = [&](const std::vector<float>& numbers) { seen.insert(seen.end(), numbers.begin(), numbers.end()); };
    for (int token = 0; token < tokens; ++token) {
        for (int i = 0; i < kWidth; ++i) hidden[static_cast<std::size_t>(i)] = static_cast<float>((token * 7 + i * 3) % 11 - 5);
        const std::vector<KeyValues> caches{{bytes(0), bytes(1), kPositions, 16, 0, token}, {bytes(2), bytes(3), kPositions, 16, 0, token}};
        for (std::size_t layer = 0; layer < layers.size();) {
            if (there != nullptr) {
                std::vector<Records> places{*there, {}};
                Chosen stopped;
                const auto lacks = [&](std::size_t at, const Chosen& chosen, const std::vector<Foreseen>& foreseen) {
                    expect(foreseen.empty(), "decoder: a layer without experts is not foreseen", static_cast<int>(at), 0, "");
                    for (int expert : chosen.experts)
                        if (brings) places[at].at[static_cast<std::size_t>(expert)] = records.at[static_cast<std::size_t>(expert)];
                    if (!brings) stopped = chosen;
                    return brings;
                };
                layer = decoder.walk(layer, layers.size(), caches, cosine, sine, places, {1, 3}, lacks, true, outputs.data(), threads).end;
                for (const Passed& passed : decoder.passed()) see(passed.chosen.weights), see(passed.shares);
                expect(decoder.passed().empty(), "decoder: what was passed is told once", threads, 0, "");
                if (!stopped.experts.empty()) see(stopped.weights), see(decoder.shares()), serve(layer++, stopped);
                continue;
            }
            const Chosen chosen = decoder.attend(layer, caches[layer], cosine, sine, threads);
            see(chosen.weights);
            if (layers[layer].router) see(decoder.shares()), serve(layer, chosen);
            ++layer;
        }
        see(hidden);
    }
    return seen;
}

void check_walk(const Isa& isa, const std::vector<DecoderLayer>& layers, Memory& memory) {
    const Weights first = memory.matrix(2 * 12 * 24, kWidth), second = memory.matrix(12 * kWidth, 24);  // of 12 experts
    const Shape one{2 * 24, kWidth, 16, 0, true}, other{kWidth, 24, 16, 0, true};
    Records records{{one, other, 0, one.nbytes(), -1, -1, false, {Function::silu, Order::halves, 1.0f, INFINITY, 0.0f}}, {}};
    std::vector<std::unique_ptr<std::uint8_t[]>> made;
    for (int expert = 0; expert < 12; ++expert) {
        made.push_back(array<std::uint8_t>(one.nbytes() + other.nbytes()));
        std::memcpy(made.back().get(), first.packed + expert * one.nbytes(), static_cast<std::size_t>(one.nbytes()));
        std::memcpy(made.back().get() + one.nbytes(), second.packed + expert * other.nbytes(), static_cast<std::size_t>(other.nbytes()));
        records.at.push_back(made.back().get());
    }
    const std::vector<float> want = walk(layers, records, nullptr, 9, 1);
    for (int threads : {1, 3}) expect(walk(layers, records, &records, 9, threads) == want, "decoder: a walk is its steps", threads, 0, isa.name);
    for (std::size_t kept : {0, 6}) {  // of the experts
        Records some = records;
        std::fill(some.at.begin() + static_cast<std::ptrdiff_t>(kept), some.at.end(), nullptr);
        for (bool brings : {false, true})
            expect(walk(layers, records, &some, 9, 1, brings) == want, "decoder: a walk and an expert that is elsewhere", static_cast<int>(kept), brings, isa.name);
    }
    Records others = records;
    std::swap(others.at[0], others.at[1]), std::swap(others.at[4], others.at[8]), std::swap(others.at[3], others.at[11]);
    expect(walk(layers, records, &others, 9, 1) != want, "decoder: other experts give other numbers", 1, 0, isa.name);
}

std::vector<float> prompt(const std::vector<DecoderLayer>& layers, int tokens, int threads, int bits) {
    std::vector<float> hidden(static_cast<std::size_t>(tokens * kWidth)), normed(hidden.size()), outputs(hidden.size(), 0.25f);
    std::vector<float> cosine(static_cast<std::size_t>(tokens * kRotary / 2), 0.5f), sine(cosine.size(), 0.75f);
    for (std::size_t i = 0; i < hidden.size(); ++i) hidden[i] = static_cast<float>(i * 7 % 11) - 5.0f;
    Prompt prompt(layers, kWidth, tokens, hidden.data(), normed.data(), cosine.data(), sine.data(), true);
    const std::int64_t before = 3, capacity = (before + tokens + kPositions - 1) / kPositions * kPositions;
    const auto cached = [&](int heads, int dim) { return array<std::uint8_t>(heads * capacity / kPositions * cached_nbytes(dim, bits)); };
    auto keys = cached(kKvHeads, kDim), values = cached(kKvHeads, kDim), latents = cached(1, kLatent), both = cached(1, kLatent + kRotary);
    auto experts = array<std::int64_t>(tokens * 3);
    auto weights = array<float>(tokens * 3);
    prompt.attend(0, {keys.get(), values.get(), capacity, bits, 0, before}, 20, experts.get(), weights.get(), threads);
    prompt.combine(0, outputs.data(), threads);
    prompt.attend(1, {both.get(), latents.get(), capacity, bits, 0, before}, 0, nullptr, nullptr, threads);
    hidden.insert(hidden.end(), weights.get(), weights.get() + tokens * 3);
    return hidden;
}

void check_prompt(const Isa& isa, const std::vector<DecoderLayer>& layers, int bits) {
    for (int tokens : {2, 33, 150}) {
        const std::vector<float> want = prompt(layers, tokens, 1, bits);
        bool finite = true;
        for (float value : want) finite = finite && std::isfinite(value);
        expect(finite, "prompt: finite", tokens, 0, isa.name);
        for (int threads : {2, 3}) expect(prompt(layers, tokens, threads, bits) == want, "prompt: the same bits", tokens, threads, isa.name);
    }
}

void check_decoder(const Isa& isa) {
    Memory memory;
    std::vector<DecoderLayer> layers{grouped(memory), latent(memory)};
    for (DecoderLayer& layer : layers)
        layer.before_attention = {memory.vector(kWidth), 1e-5f}, layer.before_mlp = {memory.vector(kWidth), 1e-5f};
    const float* norm = memory.vector(kWidth);
    for (int bits : {16, 8}) {
        const std::vector<float> want = decode(layers, norm, 1100, 1, bits);
        bool finite = true;
        for (float value : want) finite = finite && std::isfinite(value);
        expect(finite, "decoder: finite", bits, 0, isa.name);
        for (int threads : {2, 3}) expect(decode(layers, norm, 1100, threads, bits) == want, "decoder: the same bits", threads, bits, isa.name);
        check_prompt(isa, layers, bits);
    }
    check_walk(isa, layers, memory);
}

}  // namespace

int main() {
    for (const Isa* isa : available()) {
        choose(isa->name);
        for (int bits : {16, 8}) {
            for (int heads : {1, 3, 4, 7, 16})
                for (int last : {1, 31, 32, 33, 200, kSpan}) check_attend(*isa, bits, heads, 24, 20, 0, last);
            check_attend(*isa, bits, 8, 128, 128, 17, 490);
            check_attend(*isa, bits, 16, 72, 64, 511, kSpan);
            check_attend(*isa, bits, 2, 33, 37, 40, 70);
            check_attend(*isa, bits, 13, 128, 128, 0, kSpan, 300.0f);  // most weights are nothing
        }
        for (int value_dim : {4, 16, 33, 512})
            for (int positions : {1, 19, 32, 33, 600}) check_mix(*isa, value_dim, positions);
        for (int bits : {0, 16, 8}) {
            for (int heads : {1, 5, 8}) check_causal(*isa, 64 / heads, heads, 24, 20, heads * 30, 0, heads == 5, bits);
            check_causal(*isa, 1, 64, 128, 128, 0, 0, false, bits);
            check_causal(*isa, 9, 3, 7, 13, 300, 20, true, bits);
            check_causal(*isa, 40, 1, 8, 8, 100, 3, false, bits);
            check_causal(*isa, 4, 2, 72, 64, 40, 0, false, bits);
        }
        check_decoder(*isa);
    }
    std::printf("decoder: %d checks, %d failures\n", checks, failures);
    return failures == 0 ? 0 : 1;
}
