"""Hits of every cache size over a recorded trace: the fast way to what `replay` finds through the core.

Slots per layer, each token's set at once, `sets` [tokens, layers, k] most valuable first; anything ≥ `experts` is
nobody.
"""

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenroom.cache.belady import Belady
from greenroom.cache.compiled import extension
from greenroom.cache.learned import Learned, constants
from greenroom.cache.policies import S3FIFO, Hints
from greenroom.cache.scores import CONTEXT, Frequency, FrequencyAge, Probability, Recency, Scorer
from greenroom.cache.stack import Stack

_replay = extension()

SCORERS: "dict[str, type[Scorer]]" = {
    "lru": Recency,
    "lfu": Frequency,
    "frequency-age": FrequencyAge,
    "probability": Probability,
    "learned": Learned,
}
"""Policies that keep the highest scores, by name."""

OPTIMUM = "belady"

_BLOCK = 256
"""Tokens whose scores are held at once."""


def hits_by_size(
    policy: str,
    sets: "NDArray[Any]",
    experts: int,
    sizes: Sequence[int],
    probabilities: "NDArray[Any] | None" = None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> "NDArray[np.int64]":
    """Requested experts that were resident, [layers, sizes], for a policy of POLICIES or the OPTIMUM.

    `probabilities` [tokens, layers, experts] of the router, for policies that use them. `advance` is told of tokens
    done.
    """
    sets = np.ascontiguousarray(sets, np.uint16)
    if policy == "s3fifo":
        return _s3fifo(sets, experts, sizes, advance)
    stack = Stack(sets.shape[1], experts)
    blocks = _optimum(sets, experts) if policy == OPTIMUM else _scored(SCORERS[policy], sets, experts, probabilities)
    start = 0
    for scores in blocks:
        stack.feed(sets[start : start + len(scores)], scores)
        start += len(scores)
        advance(len(scores))
    return stack.hits()[:, np.minimum(np.array(sizes, np.intp), experts)]


def _optimum(sets: "NDArray[np.uint16]", experts: int) -> "Iterator[NDArray[Any]]":
    belady = Belady(sets, experts)
    for start in range(0, len(sets), _BLOCK):
        yield belady.scores(min(_BLOCK, len(sets) - start))


def _scored(
    scorer: "type[Scorer]", sets: "NDArray[np.uint16]", experts: int, probabilities: "NDArray[Any] | None"
) -> "Iterator[NDArray[Any]]":
    """Scores [n, layers, experts] after each token, block by block; all layers are lanes of one scorer."""
    if scorer is Learned and _replay is not None:
        yield from _learned(_replay, sets, experts, probabilities)
        return
    tokens, layers, k = sets.shape
    lanes = scorer(layers, experts)
    reach = max(map(abs, CONTEXT))
    # sets of this and the last token, with nobody in the layers before the first and after the last
    current, last = np.zeros((2, layers + 2 * reach, k), np.intp)
    middle = slice(reach, reach + layers)
    for start in range(0, tokens, _BLOCK):
        block = sets[start : start + _BLOCK, :, ::-1].astype(np.intp) + 1
        block[block > experts] = 0
        out = np.empty((len(block), layers, experts))
        for row, used in enumerate(block):
            current[middle] = used
            context = (
                [(current if step < 0 else last)[reach + step : reach + step + layers] for step in CONTEXT]
                if scorer.needs_context
                else ()
            )
            given = probabilities[start + row] if scorer.uses_probabilities and probabilities is not None else None
            out[row] = lanes.update(used, context, given)
            current, last = last, current
        yield out


def _learned(
    compiled: ModuleType, sets: "NDArray[np.uint16]", experts: int, probabilities: "NDArray[Any] | None"
) -> "Iterator[NDArray[Any]]":
    layers = compiled.LearnedLayers(sets.shape[1], experts, list(CONTEXT), *constants())
    for start in range(0, len(sets), _BLOCK):
        block = np.ascontiguousarray(sets[start : start + _BLOCK, :, ::-1])
        scores = np.empty((len(block), sets.shape[1], experts))
        given = None if probabilities is None else probabilities[start : start + _BLOCK]
        layers.observe(block, np.ascontiguousarray(scores[:0] if given is None else given, np.float64), scores)
        yield scores


def _s3fifo(
    sets: "NDArray[np.uint16]", experts: int, sizes: Sequence[int], advance: Callable[[int], None]
) -> "NDArray[np.int64]":
    tokens, layers, _ = sets.shape
    ordered = np.ascontiguousarray(sets[:, :, ::-1])
    hits = np.zeros((layers, len(sizes)), np.int64)
    if _replay is not None:
        _replay.s3fifo(ordered, np.array(sizes, np.int64), experts, hits)
    else:
        for layer in range(layers):
            for column, size in enumerate(sizes):
                hits[layer, column] = _s3fifo_hits(ordered[:, layer], experts, size)
    advance(tokens)
    return hits


def _s3fifo_hits(sets: "NDArray[np.uint16]", experts: int, size: int) -> int:
    policy, hints, resident, hits = S3FIFO(size), Hints(0), frozenset[tuple[int, int]](), 0
    for row in sets.tolist():
        used = [(0, expert) for expert in row if expert < experts]
        hits += sum(key in resident for key in used)
        resident = frozenset(policy.update(used, hints))
    return hits
