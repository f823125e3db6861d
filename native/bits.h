// Matrices of bits, with which a processor that has GFNI makes bytes of codes. A product with one gives each byte of eight
// anew: its bit i is the parity of row 7 - i and the byte. Internal to each translation unit, like rows.h.
#pragma once

#include <cstdint>

namespace greenroom {
namespace {

// As bytes to be multiplied: a one in column 0, in column 1, and so on, which turns a matrix into its transpose.
constexpr std::int64_t kColumns = static_cast<std::int64_t>(0x8040201008040201);

// Takes `bits` bits of a byte `places` down, and nothing else.
constexpr std::int64_t lowered(int bits, int places) {
    std::uint64_t rows = 0;
    for (int bit = 0; bit < bits; ++bit) rows |= std::uint64_t{1} << (places + bit) << 8 * (7 - bit);
    return static_cast<std::int64_t>(rows);
}

// At 3 bits a block is 16 bytes of low bits and 8 of high ones, eight columns each. As a matrix of bits these 8 are
// transposed: byte j then has the bits of columns j, 8 + j and so on, from bit 7 down. It stands beside the low bits of
// column j of each vector, and once more beside those of column 8 + j. Of the two, a selection puts all bits of two codes
// into one byte, where a product with a matrix of bits collects each code's three.
struct Collected {  // per vector, for its first eight columns and its second: which bits of the byte are the code's
    alignas(64) std::uint8_t rows[4][64];
    constexpr Collected() : rows() {
        for (int v = 0; v < 4; ++v)
            for (int half = 0; half < 8; ++half) {
                rows[v][8 * half + 7] = static_cast<std::uint8_t>(1 << 2 * v);
                rows[v][8 * half + 6] = static_cast<std::uint8_t>(2 << 2 * v);
                rows[v][8 * half + 5] = static_cast<std::uint8_t>(1 << (7 - 2 * v - half % 2));
            }
    }
};

}  // namespace
}  // namespace greenroom
