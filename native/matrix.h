// A packed matrix where it lies in memory, and what an instruction set must provide to multiply with it.
// docs/format.md, section 5, is the specification of the bytes.
#pragma once

#include <cstdint>

namespace greenroom {

struct Matrix {
    const std::uint8_t* codes;
    const std::uint8_t* scale_codes;
    const std::uint8_t* zero_codes;
    const std::uint8_t* row_params;
    std::int64_t rows, cols, groups, code_row_bytes;
    int bits, group_size;
    bool is_float16;  // at 16 bits: float16, else bfloat16
};

constexpr std::int64_t kBlock = 64;  // columns whose codes lie together
constexpr int kMaxVectors = 128;     // vectors that any RowsFunction multiplies at a time
constexpr int kMany = 8;             // vectors from which on another kernel may be the better one

// Vectors that are multiplied together: fewer than kMany, as many or more, and such that may be rounded to 8 bits.
enum class Batch { few, many, rough };

// What stands between the two products of an expert. The first makes rows g, or g and as many u, all of g first or in
// turns. alpha, limit and plus are 1, infinite and 0 where a family has nothing of the kind.
enum class Function { silu, gelu, gelu_tanh, relu, relu2 };
enum class Order { alone, halves, turns };
struct Gate {
    Function function;  // silu(x) = x / (1 + exp(-alpha x))
    Order order;
    float alpha, limit, plus;  // function(min(g, limit)) * (clamp(u, -limit, limit) + plus)
};

// Vectors come prepared: as an instruction set wants to read them, for matrices of one bit width, group size and
// number of columns. The functions below read no more of a Matrix than that, except for RowsFunction.
using Size = std::int64_t (*)(const Matrix& matrix);
using Prepare = void (*)(const Matrix& matrix, const float* x, std::uint8_t* prepared);

// y[v][r] = row r . x[v] for rows first <= r < last and vectors 0 <= v < count.
// A row's result depends on its bytes and on x[v] alone: the order of its sum is the same for every count.
using RowsFunction = void (*)(const Matrix& matrix, std::int64_t first, std::int64_t last,
                              const std::uint8_t* const* x, int count, float* const* y, float* scratch);

// to[i] = the gate's value for first[step * i], and up[step * i] unless that is null.
using Activate = void (*)(const Gate& gate, const float* first, const float* up, std::int64_t step, float* to,
                          std::int64_t count);

// Cached keys and values of one key-value head lie in blocks of kPositions positions.
// In 16 bits: float16, of keys [dim, kPositions], of values [kPositions, dim].
// In 8 bits: signed bytes, of keys [dim / 2, kPositions, 2], an odd dim filled up with a 0, of values [kPositions / 2, dim,
// 2]; then bfloat16 scales [groups, kPositions], one for each kCachedGroup numbers of a position.
constexpr int kPositions = 32, kCachedGroup = 32;

inline std::int64_t cached_nbytes(std::int64_t dim, int bits) {  // of a block
    return kPositions * (bits == 16 ? 2 * dim : dim + dim % 2 + 2 * ((dim + kCachedGroup - 1) / kCachedGroup));
}

template <class Byte>
Byte* cached_scales(Byte* block, std::int64_t dim, std::int64_t number) {  // in 8 bits: of a number's group
    return block + kPositions * (dim + dim % 2 + 2 * (number / kCachedGroup));
}

// Cached keys and values, and the query heads that read them: positions first <= p < last of a span that starts at a
// block, readable up to the end of the last block, but values in 16 bits no further than the last position.
// q: [heads, key_dim], scaled. For 8 bits words: [key_dim / 2, heads, 2], rows `stride` apart, an odd dim filled up with a
// 0: whole numbers below 2^15, which times units [heads] are q.
// Gives, per head, sum of e^(score - highest) times the values in out [heads, value_dim], and highest and the sum.
constexpr int kSpan = 512;      // positions in a span
constexpr int kHeadsAtOnce = 16;  // query heads of a Span, at most

struct Span {
    const float* q;
    const std::int16_t* words;
    const float* units;
    std::int64_t stride;
    int heads, key_dim, value_dim, bits;
    const std::uint8_t *keys, *values;
    int first, last;
    float *out, *highest, *sum;
};
using Attend = void (*)(const Span& span);

// out [value_dim] = sum of weights[p] * values[p]; values: float16 [positions, value_dim]
using Mix = void (*)(const std::uint8_t* values, int value_dim, const float* weights, int positions, float* out);

// A block's numbers in float32: of keys, dimensions first <= d < last, to [last - first, kPositions], rows `stride`
// apart; of values, its first positions, to [positions, dim].
using WidenKeys = void (*)(const std::uint8_t* block, int dim, int bits, int first, int last, float* to, std::int64_t stride);
using WidenValues = void (*)(const std::uint8_t* block, int dim, int bits, int positions, float* to);

// Causal attention of up to kRows rows, a row being one query head of one token, to the key-value head they share, in
// float32. Token t stands at place `position + t` among the keys, and sees the last `window` up to its own (0: all).
// Keys and values are cached ones, as a Span has them from position 0 on, or float32, positions key_stride and
// value_stride apart.
constexpr int kRows = 64;
constexpr int kKeysAtOnce = 96;
static_assert(kKeysAtOnce % kPositions == 0, "whole blocks");

struct Queries {
    const float* q;  // [tokens, heads, key_dim], tokens q_stride apart, scaled
    int tokens, heads, key_dim, value_dim;
    const std::uint8_t *cached_keys, *cached_values;  // or null
    int bits;                                         // of what is cached
    const float *keys, *values;
    std::int64_t q_stride, key_stride, value_stride, out_stride;
    std::int64_t position, window;
    const float* sinks;  // [heads], logits of a position that holds nothing; or null
    float* out;          // [tokens, heads, value_dim], tokens out_stride apart; may be q where the dims are the same
    float* scratch;      // scratch_floats(key_dim, value_dim), aligned to 64 bytes

    static constexpr std::int64_t scratch_floats(std::int64_t key_dim, std::int64_t value_dim) {
        return kRows * (key_dim + value_dim + kKeysAtOnce) + kKeysAtOnce * (key_dim + value_dim);
    }
};
using AttendCausally = void (*)(const Queries& queries);

struct Kernel {
    Size prepared_nbytes;  // a multiple of 64
    Prepare prepare;
    RowsFunction rows;
    Size scratch_floats;
    int rows_at_once;   // spans of rows are best multiples of it
    int most_vectors;   // that `rows` takes, kMaxVectors at most
    bool for_many;      // worth taking for more than most_vectors too, rather than unpacking the matrix once
};

struct Isa {
    const char* name;
    const char* title;
    bool (*supported)();
    Kernel (*kernel)(const Matrix& matrix, Batch batch);  // for its bit width and group size
    Activate activate;
    Attend attend;
    Mix mix;
    WidenKeys widen_keys;
    WidenValues widen_values;
    AttendCausally attend_causally;
};

extern const Isa kPortable;
#ifdef GREENROOM_X86
extern const Isa kAvx2;
extern const Isa kAvxVnni;
extern const Isa kAvx512Vnni;
#endif
#ifdef GREENROOM_ARM
extern const Isa kNeon;
#endif

inline std::int64_t padded_groups(const Matrix& matrix) { return (matrix.groups + 15) / 16 * 16 + 16; }
}  // namespace greenroom
