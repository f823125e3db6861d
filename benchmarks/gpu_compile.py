"""What Triton makes of the GPU's kernels, without a GPU: python -m benchmarks.gpu_compile [--all]

Compiles each kernel ahead of time and prints what it takes: registers, bytes spilled, shared memory, and the machine
instructions of its loop a weight, where the loop holds all there is. Ends with status 1 where something spills.
"""

import argparse
import collections
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from greenroom.kernels.gpu import launch, matrix, pairs, vector

_POINTERS = {
    "arena": "*u8", "slots": "*i32", "tasks": "*i32", "vectors": "*i32", "places": "*i32", "table": "*i32",
    "index": "*i64", "matrix": "*u8", "missing": "*i32", "rows": "*fp32", "weights": "*fp32", "x": "*fp16",
    "out": "*fp32",
}  # fmt: skip
"""Arguments that are tensors, and of what."""
_ALIGNED = ("arena", "slots", "x", "out", "record_nbytes", "offset", "scale_codes", "zero_codes", "row_params", "width")
"""Arguments that are multiples of 16, as at true shapes."""
_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel with its constants; `weights`: of a thread in one turn of the loop, 0 where that is no matter."""

    name: str
    kernel: Any
    constants: "dict[str, Any]"
    warps: int = 4
    weights: float = 0
    types: "dict[str, str]" = dataclasses.field(default_factory=dict)
    stages: int = 3
    since: int = 75
    """Compute capability from which it is used."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a kernel takes."""

    registers: int
    spilled: int
    shared: int
    per_weight: float


def cases(every: bool) -> "Iterator[Case]":
    """The kernels as `kernels.gpu.launch` calls them; with `every`, for all widths and forms."""
    formats = [(4, 64), (3, 64), (2, 16), (8, 64), (16, 0)] if every else [(4, 64), (3, 64), (2, 16)]
    for bits, group in formats:
        shape = {"BITS": bits, "GROUP": group, "IS_FLOAT16": False, "BIAS": False, "BIAS_IS_FLOAT16": False}
        columns = {16: 8, 8: 16, 4: 32}.get(bits, 64)  # of a chunk
        for rows in (launch.ROWS, launch.ROWS // 2) if bits != 3 else (launch.ROWS // 2,):
            for kind, out in (("silu_and_mul", bits), ("identity", 0)):
                constants = {**shape, "ROWS": rows, "OUT_BITS": out, **launch.gate_of(kind)}
                yield Case(
                    f"vector {bits}g{group} {rows} rows {kind}", vector.products,
                    {**constants, "HALVES": False, "ASM": True}, 1, rows * columns, {"x": "*fp32"},
                )  # fmt: skip
        for rows in (launch.ROWS, launch.ROWS // 2) if bits != 16 else ():
            for kind, out in (("silu_and_mul", bits), ("identity", 0)):
                constants = {**shape, "ROWS": rows, "OUT_BITS": out, **launch.gate_of(kind)}
                yield Case(
                    f"halves {bits}g{group} {rows} rows {kind}", vector.products,
                    {**constants, "HALVES": True, "ASM": True}, 1, rows * columns,
                    {"x": "*i32", "out": "*fp16" if out else "*fp32"}, since=80,
                )  # fmt: skip
        decode = {"tasks": None, "vectors": None, "K": 8, "KS": 8}
        prompt = {"slots": None, "K": 1, "KS": 1}
        for block, call in ((16, decode), (64, prompt)):
            tile = {"BM": block, "BN": launch.COLUMNS, "UNITS": launch.UNITS, "ASM": True}
            constants = {**shape, **call, **tile, **launch.gate_of("silu_and_mul"), "HALVES": False, "OUT_BITS": 0}
            yield Case(
                f"matrix {bits}g{group} {block} vectors", matrix.products, constants,
                types={"out": "*fp16"}, since=75 if block == 16 else 80,
            )  # fmt: skip
            if bits == 16:
                continue
            constants = constants | {"HALVES": True, "OUT_BITS": bits}
            yield Case(
                f"tiles {bits}g{group} {block} vectors", matrix.products, constants,
                weights=launch.COLUMNS // 4 * columns // 4, types={"out": "*fp16"}, since=80, stages=1,
            )  # fmt: skip
        if bits != 16:
            constants = {"BITS": bits, "GROUP": group, "BN": launch.COLUMNS, "UNITS": launch.UNITS}
            yield Case(f"dequantised {bits}g{group}", matrix.dequantised, constants, types={"out": "*fp16"})
    yield Case("arrange", vector.arrange, {"BITS": 3, "TILES": False, "BLOCK": 256})
    yield Case("combine", pairs.combine, {"K": 8, "OWN": True, "BLOCK": 256})
    yield Case("lookup", pairs.lookup, {"BLOCK": 128})


def compiled(case: Case, capability: int) -> Found:
    """Compile for a compute capability (75: a T4, 90: an H100)."""
    names = case.kernel.arg_names
    types = {
        name: "constexpr" if name in case.constants else {**_POINTERS, **case.types}.get(name, "i32") for name in names
    }
    source = ASTSource(
        fn=case.kernel,
        signature=types,
        constexprs=case.constants,
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in _ALIGNED
            if types.get(name, "constexpr") != "constexpr"
        },
    )
    options = {"num_warps": case.warps, "num_stages": case.stages, **launch.FUSED}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        instructions = _run("nvdisasm", "-c", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    per_weight = len(_loop(instructions)) / case.weights if case.weights else 0.0
    return Found(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], made.metadata.shared, per_weight)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def _loop(text: str) -> "list[str]":
    """The longest run of instructions that jumps back to its start."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    longest: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1])
            if (back := re.search(r"BRA.*`\((\.L_x_\d+)\)", found[1])) and back[1] in labels:
                longest = max(longest, instructions[labels[back[1]] :], key=len)
    return longest


def main() -> int:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--capabilities", type=int, nargs="*", default=[75, 90])
    parser.add_argument("--all", action="store_true", help="all widths and block sizes")
    parser.add_argument("--kernels", nargs="*", default=[], metavar="NAME", help="how the names of those wanted begin")
    options = parser.parse_args()
    known = list(cases(options.all))
    for name in options.kernels:
        if not any(case.name.startswith(name) for case in known):
            parser.error(f"no kernel is called {name}; there are {', '.join(case.name for case in known)}")
    if options.kernels:
        known = [case for case in known if case.name.startswith(tuple(options.kernels))]
    spilled: collections.Counter[str] = collections.Counter()
    for case in known:
        for capability in options.capabilities:
            if capability < case.since:
                continue
            found = compiled(case, capability)
            spilled[case.name] += found.spilled
            turn = f"{found.per_weight:.2f} instructions a weight" if found.per_weight else ""
            print(
                f"sm_{capability} {case.name:36} {found.registers:4} registers {found.spilled:4} spilled "
                f"{found.shared:6} shared  {turn}",
                flush=True,
            )
    worst = [name for name, nbytes in spilled.items() if nbytes]
    print(f"spilled: {', '.join(worst)}" if worst else "nothing is spilled")
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main())
