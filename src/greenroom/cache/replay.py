"""Replay a routing trace through the very core that the engine runs, with reads that finish at once."""

from collections.abc import Iterable, Sequence

from greenroom.cache.access import Access
from greenroom.cache.core import ExpertCache

Request = tuple[int, Sequence[int]] | tuple[int, Sequence[int], Sequence[float] | None]
"""(layer; distinct experts, least valuable first; the router's probabilities of all experts, where they were given)"""


def replay(cache: ExpertCache, requests: Iterable[Request]) -> list[Access]:
    """Run `requests` and return how each was found."""
    accesses = []
    for layer, experts, *given in requests:
        accesses.append(cache.request(layer, experts, None, *given))
        waiting = list(experts)
        while waiting:
            for load in cache.issue():
                cache.loaded(load.buffer)
            expert = next(expert for expert in waiting if cache.ready(layer, expert) is not None)
            waiting.remove(expert)
            cache.release(layer, expert)
        cache.finish()
    return accesses
