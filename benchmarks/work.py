"""The folder that holds the models between runs."""

import shutil
import sys
from pathlib import Path

from benchmarks import gguf_file, packed_folder
from benchmarks.shapes import Pairing, Shape
from greenroom.errors import ConfigError
from greenroom.sizes import format_bytes

_PREFIX = "bench1-"
"""Of every name; the number is raised when other bytes are written for the same name."""
_SPARE = 1 << 30


class Work:
    """Models by shape and format, built when first asked for. Where the disk is full, the oldest others make room."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make {folder} ({error.strerror}): give another folder with --work") from error

    def models(self, shape: Shape, pairing: Pairing, peer: bool) -> "tuple[Path, Path | None]":
        """The packed folder and, for a `peer`, the GGUF file. Raises ConfigError where the disk has no room."""
        ours = self.folder / f"{_PREFIX}{shape.name}-{pairing.bits}bit-g{pairing.group_size}"
        theirs = self.folder / f"{_PREFIX}{shape.name}-{pairing.peer}.gguf"
        wanted = [ours, theirs] if peer else [ours]
        missing = [path for path in wanted if not path.exists()]
        self._make_room(len(missing) * shape.nbytes(pairing.bits), keep=wanted)
        for path in missing:
            print(f"building {path}", file=sys.stderr, flush=True)
            if path is ours:
                packed_folder.write(path, shape, pairing)
            else:
                gguf_file.write(path, shape, pairing)
        return ours, theirs if peer else None

    def clean(self) -> None:
        """Remove every model."""
        for path in self._all():
            _remove(path)

    def _all(self) -> "list[Path]":
        """All models, oldest first."""
        return sorted(self.folder.glob(f"{_PREFIX}*"), key=lambda path: path.stat().st_mtime)

    def _make_room(self, nbytes: int, keep: "list[Path]") -> None:
        others = [path for path in self._all() if path not in keep]
        while nbytes and (free := shutil.disk_usage(self.folder).free) < nbytes + _SPARE:
            if not others:
                raise ConfigError(
                    f"{self.folder} needs {format_bytes(nbytes + _SPARE)} and {format_bytes(free)} are free: make "
                    "room, or give another disk with --work"
                )
            _remove(others.pop(0))


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
