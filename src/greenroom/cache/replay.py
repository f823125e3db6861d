"""Replay a routing trace through the very core that the engine runs, with reads that finish at once."""

from collections.abc import Iterable, Sequence
from itertools import repeat

from greenroom.cache.core import Access, ExpertCache


def replay(
    cache: ExpertCache,
    requests: Iterable[tuple[int, Sequence[int]]],
    probabilities: "Iterable[Sequence[float] | None]" = repeat(None),  # noqa: B008 (endless, so it keeps no state)
) -> list[Access]:
    """Run `requests` of (layer, distinct experts, least valuable first) and return how each was found.

    `probabilities`: the router's for all experts of the layer, one for each request.
    """
    accesses = []
    for (layer, experts), given in zip(requests, probabilities, strict=False):
        accesses.append(cache.request(layer, experts, probabilities=given))
        waiting = list(experts)
        while waiting:
            for load in cache.issue():
                cache.loaded(load.buffer)
            expert = next(expert for expert in waiting if cache.ready(layer, expert) is not None)
            waiting.remove(expert)
            cache.release(layer, expert)
        cache.finish()
    return accesses
