"""Ways to find the grid, and ways to hold column scales, on real weights: bytes, errors, KL divergence, perplexity.

    python -m benchmarks.dense_smollm2 OUT --dither
    python -m benchmarks.column_scales OUT TEXT 3,ours,none 3,ours,folded 3,rtn,stored …

A variant is BITS,GRID,SCALES, in the groups that packing uses at that width. GRID: rtn (round to nearest), hqq (its
zero points), ours (what packing takes). All are stored alike: 8-bit scales and zeros, settled the same way. SCALES, of
each MLP matrix's columns, by Sinkhorn's normalisation as in SINQ (arXiv:2509.22944):

    none     no scales
    folded   those of down_proj, in the rows of up_proj: no bytes
    norm     as folded, and one vector for gate_proj and up_proj in the norm before them
    stored   each matrix has its own, bfloat16: 16 / rows bits a weight. With rtn this is SINQ.

Attention stays at 16 bits. Windows of 1024 tokens lie evenly in the text; standard errors are clustered by window. The
output error is that of MLP matrices' products with the activations of the first window, over the products.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from greenroom.evaluate import WindowScore, score, summarise
from greenroom.original import Window, tokens_of
from greenroom.quant import Format, Layout, hqq, rtn
from greenroom.quant.balance import column_scales
from greenroom.quant.scratch import Scratch
from greenroom.quant.search import search
from greenroom.quant.settle import assign, settle

CONTEXT = 1024
_CHUNK = 1 << 19
Grid = tuple[torch.Tensor, torch.Tensor]


def _hqq(groups: torch.Tensor, bits: int, scratch: Scratch) -> Grid:
    top = (1 << bits) - 1
    scale, zero = rtn.solve(groups, top)
    return scale, zero + hqq.solve((groups / scale).add_(zero), top, scratch)


GRIDS: "dict[str, Callable[[torch.Tensor, int, Scratch], Grid]]" = {
    "rtn": lambda groups, bits, _: rtn.solve(groups, (1 << bits) - 1),
    "hqq": _hqq,
    "ours": lambda groups, bits, scratch: search(groups, bits, scratch)[:2],
}


def rounded(weight: torch.Tensor, format: Format, grid: str) -> torch.Tensor:
    """weight [rows, cols] on the stored grid nearest to the one that `grid` finds; cols are whole groups."""
    out = torch.empty_like(weight)
    step = _CHUNK // weight.shape[1]
    for start in range(0, len(weight), step):
        part = weight[start : start + step]
        groups = part.reshape(-1, format.group_size).t().contiguous()
        scratch = Scratch(groups.shape[0], groups.shape[1], groups.device)
        scale, zero = GRIDS[grid](groups, format.bits, scratch)
        kept = settle(groups, scale, zero, len(part), format.top, scratch)
        codes = assign(groups, kept.scale, kept.zero, format.top, scratch.codes)
        out[start : start + step] = codes.sub_(kept.zero).mul_(kept.scale).t().reshape(part.shape)
    return out


class Mlp:
    """One layer's matrices and the scales that wait in front of them: what computes is matrix @ diag(scale)."""

    def __init__(self, matrices: "dict[str, torch.Tensor]") -> None:
        self.matrices = dict(matrices)
        self.norm = torch.ones(matrices["up_proj"].shape[1])
        self.inner = torch.ones(matrices["down_proj"].shape[1])

    def quantise(self, format: Format, grid: str, scales: str) -> int:
        """Round all three; returns their bytes."""
        own = self.matrices
        if scales in ("folded", "norm"):
            self.inner = column_scales(own["down_proj"])
            own["down_proj"], own["up_proj"] = own["down_proj"] / self.inner, own["up_proj"] * self.inner[:, None]
        if scales == "norm":
            self.norm = column_scales(torch.cat((own["gate_proj"], own["up_proj"])))
            own["gate_proj"], own["up_proj"] = own["gate_proj"] / self.norm, own["up_proj"] / self.norm
        nbytes = 0
        for name, weight in own.items():
            columns = column_scales(weight).bfloat16().float() if scales == "stored" else torch.ones(weight.shape[1])
            own[name] = rounded((weight / columns).contiguous(), format, grid) * columns
            nbytes += Layout(weight.shape[0], weight.shape[1], format).nbytes
            nbytes += 2 * weight.shape[1] if scales == "stored" else 0
        return nbytes

    def effective(self) -> "dict[str, torch.Tensor]":
        """The matrices in the original's units."""
        gate, up, down = (self.matrices[name] for name in ("gate_proj", "up_proj", "down_proj"))
        return {
            "gate_proj": gate * self.norm,
            "up_proj": up * self.norm / self.inner[:, None],
            "down_proj": down * self.inner,
        }


