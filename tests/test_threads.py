"""Items on several threads: in order, with one of torch's each, and nothing left behind."""

import time
from collections.abc import Iterator

import pytest
import torch

from greenroom.threads import in_order


@pytest.fixture(autouse=True)
def three() -> "Iterator[None]":
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def slow_first(item: int) -> "tuple[int, int]":
    time.sleep(0.02 * (4 - item % 5))
    return item, torch.get_num_threads()


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_come_in_order(workers: int) -> None:
    assert list(in_order(slow_first, range(9), workers)) == [(item, 1) for item in range(9)]
    assert torch.get_num_threads() == 3


def test_items_are_not_taken_long_before_they_are_wanted() -> None:
    taken = []

    def items() -> "Iterator[int]":
        for item in range(9):
            taken.append(item)
            yield item

    results = in_order(slow_first, items(), 2)
    assert next(results)[0] == 0 and len(taken) == 3
    results.close()  # type: ignore[attr-defined]
    assert len(taken) == 3 and torch.get_num_threads() == 3


def test_an_error_reaches_the_caller() -> None:
    def fail(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    results = in_order(fail, range(9), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert torch.get_num_threads() == 3
