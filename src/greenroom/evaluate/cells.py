"""A grid's scores in a file, one line each, so that a run that was stopped goes on where it was."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from greenroom.errors import ConfigError
from greenroom.evaluate.score import WindowScore

Bits = tuple[int, int]
"""bits of attention, bits of experts"""


class Cells:
    """Window scores by bits and number of window. The first line of the file says what they were measured on.

    After a kill the file holds every score but perhaps the last, whose half a line is forgotten. `path` None keeps
    nothing. Raises ConfigError for a file of something else.
    """

    def __init__(self, path: "Path | None", subject: "dict[str, Any]") -> None:
        self._path = path
        self._scores: dict[tuple[Bits, int], WindowScore] = {}
        if path is None:
            return
        try:
            whole = self._whole(path.read_text() if path.exists() else "", json.dumps(subject) + "\n")
            self._load(whole.splitlines(), subject)  # before the file is touched: it may be somebody else's
            path.write_text(whole)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot use {path} ({error}): give another --cells") from error

    def _whole(self, text: str, header: str) -> str:
        """The whole lines of `text`; the header where a run was killed before it had written that."""
        whole = text[: text.rfind("\n") + 1]
        if not whole and not header.startswith(text):
            raise ConfigError(f"{self._path} is no file of a grid's scores: give another --cells")
        return whole or header

    def _load(self, lines: "list[str]", subject: "dict[str, Any]") -> None:
        try:
            own, *records = map(json.loads, lines)
            for record in records:
                bits = (record["attention_bits"], record["expert_bits"])
                self._scores[bits, record["window"]] = WindowScore(**record["score"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self._path} is no file of a grid's scores: give another --cells") from error
        if own != subject:
            raise ConfigError(f"{self._path} holds scores of another model, text or setting: give another --cells")

    def has(self, bits: Bits, window: int) -> bool:
        """Whether a window is measured."""
        return (bits, window) in self._scores

    def complete(self, bits: Bits, windows: int) -> bool:
        """Whether all of the first `windows` windows are."""
        return all(self.has(bits, window) for window in range(windows))

    def get(self, bits: Bits, window: int) -> WindowScore:
        """One window's score."""
        return self._scores[bits, window]

    def put(self, bits: Bits, window: int, score: WindowScore) -> None:
        """Keep one, unless there is one."""
        if self.has(bits, window):
            return
        self._scores[bits, window] = score
        if self._path is None:
            return
        record = {
            "attention_bits": bits[0], "expert_bits": bits[1], "window": window, "score": dataclasses.asdict(score)
        }  # fmt: skip
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write {self._path} ({error.strerror or error}): give another --cells") from error
