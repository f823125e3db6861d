from typing import Any

ENDED: int
DIFFERS: int

class Readers:
    def __init__(self, owner: Any, address: int, nbytes: int, threads: int, piece_nbytes: int) -> None: ...
    def start(
        self,
        ticket: int,
        access: int,
        file: int,
        offset: int,
        nbytes: int,
        place: int,
        speculative: bool,
        forget: bool,
        crc32: int,
    ) -> bool: ...
    def arrivals(self, wait: bool) -> list[tuple[int, int, int, int, float, int, int]]: ...
    def under_way(self) -> list[int]: ...
    def left_nbytes(self) -> int: ...
    def bytes_read(self) -> int: ...
    def close(self) -> None: ...
