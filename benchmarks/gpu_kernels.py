"""The GPU's kernels on a clock: shares of its memory's rate and of its matrix units, at true shapes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu_clock import Clock
from benchmarks.kernels import MODELS, Model, layout, record_nbytes, tame
from greenroom.kernels import device
from greenroom.packed import RecordTensor
from greenroom.quant import Format, Layout

FORMATS = [Format.of(4), Format.of(3), Format.of(2)]
EXPERTS = {"Mixtral 8x7B": 8, "Qwen3 30B A3B": 128, "gpt-oss 20B": 32}
"""of a layer"""
Line = dict[str, Any]


def floors(clock: Clock, on: torch.device, nbytes: int = 1 << 30, side: int = 8192) -> Line:
    """What the device does at best: copies (bytes read and written), reads, the link with pinned memory, products."""
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=on)
    target = torch.empty_like(source)
    host = torch.empty(min(nbytes, 1 << 28), dtype=torch.uint8, pin_memory=on.type == "cuda")
    a, b = (torch.randn(side, side, device=on).to(torch.float16) for _ in range(2))
    wide = source.view(torch.float32).nan_to_num_()
    copy = clock.seconds([lambda: target.copy_(source)])
    read = clock.seconds([lambda: wide.sum()])
    up = clock.seconds([lambda: target[: len(host)].copy_(host, non_blocking=True)], graph=False)
    down = clock.seconds([lambda: host.copy_(source[: len(host)], non_blocking=True)], graph=False)
    product = clock.seconds([lambda: a @ b], graph=False)
    return {
        "copy_gb_per_s": 2 * nbytes / copy / 1e9,
        "read_gb_per_s": nbytes / read / 1e9,
        "to_device_gb_per_s": len(host) / up / 1e9,
        "to_host_gb_per_s": len(host) / down / 1e9,
        "matmul_tflops": 2 * side**3 / product / 1e12,
    }


def arena(model: Model, format: Format, slots: int, on: torch.device) -> "tuple[torch.Tensor, list[RecordTensor]]":
    """uint8 [slots, record_nbytes] of random codes with tame scales, and their layout."""
    its = layout(model, format)
    made = torch.randint(0, 256, (slots, record_nbytes(its)), dtype=torch.uint8, device=on)
    for record in made:
        tame(record, its)
    return made, its


def routes(tokens: int, top_k: int, experts: int, calls: int, layers: int, on: torch.device) -> "list[torch.Tensor]":
    """Slots of each call, int32 [tokens, top_k]: one layer after another, experts uniform and without repetition."""
    g = torch.Generator().manual_seed(0)
    made = []
    for call in range(calls):
        chosen = torch.stack([torch.randperm(experts, generator=g)[:top_k] for _ in range(tokens)])
        made.append((chosen + call % layers * experts).to(on, torch.int32))
    return made


@contextlib.contextmanager
def setting(**values: Any) -> "Iterator[None]":
    """Constants of `kernels.gpu.launch` set to other values for a while."""
    from greenroom.kernels.gpu import launch  # needs triton, which only a GPU's user has

    before = {name: getattr(launch, name) for name in values}
    try:
        for name, value in values.items():
            setattr(launch, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(launch, name, value)


def decode(
    clock: Clock,
    on: torch.device,
    rate: float,
    model: Model,
    format: Format,
    tokens: int,
    layers: int,
    variant: str = "",
) -> Line:
    """Experts of one layer for 1 to 16 tokens; rate: the copy's, in GB/s.

    variant: "apart" or "together" makes pairs go one by one or share their expert's tile; "rows N" reads N rows a warp.
    """
    experts = EXPERTS.get(model.name, 4)
    memory, its = arena(model, format, experts * layers, on)
    calls = routes(tokens, model.top_k, experts, max(layers, 8), layers, on)
    kind, x = model.activation.kind, torch.randn(tokens, model.hidden, device=on).to(torch.float16)
    weights = torch.rand(tokens, model.top_k, device=on)
    values: dict[str, Any] = {}
    if variant in ("apart", "together"):
        values = {"FEW_TOKENS": 16 if variant == "apart" else 0}
    elif variant:
        values = {"ROWS": int(variant.split()[1])}
    with setting(**values):
        seconds = clock.seconds(
            [lambda slots=slots: device.token(x, memory, slots, weights, its, kind) for slots in calls]
        )
    nbytes = sum(len(slots.unique()) for slots in calls) / len(calls) * sum(tensor.nbytes for tensor in its)
    return {
        "model": model.name,
        "format": format.name,
        "tokens": tokens,
        "variant": variant,
        "us": seconds * 1e6,
        "gb_per_s": nbytes / seconds / 1e9,
        "share": nbytes / seconds / 1e9 / rate,
    }


def prompt(
    clock: Clock, on: torch.device, rate: float, model: Model, format: Format, tokens: int, experts: int
) -> Line:
    """All experts of a layer over a chunk of tokens; rate: the matrix units', in TFLOP/s."""
    memory, its = arena(model, format, experts, on)
    x = torch.randn(tokens, model.hidden, device=on).to(torch.float16)
    each = tokens * model.top_k // experts
    spans = [device.Span(expert, expert * each, each) for expert in range(experts)]
    rows = torch.randint(0, tokens, (each * experts,), device=on).to(torch.int32)
    out = torch.empty((each * experts, model.hidden), dtype=torch.float32, device=on)
    kind = model.activation.kind
    seconds = clock.seconds([lambda: device.prompt(x, memory, spans, rows, its, kind, out)], graph=False)
    rate_here = 6 * model.hidden * model.inner * each * experts / seconds / 1e12
    return {
        "model": model.name,
        "format": format.name,
        "tokens": tokens,
        "each": each,
        "ms": seconds * 1e3,
        "tflops": rate_here,
        "share": rate_here / rate,
    }


def linear(clock: Clock, on: torch.device, rate: float, rows: int, cols: int, format: Format, count: int = 8) -> Line:
    """One token through a dense packed matrix; beside it what `gpu_peers` measures."""
    shape = Layout(rows, cols, format)
    packed = torch.randint(0, 256, (count, shape.nbytes), dtype=torch.uint8, device=on)
    params = torch.tensor([0.01, 1e-4, 1.0, 0.01], dtype=torch.bfloat16, device=on)
    for one in packed:
        shape.view(one, "row_params")[:] = params
    x = torch.randn(1, cols, device=on).to(torch.float16)
    seconds = clock.seconds([lambda one=one: device.linear(x, one, rows, cols, format) for one in packed])
    return {
        "kernel": "greenroom", "rows": rows, "cols": cols, "format": format.name, "us": seconds * 1e6,
        "gb_per_s": shape.nbytes / seconds / 1e9, "share": shape.nbytes / seconds / 1e9 / rate,
    }  # fmt: skip


def cases() -> "Iterator[tuple[Model, Format, int, str]]":
    """What `decode` is measured on, the most telling first."""
    for model in MODELS:
        for format in FORMATS:
            for tokens in (1, 4, 16):
                yield model, format, tokens, ""
    for model in MODELS[:2]:  # whose sizes are the farthest apart
        for variant in ("rows 4", "rows 8", "rows 16"):
            yield model, Format.of(4), 1, variant
        for tokens in (2, 4, 8, 16):
            for variant in ("apart", "together"):
                yield model, Format.of(4), tokens, variant
