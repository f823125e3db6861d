"""The compiled kernels: float32 on a CPU, straight from the packed bits.

They decline what they cannot do, and `dispatch` asks the reference instead. Whether they take a task depends on its
own shapes, types and number of tokens alone, and a token's result does not depend on the other tokens, the other
experts or the number of threads, so bits stay the same whatever the memory. The C++ is in `native/`.
"""

import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from greenroom import environment, threads
from greenroom.errors import ConfigError
from greenroom.kernels.reference import Activation, ExpertTask
from greenroom.packed import RecordTensor
from greenroom.quant import Format, dequantize

FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
"""What is applied to the first product, or to the half of it that gates."""

_unusable = ""
try:
    import greenroom.kernels._native as _native
except ModuleNotFoundError:
    _native = None  # type: ignore[assignment]
    _unusable = "the extension is not built"
except ImportError as error:
    _native = None  # type: ignore[assignment]
    _unusable = f"the extension does not load ({error})"


BLOCK = _native.BLOCK if _native else 32
"""Positions in a block of cached keys or values."""
GROUP = _native.GROUP if _native else 32
"""Numbers of a cached key or value that share a scale in 8 bits."""


@functools.cache
def extension() -> "ModuleType | None":
    """The extension, set to the instruction set that GREENROOM_ISA asks for; None if there is none, or for "none".

    Raises ConfigError for an instruction set that this machine lacks.
    """
    wanted = environment.isa()
    if wanted == "none" or _native is None:
        return None
    if wanted and not _native.choose(wanted):
        choices = ", ".join([*_native.available(), "none"])
        raise ConfigError(f"GREENROOM_ISA={wanted}: this machine runs {choices}; unset it to take the best")
    return _native


def unusable() -> str:
    """Why the extension does not serve, or nothing."""
    return "" if extension() else _unusable or "GREENROOM_ISA=none"


def describe() -> str:
    """For people: "native (AVX-512, 2 threads)"."""
    count = threads.count()
    return f"native ({_native.title()}, {count} thread{'s' if count > 1 else ''})"


def linear(
    x: torch.Tensor, packed: torch.Tensor, rows: int, cols: int, format: Format, bias: "torch.Tensor | None" = None
) -> "torch.Tensor | None":
    """As the reference's `linear`, or None where this is no matter for these kernels."""
    if extension() is None or not _is_plain(x) or not _is_bytes(packed):
        return None
    if bias is not None and (bias.requires_grad or not _is_plain(bias) or not bias.is_contiguous()):
        return None
    packed_shape = shape(rows, cols, format)
    if not packed_shape.takes(x.shape[0]):
        return None
    x = x.contiguous()
    out = torch.empty((x.shape[0], rows), dtype=torch.float32)
    one = (packed.data_ptr(), packed.numel(), packed_shape, 0 if bias is None else bias.data_ptr(), out.data_ptr())
    _native.linears(x.data_ptr(), x.shape[0], [one], threads.count())
    return out


def linears_s() -> float:
    """Seconds that this process has spent in compiled products other than experts'."""
    return _native.linears_s() if _native else 0.0


def experts_s() -> float:
    """Seconds that it has spent in compiled experts."""
    return _native.experts_s() if _native else 0.0


def taken(x: torch.Tensor, tasks: "Sequence[ExpertTask]", layout: "Sequence[RecordTensor]") -> "list[bool]":
    """Which tasks `experts` computes."""
    if extension() is None or not _is_plain(x):
        return [False] * len(tasks)
    shapes = [shape(tensor.rows, tensor.cols, tensor.format) for tensor in layout[:2]]
    counts = [task.rows.shape[0] for task in tasks]
    takes = {count: all(its.takes(count) for its in shapes) for count in set(counts)}
    return [
        takes[count] and _is_bytes(task.record) and task.rows.is_contiguous()
        for count, task in zip(counts, tasks, strict=True)
    ]


def experts(
    x: torch.Tensor,
    tasks: "Sequence[ExpertTask]",
    layout: "Sequence[RecordTensor]",
    activation: Activation,
    rough: bool = False,
) -> "list[torch.Tensor]":
    """As the reference's `experts`, for tasks that `takes` takes. `rough`: activations of tasks of 8 rows and more may
    be rounded to 8 bits, where weights have 4 or fewer."""
    if not activation.kind:
        return [_expert(x[task.rows], task.record, layout, activation) for task in tasks]
    x = x.contiguous()
    counts = [task.rows.shape[0] for task in tasks]
    out = torch.empty((sum(counts), layout[1].rows), dtype=torch.float32)
    _native.experts(
        x.data_ptr(),
        x.shape[0],
        [task.record.data_ptr() for task in tasks],
        min(task.record.numel() for task in tasks),
        [task.rows.data_ptr() for task in tasks],
        counts,
        _layout(tuple(layout), activation.kind),
        out.data_ptr(),
        threads.count(),
        rough,
    )
    found = torch.split(out, counts)
    return list(found) if activation.after is None else [activation.after(one) for one in found]


