// AVX-512 with VNNI and VBMI: Ice Lake, Zen 4 and later. Integer sums of 64 products an instruction.
#include <immintrin.h>

#include "activation.h"
#include "bytes.h"
#include "bits.h"
#include "causal.h"
#include "tiles.h"

namespace greenroom {
namespace {

struct Avx512Vnni {
    using F = __m512;
    using I = __m512i;
    static constexpr int kWidth = 16, kBytes = 64, kRegisters = 32;
    static constexpr bool kSigned = false, kWords = false;
    static constexpr bool kInPlace = true;  // a byte of 192 or 240 is as good as one of 3 or 15
    static constexpr int tile_rows = 4, tile_rows_of_several = 4, tile_vectors = 4, most_vectors = 128;
    static constexpr int kTileVectors = 8;  // 16 sums in integers, beside codes; those in floats come and go
    static constexpr bool rows_apart = false;

    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float value) { return _mm512_set1_ps(value); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F value) { _mm512_storeu_ps(p, value); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

    // COUNT neighbouring floats, repeated; and of those, an element's own.
    template <int COUNT>
    static F load_groups(const float* p) {
        if constexpr (COUNT == 1) return _mm512_set1_ps(*p);
        if constexpr (COUNT == 2) return _mm512_castpd_ps(_mm512_broadcastsd_pd(_mm_loadl_pd(_mm_setzero_pd(), reinterpret_cast<const double*>(p))));
        if constexpr (COUNT == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
        if constexpr (COUNT == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
        return _mm512_loadu_ps(p);
    }
    template <int COUNT>
    static F pick(F a, const std::int32_t* index) {
        return COUNT == 1 ? a : _mm512_permutexvar_ps(_mm512_load_si512(index), a);
    }
    // The sums of four, side by side: each is added up in the same order whichever of the four it is.
    static __m128 reduced4(F a, F b, F c, F d) {
        const F ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const F cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const F all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
        return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    }
    static void reduce4(F a, F b, F c, F d, float* to) { _mm_storeu_ps(to, reduced4(a, b, c, d)); }
    static float reduce(F a) { return _mm_cvtss_f32(reduced4(a, a, a, a)); }

    static F from_bytes(const std::uint8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    // Two neighbouring bfloat16s everywhere, or the negative of both.
    static void set_bfloat16(const std::uint8_t* p, bool negative, F* first, F* second) {
        std::uint32_t pair;
        std::memcpy(&pair, p, 4);
        const I both = _mm512_set1_epi32(static_cast<std::int32_t>(negative ? pair ^ 0x80008000u : pair));
        *first = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        *second = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<std::int32_t>(0xffff0000u))));
    }

    template <bool FLOAT16>
    static F from_halves(const std::uint8_t* p) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        if constexpr (FLOAT16) return _mm512_cvtph_ps(halves);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }

    static I bytes_at(const std::uint8_t* p, std::int64_t left) {  // no further than `left`
        if (left >= 64) return _mm512_loadu_si512(p);
        return _mm512_maskz_loadu_epi8(left > 0 ? (std::uint64_t{1} << left) - 1 : 0, p);
    }

