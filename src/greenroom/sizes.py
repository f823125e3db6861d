"""Bytes at the edge: parse "12GiB", print 12.0 GiB. Inside, bytes are plain integers."""

import re
from fractions import Fraction

from greenroom.errors import ConfigError

_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS[_prefix] = _UNITS[f"{_prefix}I"] = _UNITS[f"{_prefix}IB"] = 1024**_power
    _UNITS[f"{_prefix}B"] = 1000**_power


def parse_bytes(size: "int | str") -> int:
    """Bytes of an integer or of a text such as "400MiB", "1.5GB" or "2G" (K, M, G, T are binary, KB … decimal).

    Raises ConfigError for anything else, and for sizes that are not positive or beyond any memory.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise ConfigError(f"a size is an integer of bytes or a text like 12GiB, not {size!r}")
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
        if match is None or match[2].upper() not in _UNITS:
            raise ConfigError(f"cannot read the size {size!r}: write it like 400MiB or 12GiB")
        size = int(Fraction(match[1]) * _UNITS[match[2].upper()])
    if size <= 0:
        raise ConfigError(f"a size must be positive, not {size}")
    if size >= 1 << 63:
        raise ConfigError("a size must be below 8388608 TiB: write it like 400MiB or 12GiB")
    return size


def format_bytes(count: float) -> str:
    """A size for people, in binary units: 0 B, 512 KiB, 1.50 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit in ("B", "KiB", "MiB") else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"
