"""A memory limit that counts page cache, and the disk's readahead.

A limit is a cgroup (version 1 or 2), for which root is needed. What is changed on the machine is put back on the way
out, whatever happens in between.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from greenroom.errors import ConfigError


class Limit:
    """A cgroup that holds at most `nbytes`, page cache included. Use as a context manager; `enter` joins it.

    Raises ConfigError where none can be made.
    """

    def __init__(self, nbytes: int, root: Path = Path("/sys/fs/cgroup")) -> None:
        self.nbytes = nbytes
        parent, self._files = _place(root)
        self._folder = parent / f"greenroom-{uuid.uuid4().hex[:8]}"

    def __enter__(self) -> "Limit":
        try:
            self._folder.mkdir()
            (self._folder / self._files[0]).write_text(str(self.nbytes))
        except OSError as error:
            self.__exit__()
            raise ConfigError(f"cannot limit memory ({error}): run as root, or with --only ram") from error
        for name, value in self._files[1].items():
            with contextlib.suppress(OSError):  # kernels without swap accounting have no such file
                (self._folder / name).write_text(value.format(self.nbytes))
        return self

    def __exit__(self, *exception: object) -> None:
        for _ in range(50):  # a process that has just ended keeps the group busy for a moment
            with contextlib.suppress(OSError):
                self._folder.rmdir()
            if not self._folder.exists():
                return
            time.sleep(0.1)

    def enter(self) -> None:
        """Move this process into the group: called in the child before it becomes the worker."""
        (self._folder / "cgroup.procs").write_text(str(os.getpid()))


def _place(root: Path) -> "tuple[Path, tuple[str, dict[str, str]]]":
    """(where a group may be made, its limit's file and what keeps it from swapping)."""
    if (root / "memory" / "memory.limit_in_bytes").exists():
        return _own_group(root / "memory"), ("memory.limit_in_bytes", {"memory.memsw.limit_in_bytes": "{}"})
    with contextlib.suppress(OSError):  # the controller may be on already; without it, setting the limit fails
        (root / "cgroup.subtree_control").write_text("+memory")
    return root, ("memory.max", {"memory.swap.max": "0"})


def _own_group(root: Path) -> Path:
    """This process's own group where it is visible: a group made in it stays within its limits."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(",") and (root / path.lstrip("/")).is_dir():
            return root / path.lstrip("/")
    return root


def why_not() -> "str | None":
    """None where limits can be set, else the reason in one line."""
    try:
        with Limit(1 << 30):
            return None
    except ConfigError as error:
        return str(error)


@contextlib.contextmanager
def readahead(path: Path, nbytes: int, sys: Path = Path("/sys")) -> "Iterator[bool]":
    """Set the readahead of the disk that holds `path`, and put it back; yields False where that cannot be done."""
    setting = _readahead_file(path, sys)
    if setting is None:
        yield False
        return
    before = setting.read_text().strip()
    try:
        setting.write_text(str(nbytes >> 10))
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        setting.write_text(before)


def _readahead_file(path: Path, sys: Path) -> "Path | None":
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    block = (sys / "dev" / "block" / number).resolve()
    places = [
        block / "queue" / "read_ahead_kb",
        block.parent / "queue" / "read_ahead_kb",  # a partition has its disk's
        sys / "class" / "bdi" / number / "read_ahead_kb",
    ]
    return next((place for place in places if place.is_file()), None)
