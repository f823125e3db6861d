// Some tokens of one sequence through a decoder's layers, all but the experts, in float32 but for what is cached: what
// decode.h does for one.
#pragma once

#include <cstdint>
#include <vector>

#include "layer.h"

namespace greenroom {

class Prompt {
public:
    // hidden, normed: [count, width], the caller's, as a Decoder's; cosine, sine: [count, rotary_dim / 2]. All of it,
    // and the layers, must outlive the prompt. rough: see compute.h.
    Prompt(const std::vector<DecoderLayer>& layers, std::int64_t width, std::int64_t count, float* hidden, float* normed,
           const float* cosine, const float* sine, bool rough);

    // hidden += attention over the cached positions, the tokens' own put behind them, each token over the last `window`
    // (0: all) up to its own; then normed. A dense layer's MLP is added; else the chosen experts of each token are told,
    // best first, and their weights: [count, top_k].
    void attend(std::size_t layer, const KeyValues& cache, std::int64_t window, std::int64_t* experts, float* weights, int threads);
    // hidden += outputs [count, width] of the experts, plus the shared MLP's.
    void combine(std::size_t layer, const float* outputs, int threads);

    std::size_t layers() const { return layers_.size(); }
    std::int64_t count() const { return count_; }

private:
    void attention(const Attention& it, const KeyValues& cache, std::int64_t window, int threads);
    void latent_attention(const LatentAttention& it, const KeyValues& cache, std::int64_t window, int threads);
    void attend_expanded(const LatentAttention& it, const KeyValues& cache, std::int64_t window, int threads);
    void mlp(const Mlp& it, int threads);
    void route(const Router& it, std::int64_t* experts, float* weights, int threads);
    void add(const float* rows, int threads);
    void normalize_all(const Norm& norm, int threads);
    template <class Body>
    void each(int threads, const Body& body) const;

    const std::vector<DecoderLayer>& layers_;
    const std::int64_t width_, count_;
    float *hidden_, *normed_;
    const float *cosine_, *sine_;
    const bool rough_;
    std::vector<float> q_, a_, b_, out_;
};

}  // namespace greenroom
