"""What a model takes beside its experts, in bytes: weights, keys and values, and what computing needs.

Arithmetic over the manifest and the model's configuration; measures nothing itself.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from greenroom.config import EngineSettings
from greenroom.decode.blocks import nbytes_per_position
from greenroom.packed import Manifest
from greenroom.static_kv import most_room

KERNEL_NBYTES = 48 << 20
"""dequantised tiles and their temporaries; see kernels.reference.TILE"""
_SCRATCH_NBYTES = 32 << 20  # of compiled kernels, what making a model leaves, and what the heap has in pieces
_BATCH = 128  # rows of experts that compiled kernels take at a time; see native/compute.cpp


@dataclasses.dataclass(frozen=True)
class Footprint:
    """A packed model as `settings` run it.

    `element_size`: bytes of one activation. `may_compile`: the compiled decoder serves, where it may: float32 on the
    CPU. `makes_scores`: attention's modules make all of a prompt's scores at once.
    """

    manifest: Manifest
    config: Any
    settings: EngineSettings
    element_size: int
    may_compile: bool
    makes_scores: bool

    @property
    def dense(self) -> int:
        """Weights that are held in memory and are not experts."""
        manifest = self.manifest
        held = [entry for entry in manifest.tensors if not entry.mappable]
        nbytes = sum(entry.nbytes for entry in manifest.linears)
        nbytes += sum(math.prod(entry.shape) * self.element_size for entry in held)
        if self._compiled:  # it has routers, and what latent attention absorbs, once more in 16 bits
            nbytes += sum(2 * math.prod(entry.shape) for entry in held if len(entry.shape) > 1)
            absorbed = [entry for entry in manifest.linears if entry.module.endswith("kv_b_proj")]
            nbytes += sum(2 * entry.rows * entry.cols for entry in absorbed)
        return nbytes

    @property
    def mapped(self) -> int:
        """Embeddings that are left on disk, mapped."""
        return sum(entry.nbytes for entry in self.manifest.tensors if entry.mappable)

    @property
    def kv_cache(self) -> int:
        """A context's keys and values: on a device a conversation's prompts, and the room that single tokens go to."""
        context = self.settings.context
        positions = context + most_room(context) if self._on_device else context
        return positions * kv_nbytes_per_token(self.config, self.element_size, self._kv_bits)

    @property
    def working_set(self) -> int:
        """Activations of a piece of a prompt, what attention makes beside them, logits, and what kernels need."""
        nbytes = self._activations + self._context
        unfused = not self._on_device and any(map(_unequal_widths, self._layers))
        return nbytes + self._scores if self._modules and (self.makes_scores or unfused) else nbytes

    @property
    def _on_device(self) -> bool:
        return self.settings.vram is not None

    @property
    def _compiled(self) -> bool:
        """The compiled decoder serves."""
        return self.may_compile and not self._on_device and self.element_size == 4

    @property
    def _kv_bits(self) -> "int | None":
        """Of what the compiled decoder caches; None where transformers' modules cache numbers as they are."""
        return self.settings.kv_bits if self._compiled else None

    @functools.cached_property
    def _modules(self) -> bool:
        """transformers' modules read long prompts: torch multiplies many vectors with what has 16 bits."""
        if not self._compiled:
            return True
        formats = [entry.format for entry in self.manifest.linears]
        for entry in self.manifest.experts:
            formats += [tensor.format for tensor in entry.tensors[:2]]  # then biases, of 16 bits always
        return any(one.bits == 16 for one in formats)

    @property
    def _tokens(self) -> int:
        """Of a prompt that go through the model at once."""
        return min(self.settings.context, self.settings.prompt_chunk)

    @property
    def _activations(self) -> int:
        text, manifest = self.config.get_text_config(), self.manifest
        hidden, vocab = int(text.hidden_size), int(text.vocab_size)
        wide = max(tensor.rows for entry in manifest.experts for tensor in entry.tensors)
        logits = 4 * vocab * 4
        if self._modules:
            return KERNEL_NBYTES + self._tokens * (12 * hidden + 3 * wide) * self.element_size + logits
        widest = max((entry.rows for entry in manifest.linears if entry.rows != vocab), default=hidden)
        outputs = experts_per_token(self.config) * hidden
        numbers = self._tokens * (4 * hidden + outputs + 2 * widest) + _BATCH * 3 * wide
        return _SCRATCH_NBYTES + numbers * self.element_size + logits

    @property
    def _context(self) -> int:
        """What one layer makes of all of a context while it reads a prompt."""
        context = self.settings.context
        positions = most_room(context) if self._on_device else context
        width = self._most(lambda layer: _expanded_width(layer, self._modules))
        if self._modules and not self._on_device:  # what is cached, once more while it grows, or as the modules see it
            cached = self._most(lambda layer: sum(_kv_widths(layer, self._compiled)))
            width += cached * (2 + 4) // self.element_size if self._compiled else cached
        mask = self._tokens * (1 + self.element_size) if self._modules else 0  # of truth values, and of numbers
        indexers = self._most(lambda layer: int(getattr(layer, "index_n_heads", None) or 0))
        scores = 2 * 4 * self._tokens * indexers  # of DeepSeek-V3.2's second attention in float32, and its ReLU of them
        return positions * (width * self.element_size + mask) + context * scores

    @property
    def _layers(self) -> "list[Any]":
        return _layers(self.config.get_text_config())

    def _most(self, of_layer: "Callable[[Any], int]") -> int:
        """Over the layers."""
        return max(map(of_layer, self._layers), default=0)

    @property
    def _scores(self) -> int:
        """Scores of a prompt's piece for all of a context, in each head of one layer, and two copies of them:
        transformers' eager attention keeps what goes into its softmax, what comes out, and what either is made from."""
        return 3 * self._most(_heads) * self._tokens * self.settings.context * self.element_size