    // Elements of 32 bits, for tiles.h: sums, and four bytes to multiply.
    static I none() { return _mm512_setzero_si512(); }
    static I load_bytes(const void* p) { return _mm512_loadu_si512(p); }
    static void store_bytes(void* p, I value) { _mm512_storeu_si512(p, value); }
    using Quads = const std::uint8_t*;
    static Quads quads(const std::uint8_t* p) { return p; }
    static I four(Quads quads, int number) {
        std::int32_t four;
        std::memcpy(&four, quads + 4 * number, 4);
        return _mm512_set1_epi32(four);
    }
    static I begin_part(I sum) { return sum; }
    static I end_part(I, I part) { return part; }
    // In place, which the compiler's own is not where there are many sums: it copies every other from register to register.
    static I add_products(I sum, I codes, I x) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
        return sum;
    }
    static I times256(I sum) { return _mm512_slli_epi32(sum, 8); }
    static F from_integers(I sum) { return _mm512_cvtepi32_ps(sum); }
    static __mmask16 first(int count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1); }
    static F load_some(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
    static void store_some(float* p, int count, F value) { _mm512_mask_storeu_ps(p, first(count), value); }

    // Words in pairs, for bytes.h.
    using Words = I;
    using Pairs = I;
    static Words words(const std::uint8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static Words pair(const std::int16_t* p) {
        std::int32_t both;
        std::memcpy(&both, p, 4);
        return _mm512_set1_epi32(both);
    }
    static Pairs no_pairs() { return none(); }
    static Pairs add_pairs(Pairs sum, Words a, Words b) {
        asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        return sum;
    }
    static F from_pairs(Pairs sum) { return _mm512_cvtepi32_ps(sum); }
    static F even(Words a) { return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(a, 16), 16)); }
    static F odd(Words a) { return _mm512_cvtepi32_ps(_mm512_srai_epi32(a, 16)); }
    static void store_words(std::int16_t* p, F value) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(value)));
    }

    // Sixteen rows of sixteen elements become columns.
    static void transpose(I (&m)[16]) {
        I pairs[16], fours[16];
        for (int i = 0; i < 16; i += 2) {
            pairs[i] = _mm512_unpacklo_epi32(m[i], m[i + 1]);
            pairs[i + 1] = _mm512_unpackhi_epi32(m[i], m[i + 1]);
        }
        for (int i = 0; i < 16; i += 4)
            for (int half = 0; half < 2; ++half) {
                fours[i + 2 * half] = _mm512_unpacklo_epi64(pairs[i + half], pairs[i + 2 + half]);
                fours[i + 2 * half + 1] = _mm512_unpackhi_epi64(pairs[i + half], pairs[i + 2 + half]);
            }
        for (int j = 0; j < 4; ++j) {  // fours[4 i + j], part k: column 4 k + j of rows 4 i to 4 i + 3
            const I even01 = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88), even23 = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
            const I odd01 = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xdd), odd23 = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xdd);
            m[j] = _mm512_shuffle_i32x4(even01, even23, 0x88);
            m[4 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
            m[8 + j] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
            m[12 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
        }
    }

    // A chunk of a row (integer.h), and its codes, a byte each.
    template <int BITS>
    struct Packed {
        static constexpr int mask = (1 << BITS) - 1;
        I bytes;

        void load(const std::uint8_t* p, std::int64_t left) { bytes = bytes_at(p, left); }

        template <bool IN_PLACE>
        I codes(int v) const {
            if (BITS == 8) return bytes;
            if (IN_PLACE) return _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(mask << v * BITS)));
            if (v == 0) return _mm512_and_si512(bytes, _mm512_set1_epi8(mask));
            return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(lowered(BITS, v * BITS)), 0);
        }
    };

    // Per 32-bit element the sum of N vectors of codes times 256 hi + lo.
    template <int N>
    static F dot(const I* q, const std::uint8_t* planes) {
        I hi = _mm512_setzero_si512();
        for (int i = 0; i < N; ++i) hi = _mm512_dpbusd_epi32(hi, q[i], _mm512_loadu_si512(planes + 128 * i));
        hi = _mm512_slli_epi32(hi, 8);
        I lo = N > 2 ? _mm512_setzero_si512() : hi;
        for (int i = 0; i < N; ++i) lo = _mm512_dpbusd_epi32(lo, q[i], _mm512_loadu_si512(planes + 128 * i + 64));
        const I sum = N > 2 ? _mm512_add_epi32(hi, lo) : lo;
        return _mm512_cvtepi32_ps(sum);
    }
};

// See bits.h.
template <>
struct Avx512Vnni::Packed<3> {
    I pairs[2];  // vectors 0 and 2, vectors 1 and 3

    void load(const std::uint8_t* p, std::int64_t left) {
        const I a = bytes_at(p, left), b = bytes_at(p + 32, left - 32);
        const I low = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 1, 3, 4, 6, 7, 8 + 5, 8 + 6), b);
        const I high = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(2, 2, 5, 5, 8 + 4, 8 + 4, 8 + 7, 8 + 7), b);
        const I columns = _mm512_set1_epi64(kColumns);
        const I transposed = _mm512_gf2p8affine_epi64_epi8(columns, high, 0), first = _mm512_set1_epi8(0x33);
        pairs[0] = _mm512_ternarylogic_epi64(first, low, transposed, 0xca);  // the second's bits where the first has ones
        pairs[1] = _mm512_ternarylogic_epi64(first, transposed, low, 0xca);
    }

    template <bool>
    I codes(int v) const {
        static constexpr Collected collected;
        return _mm512_gf2p8affine_epi64_epi8(pairs[v % 2], _mm512_load_si512(collected.rows[v]), 0);
    }
};

bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("gfni");
}

Kernel kernel(const Matrix& matrix, Batch batch) {
    switch (matrix.bits) {
        case 2: return kernel_for<Avx512Vnni, 2>(matrix.group_size, batch);
        case 3: return kernel_for<Avx512Vnni, 3>(matrix.group_size, batch);
        case 4: return kernel_for<Avx512Vnni, 4>(matrix.group_size, batch);
        case 8: return kernel_for<Avx512Vnni, 8>(matrix.group_size, batch == Batch::rough ? Batch::many : batch);
        default: return kernel_of<Float<Avx512Vnni, 16>>();
    }
}

}  // namespace

const Isa kAvx512Vnni = {"avx512vnni", "AVX-512 VNNI", supported, kernel, activate, attend<Avx512Vnni>, mix<Avx512Vnni>,
                         widen_keys<Avx512Vnni>, widen_values<Avx512Vnni>, attend_causally<Avx512Vnni>};

}  // namespace greenroom
