// AVX2 with AVX-VNNI and GFNI: Intel's 12th generation and later, which have no AVX-512, and Zen 5. Integer sums of 32
// products an instruction, exact whatever the codes.
#include <cpuid.h>

#include "avx2.h"
#include "bits.h"

namespace greenroom {
namespace {

struct AvxVnni : Avx2 {
    static constexpr bool kWords = false, kInPlace = true;
    static constexpr int kTileVectors = 6;  // 12 sums in integers, beside codes; those in floats come and go

    static I begin_part(I sum) { return sum; }
    static I end_part(I, I part) { return part; }
    static I add_products(I sum, I codes, I x) {  // in place, as in avx512vnni.cpp
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(x));
        return sum;
    }

    static Pairs add_pairs(Pairs sum, Words a, Words b) {
        asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
        return sum;
    }

    template <int BITS>
    struct Packed : Avx2::Packed<BITS> {};

    // Per 32-bit element the sum of N vectors of codes times 256 hi + lo.
    template <int N>
    static F dot(const I* q, const std::uint8_t* planes) {
        I sum = none();
        for (int i = 0; i < N; ++i) sum = _mm256_dpbusd_avx_epi32(sum, q[i], load_bytes(planes + 64 * i));
        sum = times256(sum);
        for (int i = 0; i < N; ++i) sum = _mm256_dpbusd_avx_epi32(sum, q[i], load_bytes(planes + 64 * i + 32));
        return from_integers(sum);
    }
};

// See bits.h. Two blocks, a half each.
template <>
struct AvxVnni::Packed<3> {
    I pairs[2];  // vectors 0 and 2, vectors 1 and 3

    void load(const std::uint8_t* p, std::int64_t left) {
        Avx2::Packed<3> its;
        its.load(p, left);
        const I twice = _mm256_unpacklo_epi64(its.high, its.high);
        const I transposed = _mm256_gf2p8affine_epi64_epi8(_mm256_set1_epi64x(kColumns), twice, 0);
        const I other = _mm256_and_si256(_mm256_xor_si256(its.low, transposed), _mm256_set1_epi8(0x33));
        pairs[0] = _mm256_xor_si256(transposed, other);  // the low bits where 0x33 has ones
        pairs[1] = _mm256_xor_si256(its.low, other);     // and where it has none
    }

    template <bool>
    I codes(int v) const {
        static constexpr Collected collected;
        return _mm256_gf2p8affine_epi64_epi8(pairs[v % 2], load_bytes(collected.rows[v]), 0);
    }
};

bool supported() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return kAvx2.supported() && __builtin_cpu_supports("gfni") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

Kernel kernel(const Matrix& matrix, Batch batch) {
    switch (matrix.bits) {
        case 2: return kernel_for<AvxVnni, 2>(matrix.group_size, batch);
        case 3: return kernel_for<AvxVnni, 3>(matrix.group_size, batch);
        case 4: return kernel_for<AvxVnni, 4>(matrix.group_size, batch);
        case 8: return kernel_for<AvxVnni, 8>(matrix.group_size, batch == Batch::rough ? Batch::many : batch);
        default: return kernel_of<Float<AvxVnni, 16>>();
    }
}

}  // namespace

const Isa kAvxVnni = {"avxvnni", "AVX2 VNNI", supported, kernel, activate, attend<AvxVnni>, mix<AvxVnni>,
                      widen_keys<AvxVnni>, widen_values<AvxVnni>, attend_causally<AvxVnni>};

}  // namespace greenroom