class Judge:
    """The original, its states of every window, and the second moments of its MLPs' inputs."""

    def __init__(self, folder: Path, text: str, windows: int) -> None:
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.vocabulary = int(self.model.config.vocab_size)
        ids = tokens_of(transformers.AutoTokenizer.from_pretrained(folder), text)
        step = len(ids) // windows
        starts = range(0, windows * step, step)
        self.windows = [Window(ids=ids[start : start + CONTEXT], scored=CONTEXT - 1) for start in starts]
        self.weights = {path: linear.weight.detach().clone() for path, linear in self._linears()}
        self.moments: dict[str, torch.Tensor] = {}
        hooks = [linear.register_forward_pre_hook(self._watch(path)) for path, linear in self._linears()]
        self._states = [self._run(self.windows[0])]
        for hook in hooks:
            hook.remove()
        self._states += [self._run(window) for window in self.windows[1:]]

    def output_error(self) -> float:
        """Root of the products' squared errors over their squares, of all MLP matrices together."""
        wrong = right = 0.0
        for path, linear in self._linears():
            weight, moment = self.weights[path], self.moments[path]
            difference = linear.weight - weight
            wrong += float(((difference @ moment) * difference).sum())
            right += float(((weight @ moment) * weight).sum())
        return (wrong / right) ** 0.5

    def scores(self) -> "Iterator[WindowScore]":
        """Of the model as it is now."""
        head: Any = self
        for window, states in zip(self.windows, self._states, strict=True):
            yield score(window, self._run(window), head, states, head)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """What `evaluate.score` asks of a head."""
        return self.model.lm_head(states)  # type: ignore[no-any-return]

    def _linears(self) -> "Iterator[tuple[str, Any]]":
        return ((path, one) for path, one in self.model.named_modules() if ".mlp." in path and path.endswith("_proj"))

    def _run(self, window: Window) -> torch.Tensor:
        return window.predicting(self.model.model(window.ids[None]).last_hidden_state[0])

    def _watch(self, path: str) -> "Callable[..., None]":
        def watch(_: Any, inputs: "tuple[torch.Tensor, ...]") -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            self.moments[path] = x.T @ x

        return watch


def measure(judge: Judge, variant: str, with_kl: bool) -> "dict[str, Any]":
    """One variant's row."""
    bits, grid, scales = variant.split(",")
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for path, weight in judge.weights.items():
        layer, _, name = path.rpartition(".")
        layers.setdefault(layer, {})[name] = weight
    nbytes = 0
    for layer, matrices in layers.items():
        mlp = Mlp(matrices)
        nbytes += mlp.quantise(Format.of(int(bits)), grid, scales)
        for name, value in mlp.effective().items():
            judge.model.get_submodule(f"{layer}.{name}").weight.data = value
    linears = {path: judge.model.get_submodule(path).weight for path in judge.weights}
    squares = sum(float((linears[path] - weight).square().sum()) for path, weight in judge.weights.items())
    total = sum(float(weight.square().sum()) for weight in judge.weights.values())
    row = {"variant": variant, "nbytes": nbytes, "weight_error": (squares / total) ** 0.5}
    row["output_error"] = judge.output_error()
    if with_kl:
        summary = summarise(list(judge.scores()), True)
        assert summary.kl and summary.top1_agreement
        row |= {"kl": summary.kl.value, "kl_se": summary.kl.se, "perplexity": summary.perplexity.value}
        row["top1_agreement"] = summary.top1_agreement.value
    return row


def main() -> None:
    """Measure and print a line of JSON for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--errors-only", action="store_true", help="no KL divergence, which takes most of the time")
    options = parser.parse_args()
    with torch.no_grad():
        judge = Judge(options.folder, options.text.read_text(), options.windows)
        for variant in options.variants:
            print(json.dumps(measure(judge, variant, not options.errors_only)), flush=True)


if __name__ == "__main__":
    main()
