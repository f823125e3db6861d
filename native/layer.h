// A decoder's layer described, and what its parts do to one token's vectors. greenroom.decode describes a transformers
// model in these terms; decode.h and prompt.h run it.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "compute.h"
#include "matrix.h"

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
    Weights up;  // both up-projections as they are, [heads, nope_dim + value_dim] rows: for many tokens
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

// One layer's cache of one sequence, keys and values as Span wants them: [kv_heads, capacity / kPositions] blocks in 16 or
// 8 bits. Positions first <= p < length are visible; what comes next is put at `length` and after, below capacity.
struct KeyValues {
    std::uint8_t *keys, *values;
    std::int64_t capacity;
    int bits;
    std::int64_t first, length;

    std::int64_t head_nbytes(std::int64_t dim) const { return capacity / kPositions * cached_nbytes(dim, bits); }
};

// The experts of one token.
struct Chosen {
    std::vector<int> experts;    // ascending
    std::vector<float> weights;  // theirs
};

// out = norm(x), both [count]; in place too.
void normalize(const Norm& norm, const float* x, std::int64_t count, float* out);

// Queries, keys and values of one token as attention wants them, but for the queries' scale: normed, clipped, turned.
// q: [heads, head_dim], k and v: [kv_heads, head_dim], cosine and sine: [rotary_dim / 2].
void finish_heads(const Attention& it, float* q, float* k, float* v, const float* cosine, const float* sine);

// Turns the first `dim` numbers of x by as many angles as two of them share one.
void rotate(Rotation rotation, float* x, int dim, const float* cosine, const float* sine);

// A token's experts from the router's logits [experts], which become scores.
Chosen choose(const Router& it, float* logits);

// As many experts as there are, but at most `count`, likeliest first; logits become scores.
std::vector<int> ranked(const Router& it, float* logits, int count);

// Plus this and less it again, numbers below 2^22 are whole ones, the nearest, of two the even one.
constexpr float kWhole = 0x1.8p23f;

// A head's key or value [dim] into the cache, rounded to nearest, ties to even. What is larger than float16 becomes its
// largest number, and no number stays none; with 8 bits none of its group is one then.
void put_key(const KeyValues& cache, std::int64_t kv_head, std::int64_t position, const float* x, std::int64_t dim);
void put_value(const KeyValues& cache, std::int64_t kv_head, std::int64_t position, const float* x, std::int64_t dim);

// The largest |x|; none where one is no number.
float largest_magnitude(const float* x, std::int64_t count);

// A scratch buffer's numbers, which are `count` at least.
float* sized(std::vector<float>& buffer, std::int64_t count);

float sigmoid(float x);
void softmax(float* x, std::int64_t count);

}  // namespace greenroom
