"""Shapes of published models, and the formats in which the two engines hold them."""

import dataclasses
from collections.abc import Callable
from typing import Any

from benchmarks import routing
from benchmarks.synthetic import Synthetic
from benchmarks.weights import Weights
from greenroom.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairing:
    """What is compared: experts of `bits` in groups of `group_size` here, of the quantisation `peer` there.

    Attention and head are 4-bit g64 here and `peer_dense` there, routers float, embeddings 16-bit in both.
    """

    name: str
    bits: int
    group_size: int
    peer: str
    peer_dense: str = "Q4_K"

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Mixture-of-Experts model. `family` is transformers' model_type, one of `_OWN`.

    Its weights are synthetic; what has others overrides `pairings`, `sequences`, `token_ids` and `weights`.
    """

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

    @property
    def pairings(self) -> "dict[str, Pairing]":
        """Name on the command line → what can be compared."""
        return PAIRINGS

    @property
    def sequences(self) -> "dict[str, str]":
        """Routing → the tokens that make it, for people."""
        return {"lifelike": "consecutive ids", "uniform": "ids far apart"}

    def token_ids(self, kind: str, start: int, count: int) -> "list[int]":
        """`count` ids of a sequence of routing `kind`; different starts give different pieces of one long sequence."""
        return routing.token_ids(kind, self.vocab, start, count)

    def weights(self, largest: int = 0) -> Weights:
        """What fills the model's files; no linear or record of a packed one has more than `largest` bytes."""
        return Synthetic(largest)

    def config(self) -> "dict[str, Any]":
        """What transformers' config.json says."""
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
        return {**common, **_OWN[self.family](self)}


def _mixtral_config(shape: Shape) -> "dict[str, Any]":
    return {
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": shape.intermediate,
        "num_local_experts": shape.experts,
        "sliding_window": None,
    }


def _qwen3_moe_config(shape: Shape) -> "dict[str, Any]":
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "moe_intermediate_size": shape.intermediate,
        "intermediate_size": 3 * shape.hidden,  # of dense layers, of which there is none
        "num_experts": shape.experts,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gpt_oss_config(shape: Shape) -> "dict[str, Any]":
    """As published but for the sizes: biases and sinks, a window in every other layer, positions stretched by YaRN."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "intermediate_size": shape.intermediate,
        "num_local_experts": shape.experts,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": [("sliding_attention", "full_attention")[layer % 2] for layer in range(shape.layers)],
        "swiglu_limit": 7.0,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    }


_OWN: "dict[str, Callable[[Shape], dict[str, Any]]]" = {
    "mixtral": _mixtral_config,
    "qwen3_moe": _qwen3_moe_config,
    "gpt_oss": _gpt_oss_config,
}
"""Family → what its config.json has beside what all have."""


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

_GPT_OSS = Shape(
    name="gpt-oss-20b-24",
    family="gpt_oss",
    layers=24,
    hidden=2880,
    intermediate=2880,
    experts=32,
    top_k=4,
    heads=64,
    kv_heads=8,
    head_dim=64,
    vocab=201088,
    rope_theta=150000.0,
    norm_eps=1e-5,
)

SHAPES = {shape.name: shape for shape in (_qwen3(12), _qwen3(48), _MIXTRAL, _GPT_OSS)}
"""Name on the command line → shape; the last number is how many of the model's layers there are."""


def named(known: "dict[str, Any]", name: str, what: str) -> Any:
    """`known[name]`. Raises ConfigError listing the names there are."""
    if name not in known:
        raise ConfigError(f"unknown {what} {name!r}: choose from {', '.join(known)}")
    return known[name]
