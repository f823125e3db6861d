"""Rounds matrices with llama.cpp's quantisers, in the peer's own environment; see `turns` for what the lines mean.

Needs llama_cpp, numpy and the standard library: it runs under an interpreter that has no greenroom. A matrix is handed
over and back in a file that both processes map: float32 [rows, columns], rounded where it lies.
"""

import ctypes
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llama_cpp
import numpy as np


class Quantiser:
    """`ggml_quantize_chunk` and what undoes it; a type is named by its number, which GGUF files hold, too."""

    def __init__(self, threads: int) -> None:
        self._ggml = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
        self._ggml.ggml_type_name.restype = ctypes.c_char_p
        self._ggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
        self._ggml.ggml_row_size.restype = ctypes.c_size_t
        sizes = [ctypes.c_int64] * 3
        pointer = ctypes.c_void_p
        self._ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, *sizes, pointer]
        self._ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._threads, self._pool = threads, ThreadPoolExecutor(threads)

    def round(self, kind: int, matrix: "np.ndarray", importance: "np.ndarray | None") -> int:
        """Round float32 [rows, columns] in place and return the bytes it takes; importance is float32 [columns]."""
        pieces = np.array_split(matrix, min(self._threads, len(matrix)))
        return sum(self._pool.map(lambda piece: self._round(kind, piece, importance), pieces))

    def _round(self, kind: int, piece: "np.ndarray", importance: "np.ndarray | None") -> int:
        rows, columns = piece.shape
        packed = np.empty(rows * self._ggml.ggml_row_size(kind, columns), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        nbytes = self._ggml.ggml_quantize_chunk(kind, piece.ctypes.data, packed.ctypes.data, 0, rows, columns, weights)
        dequantize = getattr(self._ggml, f"dequantize_row_{self._ggml.ggml_type_name(kind).decode()}")
        dequantize(ctypes.c_void_p(packed.ctypes.data), ctypes.c_void_p(piece.ctypes.data), ctypes.c_int64(piece.size))
        if nbytes != packed.nbytes:
            raise RuntimeError(f"type {kind}: {nbytes} bytes written where {packed.nbytes} were expected")
        return int(nbytes)


def main() -> None:
    """Say who this is, then round what each line of stdin describes in the file that the argument names."""
    llama_cpp.llama_backend_init()  # fills the tables of float16
    quantiser = Quantiser(len(os.sched_getaffinity(0)))
    print(json.dumps({"engine": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"}), flush=True)
    shared = np.memmap(sys.argv[1], np.float32, "r+")
    for line in sys.stdin:
        job = json.loads(line)
        matrix = shared[: job["rows"] * job["columns"]].reshape(job["rows"], job["columns"])
        importance = np.array(job["importance"], np.float32) if job["importance"] else None
        print(json.dumps({"nbytes": quantiser.round(job["kind"], matrix, importance)}), flush=True)


if __name__ == "__main__":
    main()
