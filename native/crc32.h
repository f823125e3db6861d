// The checksum of a packed model's records: docs/format.md.
#pragma once

#include <cstdint>

namespace greenroom {

// CRC-32 of ISO 3309, as zlib's and Python's: of `nbytes` at `data` that follow bytes whose checksum is `before`.
std::uint32_t crc32(const std::uint8_t* data, std::int64_t nbytes, std::uint32_t before = 0);

// The same, a table's entry a byte: what any machine can do, and what the way above must agree with.
std::uint32_t crc32_by_table(const std::uint8_t* data, std::int64_t nbytes, std::uint32_t before = 0);

}  // namespace greenroom
