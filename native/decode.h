// One token through a decoder's layers, all but the experts: norms, projections, rotary embedding, attention over
// cached keys and values, routers, dense and shared MLPs. Experts come from whoever holds them, between `attend` and
// `combine`.
#pragma once

#include <cstdint>
#include <vector>

#include "layer.h"

namespace greenroom {

// One layer's cache of one sequence, float16, as Span wants it: keys [kv_heads, capacity / kPositions, key_dim,
// kPositions], values [kv_heads, capacity, value_dim]. Positions first <= p < length are visible; this token is put at
// `length`, which must be below capacity.
struct KeyValues {
    std::uint8_t *keys, *values;
    std::int64_t capacity, first, length;
};

// Where a layer's experts lie: the address of each one's record, null where it is elsewhere. None where a layer has no
// experts.
struct Records {
    ExpertLayout layout;
    std::vector<const std::uint8_t*> at;
};

// What a token is guessed to choose while it walks: `experts` of each of the next `layers` that have any.
struct Foresight {
    int layers, experts;
};

// What a layer chose for a token that passed it, and `shares` where they were asked for. It has not passed a layer where
// its walk ended early.
struct Passed {
    Chosen chosen;
    std::vector<float> shares;
    bool whole = true;
};

class Decoder {
public:
    // hidden, normed: [width], the caller's: the residual stream, and what routers and experts see
    Decoder(std::vector<DecoderLayer> layers, std::int64_t width, float* hidden, float* normed);

    // hidden += attention, then normed; cosine, sine [rotary_dim / 2]. A dense layer's MLP is added, and nothing is
    // chosen; else the chosen experts are told.
    Chosen attend(std::size_t layer, const KeyValues& cache, const float* cosine, const float* sine, int threads);
    // What the router that chose last thinks of all its experts, as shares of 1 that float16 can hold: the softmax of
    // its logits, or, where a correction ranks, their sigmoids over their sum.
    std::vector<float> shares() const;
    // What a later layer's router would choose first if nothing were added to the residual stream until there: up to
    // `count` experts, likeliest first. To be called between `attend` and `combine`.
    std::vector<int> foresee(std::size_t layer, int count, int threads);
    // The layer's shared MLP, if it has one, while experts are on their way.
    void shared(std::size_t layer, int threads);
    // hidden += sum of weights[e] * outputs[e] in order, plus what `shared` computed. outputs: [n, width]
    void combine(std::size_t layer, const float* outputs, const std::vector<float>& weights);
    // A token through layers first <= l < last: `attend`, `shared`, the experts and `combine` in turn. It ends early at a
    // layer some of whose experts are elsewhere, or some of those that `foresee` gives there, after that layer's `attend`.
    // caches, records: of all layers; outputs: [most experts that a layer chooses, width]. Gives what each layer chose, the
    // one where it ended last.
    std::vector<Passed> walk(std::size_t first, std::size_t last, const std::vector<KeyValues>& caches,
                             const float* cosine, const float* sine, const std::vector<Records>& records,
                             const Foresight& foresight, bool with_shares, float* outputs, int threads);
    // normed = norm(hidden)
    void finish(const Norm& norm);

    const std::vector<DecoderLayer>& layers() const { return layers_; }
    std::int64_t width() const { return width_; }

private:
    const float* attention(const Attention& it, const KeyValues& cache, const float* cosine, const float* sine,
                           int threads);
    const float* latent_attention(const LatentAttention& it, const KeyValues& cache, const float* cosine,
                                  const float* sine, int threads);
    void mlp(const Mlp& it, float* out, int threads);
    Chosen route(const Router& it, int threads);
    bool foresees_all(std::size_t layer, const Foresight& foresight, const std::vector<Records>& records, int threads);

    std::vector<DecoderLayer> layers_;
    std::int64_t width_;
    float *hidden_, *normed_;
    std::vector<float> a_, b_, c_, partial_, projected_, shared_, logits_;
    bool corrected_ = false;  // whether `logits_` are of a router with a correction
};

}  // namespace greenroom
