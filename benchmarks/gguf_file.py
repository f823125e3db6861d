"""The same model as one GGUF file for llama.cpp: random blocks of its K-quants with sane scales."""

import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np

from benchmarks import routing
from benchmarks.shapes import Shape

ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}
"""Families whose files can be written → llama.cpp's name."""
_BLOCK = 256
"""Weights in a block of any K-quant."""
_HALVES = {"Q4_K": (0, 2), "Q3_K": (108, None), "Q2_K": (80, 82)}
"""Offset of a block's float16 scale and, where it has one, of the scale of its minima; see ggml-common.h."""
_CENTRE = {"Q4_K": 7.5, "Q2_K": 1.5}
"""The middle code: minima that much larger than scales make weights that sum to about zero."""
_POOL_BLOCKS = 1 << 17
_DENSE = "Q4_K"

Data = Callable[[], "Iterator[np.ndarray]"]


def write(path: Path, shape: Shape, quantisation: str) -> None:
    """Write the model with experts of `quantisation`; nothing is at `path` unless all of it is."""
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(partial, shape, quantisation)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def bytes_per_token(path: Path, shape: Shape) -> int:
    """Weight bytes that one token touches: all but the embedding, and of the experts the share that is routed to."""
    total = 0.0
    for tensor in gguf.GGUFReader(path).tensors:
        share = shape.top_k / shape.experts if "_exps" in tensor.name else 1.0
        total += 0 if tensor.name == "token_embd.weight" else share * tensor.n_bytes
    return int(total)


def _write(path: Path, shape: Shape, quantisation: str) -> None:
    writer = gguf.GGUFWriter(path, ARCHITECTURES[shape.family])
    _describe(writer, shape)
    tensors = dict(_tensors(shape, quantisation))
    for name, (size, kind, _) in tensors.items():
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, size, np.dtype(np.float32), math.prod(size) // block * nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    for _, _, data in tensors.values():
        writer.write_padding(file, file.tell())
        for piece in data():
            piece.tofile(file)
    writer.write_padding(file, file.tell())
    file.flush()
    os.fsync(file.fileno())  # a page that is still dirty cannot be dropped from the cache
    writer.close()


def _describe(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """Sizes, and no vocabulary: the benchmark feeds token ids."""
    writer.add_name(f"synthetic {shape.name}")
    writer.add_context_length(32768)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_expert_feed_forward_length(shape.intermediate)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")


def _tensors(
    shape: Shape, quantisation: str
) -> "Iterator[tuple[str, tuple[tuple[int, ...], gguf.GGMLQuantizationType, Data]]]":
    """Name → (size, slowest first; type; data in pieces), in file order."""
    hidden, heads, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    f16, f32 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32

    def ones(count: int) -> "tuple[tuple[int, ...], gguf.GGMLQuantizationType, Data]":
        return (count,), f32, lambda: iter([np.ones(count, np.float32)])

    def embedding() -> "Iterator[np.ndarray]":
        table = routing.embedding(shape.vocab, hidden)
        for start in range(0, shape.vocab, 8192):
            yield table[start : start + 8192].float().numpy().astype(np.float16)

    def matrix(size: "tuple[int, ...]", name: str, into_residual: bool = False) -> "tuple":  # type: ignore[type-arg]
        scale = routing.deviation(size[-1], into_residual=into_residual)
        return size, gguf.GGMLQuantizationType[name], lambda: _blocks(name, scale, size)

    yield "token_embd.weight", ((shape.vocab, hidden), f16, embedding)
    yield "output_norm.weight", ones(hidden)
    yield "output.weight", matrix((shape.vocab, hidden), _DENSE)
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", ones(hidden)
        yield f"{block}.ffn_norm.weight", ones(hidden)
        if shape.family == "qwen3_moe":
            yield f"{block}.attn_q_norm.weight", ones(shape.head_dim)
            yield f"{block}.attn_k_norm.weight", ones(shape.head_dim)
        yield f"{block}.attn_q.weight", matrix((heads, hidden), _DENSE)
        yield f"{block}.attn_k.weight", matrix((kv, hidden), _DENSE)
        yield f"{block}.attn_v.weight", matrix((kv, hidden), _DENSE)
        yield f"{block}.attn_output.weight", matrix((hidden, heads), _DENSE, into_residual=True)
        gate = functools.partial(_router, layer, shape.experts, hidden)
        yield f"{block}.ffn_gate_inp.weight", ((shape.experts, hidden), f32, gate)
        inner = (shape.experts, shape.intermediate, hidden)
        yield f"{block}.ffn_gate_exps.weight", matrix(inner, quantisation)
        yield f"{block}.ffn_up_exps.weight", matrix(inner, quantisation)
        outer = (shape.experts, hidden, shape.intermediate)
        yield f"{block}.ffn_down_exps.weight", matrix(outer, quantisation, into_residual=True)


def _router(layer: int, experts: int, hidden: int) -> "Iterator[np.ndarray]":
    return iter([routing.router(layer, experts, hidden).float().numpy()])


_places = np.random.default_rng(1)


def _blocks(name: str, deviation: float, size: "tuple[int, ...]") -> "Iterator[np.ndarray]":
    """Random blocks whose weights have `deviation`: windows into one pool, starting elsewhere each time."""
    pool, left = _pool(name, deviation), math.prod(size) // _BLOCK
    while left:
        start = int(_places.integers(0, len(pool) // 2))
        piece = pool[start : start + left]
        left -= len(piece)
        yield piece


@functools.lru_cache(maxsize=8)
def _pool(name: str, deviation: float) -> "np.ndarray":
    """uint8 [_POOL_BLOCKS, bytes of a block]."""
    kind = gguf.GGMLQuantizationType[name]
    nbytes = gguf.GGML_QUANT_SIZES[kind][1]
    pool = np.frombuffer(np.random.default_rng(2).bytes(_POOL_BLOCKS * nbytes), np.uint8).reshape(-1, nbytes).copy()
    _set_scales(pool, name, 1.0)
    found = float(gguf.dequantize(pool[:4096], kind).std())
    _set_scales(pool, name, deviation / found)
    return pool


def _set_scales(pool: "np.ndarray", name: str, scale: float) -> None:
    place, minimum = _HALVES[name]
    pool[:, place : place + 2] = np.array([scale], np.float16).view(np.uint8)
    if minimum is not None:
        pool[:, minimum : minimum + 2] = np.array([scale * _CENTRE[name]], np.float16).view(np.uint8)
