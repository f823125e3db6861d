"""Weights of any shape without a source: random codes with sane scales, in greenroom's formats and llama.cpp's."""

import functools
import math
from collections.abc import Iterator

import gguf
import numpy as np
import torch

from benchmarks import routing
from benchmarks.weights import layer_of
from greenroom.packed import ExpertsEntry
from greenroom.quant import Format, Layout, quantize_into

_POOL_SPARE = 32 << 20
"""Windows into the pool of random bytes start at this many places."""
_BLOCK = 256
"""Weights in a block of any K-quant."""
_HALVES = {"Q4_K": (0, 2), "Q3_K": (108, None), "Q2_K": (80, 82)}
"""Offset of a block's float16 scale and, where it has one, of the scale of its minima; see ggml-common.h."""
_CENTRE = {"Q4_K": 7.5, "Q2_K": 1.5}
"""The middle code: minima that much larger than scales make weights that sum to about zero."""
_POOL_BLOCKS = 1 << 17


class Synthetic:
    """Weights by chance that route as `routing` promises; the same in the same order of questions.

    `largest`: bytes of the largest piece, linear or record, that a packed model will be given.
    """

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._random = torch.Generator().manual_seed(0)
        self._places = np.random.default_rng(1)

    def records(self, entry: ExpertsEntry) -> "Iterator[torch.Tensor]":
        """Windows into the pool, scaled."""
        for _ in range(entry.num_experts):
            record = self._pool.take(entry.record_nbytes)
            for tensor in entry.tensors:
                part, into_residual = tensor.part(record), "down" in tensor.name
                if tensor.name.endswith("_bias"):
                    bias = routing.bias(tensor.cols, self._random, into_residual=into_residual)
                    quantize_into(bias[None], tensor.format, part)
                else:
                    _scale(part, tensor.rows, tensor.cols, tensor.format, into_residual)
            yield record

    def linear(self, path: str, rows: int, cols: int, format: Format) -> torch.Tensor:
        """A window into the pool, scaled."""
        packed = self._pool.take(Layout(rows, cols, format).nbytes)
        _scale(packed, rows, cols, format, path.endswith("o_proj"))
        return packed

    def plain(self, name: str, size: "tuple[int, ...]") -> torch.Tensor:
        """Embedding, routers with biases of zero, norms of ones; the biases of attention, and its sinks."""
        if len(size) == 2:
            return routing.embedding(*size) if "embed" in name else routing.router(layer_of(name), *size)
        assert len(size) == 1, f"{name} {size} is neither norm nor bias"
        if name.endswith("norm.weight"):
            return torch.ones(size, dtype=torch.bfloat16)
        if name.endswith("router.bias"):
            return torch.zeros(size, dtype=torch.bfloat16)
        return routing.bias(size[0], self._random, into_residual=name.endswith("o_proj.bias"))

    def ggml(self, name: str, size: "tuple[int, ...]", kind: gguf.GGMLQuantizationType) -> "Iterator[np.ndarray]":
        """The same embedding, routers and norms; of matrices random blocks whose weights have the same deviation."""
        if name == "token_embd.weight":
            table = routing.embedding(*size)
            return (gguf.quantize(rows.float().numpy(), kind) for rows in table.split(8192))
        if name.endswith("norm.weight"):
            return iter([np.ones(size, np.float32)])
        if name.endswith("ffn_gate_inp.weight"):
            return iter([routing.router(layer_of(name), *size).float().numpy()])
        into_residual = name.endswith(("attn_output.weight", "ffn_down_exps.weight"))
        return self._blocks(kind, routing.deviation(size[-1], into_residual=into_residual), math.prod(size) // _BLOCK)

    @functools.cached_property
    def _pool(self) -> "_Pool":
        return _Pool(self._largest)

    def _blocks(self, kind: gguf.GGMLQuantizationType, deviation: float, left: int) -> "Iterator[np.ndarray]":
        """`left` random blocks: windows into one pool, starting elsewhere each time."""
        pool = _pool_of_blocks(kind, deviation)
        while left:
            start = int(self._places.integers(0, len(pool) // 2))
            piece = pool[start : start + left]
            left -= len(piece)
            yield piece


class _Pool:
    """Random bytes to take windows from: as fast as copying, and different at every place."""

    def __init__(self, largest: int) -> None:
        self._rng = np.random.default_rng(0)
        self._bytes = torch.from_numpy(np.frombuffer(self._rng.bytes(largest + _POOL_SPARE), dtype=np.uint8).copy())

    def take(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], a copy."""
        start = int(self._rng.integers(0, (len(self._bytes) - nbytes) // 64 + 1)) * 64
        return self._bytes[start : start + nbytes].clone()


def _scale(packed: torch.Tensor, rows: int, cols: int, format: Format, into_residual: bool) -> None:
    """Give random codes the deviation that `routing` wants: scales within a quarter, zeros in the middle."""
    step = routing.deviation(cols, into_residual=into_residual) * math.sqrt(12) / (1 << format.bits)
    params = torch.tensor([step, step / 1024, format.top / 2 - 0.5, 1 / 256])
    Layout(rows, cols, format).view(packed, "row_params")[:] = params.to(torch.bfloat16)


@functools.lru_cache(maxsize=8)
def _pool_of_blocks(kind: gguf.GGMLQuantizationType, deviation: float) -> "np.ndarray":
    """uint8 [_POOL_BLOCKS, bytes of a block]."""
    nbytes = gguf.GGML_QUANT_SIZES[kind][1]
    pool = np.frombuffer(np.random.default_rng(2).bytes(_POOL_BLOCKS * nbytes), np.uint8).reshape(-1, nbytes).copy()
    _set_scales(pool, kind.name, 1.0)
    found = float(gguf.dequantize(pool[:4096], kind).std())
    _set_scales(pool, kind.name, deviation / found)
    return pool


def _set_scales(pool: "np.ndarray", name: str, scale: float) -> None:
    place, minimum = _HALVES[name]
    pool[:, place : place + 2] = np.array([scale], np.float16).view(np.uint8)
    if minimum is not None:
        pool[:, minimum : minimum + 2] = np.array([scale * _CENTRE[name]], np.float16).view(np.uint8)
