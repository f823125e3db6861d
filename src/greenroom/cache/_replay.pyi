from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

class Learned:
    def __init__(
        self,
        context: int,
        decays: list[float],
        scales: list[float],
        weights: list[float],
        powers: list[float],
        rate: float,
        count_rate: float,
    ) -> None: ...
    def observe(
        self, used: Sequence[int], context: Sequence[Sequence[int]], probabilities: Sequence[float]
    ) -> list[float]: ...

class LearnedLayers:
    def __init__(
        self,
        layers: int,
        experts: int,
        context: list[int],
        decays: list[float],
        scales: list[float],
        weights: list[float],
        powers: list[float],
        rate: float,
        count_rate: float,
    ) -> None: ...
    def observe(self, sets: NDArray[Any], probabilities: NDArray[Any], scores: NDArray[Any]) -> None: ...

def feed_stack(
    sets: NDArray[Any], scores: NDArray[Any], order: NDArray[Any], distance: NDArray[Any], found: NDArray[Any]
) -> None: ...
def s3fifo(sets: NDArray[Any], capacities: NDArray[Any], experts: int, hits: NDArray[Any]) -> None: ...
