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

constexpr std::int64_t kBlock = 64;      // columns that are unpacked together
constexpr int kMaxVectors = 32;          // vectors that one call may multiply with a matrix

// y[v][r] = row r . x[v] for rows first <= r < last and vectors 0 <= v < count. Every x[v] is readable, and zero past
// the matrix's columns, up to a multiple of kBlock. scratch holds scratch_floats(matrix).
// A row's result depends on its bytes and on x[v] alone: the order of its sum is the same for every count.
using RowsFunction = void (*)(const Matrix& matrix, std::int64_t first, std::int64_t last, const float* const* x,
                              int count, float* const* y, float* scratch);

// Cached keys and values of one key-value head, and the query heads that read them: positions first <= p < last of a
// span that starts at a block. keys: float16 [blocks, key_dim, kPositions], readable up to the end of the last block;
// values: float16 [positions, value_dim]; q: [heads, key_dim], scaled.
// Gives, per head, sum of e^(score - highest) times the values in out [heads, value_dim], and highest and the sum.
constexpr int kPositions = 32;  // positions in a block of keys
constexpr int kSpan = 512;      // positions in a span

struct Span {
    const float* q;
    int heads, key_dim, value_dim;
    const std::uint8_t *keys, *values;
    int first, last;
    float *out, *highest, *sum;
};

struct Isa {
    const char* name;
    const char* title;
    bool (*supported)();
    RowsFunction rows;
    void (*attend)(const Span& span);
    // out [value_dim] = sum of weights[p] * values[p]; values: float16 [positions, value_dim]
    void (*mix)(const std::uint8_t* values, int value_dim, const float* weights, int positions, float* out);
};

extern const Isa kPortable;
#ifdef GREENROOM_X86
extern const Isa kAvx2;
extern const Isa kAvx512;
#endif

inline std::int64_t padded_groups(const Matrix& matrix) { return (matrix.groups + 15) / 16 * 16; }
inline std::int64_t scratch_floats(const Matrix& matrix) { return 2 * padded_groups(matrix); }

}  // namespace greenroom
