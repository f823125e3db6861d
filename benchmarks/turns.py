"""One engine's turn: a process of its own that loads a model, says so, and answers each request with its figures.

Lines of JSON: the worker prints one when it has loaded and warmed up; for each line on its stdin, a trial, it prints
one with the result. It ends when its stdin does.
"""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from benchmarks.limits import Limit
from greenroom.errors import GreenroomError


class TurnError(GreenroomError):
    """An engine that could not run: one line that says which and why."""


class Worker:
    """A worker's process. Use as a context manager; `about` is what it said when it had loaded."""

    def __init__(self, name: str, command: "list[str]", limit: "Limit | None" = None, patience_s: float = 600) -> None:
        self.name, self._patience_s = name, patience_s
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in __exit__
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            preexec_fn=limit.enter if limit is not None else None,
            start_new_session=True,  # a prefix such as taskset may start it as a child: they end together
        )
        self.about: dict[str, Any] = {}

    def __enter__(self) -> "Worker":
        try:
            self.about = self._answer()
        except BaseException:
            self._kill()
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        if any(exception):
            self._kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()
        self._errors.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def trial(self, sequence: "dict[str, list[int]]") -> "dict[str, Any]":
        """Run `sequence` (prompt, warm, timed: token ids) and return what was measured."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead, and `_answer` says of what
            self._process.stdin.write(json.dumps(sequence) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> "dict[str, Any]":
        assert self._process.stdout is not None
        with self._patience():
            line = self._process.stdout.readline()
        if not line:
            raise TurnError(f"{self.name} stopped: {self._why()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    @contextlib.contextmanager
    def _patience(self) -> "Iterator[None]":
        timer = threading.Timer(self._patience_s, self._kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _why(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        said = [line for line in self._errors.read().splitlines() if line.strip()]
        if status in (-9, 137):
            return f"killed, for lack of memory or after {self._patience_s:.0f} s"
        return f"{said[-1].strip() if said else 'without a word'} (exit status {status})"
