"""Bytes in memory and the one loop that fills them from a file."""

import os

import torch


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, sharing memory."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs lag


def read_into(file: int, target: memoryview, offset: int) -> int:
    """Fill `target` from `offset` of an open file; returns the bytes read, fewer only where the file ends."""
    done = 0
    while done < len(target):
        count = os.preadv(file, [target[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done
