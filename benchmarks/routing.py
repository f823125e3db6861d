"""Weights and token sequences that make routing known in advance, and the same in both engines.

Random weights route near-uniformly or collapse into repetition, unlike any trained model. Here a token's embedding
decides its experts: it is so much larger than what attention and experts add to it that every router sees, but for a
few per cent, the embedding itself. Embeddings of neighbouring ids share a slowly drifting part (the topic) beside a
part of their own:

    embedding[id] = size · (√share · drift[id] + √(1 − share) · own[id])      drift: AR(1) with time constant TAU

Ids in sequence then route lifelike: with the constants below an LRU cache hits about 81 % with a quarter of 128
experts and 91 % with three eighths, as Qwen3-30B-A3B does. Ids far apart are independent of one another, so that
routing is near-uniform: the worst case. Which of the two is run is a matter of the token ids alone.
"""

import math

import numpy as np
import torch

SHARE = 0.62
TAU = 128.0
STRIDE = 641
"""Ids that far apart share exp(−5) of their drift; prime, so that a walk visits every id before one comes again."""
ROWS = 32768
"""Distinct embeddings at most: id and id + ROWS have the same."""
SIZE = 64.0
"""Root mean square of an embedding; see `ADDED`."""
ADDED = 0.02
"""What one attention or experts block adds to the residual stream, relative to the embedding."""
BIAS = 0.25
"""A bias, relative to the products that it is added to: leaving it out shows, and tokens still choose the experts."""
ROUTINGS = ("lifelike", "uniform")


def token_ids(routing: str, vocab: int, start: int, count: int) -> "list[int]":
    """`count` ids of a sequence of `routing`; different starts give different pieces of one long sequence."""
    step = STRIDE if routing == "uniform" else 1
    return [(start + i) * step % min(vocab, ROWS) for i in range(count)]


def embedding(vocab: int, hidden: int, seed: int = 0) -> torch.Tensor:
    """bfloat16 [vocab, hidden]; all values are exact in float16, too."""
    rng = np.random.default_rng(seed)
    rows = min(vocab, ROWS)
    drift = rng.standard_normal((rows, hidden), dtype=np.float32)
    kept, fresh = math.exp(-1 / TAU), math.sqrt(1 - math.exp(-2 / TAU))
    for i in range(1, rows):
        drift[i] *= fresh
        drift[i] += kept * drift[i - 1]
    drift *= SIZE * math.sqrt(SHARE)
    for i in range(0, rows, 1024):
        own = rng.standard_normal((min(1024, rows - i), hidden), dtype=np.float32)
        drift[i : i + 1024] += own * np.float32(SIZE * math.sqrt(1 - SHARE))
    distinct = torch.from_numpy(drift).to(torch.bfloat16)
    distinct[distinct.abs() < 2**-12] = 0  # below that float16 has fewer bits than bfloat16
    return distinct.repeat(-(-vocab // rows), 1)[:vocab]


def router(layer: int, experts: int, hidden: int) -> torch.Tensor:
    """bfloat16 [experts, hidden], another one for each layer; logits get a standard deviation of 1.5."""
    generator = torch.Generator().manual_seed(1000 + layer)
    return (torch.randn(experts, hidden, generator=generator) * (1.5 / math.sqrt(hidden))).to(torch.bfloat16)


def deviation(cols: int, *, into_residual: bool) -> float:
    """Standard deviation of a weight matrix [rows, cols], so that outputs are of order 1, or ADDED · SIZE."""
    return (ADDED * SIZE if into_residual else 1.0) / math.sqrt(cols)


def bias(count: int, generator: torch.Generator, *, into_residual: bool) -> torch.Tensor:
    """bfloat16 [count], to be added to the products of a matrix of `deviation`. Routers' biases are zeros instead:
    experts that all tokens want would hit more often than promised."""
    scale = BIAS * deviation(1, into_residual=into_residual)
    return (scale * torch.randn(count, generator=generator)).to(torch.bfloat16)
