"""How soon an expert is used again, how even the load is, how well guesses recall: plain statistics of a trace.

`sets` [tokens, layers, k]: experts, most valuable first; anything ≥ `experts` is nobody.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def reuse_distances(sets: "NDArray[Any]", experts: int) -> "NDArray[np.int64]":
    """Uses by the tokens since the expert's last use in its layer: [longest + 1], index 0 counting first uses."""
    tokens, layers, _ = sets.shape
    lane = np.arange(layers)[:, None]
    last = np.full((layers, experts + 1), -1)
    counts = np.zeros(tokens + 1, np.int64)
    for token, row in enumerate(np.minimum(sets, experts).astype(np.intp)):
        before = last[lane, row]
        distance = np.where(before < 0, 0, token - before)[row < experts]
        np.add.at(counts, distance, 1)
        last[lane, row] = token
    return counts[: int(counts.nonzero()[0].max(initial=0)) + 1]


def quantile(distances: "NDArray[np.int64]", share: float) -> "int | None":
    """The least distance that at least `share` of the repeated uses do not exceed; None without any."""
    repeated = distances[1:].cumsum()
    if not len(repeated) or repeated[-1] == 0:
        return None
    return int(np.searchsorted(repeated, share * repeated[-1])) + 1


def load(sets: "NDArray[Any]", experts: int) -> "NDArray[np.int64]":
    """Uses of each expert, [layers, experts]."""
    layers = sets.shape[1]
    counts = np.zeros((layers, experts + 1), np.int64)
    for layer in range(layers):
        counts[layer] = np.bincount(np.minimum(sets[:, layer], experts).ravel(), minlength=experts + 1)
    return counts[:, :experts]


def evenness(uses: "NDArray[np.int64]") -> "NDArray[np.float64]":
    """Of each layer: the entropy of its experts' shares over that of equal shares; 1 is even, 0 a single expert.
    A layer without a use or with one expert counts as even."""
    layers, experts = uses.shape
    totals = uses.sum(axis=1, keepdims=True)
    if experts < 2:
        return np.ones(layers)
    shares = uses / np.maximum(totals, 1)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=1)
    return np.where(totals[:, 0] > 0, entropy / np.log(experts), 1.0)


def recall(sets: "NDArray[Any]", guesses: "NDArray[Any]", experts: int) -> "NDArray[np.float64]":
    """Share of chosen experts among the first 1 … m guesses, [lookahead, m]; layers without a guess do not count.

    `guesses` [tokens, layers, lookahead, m], likeliest first, nobody where there is none. NaN where nothing counts.
    """
    _, _, lookahead, ranked = guesses.shape
    found, chosen = np.zeros((lookahead, ranked)), np.zeros((lookahead, 1))
    for start in range(0, len(sets), 1024):
        block, ahead = sets[start : start + 1024], guesses[start : start + 1024]
        real = block < experts
        for step in range(lookahead):
            guessed = ahead[:, :, step]
            counts = real & (guessed[:, :, :1] < experts)
            chosen[step] += counts.sum()
            same = (block[:, :, :, None] == guessed[:, :, None, :]) & counts[..., None]
            found[step] += same.sum(axis=(0, 1, 2))
    with np.errstate(invalid="ignore"):
        return found.cumsum(axis=1) / chosen
