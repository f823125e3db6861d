from typing import Any

BLOCK: int
Decoder: Any

class Shape:
    def takes(self, count: int) -> bool: ...

class Gate: ...
class ExpertLayout: ...

def shape(rows: int, cols: int, bits: int, group_size: int, is_float16: bool) -> Shape: ...
def gate(function: str, order: str, alpha: float, limit: float, plus: float) -> Gate: ...
def layout(
    first: Shape,
    first_offset: int,
    second: Shape,
    second_offset: int,
    first_bias: int,
    second_bias: int,
    bias_is_float16: bool,
    gate: Gate,
) -> ExpertLayout: ...
def linears(x: int, count: int, linears: list[tuple[int, int, Shape, int, int]], threads: int) -> None: ...
def linears_s() -> float: ...
def experts(
    x: int,
    x_rows: int,
    records: list[int],
    record_nbytes: int,
    rows: list[int],
    counts: list[int],
    layout: ExpertLayout,
    out: int,
    threads: int,
    rough: bool,
) -> None: ...
def add_weighted(
    out: int, out_rows: int, x: int, rows: int, weights: int, count: int, width: int, threads: int
) -> None: ...
def available() -> list[str]: ...
def active() -> str: ...
def title() -> str: ...
def choose(name: str) -> bool: ...
def token(
    x: int,
    records: list[int],
    places: list[int],
    record_nbytes: int,
    layout: ExpertLayout,
    outputs: int,
    threads: int,
) -> None: ...
