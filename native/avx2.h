// Operations of 256 bits, for the translation units that have them: AVX2 alone, and with AVX-VNNI. Internal to each, like
// rows.h.
#pragma once

#include <immintrin.h>

#include "activation.h"
#include "bytes.h"
#include "causal.h"
#include "tiles.h"

namespace greenroom {
namespace {

struct Avx2 {
    using F = __m256;
    using I = __m256i;
    static constexpr int kWidth = 8, kBytes = 32, kRegisters = 16;
    static constexpr bool kSigned = false, kWords = true;  // 255 * 128 twice is too much for 16 bits
    static constexpr bool kInPlace = false;
    static constexpr int tile_rows = 4, tile_rows_of_several = 4, tile_vectors = 4, most_vectors = 128;
    static constexpr int kTileVectors = 3;  // as many as 16 registers hold sums of, in parts and whole, beside codes
    static constexpr bool rows_apart = true;  // 16 registers do not hold a tile's codes

    static F zero() { return _mm256_setzero_ps(); }
    static F set1(float value) { return _mm256_set1_ps(value); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F value) { _mm256_storeu_ps(p, value); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static float reduce(F a) {
        __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
        return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
    }
    static void reduce4(F a, F b, F c, F d, float* to) {
        to[0] = reduce(a), to[1] = reduce(b), to[2] = reduce(c), to[3] = reduce(d);
    }

    // COUNT neighbouring floats, repeated; and of those, an element's own.
    template <int COUNT>
    static F load_groups(const float* p) {
        if constexpr (COUNT == 1) return _mm256_set1_ps(*p);
        if constexpr (COUNT <= 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
        return _mm256_loadu_ps(p);
    }
    template <int COUNT>
    static F pick(F a, const std::int32_t* index) {
        return COUNT == 1 ? a : _mm256_permutevar8x32_ps(a, _mm256_load_si256(reinterpret_cast<const I*>(index)));
    }

    static __m256i widen(const std::uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }

    static F from_bytes(const std::uint8_t* p) { return _mm256_cvtepi32_ps(widen(p)); }
    // Two neighbouring bfloat16s everywhere, or the negative of both.
    static void set_bfloat16(const std::uint8_t* p, bool negative, F* first, F* second) {
        std::uint32_t pair;
        std::memcpy(&pair, p, 4);
        const I both = _mm256_set1_epi32(static_cast<std::int32_t>(negative ? pair ^ 0x80008000u : pair));
        *first = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        *second = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<std::int32_t>(0xffff0000u))));
    }

    template <bool FLOAT16>
    static F from_halves(const std::uint8_t* p) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        if constexpr (FLOAT16) return _mm256_cvtph_ps(halves);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }

    static I bytes_at(const std::uint8_t* p, std::int64_t left) {  // no further than `left`
        if (left >= 32) return _mm256_loadu_si256(reinterpret_cast<const I*>(p));
        alignas(32) std::uint8_t some[32] = {};
        if (left > 0) std::memcpy(some, p, static_cast<std::size_t>(left));
        return _mm256_load_si256(reinterpret_cast<const I*>(some));
    }

    // Elements of 32 bits, for tiles.h: sums, parts of them in pairs of 16 bits, and four bytes to multiply.
    static I none() { return _mm256_setzero_si256(); }
    static I load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
    static void store_bytes(void* p, I value) { _mm256_storeu_si256(static_cast<I*>(p), value); }
    using Quads = const std::uint8_t*;
    static Quads quads(const std::uint8_t* p) { return p; }
    static I four(Quads quads, int number) {
        std::int32_t four;
        std::memcpy(&four, quads + 4 * number, 4);
        return _mm256_set1_epi32(four);
    }
    static I begin_part(I) { return none(); }
    static I add_products(I part, I codes, I x) {
        I sum = _mm256_add_epi16(part, _mm256_maddubs_epi16(codes, x));
        asm("" : "+x"(sum));  // else GCC adds in another order, for which it has no registers
        return sum;
    }
    static I end_part(I sum, I part) { return _mm256_add_epi32(sum, _mm256_madd_epi16(part, _mm256_set1_epi16(1))); }
    static I times256(I sum) { return _mm256_slli_epi32(sum, 8); }
    static F from_integers(I sum) { return _mm256_cvtepi32_ps(sum); }
    static I first(int count) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
    static F load_some(const float* p, int count) { return _mm256_maskload_ps(p, first(count)); }
    static void store_some(float* p, int count, F value) { _mm256_maskstore_ps(p, first(count), value); }