def add_weighted(out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> bool:
    """Add x [n, H] times weights [n, 1] to the rows of out [T, H]; False where this is no matter for these kernels."""
    plain = extension() is not None and all(_is_plain(one) and one.is_contiguous() for one in (out, x, weights))
    if not plain or not rows.is_contiguous() or rows.dtype != torch.int64:
        return False
    assert out.shape[1] == x.shape[1] and len(rows) == len(x) == weights.numel()
    addresses = x.data_ptr(), rows.data_ptr(), weights.data_ptr()
    _native.add_weighted(out.data_ptr(), len(out), *addresses, len(x), x.shape[1], threads.count())
    return True


def token(
    x: torch.Tensor,
    records: "list[int]",
    places: "list[int]",
    record_nbytes: int,
    layout: "tuple[RecordTensor, ...]",
    kind: str,
    outputs: torch.Tensor,
) -> None:
    """One token's experts in one call: x [1, H], the addresses of their records, and the rows of outputs [k, H] that
    they write."""
    if layout[0].cols != x.shape[1] or layout[1].rows != outputs.shape[1]:
        raise ValueError(f"experts of {layout[0].cols} columns and {layout[1].rows} rows do not fit {x.shape[1]}")
    _native.token(
        x.data_ptr(), records, places, record_nbytes, _layout(layout, kind), outputs.data_ptr(), threads.count()
    )


def records(
    layout: "tuple[RecordTensor, ...]", kind: str, addresses: "list[int]", record_nbytes: int
) -> "_native.Records":
    """Where all experts of a layer lie, 0 for those that are elsewhere; `kind` is their activation."""
    return _native.Records(_layout(layout, kind), addresses, record_nbytes)


def all_records(layers: "Sequence[_native.Records | None]") -> "_native.AllRecords":
    """Those of all layers of a decoder, None where a layer has no experts."""
    return _native.AllRecords([_native.Records() if one is None else one for one in layers])


def caches(layers: "list[tuple[int, int, int, int, int, int]]") -> "_native.Caches":
    """Keys, values, capacity, bits, first and length of each layer of a decoder, for one token."""
    return _native.Caches(layers)


def decoder(layers: "list[Any]", hidden: torch.Tensor, normed: torch.Tensor) -> Any:
    """The compiled decoder over `layers`; hidden and normed float32 [1, width] are its working vectors."""
    return _native.Decoder(layers, hidden.shape[1], hidden.data_ptr(), normed.data_ptr())


def _expert(
    x: torch.Tensor, record: torch.Tensor, layout: "Sequence[RecordTensor]", activation: Activation
) -> torch.Tensor:
    """One expert, its activation computed by the family's own code."""
    first, second, *biases = layout
    inner, outer = [dequantize(t.part(record), t.rows, t.cols, t.format)[0] for t in biases] or (None, None)
    hidden = linear(x, first.part(record), first.rows, first.cols, first.format, inner)
    assert hidden is not None
    out = linear(activation.gate(hidden), second.part(record), second.rows, second.cols, second.format, outer)
    assert out is not None
    return out if activation.after is None else activation.after(out)


def _is_plain(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and not (x.requires_grad and torch.is_grad_enabled())


def _is_bytes(packed: torch.Tensor) -> bool:
    return packed.device.type == "cpu" and packed.dtype == torch.uint8 and packed.is_contiguous()


@functools.lru_cache(maxsize=256)
def shape(rows: int, cols: int, format: Format) -> "_native.Shape":
    """A packed matrix's shape, for the extension."""
    return _native.shape(rows, cols, format.bits, format.group_size, format.dtype == "float16")


@functools.lru_cache(maxsize=256)
def _layout(layout: "tuple[RecordTensor, ...]", kind: str) -> "_native.ExpertLayout":
    first, second, *biases = layout
    shapes = [shape(tensor.rows, tensor.cols, tensor.format) for tensor in (first, second)]
    inner, outer = (bias.offset for bias in biases) if biases else (-1, -1)
    is_float16 = bool(biases) and biases[0].format.dtype == "float16"
    return _native.layout(shapes[0], first.offset, shapes[1], second.offset, inner, outer, is_float16, _gate(kind))


def _gate(kind: str) -> "_native.Gate":
    """See `Activation.kind`."""
    name, *numbers = kind.split(":")
    if name in FUNCTIONS:
        return _native.gate(name, "alone", 1.0, math.inf, 0.0)
    if name.removesuffix("_and_mul") in FUNCTIONS:
        return _native.gate(name.removesuffix("_and_mul"), "halves", 1.0, math.inf, 0.0)
    if name == "clamped_silu_and_mul":
        return _native.gate("silu", "halves", 1.0, float(numbers[0]), 0.0)
    orders = {"swigluoai": "halves", "swigluoai_interleaved": "turns"}
    return _native.gate("silu", orders[name], float(numbers[0]), float(numbers[1]), 1.0)
