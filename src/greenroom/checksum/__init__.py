"""The checksum of a packed model's bytes: zlib's CRC-32, ten times as fast where `native/crc32.cpp` was compiled."""

try:
    from greenroom.checksum._crc32 import crc32 as checksum
except ImportError:
    from zlib import crc32 as checksum

__all__ = ["checksum"]
