"""The GPU's kernels as compiled PTX, run on the CPU (`ptx`): python tests/emulated.py CASE... [--broken]

A case is dtype:bits:group:hidden:inner:tokens. Prints a JSON object for each kernel that it takes: how far what it
gives is from the reference. --broken: in assembly, a column is multiplied twice and another not at all, or words change
places.
"""

import argparse
import dataclasses
import json
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
from benchmarks import gpu_check
from benchmarks.kernels import Model
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import ptx
from greenroom.kernels.gpu import halves, launch, tiles
from greenroom.quant import Format
from launches import NoDriver

DRIVER = NoDriver(80)
PROGRAMS: "dict[tuple[Any, ...], ptx.Program]" = {}


def launcher(kernel: Any, grid: "tuple[int, ...]") -> Any:
    """In place of `JITFunction.__getitem__`."""

    def run(*args: Any, **kwargs: Any) -> None:
        *_, backend, bind = kernel.device_caches[0]
        bound, specialization, options = bind(*args, debug=False, **kwargs)
        key = (kernel.fn.__qualname__, kernel.fn.__module__, str(specialization), str(options))
        if key not in PROGRAMS:
            packed = kernel._pack_args(backend, kwargs | {"debug": False}, bound, specialization, options)
            PROGRAMS[key] = compiled(kernel, *packed)
        given = [value for value, one in zip(bound.values(), specialization, strict=True) if one[0] != "constexpr"]
        tensors = [one for one in given if torch.is_tensor(one)]
        numbers = [one.data_ptr() if torch.is_tensor(one) else int(one) for one in given]
        numbers += [0] * (len(PROGRAMS[key].parameters) - len(numbers))  # Triton's own scratch, which is not used
        ptx.launch(PROGRAMS[key], grid, numbers, [memory_of(one) for one in tensors])

    return run


def compiled(kernel: Any, options: Any, signature: Any, constexprs: Any, attrs: Any) -> ptx.Program:
    source = kernel.ASTSource(kernel, signature, constexprs, attrs)
    made = kernel.compile(source, target=DRIVER.get_current_target(), options=options.__dict__)
    return ptx.parse(made.asm["ptx"], made.metadata.shared)


def memory_of(tensor: torch.Tensor) -> "ptx.Array":
    """uint8, from the tensor's start to its storage's end: kernels read records beside it."""
    storage = tensor.untyped_storage()
    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
    start = tensor.data_ptr() - storage.data_ptr()
    found: ptx.Array = whole[start:].numpy()
    return found


def main() -> None:
    """Check all cases."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--broken", action="store_true")
    options = parser.parse_args()
    driver.set_active(DRIVER)
    JITFunction.__getitem__ = launcher
    launch.assembles = launch.has_matrix_units = lambda device: True
    if options.broken:
        halves._STEP.value = halves._STEP.value.replace("{a0, a1, a2, a3}", "{a0, a1, a0, a3}")
        tiles._WEIGHTS.value = tiles._WEIGHTS.value.replace("0x5410", "0x1054")
    torch.manual_seed(0)
    for case in options.cases:
        dtype, *numbers = case.split(":")
        bits, group, hidden, inner, tokens = map(int, numbers)
        model, format = Model(case, hidden, inner, 2), Format(bits=bits, group_size=group)
        for one in gpu_check.check(format, getattr(torch, dtype), (tokens,), torch.device("cpu"), model):
            print(json.dumps(dataclasses.asdict(one) | {"right": one.right}), flush=True)


if __name__ == "__main__":
    main()