def kv_nbytes_per_token(config: Any, element_size: int, kv_bits: "int | None") -> int:
    """Bytes of KV cache that one more token takes, of numbers of `element_size` bytes, or as the compiled decoder holds
    them in `kv_bits` bits.

    Sliding-window layers are counted as if they grew (a safe side's estimate), recurrent ones not at all.
    """
    config = config.get_text_config()
    layers = _layers(config)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    recurrent = [any(word in kind for word in ("linear", "mamba", "conv", "recurrent")) for kind in kinds]
    widths = [_kv_widths(layer, kv_bits is not None) for layer in layers]
    held = [one for its, skip in zip(widths, recurrent, strict=False) for one in its if not skip]
    if kv_bits is None:
        return element_size * sum(held)
    return sum(nbytes_per_position(one, kv_bits) for one in held)


def experts_per_token(config: Any) -> int:
    """top-k of the router, under any of the names configurations give it."""
    text = config.get_text_config()
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k"):
        value = getattr(text, name, None)
        if isinstance(value, list | tuple):
            value = max(value)
        if isinstance(value, int):
            return value
    return 2


def _layers(config: Any) -> "list[Any]":
    """A text model's configuration for each of its layers."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * int(getattr(config, "num_hidden_layers", 0) or 0)


def _heads(config: Any) -> int:
    """Of queries, in one layer."""
    return int(getattr(config, "num_attention_heads", 1) or 1)


def _kv_widths(config: Any, compiled: bool) -> "list[int]":
    """Numbers that one layer caches for one token: those of each key and value."""
    heads = _heads(config)
    if rank := int(getattr(config, "kv_lora_rank", None) or 0):  # multi-head latent attention caches latents
        rotated = int(config.qk_rope_head_dim)
        indexed = int(getattr(config, "index_head_dim", None) or 0)  # DeepSeek-V3.2's second, small attention
        return [rank + rotated, rank, indexed] if compiled else [rank, rotated, indexed]
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return [int(getattr(config, "head_dim", None) or config.hidden_size // heads)] * (2 * kv_heads)


def _unequal_widths(config: Any) -> bool:
    """Whether keys and values differ in width, as latent attention's do: torch has no fused attention for those on the
    CPU and makes all scores."""
    if not getattr(config, "kv_lora_rank", None):
        return False
    return int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim) != int(config.v_head_dim)


def _expanded_width(config: Any, modules: bool) -> int:
    """Numbers of one position that attention makes of what is cached while one layer reads a prompt. Latent attention:
    the latent widened, and for each head what the up-projection makes, keys with their rotated part, and values. Else
    `modules` repeat each head of keys and values for all heads of queries that share it."""
    heads = _heads(config)
    if not (rank := int(getattr(config, "kv_lora_rank", None) or 0)):
        shared = heads // int(getattr(config, "num_key_value_heads", None) or heads)
        return shared * sum(_kv_widths(config, False)) if modules and shared > 1 else 0
    nope, rope, value = (int(getattr(config, f"{name}_head_dim")) for name in ("qk_nope", "qk_rope", "v"))
    return rank + rope + heads * (2 * nope + rope + 2 * value)
