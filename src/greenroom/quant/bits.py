"""Integer codes to bytes and back: blocks of 64 weights, 8 x bits bytes each.

    8 bits  byte j = w[j]
    4 bits  byte j = w[j] | w[j+32] << 4                                          j = 0..31
    2 bits  byte j = w[j] | w[j+16] << 2 | w[j+32] << 4 | w[j+48] << 6            j = 0..15
    3 bits  the low two bits as at 2 bits, then bit i of a little-endian u64 = the high bit of w[i]

Neighbours in a byte are far apart in the row, so a row unpacks by shifts and masks over whole lanes.
"""

import torch

BLOCK = 64


def pack(codes: torch.Tensor, bits: int, out: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [rows, padded_cols], each below 2^bits, into out uint8 [rows, padded_cols * bits / 8]; returns out.

    padded_cols is a multiple of 64; bits is 2, 3, 4 or 8.
    """
    if bits == 8:
        return out.copy_(codes)
    rows, cols = codes.shape
    lanes = codes.view(rows, cols // BLOCK, BLOCK)
    blocks = out.view(rows, cols // BLOCK, 8 * bits)
    if bits == 3:
        _pack_lanes(lanes & 3, 2, blocks[..., :16])
        _pack_high(lanes >> 2, blocks[..., 16:])
    else:
        _pack_lanes(lanes, bits, blocks)
    return out


def unpack(packed: torch.Tensor, bits: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """The inverse of `pack`: uint8 [rows, bytes] into out uint8 [rows, bytes * 8 / bits] (made if None); returns out.

    The result may be the input itself at 8 bits when out is None.
    """
    if bits == 8:
        return packed if out is None else out.copy_(packed)
    rows, width = packed.shape
    blocks = packed.view(rows, width // (8 * bits), 8 * bits)
    if out is None:
        out = torch.empty((rows, width * 8 // bits), dtype=torch.uint8, device=packed.device)
    lanes = out.view(rows, -1, BLOCK)
    if bits == 3:
        _unpack_lanes(blocks[..., :16], 2, lanes)
        _unpack_high(blocks[..., 16:], lanes)
    else:
        _unpack_lanes(blocks, bits, lanes)
    return out


def _pack_lanes(lanes: torch.Tensor, bits: int, blocks: torch.Tensor) -> None:
    width = BLOCK * bits // 8
    blocks.copy_(lanes[..., :width])
    for shift, start in enumerate(range(width, BLOCK, width), start=1):
        blocks.bitwise_or_(lanes[..., start : start + width] << (shift * bits))


def _unpack_lanes(blocks: torch.Tensor, bits: int, lanes: torch.Tensor) -> None:
    width = BLOCK * bits // 8
    last = BLOCK // width - 1
    for lane in range(last + 1):
        target = lanes[..., lane * width : (lane + 1) * width]
        torch.bitwise_right_shift(blocks, lane * bits, out=target)
        if lane < last:  # the topmost lane has nothing above it to mask away
            target.bitwise_and_((1 << bits) - 1)


def _pack_high(bit: torch.Tensor, blocks: torch.Tensor) -> None:
    eights = bit.view(*bit.shape[:-1], 8, 8)  # bit i of the u64 is bit i % 8 of byte i // 8
    blocks.copy_(eights[..., 0])
    for i in range(1, 8):
        blocks.bitwise_or_(eights[..., i] << i)


def _unpack_high(blocks: torch.Tensor, lanes: torch.Tensor) -> None:
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    high = (blocks.unsqueeze(-1) >> shifts).bitwise_and_(1).bitwise_left_shift_(2)
    lanes.bitwise_or_(high.view(lanes.shape))
