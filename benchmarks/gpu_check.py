"""Every GPU kernel against the reference in float32: python -m benchmarks.gpu_check [--small] [--part I/N]

Fresh random inputs, outputs poisoned first, errors as ‖out − wanted‖ / ‖wanted‖. Prints a JSON object a check; ends
with status 1 where one is beyond what the activations' dtype explains. `--small` is for compute-sanitizer; parts are
for processes beside one another, since nearly all of the time is Triton's compiler's.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence

import torch

from benchmarks.kernels import Model, in_turns, layout
from greenroom.kernels import ExpertTask, device, reference
from greenroom.packed import RecordTensor
from greenroom.quant import Format, quantize

FORMATS = [Format.of(4), Format.of(3), Format.of(2)]
"""The defaults, first; then the others."""
FORMATS += [Format(bits=bits, group_size=group) for bits in (2, 3, 4, 8) for group in (16, 32, 64, 128)]
FORMATS += [Format(bits=16, group_size=0, dtype=dtype) for dtype in ("bfloat16", "float16")]
FORMATS = list(dict.fromkeys(FORMATS))
ALLOWED = {torch.float32: 3e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""In float16 weights, activations and what lies between the products are rounded: 5e-4 to 2e-3 at these sizes."""
ODD = Model("odd", 328, 203, 3)
"""Neither whole blocks nor whole tiles."""
EVEN = Model("even", 512, 256, 2)
"""Sizes that are multiples of 16, for which Triton compiles other code: that of real models."""
TURNS = Model("turns", 328, 203, 3, in_turns(1.0), biased=True)
"""Biases and gpt-oss's gate, with clamps that are met."""
TOKENS = (1, 7, 40)


@dataclasses.dataclass(frozen=True)
class Checked:
    """How far one kernel is from the reference."""

    model: str
    kernel: str
    format: str
    dtype: str
    error: float

    @property
    def right(self) -> bool:
        """Whether rounding explains it; what is no number is never right."""
        return self.error < ALLOWED[getattr(torch, self.dtype)]


def records(model: Model, format: Format, count: int, on: torch.device) -> "tuple[torch.Tensor, list[RecordTensor]]":
    """uint8 [count, record_nbytes] of random experts, and their layout."""
    its = layout(model, format)
    made = [torch.cat([quantize(_random(tensor), tensor.format) for tensor in its]) for _ in range(count)]
    return torch.stack(made).to(on), its


def _random(tensor: RecordTensor) -> torch.Tensor:
    """Products, and biases, of order 1."""
    weight = torch.randn(tensor.rows, tensor.cols)
    return weight if tensor.rows == 1 else weight / tensor.cols**0.5


def check(
    format: Format, dtype: torch.dtype, tokens: "Sequence[int]", on: torch.device, model: Model = ODD
) -> "Iterator[Checked]":
    """The decode kernels for each number of tokens, the prompt's, and a dense linear."""
    experts = 4
    arena, its = records(model, format, experts, on)
    most = max(tokens)
    x = torch.randn(most, model.hidden, device=on).to(dtype)
    slots = torch.stack([torch.randperm(experts)[: model.top_k] for _ in range(most)]).to(on, torch.int32)
    weights = torch.rand(most, model.top_k, device=on)
    wanted = torch.stack([_pair(model, x, arena, its, t, slot) for t, row in enumerate(slots.tolist()) for slot in row])
    wanted = wanted.view(most, model.top_k, -1)
    total = (wanted * weights.unsqueeze(-1)).sum(1)
    named = {"model": model.name, "format": format.name, "dtype": str(dtype).removeprefix("torch.")}
    for count in tokens:
        if count <= device.MOST_TOKENS:
            out = device.token(x[:count], arena, slots[:count], weights[:count], its, model.activation.kind)
            yield Checked(kernel=f"token {count}", error=_error(out, total[:count]), **named)
    out = torch.full((most * model.top_k, model.hidden), float("nan"), device=on)
    flat = slots.flatten()
    order = flat.argsort(stable=True)
    ends = flat.long().bincount(minlength=experts).cumsum(0).tolist()
    spans = [device.Span(e, s, end - s) for e, (s, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > s]
    device.prompt(x, arena, spans, (order // model.top_k).to(torch.int32), its, model.activation.kind, out)
    yield Checked(kernel="prompt", error=_error(out, wanted.flatten(0, 1)[order]), **named)
    places = order.argsort().view(most, model.top_k).to(torch.int32)
    yield Checked(kernel="combine", error=_error(device.combine(out, places, weights), total), **named)
    first = its[0]
    out = device.linear(x, first.part(arena[0]), first.rows, first.cols, format)
    exact = reference.linear(x.float(), first.part(arena[0]), first.rows, first.cols, format)
    yield Checked(kernel="linear", error=_error(out.float(), exact), **named)


def _pair(
    model: Model, x: torch.Tensor, arena: torch.Tensor, its: "list[RecordTensor]", t: int, slot: int
) -> torch.Tensor:
    task = ExpertTask(arena[slot], torch.tensor([t], device=x.device))
    return reference.experts(x.float(), [task], its, model.activation)[0][0]


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def cases(small: bool) -> "list[tuple[Model, Format, torch.dtype]]":
    """What is checked, the defaults first; `small`: these in float16 alone."""
    if small:
        return [(ODD, format, torch.float16) for format in FORMATS[:3]]
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    models = {format: (EVEN, ODD, TURNS) if format in FORMATS[:3] else (EVEN, ODD) for format in FORMATS}
    return [(model, format, dtype) for format in FORMATS for dtype in dtypes for model in models[format]]


def main() -> int:
    """Check and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--small", action="store_true", help="the default formats in float16 alone")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th case, from the I-th on")
    options = parser.parse_args()
    if reason := device.unusable():
        print(f"the GPU's kernels cannot run: {reason}", file=sys.stderr)
        return 2
    part, parts = map(int, options.part.split("/"))
    all_right = True
    for model, format, dtype in cases(options.small)[part::parts]:
        for one in check(format, dtype, TOKENS, torch.device("cuda"), model):
            print(json.dumps(dataclasses.asdict(one) | {"right": one.right}), flush=True)
            all_right = all_right and one.right
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
