"""Runs PTX on a CPU, a block of threads in lockstep as numpy arrays: so that compiled kernels, inline assembly
included, are tested where there is no GPU. It knows the instructions that Triton makes of our kernels, and refuses
others.

Every access to memory has to lie in what was handed in. Branches must be taken by all threads or none; so neither is
seen where threads race. What matrix units compute is placed as NVIDIA's "PTX ISA" says of `mma.m16n8k16`, and summed in
float64.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_TYPES = {"s": "int", "u": "uint", "b": "uint", "f": "float"}
WARP = 32


class UnsupportedError(Exception):
    """An instruction that is not known here, or a branch that threads part at."""


def dtype_of(name: str) -> "np.dtype[Any]":
    """numpy's dtype of "s32", "b16", "f16", ..."""
    return np.dtype(f"{_TYPES[name[0]]}{name[1:]}")


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: `guard` is the predicate that it depends on, or nothing; "!" before it negates."""

    guard: str
    name: str
    operands: "tuple[str, ...]"


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """A kernel."""

    instructions: "list[Instruction]"
    labels: "dict[str, int]"
    parameters: "list[str]"
    """their types, in order"""
    threads: int
    shared: int
    """bytes"""


def parse(text: str, shared: int) -> Program:
    """The one entry of a PTX file."""
    head, body = re.split(r"\n\{", text, maxsplit=1)
    parameters = re.findall(r"\.param \.(\w+)", head)
    threads = int(re.search(r"\.reqntid (\d+)", head)[1])  # type: ignore[index]
    body = re.sub(r"//[^\n]*", "", body)
    body = re.split(r"\n\s*\.(?:file|section)\b", body)[0]
    body = re.sub(r"\n\s*\.loc[^\n]*", "", body)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in _statements(body):
        if label := re.fullmatch(r"([$\w]+):", statement):
            labels[label[1]] = len(instructions)
        elif not statement.startswith("."):
            found = re.match(r"(?:@(!?%?\w+)\s+)?([\w.:]+)\s*(.*)", statement, re.DOTALL)
            assert found, statement
            instructions.append(Instruction(found[1] or "", found[2], _operands(found[3])))
    return Program(instructions, labels, parameters, threads, shared)


def _statements(body: str) -> "Iterator[str]":
    while body := body.lstrip():
        if body[0] in "{}":
            body = body[1:]
        elif label := re.match(r"[$\w]+:", body):
            yield label[0]
            body = body[len(label[0]) :]
        else:
            statement, _, body = body.partition(";")
            yield statement.strip()


def _operands(text: str) -> "tuple[str, ...]":
    return tuple(part.strip() for part in re.findall(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*)", text))


class Block:
    """One block of threads of a launch."""

    def __init__(
        self,
        program: Program,
        arguments: "list[int]",
        index: "tuple[int, int, int]",
        grid: "tuple[int, int, int]",
        memory: "list[Array]",
    ) -> None:
        self.program, self.index, self.grid = program, index, grid
        self.n = program.threads
        self.registers: dict[str, Array] = {}
        self.arguments = [
            np.full(self.n, value & (2 ** int(kind[1:]) - 1), dtype_of("b" + kind[1:]))
            for value, kind in zip(arguments, program.parameters, strict=True)
        ]
        self.memory = [(one.__array_interface__["data"][0], one) for one in memory]
        self.shared = np.zeros(max(program.shared, 16), np.uint8)

    def run(self) -> None:
        """To its end."""
        at = 0
        while at < len(self.program.instructions):
            instruction = self.program.instructions[at]
            at += 1
            active = self._active(instruction.guard)
            family = instruction.name.split(".")[0]
            if family == "ret":
                if active.all():
                    return
                self._uniform(active)
            elif family == "bra":
                if self._uniform(active):
                    at = self.program.labels[instruction.operands[0]]
            elif active.any():
                self._do(instruction, active)

    def _active(self, guard: str) -> Array:
        if not guard:
            return np.ones(self.n, bool)
        found = self.registers[guard.lstrip("!")]
        return ~found if guard[0] == "!" else found

    def _uniform(self, active: Array) -> bool:
        if active.any() != active.all():
            raise UnsupportedError("threads part at a branch")
        return bool(active.any())

    def _do(self, instruction: Instruction, active: Array) -> None:
        family, *parts = instruction.name.split(".")
        method: Callable[..., None] | None = getattr(self, f"do_{family}", None)
        with np.errstate(all="ignore"):
            if method is not None:
                method(parts, instruction.operands, active)
            elif family in _SIMPLE:
                kind = parts[-1]
                given = [self.value(one, kind) for one in instruction.operands[1:]]
                self.put(instruction.operands[0], _SIMPLE[family](*given).astype(given[0].dtype), active)
            else:
                raise UnsupportedError(f"{instruction.name} {', '.join(instruction.operands)}")

    # operands

    def value(self, operand: str, kind: str) -> Array:
        """[threads] as `kind`: "s32", "f16", "pred", ..."""
        if kind == "pred":
            return self.registers[operand]
        if operand in self.registers:
            found = self.registers[operand]
            return found.astype(f"uint{kind[1:]}").view(dtype_of(kind))
        return self._constant(operand, kind)

    def _constant(self, operand: str, kind: str) -> Array:
        thread = np.arange(self.n, dtype=np.uint32)
        if operand.startswith("%"):
            known = {"%tid.x": thread, "%laneid": thread % WARP}
            for number, axis in enumerate("xyz"):
                known[f"%ctaid.{axis}"] = np.full(self.n, self.index[number], np.uint32)
                known[f"%nctaid.{axis}"] = np.full(self.n, self.grid[number], np.uint32)
            if operand not in known:
                raise UnsupportedError(operand)
            return known[operand].astype(dtype_of(kind))
        if operand[:2] in ("0f", "0F"):
            return np.full(self.n, int(operand[2:], 16), np.uint32).view(np.float32)
        number = 0 if operand == "global_smem" else int(operand.removesuffix("U"), 0)
        bits = int(kind[1:])
        return np.full(self.n, number & (2**bits - 1), f"uint{bits}").view(dtype_of(kind))

    def put(self, operand: str, value: Array, active: Array) -> None:
        """Into a register, of the active threads."""
        if value.dtype != bool:
            value = value.view(f"uint{value.dtype.itemsize * 8}")
        if not active.all():
            old = self.registers.get(operand, np.zeros(self.n, value.dtype))
            value = np.where(active, value, old)
        self.registers[operand] = value

    # memory

    def _address(self, operand: str) -> Array:
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        assert found, operand
        base = self.value(found[1], "u64").astype(np.int64)
        return base + int(found[2] or "0", 0)

    def _places(self, space: str, address: Array, size: int, active: Array) -> "Iterator[tuple[Array, Array, Array]]":
        """(threads, bytes, where in them): each thread's is in one of them, or it should not be read."""
        left = active.copy()
        for start, one in [(0, self.shared)] if space == "shared" else self.memory:
            here = left & (address >= start) & (address + size <= start + one.nbytes)
            if here.any():
                yield here, one, address[here] - start
                left &= ~here
        if left.any():
            raise IndexError(f"{left.sum()} threads access {space} memory that nobody handed in")

    def read(self, space: str, address: Array, size: int, active: Array) -> Array:
        """uint8 [threads, size]."""
        if (address[active] % min(size, 4)).any():
            raise IndexError("an address is not aligned")
        found = np.zeros((self.n, size), np.uint8)
        for here, one, at in self._places(space, address, size, active):
            found[here] = one[at[:, None] + np.arange(size)]
        return found

    def do_ld(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """ld.param, ld.global, ld.shared."""
        if parts[0] == "param":
            number = int(operands[1].strip("[]").rpartition("_")[2])
            self.put(operands[0], self.arguments[number], active)
            return
        names = _names(operands[0])
        kind = dtype_of(parts[-1])
        found = self.read(parts[0], self._address(operands[1]), len(names) * kind.itemsize, active)
        for name, value in zip(names, np.ascontiguousarray(found).view(kind).T, strict=True):
            wide = f"{kind.kind}4" if kind.itemsize < 2 else kind  # registers have 16 bits and more
            self.put(name, np.ascontiguousarray(value.astype(wide)), active)

    def do_st(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """st.global, st.shared."""
        names = _names(operands[1])
        data = np.stack([self.value(name, parts[-1]) for name in names], 1)
        data = np.ascontiguousarray(data).view(np.uint8)
        address = self._address(operands[0])
        for here, one, at in self._places(parts[0], address, data.shape[1], active):
            one[at[:, None] + np.arange(data.shape[1])] = data[here]

    def do_mov(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """Registers, and pairs packed into or out of one."""
        target, source = operands
        kind = parts[-1]
        if target[0] == "{":
            names = _names(target)
            value = np.ascontiguousarray(self.value(source, kind)).view(f"uint{int(kind[1:]) // len(names)}")
            for name, one in zip(names, value.reshape(self.n, -1).T, strict=True):
                self.put(name, np.ascontiguousarray(one), active)
        elif source[0] == "{":
            names = _names(source)
            each = f"b{int(kind[1:]) // len(names)}"
            value = np.stack([self.value(name, each) for name in names], 1)
            self.put(target, np.ascontiguousarray(value).view(dtype_of(kind))[:, 0], active)
        else:
            self.put(target, self.value(source, kind), active)

    # arithmetic

    def do_mul(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """Floats; integers' low halves, or whole products."""
        a, b = (self.value(one, parts[-1]) for one in operands[1:])
        if "wide" in parts:
            a, b = a.astype(f"{a.dtype.kind}8"), b.astype(f"{b.dtype.kind}8")
        if "hi" in parts:
            product = (a.astype(object) * b.astype(object)) >> (8 * a.dtype.itemsize)
            self.put(operands[0], product.astype(a.dtype), active)
            return
        self.put(operands[0], a * b, active)

    def do_mad(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """Of integers."""
        kind = parts[-1]
        a, b = (self.value(one, kind) for one in operands[1:3])
        if "wide" in parts:
            kind = kind[0] + "64"
            a, b = a.astype(dtype_of(kind)), b.astype(dtype_of(kind))
        self.put(operands[0], a * b + self.value(operands[3], kind), active)

    def do_fma(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """float32, or pairs of float16: rounded once."""
        if parts[-1] == "f16x2":
            a, b, c = (_halves(self.value(one, "b32")).astype(np.float64) for one in operands[1:])
            self.put(operands[0], _whole((a * b + c).astype(np.float16)), active)
            return
        a, b, c = (self.value(one, "f32").astype(np.float64) for one in operands[1:])
        self.put(operands[0], (a * b + c).astype(np.float32), active)

    def do_add(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """Numbers, or pairs of 16-bit integers."""
        if parts[-1] in ("s16x2", "u16x2"):
            a, b = (np.ascontiguousarray(self.value(one, "b32")).view(np.uint16) for one in operands[1:])
            self.put(operands[0], (a + b).view(np.uint32), active)
            return
        a, b = (self.value(one, parts[-1]) for one in operands[1:])
        self.put(operands[0], a + b, active)

    def do_shl(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """By less than the width, here."""
        self.put(operands[0], self.value(operands[1], parts[-1]) << self._count(operands[2], parts[-1]), active)

    def do_shr(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """Arithmetic where signed."""
        self.put(operands[0], self.value(operands[1], parts[-1]) >> self._count(operands[2], parts[-1]), active)

    def _count(self, operand: str, kind: str) -> Array:
        count = self.value(operand, "u32")
        if (count >= int(kind[1:])).any():
            raise UnsupportedError("a shift by the whole width")
        return count.astype(dtype_of(kind))

    def do_div(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """Integers towards zero."""
        a, b = (self.value(one, parts[-1]) for one in operands[1:])
        if a.dtype.kind == "f":
            self.put(operands[0], a / b, active)
        else:
            wide = np.trunc(a.astype(np.float64) / np.where(b == 0, 1, b))
            self.put(operands[0], wide.astype(a.dtype), active)

    def do_bfe(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """A field of bits at a constant place."""
        start, length = int(operands[2], 0), int(operands[3], 0)
        value = self.value(operands[1], parts[-1])
        left = value.dtype.type(8 * value.dtype.itemsize - start - length)
        right = value.dtype.type(8 * value.dtype.itemsize - length)
        self.put(operands[0], (value << left) >> right, active)

    def do_prmt(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """Bytes of two words, as a constant chooses them."""
        a, b, chosen = (self.value(one, "b32") for one in operands[1:])
        data = np.ascontiguousarray(np.stack([a, b], 1)).view(np.uint8)
        out = np.zeros((self.n, 4), np.uint8)
        for place in range(4):
            nibble = chosen >> np.uint32(4 * place) & np.uint32(15)
            one = np.take_along_axis(data, (nibble & 7).astype(np.int64)[:, None], 1)[:, 0]
            out[:, place] = np.where(nibble & 8, np.where(one & 0x80, 0xFF, 0), one)
        self.put(operands[0], out.view(np.uint32)[:, 0], active)

    def do_lop3(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """Any function of three bits."""
        a, b, c = (self.value(one, "b32") for one in operands[1:4])
        table, out = int(operands[4], 0), np.zeros(self.n, np.uint32)
        for row in range(8):
            if table >> row & 1:
                out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        self.put(operands[0], out, active)

    def do_setp(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """Comparisons; with a number that is none, only those that end in u hold."""
        a, b = (self.value(one, parts[-1]) for one in operands[1:])
        name = parts[0]
        if name in _COMPARE:
            found = _COMPARE[name](a, b)
        else:
            found = _COMPARE[name.removesuffix("u")](a, b) | np.isnan(a) | np.isnan(b)
        self.put(operands[0], found, active)

    def do_selp(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """One or the other."""
        a, b = (self.value(one, parts[-1]) for one in operands[1:3])
        self.put(operands[0], np.where(self.registers[operands[3]], a, b), active)

    def do_cvt(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """Between numbers; pairs of float16 from two of float32."""
        to, kind = parts[-2:]
        if to in ("f16x2", "bf16x2"):
            high, low = (_rounded(self.value(one, "f32"), to.removesuffix("x2")) for one in operands[1:])
            self.put(operands[0], _whole(np.stack([low, high], 1)), active)
            return
        if kind == "bf16":
            value = (self.value(operands[1], "u16").astype(np.uint32) << 16).view(np.float32)
        elif kind[1:] == "8":
            value = self.value(operands[1], "b32").astype(np.uint8).view(dtype_of(kind))
        else:
            value = self.value(operands[1], kind)
        made = _rounded(value, to) if to == "bf16" else value.astype(dtype_of(to))
        self.put(operands[0], made.astype(np.int32) if made.dtype.itemsize == 1 else made, active)

    # what a warp does together

    def _warps(self, value: Array) -> Array:
        return value.reshape(-1, WARP)

    def do_shfl(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """shfl.sync.bfly and .idx."""
        target, source, by, *_ = operands
        lane = np.arange(self.n) % WARP
        by_value = self.value(by, "u32").astype(np.int64)
        if parts[1] not in ("bfly", "idx"):
            raise UnsupportedError(f"shfl.{'.'.join(parts)}")
        chosen = lane ^ by_value if parts[1] == "bfly" else by_value % WARP
        value = self._warps(self.value(source, "b32"))
        found = np.take_along_axis(value, self._warps(chosen), 1).ravel()
        self.put(target.split("|")[0], found, active)

    def do_redux(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """The smallest or largest of a warp."""
        value = self._warps(self.value(operands[1], parts[-1]))
        found = {"min": np.min, "max": np.max, "add": np.sum}[parts[1]](value, 1, keepdims=True)
        self.put(operands[0], np.repeat(found.astype(value.dtype), WARP, 1).ravel(), active)

    def do_bar(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """Threads are in lockstep."""

    def do_cp(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """cp.async: done at once, the rest of a place is zeros."""
        if parts[1] in ("commit_group", "wait_group"):
            return
        size = int(operands[2], 0)
        count = self.value(operands[3], "u32") if len(operands) > 3 else np.full(self.n, size, np.uint32)
        data = self.read("global", self._address(operands[1]), size, active & (count > 0))
        data[np.arange(size) >= count[:, None]] = 0
        for here, one, at in self._places("shared", self._address(operands[0]), size, active):
            one[at[:, None] + np.arange(size)] = data[here]

    def do_ldmatrix(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """8 × 8 matrices of 16 bits: thread i's address is that of row i % 8 of matrix i // 8."""
        names = _names(operands[0])
        address = self._warps(self._address(operands[1]))
        for number, name in enumerate(names):
            rows = address[:, 8 * number : 8 * number + 8].repeat(4, 1) + np.tile(np.arange(4) * 4, 8)
            found = np.ascontiguousarray(self.read("shared", rows.ravel(), 4, active)).view(np.uint16)
            if "trans" in parts:
                matrices = found.reshape(-1, 8, 8).transpose(0, 2, 1)
                found = np.ascontiguousarray(matrices).reshape(self.n, 2)
            self.put(name, _whole(found), active)

    def do_mma(self, parts: "list[str]", operands: "tuple[str, ...]", active: Array) -> None:
        """m16n8k16 of float16 or bfloat16 into float32."""
        kind = parts[-2]
        known = parts[2] == "m16n8k16" and parts[-4:] == ["f32", kind, kind, "f32"] and kind in ("f16", "bf16")
        if not known or not active.all():
            raise UnsupportedError(f"mma.{'.'.join(parts)}")
        d, a, b, c = map(_names, operands)
        given = [[_floats(self.value(name, "b32"), kind) for name in names] for names in (a, b)]
        sums = [self.value(name, "f32") for name in c]
        made = np.zeros((4, self.n), np.float32)
        for first in range(0, self.n, WARP):
            warp = slice(first, first + WARP)
            left, right = ([one[warp] for one in names] for names in given)
            made[:, warp] = _product(left, right, [one[warp] for one in sums])
        for name, value in zip(d, made, strict=True):
            self.put(name, np.ascontiguousarray(value), active)


def _product(a: "list[Array]", b: "list[Array]", c: "list[Array]") -> "list[Array]":
    """What a warp's m16n8k16 gives: a four times and b twice [32, 2], c and the result four times float32 [32]."""
    lane = np.arange(WARP)
    group, thread = lane // 4, lane % 4
    left, right, total = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for i in range(8):
        row = group + (0 if i < 2 or 4 <= i < 6 else 8)
        left[row, 2 * thread + i % 2 + (0 if i < 4 else 8)] = a[i // 2][:, i % 2]
    for i in range(4):
        right[2 * thread + i % 2 + (0 if i < 2 else 8), group] = b[i // 2][:, i % 2]
    places = [(group + (0 if i < 2 else 8), 2 * thread + i % 2) for i in range(4)]
    for value, place in zip(c, places, strict=True):
        total[place] = value
    result = (left @ right + total).astype(np.float32)
    return [result[place] for place in places]


def _names(operand: str) -> "list[str]":
    return operand.strip("{} ").replace(" ", "").split(",")


def _floats(words: Array, kind: str) -> Array:
    """float32 [n, 2] of pairs in words."""
    if kind == "f16":
        return _halves(words).astype(np.float32)
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(-1, 2)
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _halves(words: Array) -> Array:
    """float16 [n, 2] of uint32 [n]: low, high."""
    return np.ascontiguousarray(words).view(np.float16).reshape(-1, 2)


def _rounded(value: Array, kind: str) -> Array:
    """float32 as float16, or as the bits of a bfloat16 (what is no number is not looked at)."""
    if kind == "f16":
        return value.astype(np.float16)
    bits = value.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _whole(halves: Array) -> Array:
    return np.ascontiguousarray(halves).view(np.uint32)[:, 0]


_COMPARE: "dict[str, Callable[[Array, Array], Array]]" = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_SIMPLE: "dict[str, Callable[..., Array]]" = {
    "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "min": np.fmin, "max": np.fmax, "abs": np.abs, "neg": np.negative, "ex2": np.exp2, "rcp": np.reciprocal,
    "rem": np.fmod, "sqrt": np.sqrt,
}  # fmt: skip


def launch(program: Program, grid: "tuple[int, ...]", arguments: "list[int]", memory: "list[Array]") -> None:
    """All blocks, one after another. arguments: integers and addresses; memory: uint8, what those point into."""
    x, y, z = (*grid, 1, 1)[:3]
    for number in range(x * y * z):
        Block(program, arguments, (number % x, number // x % y, number // (x * y)), (x, y, z), memory).run()
