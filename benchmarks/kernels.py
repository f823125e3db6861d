"""Packed kernels against the memory's floor: python benchmarks/kernels.py [--threads N].

Prints the read bandwidth first. Then, per shape and width: time of the compiled kernels and of the reference on one
token, and the share of the floor that the compiled ones reach. Matrices rotate, so that none stays in a cache.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from greenroom.kernels import describe, linear, reference
from greenroom.machine import ram_bandwidth
from greenroom.quant import Format, Layout

Linear = Callable[..., torch.Tensor]

SHAPES = [(14336, 4096), (1536, 2048), (3072, 576)]
"""rows, cols: Mixtral 8x7B, Qwen3-30B-A3B (gate and up), the demo"""
WIDTHS = [(2, 16), (3, 64), (4, 32), (4, 64), (8, 64), (16, 0)]
"""bits, group size"""
ROTATED_NBYTES = 192 << 20


def matrices(rows: int, cols: int, format: Format) -> "list[torch.Tensor]":
    """Random codes with tame scales."""
    layout = Layout(rows, cols, format)
    made = torch.randint(0, 256, (layout.nbytes,), dtype=torch.uint8)
    if format.bits != 16:
        layout.view(made, "row_params")[:] = torch.tensor([0.01, 1e-4, 1.0, 0.01], dtype=torch.bfloat16)
    return [made.clone() for _ in range(max(1, ROTATED_NBYTES // layout.nbytes))]


def median_s(kernel: Linear, x: torch.Tensor, packed: "list[torch.Tensor]", *shape: Any, trials: int) -> float:
    """Seconds a product, over `trials` rotations through `packed` after one that warms up."""
    times = []
    for _ in range(trials + 1):
        start = time.perf_counter()
        for one in packed:
            kernel(x, one, *shape)
        times.append((time.perf_counter() - start) / len(packed))
    return statistics.median(times[1:])


def measure(x: torch.Tensor, rows: int, format: Format, floor: float, trials: int) -> str:
    """One line of the table."""
    cols = x.shape[1]
    packed = matrices(rows, cols, format)
    ours = median_s(linear, x, packed, rows, cols, format, trials=trials)
    theirs = median_s(reference.linear, x, packed[:4], rows, cols, format, trials=3)
    rate = packed[0].numel() / ours
    return (
        f"{rows:6} x {cols:<5} {format.name:15} {ours * 1e6:8.1f} us {rows * cols / ours / 1e9:6.2f} G weights/s "
        f"{rate / 1e9:6.2f} GB/s = {rate / floor:5.3f} of the floor; "
        f"reference {theirs * 1e6:8.1f} us ({theirs / ours:.1f} x)"
    )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--trials", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    floor = ram_bandwidth()
    print(f"{describe()}; floor: RAM {floor / 1e9:.1f} GB/s; tokens: {options.tokens}")
    for rows, cols in SHAPES:
        for bits, group in WIDTHS:
            format = Format(bits=bits, group_size=group)
            print(measure(torch.randn(options.tokens, cols), rows, format, floor, options.trials), flush=True)


if __name__ == "__main__":
    main()