    // Words in pairs, for bytes.h.
    using Words = I;
    using Pairs = I;
    static Words words(const std::uint8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static Words pair(const std::int16_t* p) {
        std::int32_t both;
        std::memcpy(&both, p, 4);
        return _mm256_set1_epi32(both);
    }
    static Pairs no_pairs() { return none(); }
    static Pairs add_pairs(Pairs sum, Words a, Words b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
    static F from_pairs(Pairs sum) { return _mm256_cvtepi32_ps(sum); }
    static F even(Words a) { return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(a, 16), 16)); }
    static F odd(Words a) { return _mm256_cvtepi32_ps(_mm256_srai_epi32(a, 16)); }
    static void store_words(std::int16_t* p, F value) {
        const I whole = _mm256_cvtps_epi32(value), halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole, whole), 8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(halves));
    }

    // Eight rows of eight elements become columns.
    static void transpose(I (&m)[8]) {
        I pairs[8], fours[8];
        for (int i = 0; i < 8; i += 2) {
            pairs[i] = _mm256_unpacklo_epi32(m[i], m[i + 1]);
            pairs[i + 1] = _mm256_unpackhi_epi32(m[i], m[i + 1]);
        }
        for (int i = 0; i < 8; i += 4)
            for (int half = 0; half < 2; ++half) {
                fours[i + 2 * half] = _mm256_unpacklo_epi64(pairs[i + half], pairs[i + 2 + half]);
                fours[i + 2 * half + 1] = _mm256_unpackhi_epi64(pairs[i + half], pairs[i + 2 + half]);
            }
        for (int j = 0; j < 4; ++j) {  // fours[4 i + j], half k: column 4 k + j of rows 4 i to 4 i + 3
            m[j] = _mm256_permute2x128_si256(fours[j], fours[4 + j], 0x20);
            m[4 + j] = _mm256_permute2x128_si256(fours[j], fours[4 + j], 0x31);
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
            if (IN_PLACE) return _mm256_and_si256(bytes, _mm256_set1_epi8(static_cast<char>(mask << v * BITS)));
            return _mm256_and_si256(v == 0 ? bytes : _mm256_srli_epi16(bytes, v * BITS), _mm256_set1_epi8(mask));
        }
    };

    // Per 32-bit element the sum of N vectors of codes times 256 hi + lo. Pairs of products are added in 16 bits: four
    // vectors of codes below 8 or two of codes below 16 stay within them.
    template <int N>
    static F dot(const I* q, const std::uint8_t* planes) {
        I hi = _mm256_setzero_si256(), lo = hi;
        for (int i = 0; i < N; ++i) {
            const I* at = reinterpret_cast<const I*>(planes + 64 * i);
            hi = _mm256_add_epi16(hi, _mm256_maddubs_epi16(q[i], _mm256_loadu_si256(at)));
            lo = _mm256_add_epi16(lo, _mm256_maddubs_epi16(q[i], _mm256_loadu_si256(at + 1)));
        }
        return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(hi, _mm256_set1_epi16(256)),
                                                   _mm256_madd_epi16(lo, _mm256_set1_epi16(1))));
    }

    // The same as words times words, pairs added in 32 bits: for codes of 8 bits, or of 2 anywhere in their bytes.
    template <int N>
    static F dot_words(const I* q, const std::uint8_t* planes) {
        I sum = _mm256_setzero_si256();
        for (int i = 0; i < N; ++i) {
            const I* at = reinterpret_cast<const I*>(planes + 64 * i);
            const I even = _mm256_and_si256(q[i], _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(q[i], 8);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, _mm256_loadu_si256(at)));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(odd, _mm256_loadu_si256(at + 1)));
        }
        return _mm256_cvtepi32_ps(sum);
    }
};

// Bytes as they lie.
template <>
struct Avx2::Packed<8> {
    I bytes[2];

    void load(const std::uint8_t* p, std::int64_t left) { bytes[0] = bytes_at(p, left), bytes[1] = bytes_at(p + 32, left - 32); }

    template <bool>
    I codes(int v) const { return bytes[v]; }
};

// Two blocks, each of 16 bytes of low bits and 8 of high ones, eight columns each.
template <>
struct Avx2::Packed<3> {
    I low, high;  // a block a half

    void load(const std::uint8_t* p, std::int64_t left) {
        std::uint8_t some[48] = {};
        if (left < 48) {
            std::memcpy(some, p, static_cast<std::size_t>(left));
            p = some;
        }
        const __m128i* at = reinterpret_cast<const __m128i*>(p);
        low = _mm256_set_m128i(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 24)), _mm_loadu_si128(at));
        high = _mm256_set_m128i(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 40)), _mm_loadl_epi64(at + 1));
    }

    template <bool>
    I codes(int v) const {
        const I bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
        const I columns = _mm256_set_epi64x(0x0101010101010101, 0, 0x0101010101010101, 0);
        const I bytes = _mm256_shuffle_epi8(high, _mm256_add_epi8(columns, _mm256_set1_epi8(static_cast<char>(2 * v))));
        const I set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
        const I lanes = v == 0 ? low : _mm256_srli_epi16(low, 2 * v);
        return _mm256_or_si256(_mm256_and_si256(lanes, _mm256_set1_epi8(3)), _mm256_and_si256(set, _mm256_set1_epi8(4)));
    }
};

}  // namespace
}  // namespace greenroom
