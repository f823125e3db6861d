"""Packed kernels against the memory's floor: python benchmarks/kernels.py [--threads N] [--tokens N] [--reference].

One call computes what one token asks of a layer's experts: gate and up, activation, down, of top-k experts. Records
rotate through more memory than any cache holds, and the floor, the rate at which all threads together read memory, is
measured beside each trial, because it drifts. Prints a line per model shape and format; the last line is one JSON
object with all of them.
"""

import argparse
import dataclasses
import json
import statistics
import time

import torch
import torch.nn.functional as F

from greenroom.kernels import Activation, ExpertTask, describe, experts, reference
from greenroom.machine import ram_bandwidth
from greenroom.packed import RecordTensor
from greenroom.quant import Format, Layout
from greenroom.store import Arena

FORMATS = [(4, 64), (3, 64), (2, 16), (4, 32), (2, 64), (8, 64), (16, 0)]
"""bits, group size; the first three are the defaults"""


def swiglu(hidden: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up."""
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


SWIGLU = Activation(gate=swiglu, kind="silu_and_mul")


def in_turns(limit: float) -> Activation:
    """gpt-oss's: gate and up in turns, clamped to `limit`."""

    def gate(hidden: torch.Tensor) -> torch.Tensor:
        gate, up = hidden[..., ::2].clamp(max=limit), hidden[..., 1::2].clamp(-limit, limit)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)

    return Activation(gate=gate, kind=f"swigluoai_interleaved:1.702:{limit}")


@dataclasses.dataclass(frozen=True)
class Model:
    """A layer's experts: `top_k` of them a token; `biased`: both products have biases."""

    name: str
    hidden: int
    inner: int
    top_k: int
    activation: Activation = SWIGLU
    biased: bool = False


MODELS = [
    Model("Mixtral 8x7B", 4096, 14336, 2),
    Model("Qwen3 30B A3B", 2048, 768, 8),
    Model("gpt-oss 20B", 2880, 2880, 4, in_turns(7.0), biased=True),
]


def layout(model: Model, format: Format) -> "list[RecordTensor]":
    """The two matrices of an expert's record, then their biases where it has them."""
    sizes = [("gate_up_proj", 2 * model.inner, model.hidden), ("down_proj", model.hidden, model.inner)]
    wanted = [(*size, format) for size in sizes]
    if model.biased:
        wanted += [(f"{name}_bias", 1, rows, Format(bits=16, group_size=0)) for name, rows, _ in sizes]
    its: list[RecordTensor] = []
    for name, rows, cols, own in wanted:
        offset = its[-1].offset + its[-1].nbytes if its else 0
        its.append(RecordTensor(name=name, rows=rows, cols=cols, offset=offset, format=own))
    return its


def record_nbytes(its: "list[RecordTensor]") -> int:
    """With what makes it whole pages."""
    return -(-(its[-1].offset + its[-1].nbytes) // 4096) * 4096


def tame(record: torch.Tensor, its: "list[RecordTensor]") -> None:
    """Give a record of random bytes scales that keep its products small, and biases of zero."""
    for tensor in its:
        part = tensor.part(record)
        if tensor.name.endswith("_bias"):
            part.zero_()
        elif tensor.format.bits != 16:
            params = torch.tensor([0.01, 1e-4, 1.0, 0.01], dtype=torch.bfloat16, device=record.device)
            Layout(tensor.rows, tensor.cols, tensor.format).view(part, "row_params")[:] = params


def records(its: "list[RecordTensor]", nbytes: int) -> "list[torch.Tensor]":
    """Random codes with tame scales, about `nbytes` in all."""
    size = record_nbytes(its)
    count = max(2, nbytes // size)
    arena = Arena(count, size)
    memory = [arena.record(number) for number in range(count)]
    memory[0].random_(0, 256)
    tame(memory[0], its)
    for other in memory[1:]:
        other.copy_(memory[0])
    return memory


@dataclasses.dataclass
class Trial:
    """What one rotation through the records took."""

    floor: float
    seconds: float
    nbytes: int

    @property
    def share(self) -> float:
        """Of the floor."""
        return self.nbytes / self.seconds / self.floor


def rotate(model: Model, its: "list[RecordTensor]", made: "list[torch.Tensor]", tokens: int) -> Trial:
    """All records once, `top_k` a call, each for `tokens` tokens."""
    x, rows = torch.randn(tokens, model.hidden), torch.arange(tokens)
    calls = [
        [ExpertTask(one, rows) for one in made[start : start + model.top_k]]
        for start in range(0, len(made) - model.top_k + 1, model.top_k)
    ]
    floor = ram_bandwidth()
    start = time.perf_counter()
    for tasks in calls:
        experts(x, tasks, its, model.activation)
    seconds = time.perf_counter() - start
    read = sum(tensor.nbytes for tensor in its)
    return Trial(floor, seconds / len(calls), read * model.top_k)


def measure(model: Model, format: Format, options: argparse.Namespace) -> "dict[str, object]":
    """One line of the table."""
    its = layout(model, format)
    made = records(its, max(options.rotate << 20, model.top_k * record_nbytes(its)))  # a call's, at least
    rotate(model, its, made, options.tokens)
    trials = [rotate(model, its, made, options.tokens) for _ in range(options.trials)]
    seconds = statistics.median(trial.seconds for trial in trials)
    shares = sorted(trial.share for trial in trials)
    weights = 3 * model.hidden * model.inner * model.top_k
    found: dict[str, object] = {
        "model": model.name,
        "format": format.name,
        "tokens": options.tokens,
        "us": round(seconds * 1e6, 1),
        "gb_per_s": round(trials[0].nbytes / seconds / 1e9, 2),
        "floor_gb_per_s": round(statistics.median(trial.floor for trial in trials) / 1e9, 2),
        "share": round(statistics.median(shares), 3),
        "share_least": round(shares[0], 3),
        "share_most": round(shares[-1], 3),
        "gmac_per_s": round(weights * options.tokens / seconds / 1e9, 1),
    }
    if options.reference:
        x, task = torch.randn(options.tokens, model.hidden), ExpertTask(made[0], torch.arange(options.tokens))
        start = time.perf_counter()
        reference.experts(x, [task], its, model.activation)
        found["of_reference"] = round((time.perf_counter() - start) * model.top_k / seconds, 1)
    return found


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=1, help="tokens for each expert")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--rotate", type=int, default=1024, metavar="MIB", help="memory that records rotate through")
    parser.add_argument("--formats", nargs="*", default=[], metavar="BITSgGROUP", help="for example 4g64 2g16")
    parser.add_argument("--reference", action="store_true", help="time torch too, on one expert")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{describe()}; floor: RAM {ram_bandwidth() / 1e9:.1f} GB/s")
    found = []
    for bits, group in FORMATS:
        if options.formats and f"{bits}g{group}" not in options.formats:
            continue
        for model in MODELS:
            line = measure(model, Format(bits=bits, group_size=group), options)
            print("  ".join(f"{key}={value}" for key, value in line.items()), flush=True)
            found.append(line)
    print(json.dumps({"kernel": describe(), "threads": options.threads, "results": found}))


if __name__ == "__main__":
    main()
