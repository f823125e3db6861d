// Runs every format on every instruction set of this machine over buffers of exactly the size they should have, to be
// built with sanitizers: cmake -S native -B build -DGREENROOM_SANITIZE=address,undefined (or thread).
// Arithmetic is compared with double precision here, and with the reference in tests/test_native.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "compute.h"

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

constexpr int kVectors = 40;

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

void check_linear(const Shape& shape, const char* isa, std::mt19937& random) {
    const Bytes packed = random_matrix(shape, random);
    const Matrix matrix = shape.at(packed.get());
    const std::vector<float> x = random_vectors(kVectors * shape.cols, random);
    std::vector<float> all(static_cast<std::size_t>(kVectors * shape.rows));
    linear(x.data(), kVectors, packed.get(), shape, nullptr, all.data(), 3);
    std::vector<double> tops(kVectors);
    for (std::size_t i = 0; i < x.size(); ++i) {
        double& top = tops[i / static_cast<std::size_t>(shape.cols)];
        top = std::max<double>(top, std::fabs(x[i]));
    }
    bool close = true;
    for (int v = 0; v < kVectors; ++v)
        for (std::int64_t row = 0; row < shape.rows; ++row) {
            // float32's own rounding, and that of vectors to 16 bits: half a step of the largest element's 32639
            double sum = 0, allowed = 1e-37;
            for (std::int64_t col = 0; col < shape.cols; ++col) {
                const Weight w = weight(matrix, row, col);
                const double element = x[static_cast<std::size_t>(v * shape.cols + col)];
                sum += w.value * element;
                allowed += 1e-6 * w.size * std::fabs(element) + std::fabs(w.value) * tops[static_cast<std::size_t>(v)] / 65278;
            }
            close &= std::fabs(all[static_cast<std::size_t>(v * shape.rows + row)] - sum) <= allowed;
        }
    expect(close, "product", shape, isa);
    for (const int count : {1, 3, 6}) {
        std::vector<float> some(static_cast<std::size_t>(count * shape.rows));
        linear(x.data(), count, packed.get(), shape, nullptr, some.data(), 1);
        expect(std::memcmp(some.data(), all.data(), some.size() * 4) == 0, "same bits", shape, isa);
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
    const std::int64_t rows[3][2] = {{0, 3}, {2, 2}, {1, 0}};
    const auto run = [&](int from, int to, int threads) {
        std::vector<float> out(static_cast<std::size_t>((to - from) * 2 * second.rows));
        std::vector<Task> tasks;
        for (int t = from; t < to; ++t)
            tasks.push_back({records[t].get(), rows[t], 2, out.data() + (t - from) * 2 * second.rows});
        experts(x.data(), tasks, layout, threads);
        return out;
    };
    const std::vector<float> all = run(0, 3, 4);
    std::vector<std::thread> callers;  // several at once: one has the pool, the others compute alone
    bool same[3];
    for (int t = 0; t < 3; ++t)
        callers.emplace_back([&, t] {
            const std::vector<float> one = run(t, t + 1, 2);
            same[t] = std::memcmp(one.data(), all.data() + t * 2 * second.rows, one.size() * 4) == 0;
        });
    for (std::thread& caller : callers) caller.join();
    expect(same[0] && same[1] && same[2], "an expert alone", first, isa);
}

}  // namespace

int main() {
    std::mt19937 random(1);
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
