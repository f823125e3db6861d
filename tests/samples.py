"""Of a test's many cases, those that run by default. The others are `slow`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some(cases: "Iterable[Any]", kept: "Collection[Any]") -> "list[Any]":
    """`cases` as parameters; all but the `kept` ones are marked slow. A tuple is a case of several parameters."""
    cases = list(cases)
    assert all(case in cases for case in kept), "a case is kept that is none"
    return [case if case in kept else pytest.param(*_values(case), marks=pytest.mark.slow) for case in cases]


def _values(case: Any) -> "tuple[Any, ...]":
    return case if isinstance(case, tuple) else (case,)
