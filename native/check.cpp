// Runs every format on every instruction set of this machine over buffers of exactly the size they should have, to be
// built with sanitizers: cmake -S native -B build -DGREENROOM_SANITIZE=address,undefined (or thread).
// Arithmetic is compared with double precision here, and with the reference in tests/test_native.py.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "compute.h"
#include "pool.h"

using namespace greenroom;

namespace {

int failures = 0, checks = 0;

void expect(bool holds, const char* what, const Shape& shape, const char* isa) {
    ++checks;
    if (holds) return;
    ++failures;
    std::printf("FAILED %s: %d bits g%d, %ld x %ld, %s\n", what, shape.bits, shape.group_size,
                static_cast<long>(shape.rows), static_cast<long>(shape.cols), isa);
}

constexpr int kVectors = 140;  // more than a product takes

using Bytes = std::unique_ptr<std::uint8_t[]>;

// Random codes; scales of about 1/16, zeros of about half the codes; 16-bit values below 2.
Bytes random_matrix(const Shape& shape, std::mt19937& random) {
    Bytes packed(new std::uint8_t[static_cast<std::size_t>(shape.nbytes())]);
    for (std::int64_t i = 0; i < shape.nbytes(); ++i) packed[i] = static_cast<std::uint8_t>(random());
    if (shape.bits == 16) {
        for (std::int64_t i = 1; i < shape.nbytes(); i += 2) packed[i] &= 0xbf;
        return packed;
    }
    const Matrix matrix = shape.at(packed.get());
    auto* params = const_cast<std::uint8_t*>(matrix.row_params);
    const std::uint16_t values[] = {0x3d00, 0x3980, 0x3f80, 0x3c80};
    for (std::int64_t row = 0; row < shape.rows; ++row) std::memcpy(params + 8 * row, values, 8);
    return packed;
}

float bfloat16(const std::uint8_t* p) {
    const std::uint32_t bits = static_cast<std::uint32_t>(p[0] | p[1] << 8) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

int code(const Matrix& m, std::int64_t row, std::int64_t col) {
    const std::uint8_t* b = m.codes + row * m.code_row_bytes + col / 64 * 8 * m.bits;
    const std::int64_t i = col % 64;
    switch (m.bits) {
        case 8: return b[i];
        case 4: return b[i % 32] >> 4 * (i / 32) & 15;
        case 2: return b[i % 16] >> 2 * (i / 16) & 3;
        default: return (b[i % 16] >> 2 * (i / 16) & 3) | (b[16 + i / 8] >> (i % 8) & 1) << 2;
    }
}

struct Weight {
    double value, size;  // size: of what is subtracted to make it
};

Weight weight(const Matrix& m, std::int64_t row, std::int64_t col) {
    if (m.bits == 16) {
        const double value = bfloat16(m.codes + 2 * (row * m.cols + col));
        return {value, std::fabs(value)};
    }
    const std::int64_t group = row * m.groups + col / m.group_size;
    const std::uint8_t* p = m.row_params + 8 * row;
    const double scale = bfloat16(p) + bfloat16(p + 2) * m.scale_codes[group];
    const double zero = bfloat16(p + 4) + bfloat16(p + 6) * m.zero_codes[group];
    const int its = code(m, row, col);
    return {scale * (its - zero), std::fabs(scale) * (its + std::fabs(zero))};
}

std::vector<float> random_vectors(std::int64_t count, std::mt19937& random) {
    std::vector<float> x(static_cast<std::size_t>(count));
    for (float& value : x) value = std::normal_distribution<float>()(random);
    return x;
}

// Whether y is the matrix times x, but for float32's own rounding, and that of vectors to 16 bits: half a step of the
// largest element's 32639; or to 8, half a step of 127 of a group's largest.
bool is_product(const Matrix& matrix, const float* x, const float* y, bool rough) {
    float top = 0;
    for (std::int64_t col = 0; col < matrix.cols; ++col) top = std::max(top, std::fabs(x[col]));
    std::vector<float> step(static_cast<std::size_t>(matrix.cols), top / 65278);
    for (std::int64_t col = 0; rough && col < matrix.cols; ++col) {
        const std::int64_t first = col / matrix.group_size * matrix.group_size, last = std::min(first + matrix.group_size, matrix.cols);
        float most = 0;
        for (std::int64_t i = first; i < last; ++i) most = std::max(most, std::fabs(x[i]));
        step[static_cast<std::size_t>(col)] = most / 254;
    }
    for (std::int64_t row = 0; row < matrix.rows; ++row) {
        double sum = 0, allowed = 1e-37;
        for (std::int64_t col = 0; col < matrix.cols; ++col) {
            const Weight w = weight(matrix, row, col);
            sum += w.value * x[col];
            allowed += 1e-6 * w.size * std::fabs(x[col]) + std::fabs(w.value) * step[static_cast<std::size_t>(col)];
        }
        if (std::fabs(y[row] - sum) > allowed) return false;
    }
    return true;
}

void check_linear(const Shape& shape, const char* isa, std::mt19937& random) {
    const Bytes packed = random_matrix(shape, random);
    const std::vector<float> x = random_vectors(kVectors * shape.cols, random);
    const auto run = [&](int count, int threads, bool rough = false) {
        std::vector<float> y(static_cast<std::size_t>(count * shape.rows));
        linear(x.data(), count, packed.get(), shape, nullptr, y.data(), threads, rough);
        return y;
    };
    const auto product = [&](const std::vector<float>& y, int v, bool rough) {
        return is_product(shape.at(packed.get()), &x[static_cast<std::size_t>(v * shape.cols)], &y[static_cast<std::size_t>(v * shape.rows)], rough);
    };
    const std::vector<float> all = run(kVectors, 3), few = run(kMany - 1, 3);
    for (const int v : {0, 1, 2, 3, 4, 5, 6, 7, 30, 31, 32, 127, 128, kVectors - 1}) {
        const std::vector<float>& found = v < kMany - 1 ? few : all;
        expect(product(found, v, false), "product", shape, isa);
    }
    for (const int count : {1, 3, 6, kMany, 13, 35}) {
        const std::vector<float>& same = count < kMany ? few : all;
        const std::vector<float> some = run(count, 1);
        expect(std::memcmp(some.data(), same.data(), some.size() * 4) == 0, "same bits", shape, isa);
    }
    const bool is_rounded = shape.bits <= 4 && std::strcmp(isa, "portable") != 0;
    const std::vector<float> rough = run(kVectors, 3, true);
    for (const int v : {0, 1, 7, 31, 127, kVectors - 1}) expect(product(rough, v, is_rounded), "rough product", shape, isa);
    if (shape.rows * shape.cols > 1000) expect((rough == all) != is_rounded, "rounded to 8 bits", shape, isa);
    for (const int count : {1, kMany, 35}) {
        const std::vector<float> some = run(count, 1, true);
        expect(std::memcmp(some.data(), count < kMany ? few.data() : rough.data(), some.size() * 4) == 0, "same rough bits", shape, isa);
    }
}

void check_experts(const Shape& first, Order order, const char* isa, std::mt19937& random) {
    const Shape second{first.cols, order == Order::alone ? first.rows : first.rows / 2, first.bits, first.group_size, false};
    const bool biased = order == Order::turns;
    const std::int64_t matrices = first.nbytes() + second.nbytes();
    const std::int64_t nbytes = matrices + (biased ? 2 * (first.rows + second.rows) : 0);
    Bytes records[3];
    for (Bytes& record : records) {
        record.reset(new std::uint8_t[static_cast<std::size_t>(nbytes)]);
        std::memcpy(record.get(), random_matrix(first, random).get(), static_cast<std::size_t>(first.nbytes()));
        std::memcpy(record.get() + first.nbytes(), random_matrix(second, random).get(),
                    static_cast<std::size_t>(second.nbytes()));
        for (std::int64_t i = matrices; i < nbytes; ++i) record[i] = static_cast<std::uint8_t>(i % 2 ? 0x3f : random());
    }
    const Gate gate{Function::silu, order, 1, std::numeric_limits<float>::infinity(), 0};
    const ExpertLayout layout{first, second, 0, first.nbytes(), biased ? matrices : -1,
                              biased ? matrices + 2 * first.rows : -1, false, gate};
    const std::vector<float> x = random_vectors(4 * first.cols, random);
    constexpr int counts[] = {2, 9, 2}, before[] = {0, 2, 11, 13};
    const std::int64_t rows[3][9] = {{0, 3}, {2, 2, 0, 1, 3, 3, 1, 0, 2}, {1, 0}};
    const auto run = [&](int from, int to, int threads) {
        std::vector<float> out(static_cast<std::size_t>((before[to] - before[from]) * second.rows));
        std::vector<Task> tasks;
        for (int t = from; t < to; ++t)
            tasks.push_back({records[t].get(), rows[t], counts[t], out.data() + (before[t] - before[from]) * second.rows});
        experts(x.data(), tasks, layout, threads);
        return out;
    };
    const std::vector<float> all = run(0, 3, 4);
    std::vector<std::thread> callers;  // several at once: one has the pool, the others compute alone
    bool same[3];
    for (int t = 0; t < 3; ++t)
        callers.emplace_back([&, t] {
            const std::vector<float> one = run(t, t + 1, 2);
            same[t] = std::memcmp(one.data(), all.data() + before[t] * second.rows, one.size() * 4) == 0;
        });
    for (std::thread& caller : callers) caller.join();
    expect(same[0] && same[1] && same[2], "an expert alone", first, isa);
}

// What a body throws comes out, with others at work or without, and the next loop is whole.
void check_thrown() {
    for (const int threads : {1, 2, 7})
        for (const int bad : {0, 37, 99}) {
            std::atomic<int> thrown{0}, done{0};
            try {
                parallel_for(100, threads, [&](std::int64_t item) {
                    if (item % 50 == bad % 50) throw std::bad_alloc();
                });
            } catch (const std::bad_alloc&) {
                ++thrown;
            }
            parallel_for(100, threads, [&](std::int64_t) { ++done; });
            expect(thrown == 1 && done == 100, "what is thrown", {threads, bad, 16, 0, false}, "");
        }
}

}  // namespace

int main() {
    std::mt19937 random(1);
    check_thrown();
    for (const Isa* isa : available()) {
        choose(isa->name);
        for (const int bits : {2, 3, 4, 8, 16})
            for (const int group : {16, 32, 64, 128}) {
                if (bits == 16 && group != 16) continue;
                for (const std::int64_t rows : {1, 34, 130})
                    for (const std::int64_t cols : {1, 48, 64, 80, 576}) {
                        const Shape shape{rows, cols, bits, bits == 16 ? 0 : group, false};
                        check_linear(shape, isa->name, random);
                        if (rows > 1) check_experts(shape, static_cast<Order>(group / 32 % 3), isa->name, random);
                    }
            }
    }
    std::printf("%d passed, %d failed\n", checks - failures, failures);
    return failures != 0;
}
