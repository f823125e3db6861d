"""One packing at a time into a folder: the kernel's lock on the folder itself, which goes with whoever holds it."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from greenroom.errors import PackError


@contextlib.contextmanager
def locked(folder: Path) -> "Iterator[None]":
    """Hold the folder, which must be there; nothing is held where the file system has no such locks.

    Raises PackError where someone else holds it, or it cannot be opened.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise PackError(f"cannot open {folder} ({error.strerror or error}): choose another folder") from error
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PackError(f"another greenroom packs into {folder}: wait for it") from None
    except OSError:  # e.g. a network's file system
        return
