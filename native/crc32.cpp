#include "crc32.h"

#include <array>
#include <cstring>

#if defined(GREENROOM_X86)
#include <immintrin.h>
#elif defined(GREENROOM_ARM)
#include <arm_acle.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

namespace greenroom {
namespace {

constexpr int kAtOnce = 8;  // bytes

using Tables = std::array<std::array<std::uint32_t, 256>, kAtOnce>;

// A polynomial over bits, that of x^0 the highest, times x modulo the checksum's own.
constexpr std::uint32_t times_x(std::uint32_t value) { return value >> 1 ^ (value & 1 ? 0xedb88320u : 0u); }

// tables[n][byte]: the checksum of a byte and n zeros after it, without the inversions at either end.
Tables make_tables() {
    Tables tables;
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
        std::uint32_t sum = byte;
        for (int bit = 0; bit < 8; ++bit) sum = times_x(sum);
        tables[0][byte] = sum;
    }
    for (int n = 1; n < kAtOnce; ++n)
        for (int byte = 0; byte < 256; ++byte) {
            const std::uint32_t before = tables[n - 1][byte];
            tables[n][byte] = before >> 8 ^ tables[0][before & 255];
        }
    return tables;
}

// Inverted at neither end, as all that follow.
std::uint32_t by_table(const std::uint8_t* data, std::int64_t nbytes, std::uint32_t sum) {
    static const Tables tables = make_tables();
    for (; nbytes >= kAtOnce; nbytes -= kAtOnce, data += kAtOnce) {
        const std::uint32_t low = sum ^ (static_cast<std::uint32_t>(data[0]) | static_cast<std::uint32_t>(data[1]) << 8 |
                                         static_cast<std::uint32_t>(data[2]) << 16 | static_cast<std::uint32_t>(data[3]) << 24);
        sum = tables[7][low & 255] ^ tables[6][low >> 8 & 255] ^ tables[5][low >> 16 & 255] ^ tables[4][low >> 24] ^
              tables[3][data[4]] ^ tables[2][data[5]] ^ tables[1][data[6]] ^ tables[0][data[7]];
    }
    for (; nbytes > 0; --nbytes, ++data) sum = sum >> 8 ^ tables[0][(sum ^ *data) & 255];
    return sum;
}

#if defined(GREENROOM_X86)
#define GREENROOM_CARRYLESS __attribute__((target("pclmul,sse4.1")))

// x^n modulo the checksum's polynomial, as a factor of a product without carries. (Of two numbers whose highest bit is
// x^0 such a product is one place short, hence the shift.)
constexpr std::int64_t power(int n) {
    std::uint32_t value = 0x80000000u;
    for (; n > 0; --n) value = times_x(value);
    return static_cast<std::int64_t>(static_cast<std::uint64_t>(value) << 1);
}

// 16 bytes that stand BITS before others, added to those: the two halves times the remainders of what lies between.
template <int BITS>
GREENROOM_CARRYLESS inline __m128i folded(__m128i early, __m128i late) {
    constexpr std::int64_t of_low = power(BITS + 32), of_high = power(BITS - 32);
    const __m128i factors = _mm_set_epi64x(of_high, of_low);
    const __m128i low = _mm_clmulepi64_si128(early, factors, 0x00), high = _mm_clmulepi64_si128(early, factors, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), late);
}

GREENROOM_CARRYLESS inline __m128i load(const std::uint8_t* data) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

// After Gopal, Ozturk and others, "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", 2009: four
// pieces of 16 bytes at a time become the next four, those become one, and of its 16 bytes the table makes the rest.
GREENROOM_CARRYLESS std::uint32_t by_folding(const std::uint8_t* data, std::int64_t nbytes, std::uint32_t sum) {
    __m128i pieces[4];
    for (int i = 0; i < 4; ++i) pieces[i] = load(data + 16 * i);
    pieces[0] = _mm_xor_si128(pieces[0], _mm_cvtsi32_si128(static_cast<int>(sum)));
    for (data += 64, nbytes -= 64; nbytes >= 64; data += 64, nbytes -= 64)
        for (int i = 0; i < 4; ++i) pieces[i] = folded<512>(pieces[i], load(data + 16 * i));
    __m128i one = pieces[0];
    for (int i = 1; i < 4; ++i) one = folded<128>(one, pieces[i]);
    for (; nbytes >= 16; data += 16, nbytes -= 16) one = folded<128>(one, load(data));
    std::uint8_t rest[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), one);
    return by_table(data, nbytes, by_table(rest, 16, 0));
}

bool folds() { return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1"); }
#endif

#if defined(GREENROOM_ARM)
// There is an instruction for 8 bytes.
std::uint32_t by_instruction(const std::uint8_t* data, std::int64_t nbytes, std::uint32_t sum) {
    for (; nbytes >= 8; data += 8, nbytes -= 8) {
        std::uint64_t eight;
        std::memcpy(&eight, data, 8);
        sum = __crc32d(sum, eight);
    }
    for (; nbytes > 0; ++data, --nbytes) sum = __crc32b(sum, *data);
    return sum;
}

bool has_instruction() {
#if defined(__APPLE__)
    return true;
#elif defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_CRC32;
#else
    return false;
#endif
}
#endif

}  // namespace

std::uint32_t crc32_by_table(const std::uint8_t* data, std::int64_t nbytes, std::uint32_t before) {
    return ~by_table(data, nbytes, ~before);
}

std::uint32_t crc32(const std::uint8_t* data, std::int64_t nbytes, std::uint32_t before) {
#if defined(GREENROOM_X86)
    static const bool can = folds();
    if (can && nbytes >= 64) return ~by_folding(data, nbytes, ~before);
#elif defined(GREENROOM_ARM)
    static const bool can = has_instruction();
    if (can) return ~by_instruction(data, nbytes, ~before);
#endif
    return crc32_by_table(data, nbytes, before);
}

}  // namespace greenroom
