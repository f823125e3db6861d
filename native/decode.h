// One token through a decoder's layers, all but the experts: norms, projections, rotary embedding, attention over
// cached keys and values, routers, dense and shared MLPs. Experts come from whoever holds them, between `attend` and
// `combine`.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "layer.h"

namespace greenroom {

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

// A later layer, and the experts that its router would choose first, likeliest first.
struct Foreseen {
    std::size_t layer;
    std::vector<int> experts;
};

// What a layer chose for a token that passed it, and `shares` where they were asked for.
struct Passed {
    std::size_t layer;
    Chosen chosen;
    std::vector<float> shares;
};

// The layer where a token ended, or the last it was to go to, and the mean seconds that a layer took to foresee others.
struct Walked {
    std::size_t end;
    double foresee_s;
};

// Asked where some of what a layer chose, or some of what is foreseen there, is elsewhere: whether the token may go on,
// since all that was chosen is there now.
using Lacks = std::function<bool(std::size_t layer, const Chosen& chosen, const std::vector<Foreseen>& foreseen)>;

// What attention works in.
struct AttentionScratch {
    std::vector<float> partial, units;
    std::vector<std::int16_t> words;
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
    // A token through layers first <= l < last: `attend`, `shared`, the experts and `combine` in turn. It ends early, after
    // its `attend`, at a layer where `lacks` is asked and says no. caches, records: of all layers, of which `lacks` may
    // change the addresses; outputs: [most experts that a layer chooses, width].
    Walked walk(std::size_t first, std::size_t last, const std::vector<KeyValues>& caches, const float* cosine,
                const float* sine, const std::vector<Records>& records, const Foresight& foresight, const Lacks& lacks,
                bool with_shares, float* outputs, int threads);
    // What was chosen in the layers with experts that the latest walk has passed since this was last asked.
    std::vector<Passed> passed() { return std::exchange(passed_, {}); }
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
    std::vector<Foreseen> foresee_all(std::size_t layer, const Foresight& foresight, int threads);

    std::vector<DecoderLayer> layers_;
    std::int64_t width_;
    float *hidden_, *normed_;
    std::vector<Passed> passed_;
    std::vector<float> a_, b_, c_, projected_, shared_, logits_;
    AttentionScratch scratch_;
    bool corrected_ = false;  // whether `logits_` are of a router with a correction
};

}  // namespace greenroom
