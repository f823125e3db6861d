"""What the cache says of a request: how its experts were found, what is to be read, and the totals."""

from dataclasses import dataclass

from greenroom.cache.policies import Key


@dataclass(frozen=True, slots=True)
class Load:
    """Read expert `key` into `buffer`; `speculative` ones yield to demand."""

    key: Key
    buffer: int
    speculative: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How the experts of one request were found; the four tuples partition the request."""

    hits: tuple[Key, ...]
    """resident before the request"""
    prefetched: tuple[Key, ...]
    """in a staging buffer, read by a guess that had finished"""
    late: tuple[Key, ...]
    """in a staging buffer, the guess still reading"""
    misses: tuple[Key, ...]
    """must be read now"""


@dataclass(slots=True)
class Counters:
    """Running totals, in experts (a request of k experts counts k)."""

    hits: int = 0
    prefetched: int = 0
    late: int = 0
    misses: int = 0
    guesses: int = 0
    """speculative loads started"""

    @property
    def loads(self) -> int:
        """Loads that were asked for; without one, what is resident stays where it is."""
        return self.misses + self.guesses

    @property
    def requests(self) -> int:
        """Experts requested."""
        return self.hits + self.prefetched + self.late + self.misses

    @property
    def hit_rate(self) -> float:
        """Share of requested experts that were resident; 0 before the first request."""
        return self.hits / self.requests if self.requests else 0.0
