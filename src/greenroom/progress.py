"""A progress bar with rate and time left, on stderr, and silent where stderr is not a terminal."""

import sys
import time
from types import TracebackType
from typing import TextIO

from greenroom.sizes import format_bytes

_REDRAW_S = 0.1


class Progress:
    """Counts bytes, or `unit`s, towards a total and draws one line. Use as a context manager.

    `total` and the argument of `advance` are bytes or units. Nothing is printed when the stream is not a terminal.
    """

    def __init__(self, label: str, total: int, stream: "TextIO | None" = None, unit: str = "") -> None:
        self.unit = unit
        self.label, self.total, self.done = label, max(total, 1), 0
        self.stream = stream if stream is not None else sys.stderr
        self.visible = self.stream.isatty()
        self._skipped = 0
        self._start_s = self._drawn_s = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: "type[BaseException] | None", error: "BaseException | None", trace: "TracebackType | None"
    ) -> None:
        if self.visible:
            self._draw()
            self.stream.write("\n")
            self.stream.flush()

    def skip(self, count: int) -> None:
        """Count bytes that an earlier run has done: they do not enter the rate."""
        self._skipped += count
        self.advance(count)

    def advance(self, count: int) -> None:
        """Add `count` bytes done."""
        self.done += count
        now_s = time.monotonic()
        if self.visible and now_s - self._drawn_s >= _REDRAW_S:
            self._drawn_s = now_s
            self._draw()

    def _draw(self) -> None:
        elapsed_s = time.monotonic() - self._start_s
        rate = (self.done - self._skipped) / elapsed_s if elapsed_s > 0 else 0.0
        left = f"{_clock((self.total - self.done) / rate)} left" if rate > 0 else "…"
        part = min(self.done / self.total, 1.0)
        bar = ("█" * int(part * 24)).ljust(24, "·")
        count = f"{self.done} {self.unit} {rate:.3g}/s"
        if not self.unit:
            count = f"{format_bytes(self.done)} {rate / 1e9:.3f} GB/s"
        text = f"{self.label} {bar} {part:4.0%} {count} {left}"
        self.stream.write(f"\r\x1b[K{text}")
        self.stream.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
