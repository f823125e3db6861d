// Any machine: four lanes that the compiler maps to what it has.
#include <cmath>

#include "activation.h"
#include "bytes.h"
#include "causal.h"
#include "rows.h"

namespace greenroom {
namespace {

struct Portable {
    using F = float __attribute__((vector_size(16)));
    static constexpr int kWidth = 4, kRegisters = 16;
    static constexpr bool kSigned = false;

    static F zero() { return F{0, 0, 0, 0}; }
    static F set1(float value) { return F{value, value, value, value}; }
    static F load(const float* p) {
        F value;
        std::memcpy(&value, p, sizeof value);
        return value;
    }
    static void store(float* p, F value) { std::memcpy(p, &value, sizeof value); }
    static F add(F a, F b) { return a + b; }
    static F sub(F a, F b) { return a - b; }
    static F mul(F a, F b) { return a * b; }
    static F fma(F a, F b, F c) { return a * b + c; }
    static float reduce(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }

    static F from_bytes(const std::uint8_t* p) {
        return F{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
    }
    static void set_bfloat16(const std::uint8_t* p, bool negative, F* first, F* second) {
        const float sign = negative ? -1.0f : 1.0f;
        *first = set1(sign * bfloat16_at(p));
        *second = set1(sign * bfloat16_at(p + 2));
    }

    template <bool FLOAT16>
    static F from_halves(const std::uint8_t* p) {
        if constexpr (FLOAT16) return F{float16_at(p), float16_at(p + 2), float16_at(p + 4), float16_at(p + 6)};
        return F{bfloat16_at(p), bfloat16_at(p + 2), bfloat16_at(p + 4), bfloat16_at(p + 6)};
    }

    // Words in pairs, for bytes.h.
    struct Words {
        std::int16_t at[2 * kWidth];
    };
    struct Pairs {
        std::int32_t at[kWidth];
    };
    static Words words(const std::uint8_t* p) {
        Words a;
        for (int i = 0; i < 2 * kWidth; ++i) a.at[i] = static_cast<std::int8_t>(p[i]);
        return a;
    }
    static Words pair(const std::int16_t* p) {
        Words a;
        for (int i = 0; i < 2 * kWidth; ++i) a.at[i] = p[i % 2];
        return a;
    }
    static Pairs no_pairs() { return {}; }
    static Pairs add_pairs(Pairs sum, Words a, Words b) {
        for (int i = 0; i < kWidth; ++i) sum.at[i] += a.at[2 * i] * b.at[2 * i] + a.at[2 * i + 1] * b.at[2 * i + 1];
        return sum;
    }
    static F from_pairs(Pairs sum) {
        F value;
        for (int i = 0; i < kWidth; ++i) value[i] = static_cast<float>(sum.at[i]);
        return value;
    }
    static F even(Words a) {
        F value;
        for (int i = 0; i < kWidth; ++i) value[i] = a.at[2 * i];
        return value;
    }
    static F odd(Words a) {
        F value;
        for (int i = 0; i < kWidth; ++i) value[i] = a.at[2 * i + 1];
        return value;
    }
    static void store_words(std::int16_t* p, F value) {
        for (int i = 0; i < kWidth; ++i) p[i] = value[i] == value[i] ? static_cast<std::int16_t>(std::nearbyint(value[i])) : 0;
    }

    template <int BITS, int SUB>
    static void unpack(const std::uint8_t* p, const float* scale, const float* offset, F* weights) {
        constexpr int low = BITS == 3 ? 2 : BITS;    // bits that lie as shifted lanes
        constexpr int lane = 8 * low;                // codes in a lane
        float codes[kBlock];
        for (int shift = 0; shift < 8 / low; ++shift)
            for (int j = 0; j < lane; ++j)
                codes[shift * lane + j] = static_cast<float>((p[j] >> (shift * low)) & ((1 << low) - 1));
        if constexpr (BITS == 3)
            for (int i = 0; i < kBlock; ++i) codes[i] += static_cast<float>((p[16 + i / 8] >> (i % 8) & 1) << 2);
        for (int i = 0; i < kBlock / kWidth; ++i)
            weights[i] = fma(load(codes + i * kWidth), set1(scale[i * kWidth / SUB]), set1(offset[i * kWidth / SUB]));
    }
};

bool supported() { return true; }

Kernel kernel(const Matrix& matrix, Batch) { return float_kernel<Portable>(matrix.bits); }

}  // namespace

const Isa kPortable = {"portable", "portable C++", supported, kernel, activate, attend<Portable>, mix<Portable>,
                       widen_keys<Portable>, widen_values<Portable>, attend_causally<Portable>};

}  // namespace greenroom
