"""What one packed weight is made of: bits per code and weights per group."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from greenroom.errors import ConfigError

BITS = (2, 3, 4, 8, 16)
GROUP_SIZES = (16, 32, 64, 128)
DEFAULT_GROUP_SIZE: dict[int, int] = {2: 16, 3: 64, 4: 64, 8: 64, 16: 0}
"""Weights per group where none is asked for; 2 to 4 bits as in Eliseev & Mazur 2023 (arXiv:2312.17238)."""
DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a weight matrix is stored.

    bits: 2, 3, 4 or 8 bits a code, or 16 for the raw values.
    group_size: consecutive weights of a row that share a scale and a zero point; 0 at 16 bits.
    dtype: "bfloat16" or "float16": what 16 bits are. The other widths keep the default.

    Raises ConfigError for any other combination.
    """

    bits: int
    group_size: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ConfigError(f"bits must be one of {', '.join(map(str, BITS))}, not {self.bits!r}")
        if type(self.group_size) is not int:
            raise ConfigError(f"a group size is an integer, not {self.group_size!r}")
        if self.bits == 16 and self.group_size != 0:
            raise ConfigError(f"16-bit weights have no groups: the group size must be 0, not {self.group_size}")
        if self.bits != 16 and self.group_size not in GROUP_SIZES:
            raise ConfigError(f"a group size must be one of {', '.join(map(str, GROUP_SIZES))}, not {self.group_size}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.bits != 16 and self.dtype != DTYPES[0]:
            raise ConfigError(f"dtype is a choice at 16 bits only, not at {self.bits}")

    @classmethod
    def of(cls, bits: int, group_size: int | None = None) -> "Format":
        """The format of a width; group_size None takes DEFAULT_GROUP_SIZE. Raises ConfigError."""
        if group_size is None:
            group_size = DEFAULT_GROUP_SIZE.get(bits, 0)
        return cls(bits=bits, group_size=group_size)

    @classmethod
    def from_json(cls, record: Mapping[str, object]) -> "Format":
        """The format that `to_json` wrote. Raises ConfigError for unknown or missing keys and for bad values."""
        known = {"bits", "group_size", "dtype"}
        if unknown := sorted(set(record) - known):
            raise ConfigError(f"a format has no setting named {', '.join(unknown)}")
        if missing := sorted({"bits", "group_size"} - set(record)):
            raise ConfigError(f"a format needs {', '.join(missing)}")
        return cls(**record)  # type: ignore[arg-type]  # __post_init__ checks the values

    def to_json(self) -> dict[str, int | str]:
        """The fields as a dictionary that JSON can hold."""
        return asdict(self)

    @property
    def top(self) -> int:
        """The largest code, 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def name(self) -> str:
        """For people: "4-bit g64", "16-bit bfloat16"."""
        return f"16-bit {self.dtype}" if self.bits == 16 else f"{self.bits}-bit g{self.group_size}"

    def bits_per_weight(self, rows: int, cols: int) -> float:
        """Stored bits per weight of a [rows, cols] matrix, with scales, zeros, row parameters and padding."""
        from greenroom.quant.layout import Layout  # layout builds on this module

        return 8 * Layout(rows, cols, self).nbytes / (rows * cols)
