// Products and experts over packed matrices, shared out to threads. Bit for bit the same for any number of threads.
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
    Matrix at(const std::uint8_t* packed) const;
};

// One of an experts' record: where its two matrices lie, and what happens in between.
struct ExpertLayout {
    Shape first, second;
    std::int64_t first_offset, second_offset;
    bool gated;  // first holds gate and up, one above the other: silu(gate) * up; else silu(first)
};

struct Task {
    const std::uint8_t* record;
    const std::int64_t* rows;  // of x
    int count;                 // of rows, at most kMaxVectors
    float* out;                // [count, second.rows]
};

// The instruction sets this machine has, best first; which one computes; and choosing another by name.
std::vector<const Isa*> available();
const Isa& active();
bool choose(const char* name);

// out [count, shape.rows] = x [count, shape.cols] times the transposed matrix, plus bias [shape.rows] unless null.
void linear(const float* x, int count, const std::uint8_t* packed, const Shape& shape, const float* bias, float* out,
            int threads);

// A packed matrix that multiplies: out [count, shape.rows].
struct Linear {
    const std::uint8_t* packed;
    Shape shape;
    const float* bias;
    float* out;
};

// Several matrices times the same x.
void linears(const float* x, int count, const Linear* list, int n, int threads);

// Each task's out = second . silu-gate(first . x[rows]). x is [_, first.cols].
void experts(const float* x, const std::vector<Task>& tasks, const ExpertLayout& layout, int threads);

}  // namespace greenroom
