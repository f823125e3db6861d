"""The same model as one GGUF file for llama.cpp."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from benchmarks.shapes import Pairing, Shape

ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}
"""Families whose files can be written → llama.cpp's name."""


def write(path: Path, shape: Shape, pairing: Pairing) -> None:
    """Write the model in the peer's formats; nothing is at `path` unless all of it is."""
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(partial, shape, pairing)
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


def _write(path: Path, shape: Shape, pairing: Pairing) -> None:
    writer = gguf.GGUFWriter(path, ARCHITECTURES[shape.family])
    _describe(writer, shape)
    tensors, weights = dict(_tensors(shape, pairing)), shape.weights()
    for name, (size, kind) in tensors.items():
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, size, np.dtype(np.float32), math.prod(size) // block * nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    for name, (size, kind) in tensors.items():
        writer.write_padding(file, file.tell())
        for piece in weights.ggml(name, size, kind):
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
    shape: Shape, pairing: Pairing
) -> "Iterator[tuple[str, tuple[tuple[int, ...], gguf.GGMLQuantizationType]]]":
    """Name → (size, slowest first; type), in file order."""
    hidden, heads, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    f16, f32 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32
    experts, dense = gguf.GGMLQuantizationType[pairing.peer], gguf.GGMLQuantizationType[pairing.peer_dense]
    yield "token_embd.weight", ((shape.vocab, hidden), f16)
    yield "output_norm.weight", ((hidden,), f32)
    yield "output.weight", ((shape.vocab, hidden), dense)
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", ((hidden,), f32)
        yield f"{block}.ffn_norm.weight", ((hidden,), f32)
        if shape.family == "qwen3_moe":
            yield f"{block}.attn_q_norm.weight", ((shape.head_dim,), f32)
            yield f"{block}.attn_k_norm.weight", ((shape.head_dim,), f32)
        yield f"{block}.attn_q.weight", ((heads, hidden), dense)
        yield f"{block}.attn_k.weight", ((kv, hidden), dense)
        yield f"{block}.attn_v.weight", ((kv, hidden), dense)
        yield f"{block}.attn_output.weight", ((hidden, heads), dense)
        yield f"{block}.ffn_gate_inp.weight", ((shape.experts, hidden), f32)
        yield f"{block}.ffn_gate_exps.weight", ((shape.experts, shape.intermediate, hidden), experts)
        yield f"{block}.ffn_up_exps.weight", ((shape.experts, shape.intermediate, hidden), experts)
        yield f"{block}.ffn_down_exps.weight", ((shape.experts, hidden, shape.intermediate), experts)
