"""The demo with more experts: a model that talks, large enough that half or a quarter of it is a sensible limit.

Its routers see what a trained model's see, so no routing is made up: "lifelike" is running text, this project's own
documents, and "uniform" random ids. Both hit an LRU cache about alike, 55, 77 and 94 % with an eighth, a quarter and
half of the experts: what all hidden states have in common decides much, whatever the tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.shapes import Pairing, Shape
from benchmarks.upcycled import NOISE, Upcycled
from greenroom import library

_ROOT = Path(__file__).parents[1]
_PAIRING = Pairing(name="4", bits=4, group_size=32, peer="Q4_0", peer_dense="Q4_0")
"""Rows of 576 weights are no whole blocks of a K-quant."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Shape):
    """A checkpoint in Mixtral's layout that is upcycled to these sizes; all but `experts` must be its own."""

    checkpoint: "Callable[[], Path]" = library.demo_checkpoint
    noise: float = NOISE
    """of experts, relative to the standard deviation of each matrix"""

    @property
    def pairings(self) -> "dict[str, Pairing]":
        """Four bits."""
        return {_PAIRING.name: _PAIRING}

    @property
    def sequences(self) -> "dict[str, str]":
        """What tokens are."""
        return {"lifelike": "running text", "uniform": "random ids"}

    def token_ids(self, kind: str, start: int, count: int) -> "list[int]":
        """A piece of the text, or of one long row of random ids."""
        if kind == "uniform":
            ids: list[int] = np.random.default_rng(0).integers(0, self.vocab, start + count)[start:].tolist()
            return ids
        text = _text_ids(self.checkpoint)
        return [text[(start + i) % len(text)] for i in range(count)]

    def weights(self, largest: int = 0) -> Upcycled:
        """The checkpoint's, with more experts."""
        return Upcycled(self.checkpoint(), self.experts, self.noise)


@functools.cache
def _text_ids(checkpoint: "Callable[[], Path]") -> "list[int]":
    """The documents in the checkpoint's tokens."""
    documents = [_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))]
    tokenizer = Tokenizer.from_file(str(checkpoint() / "tokenizer.json"))
    ids: list[int] = tokenizer.encode("\n".join(path.read_text() for path in documents)).ids
    return ids


DEMO = Demo(
    name="demo-64",
    family="mixtral",
    layers=30,
    hidden=576,
    intermediate=1536,
    experts=64,
    top_k=2,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab=49152,
    rope_theta=100000.0,
    norm_eps=1e-5,
)
