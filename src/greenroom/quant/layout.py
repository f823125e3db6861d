"""Where the parts of one packed matrix lie in its buffer.

    codes        uint8 [rows, code_row_bytes]  2 to 8 bits: rows padded to whole blocks (see bits.py);
                                               16 bits: the raw little-endian values, unpadded, and no other part
    scale_codes  uint8 [rows, groups]
    zero_codes   uint8 [rows, groups]
    row_params   bfloat16 [rows, 4]            scale_min, scale_step, zero_min, zero_step

    scale = scale_min + scale_step * scale_code      zero = zero_min + zero_step * zero_code
    weight = scale * (code - zero)                   all in float32

Every part starts at a multiple of 64 bytes and the whole is a multiple of 64, so that records can be read with
aligned direct I/O and copied to a device part by part.
"""

from dataclasses import dataclass

import torch

from greenroom.errors import ConfigError
from greenroom.quant.format import Format

ALIGNMENT = 64
"""Bytes; also the number of weights in one block of codes."""


def _align(count: int, multiple: int = ALIGNMENT) -> int:
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """Offsets and sizes, in bytes, of a packed [rows, cols] matrix. Raises ConfigError for an empty matrix."""

    rows: int
    cols: int
    format: Format

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise ConfigError(f"a weight has at least one row and one column, not {self.rows} x {self.cols}")

    @property
    def padded_cols(self) -> int:
        """Columns as stored: whole blocks of 64, whole groups of 128; at 16 bits just cols."""
        if self.format.bits == 16:
            return self.cols
        return _align(self.cols, max(ALIGNMENT, self.format.group_size))

    @property
    def groups(self) -> int:
        """Groups in a row; 0 at 16 bits."""
        return 0 if self.format.bits == 16 else self.padded_cols // self.format.group_size

    @property
    def code_row_bytes(self) -> int:
        """Bytes of one row of codes."""
        return self.padded_cols * self.format.bits // 8

    @property
    def codes(self) -> int:
        """Offset of the codes."""
        return 0

    @property
    def scale_codes(self) -> int:
        """Offset of the scale codes."""
        return _align(self.rows * self.code_row_bytes)

    @property
    def zero_codes(self) -> int:
        """Offset of the zero codes."""
        return self.scale_codes + _align(self.rows * self.groups)

    @property
    def row_params(self) -> int:
        """Offset of the row parameters."""
        return self.zero_codes + _align(self.rows * self.groups)

    @property
    def nbytes(self) -> int:
        """Size of the whole record."""
        return self.row_params + (0 if self.format.bits == 16 else _align(self.rows * 8))

    def parts(self) -> dict[str, tuple[int, int]]:
        """Name to (offset, length without padding) of every part there is, in order."""
        found = {"codes": (self.codes, self.rows * self.code_row_bytes)}
        if self.format.bits != 16:
            found["scale_codes"] = (self.scale_codes, self.rows * self.groups)
            found["zero_codes"] = (self.zero_codes, self.rows * self.groups)
            found["row_params"] = (self.row_params, self.rows * 8)
        return found

    def view(self, packed: torch.Tensor, part: str) -> torch.Tensor:
        """One part of a packed uint8 [nbytes] tensor as a view, in the shape and dtype of this module's table.

        Raises ConfigError if the tensor is not of this layout, KeyError for a part that is not there.
        """
        if packed.dtype != torch.uint8 or packed.shape != (self.nbytes,):
            raise ConfigError(
                f"a packed {self.rows} x {self.cols} {self.format.name} weight is {self.nbytes} bytes of uint8, "
                f"not {packed.dtype} {list(packed.shape)}"
            )
        start, length = self.parts()[part]
        found = packed[start : start + length].view(self.rows, -1)
        return found.view(torch.bfloat16) if part == "row_params" else found
