// One token through a decoder's layers, all but the experts: norms, projections, rotary embedding, attention over
// cached keys and values, routers, dense and shared MLPs. Experts come from whoever holds them, between `attend` and
// `combine`. greenroom.decode describes a transformers model in these terms and proves each kind of layer against it.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "compute.h"

namespace greenroom {

// A packed matrix and its bias, or nothing.
struct Weights {
    const std::uint8_t* packed = nullptr;
    Shape shape{};
    const float* bias = nullptr;

    explicit operator bool() const { return packed != nullptr; }
};

// x * weight / sqrt(mean(x^2) + eps), or nothing.
struct Norm {
    const float* weight = nullptr;
    float eps = 0.0f;
};

// Which two numbers of a head a rotary embedding turns together, and where it leaves them.
enum class Rotation {
    halves,           // i and i + dim/2
    pairs,            // 2i and 2i + 1
    pairs_to_halves,  // takes 2i and 2i + 1, leaves them at i and i + dim/2
};

// Grouped-query attention.
struct Attention {
    Weights query, key, value, output;
    Norm query_norm, key_norm;
    bool norm_each_head = false;  // else over all heads at once
    float clip = 0.0f;            // of queries, keys and values; 0: none
    int heads = 0, kv_heads = 0, head_dim = 0, rotary_dim = 0;
    Rotation rotation = Rotation::halves;
    float scale = 1.0f;
    const float* sinks = nullptr;  // [heads]: logits of a position that holds nothing
};

// Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), with the up-projections absorbed into the query and
// the output: what is cached is the latent and one rotated key for all heads.
struct LatentAttention {
    Weights query_down, query, latent, output;  // query_down: or nothing
    Norm query_norm, latent_norm;
    const std::uint8_t* key_up = nullptr;    // float16 [heads, nope_dim, latent_dim]
    const std::uint8_t* value_up = nullptr;  // float16 [heads, latent_dim, value_dim]
    int heads = 0, nope_dim = 0, rotary_dim = 0, latent_dim = 0, value_dim = 0;
    Rotation rotation = Rotation::halves;
    float scale = 1.0f;
};

struct Router {
    enum class Scores { softmax, sigmoid, softmax_of_chosen };

    Weights weights;
    Scores scores = Scores::softmax;
    int top_k = 0;
    const float* correction = nullptr;  // [experts], added to the scores for choosing
    int groups = 1, top_groups = 1;     // experts are chosen from the best groups
    bool group_by_two = false;          // a group's score is the sum of its best two; else its best
    bool normalize = false;             // chosen weights sum to 1
    float scale = 1.0f;
};

// down . (silu(gate . x) * (up . x)), times sigmoid(scale . x) where there is a scale.
struct Mlp {
    Weights gate, up, down, scale;
};

struct DecoderLayer {
    Norm before_attention, before_mlp;
    std::optional<Attention> attention;
    std::optional<LatentAttention> latent_attention;
    std::optional<Router> router;  // else the layer is dense
    std::optional<Mlp> mlp;        // the dense or the shared one
};

// One layer's cache of one sequence, float16, as Span wants it: keys [kv_heads, capacity / kPositions, key_dim,
// kPositions], values [kv_heads, capacity, value_dim]. Positions first <= p < length are visible; this token is put at
// `length`, which must be below capacity.
struct KeyValues {
    std::uint8_t *keys, *values;
    std::int64_t capacity, first, length;
};

struct Chosen {
    std::vector<int> experts;    // ascending
    std::vector<float> weights;  // theirs
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
    // The layer's shared MLP, if it has one, while experts are on their way.
    void shared(std::size_t layer, int threads);
    // hidden += sum of weights[e] * outputs[e] in order, plus what `shared` computed. outputs: [n, width]
    void combine(std::size_t layer, const float* outputs, const std::vector<float>& weights);
    // normed = norm(hidden)
    void finish(const Norm& norm);

    std::size_t layers() const { return layers_.size(); }

private:
    const float* attention(const Attention& it, const KeyValues& cache, const float* cosine, const float* sine,
                           int threads);
    const float* latent_attention(const LatentAttention& it, const KeyValues& cache, const float* cosine,
                                  const float* sine, int threads);
    void mlp(const Mlp& it, float* out, int threads);
    Chosen route(const Router& it, int threads);

    std::vector<DecoderLayer> layers_;
    std::int64_t width_;
    float *hidden_, *normed_;
    std::vector<float> a_, b_, c_, partial_, projected_, shared_, logits_;
    bool corrected_ = false;  // whether `logits_` are of a router with a correction
};

}  // namespace greenroom
