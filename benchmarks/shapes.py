"""Shapes of published models, and the formats in which the two engines hold them."""

import dataclasses
from typing import Any

from greenroom.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Mixture-of-Experts model. `family` is transformers' model_type, qwen3_moe or mixtral."""

    name: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    """of one expert"""
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    rope_theta: float = 1e6
    norm_eps: float = 1e-6

    def nbytes(self, bits: int) -> int:
        """About what a model of these sizes takes on disk with experts of `bits`, a little too much."""
        experts = 3 * self.layers * self.experts * self.hidden * self.intermediate
        attention = 2 * self.layers * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return int(experts * (bits + 1.1) / 8 + (attention + self.vocab * self.hidden) * 4.6 / 8) + (
            2 * self.vocab * self.hidden
        )

    def config(self) -> "dict[str, Any]":
        """What transformers' config.json says."""
        own: dict[str, Any]
        common = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_experts_per_tok": self.top_k,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
            "model_type": self.family,
        }
        if self.family == "mixtral":
            own = {"intermediate_size": self.intermediate, "num_local_experts": self.experts, "sliding_window": None}
            return {**common, **own, "architectures": ["MixtralForCausalLM"]}
        own = {
            "moe_intermediate_size": self.intermediate,
            "intermediate_size": 3 * self.hidden,  # of dense layers, of which there is none
            "num_experts": self.experts,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        return {**common, **own, "architectures": ["Qwen3MoeForCausalLM"]}


def _qwen3(layers: int) -> Shape:
    return Shape(
        name=f"qwen3-30b-a3b-{layers}",
        family="qwen3_moe",
        layers=layers,
        hidden=2048,
        intermediate=768,
        experts=128,
        top_k=8,
        heads=32,
        kv_heads=4,
        head_dim=128,
        vocab=151936,
    )


_MIXTRAL = Shape(
    name="mixtral-8x7b-4",
    family="mixtral",
    layers=4,
    hidden=4096,
    intermediate=14336,
    experts=8,
    top_k=2,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=32000,
    norm_eps=1e-5,
)

SHAPES = {shape.name: shape for shape in (_qwen3(12), _qwen3(48), _MIXTRAL)}
"""Name on the command line → shape; the last number is how many of the model's layers there are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairing:
    """What is compared: experts of `bits` in groups of `group_size` here, of the quantisation `peer` there.

    Attention and head are 4-bit g64 here and Q4_K there, routers float, embeddings 16-bit in both.
    """

    name: str
    bits: int
    group_size: int
    peer: str

    @property
    def ours(self) -> str:
        """The experts' format here, for people."""
        return f"{self.bits}-bit g{self.group_size}"


PAIRINGS = {
    pairing.name: pairing
    for pairing in (
        Pairing(name="4", bits=4, group_size=64, peer="Q4_K"),
        Pairing(name="3", bits=3, group_size=64, peer="Q3_K"),
        Pairing(name="2", bits=2, group_size=16, peer="Q2_K"),
        Pairing(name="2g32", bits=2, group_size=32, peer="Q2_K"),
    )
}
"""Name on the command line → pairing. `2` is greenroom's own choice at two bits and larger than Q2_K; `2g32` is not."""


def named(known: "dict[str, Any]", name: str, what: str) -> Any:
    """`known[name]`. Raises ConfigError listing the names there are."""
    if name not in known:
        raise ConfigError(f"unknown {what} {name!r}: choose from {', '.join(known)}")
    return known[name]
