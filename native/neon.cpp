// Arm NEON with the dot products of Armv8.2: servers since 2019 and every Apple processor with an M. Integer sums of 16
// products an instruction.
#include <arm_neon.h>

#ifdef __linux__
#include <sys/auxv.h>
#endif

#define GREENROOM_UNROLL _Pragma("GCC unroll 4")  // shifts and lanes are parts of instructions
#include "activation.h"
#include "bytes.h"
#include "causal.h"
#include "tiles.h"

namespace greenroom {
namespace {

struct Neon {
    using F = float32x4_t;
    using I = int32x4_t;
    static constexpr int kWidth = 4, kBytes = 16, kRegisters = 32;
    static constexpr bool kSigned = true;  // both bytes of a product are: 8-bit codes come less 128
    static constexpr bool kWords = false, kInPlace = false, rows_apart = false;
    static constexpr int tile_rows = 4, most_vectors = 128;
    static constexpr int tile_rows_of_several = 2, tile_vectors = 3;  // four rows' codes take half of the registers
    static constexpr int kTileVectors = 6;  // 12 sums in integers, 8 of codes, 6 of x

    static F zero() { return vdupq_n_f32(0.0f); }
    static F set1(float value) { return vdupq_n_f32(value); }
    static F load(const float* p) { return vld1q_f32(p); }
    static void store(float* p, F value) { vst1q_f32(p, value); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F sub(F a, F b) { return vsubq_f32(a, b); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    // The sums of four, side by side: each is added up in the same order whichever of the four it is.
    static F reduced4(F a, F b, F c, F d) { return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)); }
    static void reduce4(F a, F b, F c, F d, float* to) { store(to, reduced4(a, b, c, d)); }
    static float reduce(F a) { return vgetq_lane_f32(reduced4(a, a, a, a), 0); }

    // COUNT neighbouring floats, repeated; and of those, a vector's own: 16 codes are never of two groups.
    template <int COUNT>
    static F load_groups(const float* p) {
        if constexpr (COUNT == 1) return vld1q_dup_f32(p);
        if constexpr (COUNT == 2) return vcombine_f32(vld1_f32(p), vld1_f32(p));
        return vld1q_f32(p);
    }
    template <int COUNT>
    static F pick(F a, const std::int32_t* index) {
        return COUNT == 1 ? a : set1(a[index[0]]);
    }

