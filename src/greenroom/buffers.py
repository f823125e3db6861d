"""Bytes in memory, and the one way to open and read files that fill them."""

import contextlib
import ctypes
import errno
import mmap
import os
from pathlib import Path

import torch

from greenroom.errors import BudgetError
from greenroom.sizes import format_bytes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, sharing memory."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs lag


def allocate(nbytes: int, huge: bool = True) -> torch.Tensor:
    """Zeroed memory, uint8 [nbytes], page-aligned. `huge`: in huge pages where the kernel has any, so that what is
    streamed through every token costs few misses of the address translation; else in none, so that what was never
    touched takes no memory. Raises BudgetError where the system has none."""
    try:
        mapping = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise BudgetError(
            f"the system gives this process no {format_bytes(nbytes)} more ({error.strerror}): give a smaller --ram"
        ) from error
    with contextlib.suppress(AttributeError, OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes)


def give_back() -> None:
    """What this process has freed goes back to the system, where the C library can do that (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def give_back_large() -> None:
    """From now on blocks of 2 MiB and more, as a prompt's activations are, go back to the system where they are freed
    (glibc). It would come to keep those of up to 32 MiB in its heap, in pieces that nothing else fits in: a third of
    what transformers' attention takes for a long prompt."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 2 << 20)
        library.mallopt(_M_TRIM_THRESHOLD, 4 << 20)


def sent(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    """A tensor of the host on a device. What is computed there from then on comes after the copy; the host waits for
    nothing, for which the bytes have to be in pinned memory. Raises RuntimeError where a CUDA graph is captured: each
    replay would send what lies there by then."""
    if place.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("it sends values from the host")
        tensor = tensor.pin_memory()
    return tensor.to(place, non_blocking=True)


def open_direct(path: Path) -> "tuple[int, bool]":
    """(a file descriptor, whether its reads bypass the page cache): tmpfs and some network file systems cannot."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY), False


def read_into(file: int, target: memoryview, offset: int) -> int:
    """Fill `target` from `offset` of an open file; returns the bytes read, fewer only where the file ends."""
    done = 0
    while done < len(target):
        count = os.preadv(file, [target[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done
