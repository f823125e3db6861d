"""Reusable room for groups, and sums over a group whose last bit does not depend on threads or chunking.

torch.sum adds columns in an order that depends on where a column falls in a vector register. Here a group is
halved again and again: element-wise additions only, each correctly rounded, in an order fixed by the group size.
"""

import torch


class Scratch:
    """Three float32 buffers [size, count] for groups of size weights, a power of two.

    codes: for codes. first and second: terms to be summed over each group.
    """

    def __init__(self, size: int, count: int, device: torch.device) -> None:
        self.codes = torch.empty((size, count), dtype=torch.float32, device=device)
        terms = torch.empty((2, size, count), dtype=torch.float32, device=device)
        self.first, self.second = terms[0], terms[1]
        self._sums = terms[:, 0]
        halves = [size >> (i + 1) for i in range(size.bit_length() - 1)]
        # the views are made once: making them costs more than a short addition
        self._both = [(terms[:, :half], terms[:, half : 2 * half]) for half in halves]
        self._one = [(terms[0, :half], terms[0, half : 2 * half]) for half in halves]

    def fold(self) -> torch.Tensor:
        """Column sums [count] of first; overwrites it."""
        for low, high in self._one:
            torch.add(low, high, out=low)
        return self._sums[0].clone()

    def fold_both(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Column sums [count] of first and of second; overwrites both."""
        for low, high in self._both:
            torch.add(low, high, out=low)
        first, second = self._sums.clone()
        return first, second