    static F from_bytes(const std::uint8_t* p) {
        std::uint32_t four;
        std::memcpy(&four, p, 4);
        return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
    }
    // Two neighbouring bfloat16s everywhere, or the negative of both.
    static void set_bfloat16(const std::uint8_t* p, bool negative, F* first, F* second) {
        std::uint32_t pair;
        std::memcpy(&pair, p, 4);
        const uint32x4_t both = vdupq_n_u32(negative ? pair ^ 0x80008000u : pair);
        *first = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
        *second = vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000u)));
    }

    template <bool FLOAT16>
    static F from_halves(const std::uint8_t* p) {
        const uint16x4_t halves = vreinterpret_u16_u8(vld1_u8(p));
        if constexpr (FLOAT16) return vcvt_f32_f16(vreinterpret_f16_u16(halves));
        return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
    }

    // Elements of 32 bits, for tiles.h: sums, and four bytes to multiply.
    static I none() { return vdupq_n_s32(0); }
    static I load_bytes(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const std::uint8_t*>(p))); }
    static void store_bytes(void* p, I value) { vst1q_u8(static_cast<std::uint8_t*>(p), vreinterpretq_u8_s32(value)); }
    using Quads = int8x16_t;
    struct Four {
        Quads quads;
        int number;
    };
    static Quads quads(const std::uint8_t* p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }
    static Four four(Quads quads, int number) { return {quads, number}; }
    static I begin_part(I sum) { return sum; }
    static I end_part(I, I part) { return part; }
    static I add_products(I sum, I codes, Four x) {
        const int8x16_t q = vreinterpretq_s8_s32(codes);
        switch (x.number) {  // an instruction holds the number
            case 0: return vdotq_laneq_s32(sum, q, x.quads, 0);
            case 1: return vdotq_laneq_s32(sum, q, x.quads, 1);
            case 2: return vdotq_laneq_s32(sum, q, x.quads, 2);
            default: return vdotq_laneq_s32(sum, q, x.quads, 3);
        }
    }
    static I times256(I sum) { return vshlq_n_s32(sum, 8); }
    static F from_integers(I sum) { return vcvtq_f32_s32(sum); }
    static F load_some(const float* p, int count) {
        if (count >= kWidth) return load(p);
        float some[kWidth] = {};
        for (int i = 0; i < count; ++i) some[i] = p[i];
        return load(some);
    }
    static void store_some(float* p, int count, F value) {
        if (count >= kWidth) return store(p, value);
        for (int i = 0; i < count; ++i) p[i] = value[i];
    }

    // Words in pairs, for bytes.h; sums of pairs are apart until they are asked for.
    using Words = int16x8_t;
    using Pairs = int32x4x2_t;
    static Words words(const std::uint8_t* p) { return vmovl_s8(vreinterpret_s8_u8(vld1_u8(p))); }
    static Words pair(const std::int16_t* p) {
        std::int32_t both;
        std::memcpy(&both, p, 4);
        return vreinterpretq_s16_s32(vdupq_n_s32(both));
    }
    static Pairs no_pairs() { return {{none(), none()}}; }
    static Pairs add_pairs(Pairs sum, Words a, Words b) {
        return {{vmlal_s16(sum.val[0], vget_low_s16(a), vget_low_s16(b)), vmlal_high_s16(sum.val[1], a, b)}};
    }
    static F from_pairs(Pairs sum) { return vcvtq_f32_s32(vpaddq_s32(sum.val[0], sum.val[1])); }
    static F even(Words a) { return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vuzp1q_s16(a, a)))); }
    static F odd(Words a) { return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vuzp2q_s16(a, a)))); }
    static void store_words(std::int16_t* p, F value) { vst1_s16(p, vqmovn_s32(vcvtnq_s32_f32(value))); }

    // Four rows of four elements become columns.
    static void transpose(I (&m)[4]) {
        int64x2_t pairs[4];
        for (int i = 0; i < 4; i += 2) {
            pairs[i] = vreinterpretq_s64_s32(vtrn1q_s32(m[i], m[i + 1]));
            pairs[i + 1] = vreinterpretq_s64_s32(vtrn2q_s32(m[i], m[i + 1]));
        }
        for (int j = 0; j < 2; ++j) {
            m[j] = vreinterpretq_s32_s64(vtrn1q_s64(pairs[j], pairs[2 + j]));
            m[2 + j] = vreinterpretq_s32_s64(vtrn2q_s64(pairs[j], pairs[2 + j]));
        }
    }

    // A chunk of a row (integer.h), which here is a block, so that all its bytes are there; and its codes, a signed byte each.
    template <int BITS>
    struct Packed {
        static constexpr int kCount = BITS / 2;  // registers of 16 bytes
        uint8x16_t bytes[kCount];

        void load(const std::uint8_t* p, std::int64_t) {
            for (int i = 0; i < kCount; ++i) bytes[i] = vld1q_u8(p + 16 * i);
        }

        template <bool>
        I codes(int v) const {
            const uint8x16_t its = bytes[v % kCount];
            if constexpr (BITS == 8) return vreinterpretq_s32_u8(veorq_u8(its, vdupq_n_u8(128)));
            else return vreinterpretq_s32_u8(lanes<BITS>(its, v / kCount));
        }
    };

    // The codes of BITS bits that lie `place` codes up in their bytes.
    template <int BITS>
    static uint8x16_t lanes(uint8x16_t bytes, int place) {
        const uint8x16_t shifted = vshlq_u8(bytes, vdupq_n_s8(static_cast<std::int8_t>(-place * BITS)));
        return vandq_u8(shifted, vdupq_n_u8((1 << BITS) - 1));
    }

    // Per 32-bit element the sum of N vectors of codes times 256 hi + lo.
    template <int N>
    static F dot(const I* q, const std::uint8_t* planes) {
        I sum = none();
        for (int i = 0; i < N; ++i) sum = products(sum, q[i], planes + 32 * i);
        sum = times256(sum);
        for (int i = 0; i < N; ++i) sum = products(sum, q[i], planes + 32 * i + 16);
        return from_integers(sum);
    }
    static I products(I sum, I codes, const std::uint8_t* x) {
        return vdotq_s32(sum, vreinterpretq_s8_s32(codes), vreinterpretq_s8_u8(vld1q_u8(x)));
    }
};

// A block is 16 bytes of low bits and 8 of high ones, eight columns each.
template <>
struct Neon::Packed<3> {
    uint8x16_t low, high;  // high: its 8 bytes twice

    void load(const std::uint8_t* p, std::int64_t) {
        low = vld1q_u8(p);
        high = vcombine_u8(vld1_u8(p + 16), vld1_u8(p + 16));
    }

    template <bool>
    I codes(int v) const {
        const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
        const uint8x8_t first = vdup_n_u8(static_cast<std::uint8_t>(2 * v)), second = vdup_n_u8(static_cast<std::uint8_t>(2 * v + 1));
        const uint8x16_t set = vtstq_u8(vqtbl1q_u8(high, vcombine_u8(first, second)), bit);
        return vreinterpretq_s32_u8(vorrq_u8(lanes<2>(low, v), vandq_u8(set, vdupq_n_u8(4))));
    }
};

bool supported() {
#if defined(__APPLE__)
    return true;
#elif defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return false;
#endif
}

Kernel kernel(const Matrix& matrix, Batch batch) {
    switch (matrix.bits) {
        case 2: return kernel_for<Neon, 2>(matrix.group_size, batch);
        case 3: return kernel_for<Neon, 3>(matrix.group_size, batch);
        case 4: return kernel_for<Neon, 4>(matrix.group_size, batch);
        case 8: return kernel_for<Neon, 8>(matrix.group_size, batch == Batch::rough ? Batch::many : batch);
        default: return kernel_of<Float<Neon, 16>>();
    }
}

}  // namespace

const Isa kNeon = {"neon", "Arm NEON", supported, kernel, activate, attend<Neon>, mix<Neon>, widen_keys<Neon>, widen_values<Neon>, attend_causally<Neon>};

}  // namespace greenroom
