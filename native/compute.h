// Products and experts over packed matrices, shared out to threads. Bit for bit the same for any number of threads, and
// for a vector whatever the others are, but for one choice: a task of kMany vectors or more may have another kernel. That
// may round vectors to 8 bits where `rough` says so, else to no less than 16.
#pragma once

#include <cstdint>
#include <vector>

#include "matrix.h"

namespace greenroom {

// What is needed to find a matrix's parts: the arguments of quant.Layout.
struct Shape {
    std::int64_t rows, cols;
    int bits, group_size;
    bool is_float16;

    std::int64_t nbytes() const;
    Matrix at(const std::uint8_t* packed) const;  // null: sizes alone
};

struct Linear {
    const std::uint8_t* packed;
    Shape shape;
    const float* bias;  // [rows], or null
    float* out;         // [count, rows]
};

// An expert's record: where its two matrices lie, and their biases, rows of 16 bits, where it has any.
struct ExpertLayout {
    Shape first, second;
    std::int64_t first_offset, second_offset;
    std::int64_t first_bias, second_bias;  // offsets, negative if there is none
    bool bias_is_float16;
    Gate gate;
};

struct Task {
    const std::uint8_t* record;
    const std::int64_t* rows;  // of x
    int count;                 // of rows
    float* out;                // [count, second.rows]
};

// The instruction sets this machine has, best first; which one computes; and choosing another by name.
std::vector<const Isa*> available();
const Isa& active();
bool choose(const char* name);

// Each linear's out = x [count, cols] times its transposed matrix, plus its bias. All have x's columns.
void linears(const float* x, int count, const Linear* list, int n, int threads, bool rough = false);

// The same for one.
void linear(const float* x, int count, const std::uint8_t* packed, const Shape& shape, const float* bias, float* out,
            int threads, bool rough = false);

// Seconds that callers have spent in these two, and in `experts`, since the process started.
double linears_s();
double experts_s();

// Each task's out = second . gate(first . x[rows] + bias) + bias. x is [_, first.cols].
void experts(const float* x, const std::vector<Task>& tasks, const ExpertLayout& layout, int threads, bool rough = false);

// out[rows[v]] += weights[v] * x[v] in their order; x: [count, width], out: [_, width].
void add_weighted(float* out, const float* x, const std::int64_t* rows, const float* weights, int count, std::int64_t width,
                  int threads);

}  // namespace greenroom
