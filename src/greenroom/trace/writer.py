"""Write a routing trace as tokens come: bounded memory, nothing at its place before it is whole."""

import contextlib
import itertools
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from greenroom.errors import TraceError
from greenroom.trace.arrays import smallest_type
from greenroom.trace.format import VERSION, RoutingTrace

_COPY_NBYTES = 1 << 20


def check_place(path: "str | Path") -> None:
    """Raise TraceError where no trace can be written to `path`. Leaves nothing there."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise TraceError(f"cannot write a trace to {path}, which is no file: give the name of one")
        temporary = _temporary(path)
        there = temporary.exists()
        temporary.open("ab").close()
        if not there:
            temporary.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _unwritable(path: Path, error: OSError) -> TraceError:
    return TraceError(f"cannot write {path} ({error.strerror or error}): choose another place")


class TraceWriter:
    """Spools each array to a temporary file and packs them into `path` on `close`. Use as a context manager: an error
    inside leaves what was at `path` before.

    `top_k`, `lookahead` × `ranked` (guesses; 0 for none): sizes of the arrays. `probabilities`: whether they come.
    """

    def __init__(
        self,
        path: "str | Path",
        *,
        layers: int,
        num_experts: int,
        top_k: int,
        weights: bool = False,
        probabilities: bool = False,
        lookahead: int = 0,
        ranked: int = 0,
        model: str = "",
    ) -> None:
        self.path = Path(path)
        index = smallest_type(num_experts)
        self._spools = {"experts": _Spool((layers, top_k), index), "prompt": _Spool((), np.bool_)}
        if weights:
            self._spools["weights"] = _Spool((layers, top_k), np.float16)
        if probabilities:
            self._spools["probabilities"] = _Spool((layers, num_experts), np.float16)
        if lookahead and ranked:
            self._spools["guesses"] = _Spool((layers, lookahead, ranked), index)
        self._meta = {"format": "greenroom-trace", "version": VERSION, "num_experts": num_experts, "model": model}
        self._offsets, self._passes = [0], [0]
        self.tokens = 0

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(
        self, kind: "type[BaseException] | None", error: "BaseException | None", trace: "TracebackType | None"
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._drop()

    def add(self, passes: Sequence[int], **arrays: "NDArray[Any]") -> None:
        """Append tokens: every array of the trace, each [n, …]; `passes`: how many tokens each forward pass had.

        Raises TraceError where the disk of temporary files is full.
        """
        assert arrays.keys() == self._spools.keys(), "arrays come and go"
        for name, array in arrays.items():
            assert len(array) == sum(passes), f"{name} has {len(array)} tokens, not {sum(passes)}"
            self._spools[name].append(array)
        for count in passes:
            self.tokens += count
            self._passes.append(self.tokens)

    def end_prompt(self) -> None:
        """What comes next belongs to another prompt."""
        self._offsets.append(self.tokens)

    def close(self) -> None:
        """Pack, flush and rename. Raises TraceError where the disk is full or the folder cannot be written."""
        if self._offsets[-1] != self.tokens:
            self.end_prompt()
        temporary = _temporary(self.path)
        try:
            with temporary.open("wb") as file:
                self._pack(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _unwritable(self.path, error) from error
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            self._drop()

    def _pack(self, file: "IO[bytes]") -> None:
        small = {
            "meta": np.array(json.dumps(self._meta)),
            "offsets": np.array(self._offsets, np.int64),
            "passes": np.array(self._passes, np.int64),
        }
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, array in small.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
            for name, spool in self._spools.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    spool.copy_to(member, self.tokens)

    def _drop(self) -> None:
        for spool in self._spools.values():
            with contextlib.suppress(OSError):  # what a full disk did not take is tried once more, and not wanted
                spool.file.close()


@contextlib.contextmanager
def _spooling() -> "Iterator[None]":
    try:
        yield
    except OSError as error:
        raise TraceError(
            f"cannot keep the trace in {tempfile.tempdir or 'a temporary folder'} ({error.strerror or error}): "
            "make room there, or set TMPDIR to another folder"
        ) from error


class _Spool:
    """One array's rows in a temporary file."""

    def __init__(self, shape: "tuple[int, ...]", dtype: Any) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        with _spooling():
            self.file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the writer)

    def append(self, array: "NDArray[Any]") -> None:
        assert array.shape[1:] == self.shape, f"rows of shape {array.shape[1:]}, not {self.shape}"
        with _spooling():
            self.file.write(np.ascontiguousarray(array, self.dtype).tobytes())
            self.file.flush()  # a full disk is noticed here, where it has its own remedy

    def copy_to(self, member: "IO[bytes]", tokens: int) -> None:
        """The whole array in the npy format."""
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (tokens, *self.shape)}
        np.lib.format.write_array_header_1_0(member, header)
        self.file.seek(0)
        while block := self.file.read(_COPY_NBYTES):
            member.write(block)


def write_trace(path: "str | Path", trace: RoutingTrace) -> None:
    """Write a trace that is in memory."""
    extras = {name: getattr(trace, name) for name in ("weights", "probabilities", "guesses")}
    lookahead, ranked = trace.guesses.shape[2:] if trace.guesses is not None else (0, 0)
    with TraceWriter(
        path,
        layers=trace.layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        weights=trace.weights is not None,
        probabilities=trace.probabilities is not None,
        lookahead=lookahead,
        ranked=ranked,
        model=trace.model,
    ) as writer:
        arrays = {name: array for name, array in extras.items() if array is not None}
        starts = trace.offsets.tolist()
        passes = np.diff(trace.passes)
        ends = np.searchsorted(trace.passes, starts)
        for number, (start, stop) in enumerate(itertools.pairwise(starts)):
            rows = slice(start, stop)
            writer.add(
                passes[ends[number] : ends[number + 1]].tolist(),
                experts=trace.experts[rows],
                prompt=trace.prompt[rows],
                **{name: array[rows] for name, array in arrays.items()},
            )
            writer.end_prompt()
