"""Every launch of the GPU's kernels through Triton's own binding of arguments, as on a GPU but for the launch itself:
neither the interpreter nor a compiler that is called by hand goes that way. Prints which kernels were bound.

    TRITON_INTERPRET=0 python tests/launches.py
"""

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
from benchmarks.kernels import Model, layout
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from greenroom.kernels import device
from greenroom.quant import Format

bound: set[str] = set()


class NoDriver:
    """Says what a driver is asked before a launch on a GPU of a compute capability."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0


def launcher(kernel: Any, grid: Any) -> Any:
    """In place of `JITFunction.__getitem__`."""

    def launch(*args: Any, **kwargs: Any) -> None:
        *_, bind = kernel.device_caches[0]
        arguments, specialization, options = bind(*args, debug=False, **kwargs)
        assert list(arguments) == kernel.arg_names and len(specialization) == len(arguments)
        assert options["enable_fp_fusion"] and max(grid[1:], default=1) <= 65535, grid
        bound.add(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}")

    return launch


def main() -> None:
    """Launch all of them."""
    driver.set_active(NoDriver(90))
    JITFunction.__getitem__ = launcher
    for format in (Format.of(3), Format.of(4), Format(bits=16, group_size=0, dtype="float16")):
        its = layout(Model("small", 256, 128, 2), format)
        arena = torch.zeros(4, its[1].offset + its[1].nbytes, dtype=torch.uint8)
        for tokens in (1, 5):
            x, weights = torch.zeros(tokens, 256, dtype=torch.float16), torch.zeros(tokens, 2)
            slots = torch.zeros(tokens, 2, dtype=torch.int32)
            device.token(x, arena, slots, weights, its, "silu_and_mul")
            device.linear(x, its[0].part(arena[0]), its[0].rows, its[0].cols, format)
            device.linear(x, torch.zeros(1, dtype=torch.uint8), 1 << 18, 64, format)
        rows, out = torch.zeros(80, dtype=torch.int32), torch.zeros(80, 256)
        device.prompt(x, arena, [device.Span(0, 0, 40), device.Span(1, 40, 40)], rows, its, "silu_and_mul", out)
        device.combine(out, slots, weights)
        device.dequantised(its[0].part(arena[0]), its[0], 0, 64, torch.float16)
    device.lookup(torch.zeros(8, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(3).int())
    print(*sorted(bound))


if __name__ == "__main__":
    main()
