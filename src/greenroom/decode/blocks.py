"""Cached keys or values in blocks of positions, as native/matrix.h has them.

In 16 bits a block is float16, of keys [dim, BLOCK], of values [BLOCK, dim]. In 8 bits it is int8, of keys [dim / 2,
BLOCK, 2], of values [BLOCK / 2, dim, 2], and then bfloat16 scales [groups, BLOCK], one for each GROUP numbers of a
position: the largest of them is 127 scales.
"""

import math

import torch

from greenroom.buffers import allocate
from greenroom.kernels import native
from greenroom.static_kv import lasting

_MIN_CAPACITY = 256
"""Positions."""


def nbytes_per_position(dim: int, bits: int) -> int:
    """Bytes that `dim` numbers of one position take in `bits` bits, 16 or 8."""
    return _numbers_nbytes(dim, bits) + (0 if bits == 16 else 2 * math.ceil(dim / native.GROUP))


def _numbers_nbytes(dim: int, bits: int) -> int:
    """Of one position, without scales."""
    return 2 * dim if bits == 16 else dim + dim % 2


class Blocks:
    """Room for at least `positions` positions of numbers [heads, dim], all 0; `keys`: those of keys. What nobody has
    written to takes no memory."""

    def __init__(self, heads: int, positions: int, dim: int, bits: int, keys: bool) -> None:
        self.heads, self.dim, self.bits, self._keys = heads, dim, bits, keys
        count = math.ceil(max(_MIN_CAPACITY, positions) / native.BLOCK)
        self._bytes = _room(heads, count, native.BLOCK * nbytes_per_position(dim, bits))
        together = 1 if bits == 16 else 2
        end = native.BLOCK * _numbers_nbytes(dim, bits)
        numbers = self._bytes[..., :end].view(torch.float16 if bits == 16 else torch.int8)
        if keys:
            numbers = numbers.view(heads, count, -1, native.BLOCK, together).transpose(2, 3)
        else:
            numbers = torch.unflatten(numbers[..., : native.BLOCK * dim], 2, (-1, dim, together)).transpose(3, 4)
        self._numbers = numbers
        """of keys [heads, blocks, BLOCK, dim / together, together], of values [heads, blocks, BLOCK / together,
        together, dim]"""
        if bits == 8:
            scales = self._bytes[..., end:].view(torch.bfloat16)
            self._scales = scales.view(heads, count, -1, native.BLOCK).transpose(2, 3)  # [heads, blocks, BLOCK, groups]

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self._bytes.shape[1] * native.BLOCK

    @property
    def address(self) -> int:
        """Where they lie."""
        return self._bytes.data_ptr()

    def put(self, start: int, x: torch.Tensor) -> None:
        """x [heads, n, dim] from position `start` on, rounded, what is larger than float16 to its largest number."""
        largest = torch.finfo(torch.float16).max
        x = x.clamp(-largest, largest)
        if self.bits == 16:
            self._put_numbers(start, x.to(torch.float16))
            return
        codes, scales = [], []
        for group in torch.split(x.to(torch.float32), native.GROUP, dim=2):
            scale = (group.abs().amax(dim=2, keepdim=True) / 127).to(torch.bfloat16)
            codes.append((group / scale).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8))
            scales.append(scale)
        self._put_numbers(start, torch.cat(codes, dim=2))
        self._put_scales(start, torch.cat(scales, dim=2))

    def get(self, first: int, last: int) -> torch.Tensor:
        """Positions first <= p < last [heads, n, dim]: float16, or of 8 bits float32."""
        found = self._get_numbers(first, last)
        if self.bits == 16:
            return found
        found = found.to(torch.float32)
        groups = torch.split(found, native.GROUP, dim=2)
        for group, scale in zip(groups, self._get_scales(first, last).unbind(2), strict=True):
            group.mul_(scale[..., None])
        return found

    def moved(self, first: int, last: int, positions: int) -> "Blocks":
        """Positions first <= p < last, as they are, at the start of room for `positions`."""
        new = Blocks(self.heads, positions, self.dim, self.bits, self._keys)
        if first == 0:  # as they lie: a copy in between would be as large as all of them
            used = _blocks(last)
            new._bytes[:, :used] = self._bytes[:, :used]
            return new
        new._put_numbers(0, self._get_numbers(first, last))
        if self.bits == 8:
            new._put_scales(0, self._get_scales(first, last))
        return new

    def _put_numbers(self, start: int, x: torch.Tensor) -> None:
        """x [heads, n, dim] as they are held."""
        block, lane = _places(start, x.shape[1])
        if self._keys:
            together = self._numbers.shape[4]
            x = torch.nn.functional.pad(x, (0, x.shape[2] % together))
            self._numbers[:, block, lane] = torch.unflatten(x, 2, (-1, together))
        else:
            together = self._numbers.shape[3]
            self._numbers[:, block, lane // together, lane % together] = x

    def _get_numbers(self, first: int, last: int) -> torch.Tensor:
        """[heads, n, dim] as they are held."""
        used = self._numbers[:, : _blocks(last)]
        if self._keys:
            return used.flatten(3).flatten(1, 2)[:, first:last, : self.dim]
        return used.flatten(1, 3)[:, first:last]

    def _put_scales(self, start: int, x: torch.Tensor) -> None:
        block, lane = _places(start, x.shape[1])
        self._scales[:, block, lane] = x

    def _get_scales(self, first: int, last: int) -> torch.Tensor:
        return self._scales[:, : _blocks(last)].flatten(1, 2)[:, first:last]


def _places(start: int, count: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Block of each position, and place in it."""
    positions = torch.arange(start, start + count)
    return positions // native.BLOCK, positions % native.BLOCK


def _blocks(positions: int) -> int:
    return math.ceil(positions / native.BLOCK)


def _room(*shape: int) -> torch.Tensor:
    with lasting():
        return allocate(math.prod(shape), huge=False).view(shape)
