"""The compiled checksum is zlib's: of any bytes, from anywhere in memory, in one piece or in several."""

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from greenroom.checksum import checksum


@given(st.binary(max_size=400), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_a_checksum_is_zlibs_and_goes_on_from_another(data: bytes, cut: int, before: int) -> None:
    assert checksum(data) == zlib.crc32(data)
    assert checksum(memoryview(bytearray(data))[cut:], before) == zlib.crc32(data[cut:], before)
    assert checksum(data[cut:], checksum(data[:cut])) == zlib.crc32(data)


def test_one_bit_is_noticed() -> None:
    """Negative control."""
    data = bytearray(1000)
    data[500] ^= 1
    assert checksum(data) != checksum(bytes(1000))


def test_what_is_no_bytes_is_refused() -> None:
    with pytest.raises(TypeError):
        checksum("text")  # type: ignore[arg-type]
