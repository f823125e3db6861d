"""All figures of a trace in one report: a table for people, JSON for machines, arrays for the pictures."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenroom.analyze.reuse import evenness, load, quantile, recall, reuse_distances
from greenroom.cache import POLICIES
from greenroom.cache.simulate import OPTIMUM, hits_by_size
from greenroom.errors import ConfigError
from greenroom.trace import RoutingTrace

_SHARES = 8
"""Cache sizes, by default: this many, evenly spaced up to all experts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """`hits`: policy → hit ratio at each of `sizes` (slots per layer). `recall` [lookahead, m] or None. `distances`:
    uses by tokens since the last one. `uses` [layers, experts]. `sets` [tokens, layers, k]: the experts of the tokens
    looked at, which are the trace's "decode" or "prompt" tokens or "all"."""

    trace: RoutingTrace
    sets: "NDArray[Any]"
    which: str
    requests: int
    sizes: "list[int]"
    hits: "dict[str, list[float]]"
    recall: "NDArray[np.float64] | None"
    distances: "NDArray[np.int64]"
    uses: "NDArray[np.int64]"

    @property
    def tokens(self) -> int:
        """Tokens looked at."""
        return len(self.sets)

    def json(self) -> "dict[str, Any]":
        """One object of plain numbers; docs/cli.md names its fields."""
        even = evenness(self.uses)
        return {
            "model": self.trace.model,
            "tokens": self.tokens,
            "which": self.which,
            "prompts": len(self.trace.offsets) - 1,
            "layers": self.trace.layers,
            "num_experts": self.trace.num_experts,
            "top_k": self.trace.top_k,
            "sizes": self.sizes,
            "hit_rate": self.hits,
            "misses_over_optimum": {name: self.over_optimum(name) for name in self.hits},
            "recall": None if self.recall is None else [[_finite(r) for r in row] for row in self.recall.tolist()],
            "reuse": {
                "first_uses": int(self.distances[:1].sum()),
                "next_token": self.reused_within(1),
                "within_16_tokens": self.reused_within(16),
                "median_tokens": quantile(self.distances, 0.5),
                "p90_tokens": quantile(self.distances, 0.9),
                "counts": self.distances.tolist(),
            },
            "load": {
                "evenness": even.tolist(),
                "evenness_mean": _finite(float(even.mean())) if len(even) else None,
                "most_used_share": self.most_used_share(),
                "unused": int((self.uses == 0).sum()),
            },
        }

    def over_optimum(self, policy: str) -> "list[float | None]":
        """Misses of `policy` at each size over those of Belady's optimum; None where that has none."""
        pairs = zip(self.hits[policy], self.hits[OPTIMUM], strict=True)
        return [(1 - hit) / (1 - best) if best < 1 else None for hit, best in pairs]

    def reused_within(self, tokens: int) -> float:
        """Share of uses that repeat one at most `tokens` tokens before."""
        return float(self.distances[1 : tokens + 1].sum() / max(self.requests, 1))

    def most_used_share(self) -> float:
        """Mean over layers of the share that the most used eighth of experts has; even load gives that eighth."""
        top = max(1, self.uses.shape[1] // 8)
        ordered = np.sort(self.uses, axis=1)[:, ::-1]
        shares = ordered[:, :top].sum(axis=1) / np.maximum(ordered.sum(axis=1), 1)
        return float(shares.mean()) if len(shares) else 0.0

    def table(self) -> str:
        """For people."""
        t = self.trace
        lines = [
            f"{t.model or 'trace'}: {self.tokens} {self.which} tokens of {len(t.offsets) - 1} prompts, "
            f"{t.layers} MoE layers, {t.top_k} of {t.num_experts} experts"
        ]
        if not self.requests:
            return "\n".join([*lines, "  nothing was routed: no figures"])
        lines += ["", "hit ratio by experts kept per layer (misses over those of the optimum)"]
        lines.append("  " + "policy".ljust(14) + "".join(f"{size:>15}" for size in self.sizes))
        for name, row in self.hits.items():
            cells = [
                f"{hit:7.1%} ({'–' if over is None else f'{over:.2f}'})".rjust(15)
                for hit, over in zip(row, self.over_optimum(name), strict=True)
            ]
            lines.append("  " + name.ljust(14) + "".join(cells))
        return "\n".join([*lines, "", *self._recall_lines(), *self._reuse_lines()])

    def _recall_lines(self) -> "list[str]":
        if self.recall is None:
            return ["recall of guesses: not recorded in this trace"]
        k, most = self.trace.top_k, self.recall.shape[1]
        columns = sorted({m for m in (1, k, 2 * k, 4 * k, most) if m <= most})
        lines = ["recall by experts guessed, layers ahead"]
        lines.append("  " + "ahead".ljust(14) + "".join(f"{m:>8}" for m in columns))
        for step, row in enumerate(self.recall, start=1):
            cells = ("       –" if np.isnan(row[m - 1]) else f"{row[m - 1]:8.1%}" for m in columns)
            lines.append("  " + str(step).ljust(14) + "".join(cells))
        return [*lines, ""]

    def _reuse_lines(self) -> "list[str]":
        even = evenness(self.uses)
        return [
            f"reuse: {self.reused_within(1):.1%} of uses repeat one of the token before, "
            f"{self.reused_within(16):.1%} one of the last 16; "
            f"median {quantile(self.distances, 0.5)} tokens, nine tenths within {quantile(self.distances, 0.9)}",
            f"load: evenness {even.mean():.3f} (1 is even; least {even.min():.3f} in layer {int(even.argmin())}), "
            f"the most used eighth takes {self.most_used_share():.1%}, {int((self.uses == 0).sum())} never used",
        ]


def analyze(
    trace: RoutingTrace,
    *,
    which: str = "decode",
    sizes: "Sequence[int] | None" = None,
    policies: "Sequence[str] | None" = None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Report:
    """Every figure of `trace`. `which` tokens: "decode", "prompt" or "all", each token's set a request of its own.

    `sizes`: slots per layer; `policies`: names of POLICIES, all by default; Belady's optimum always. `advance` is told
    of tokens done, once for each policy and the optimum. Raises ConfigError for an unknown policy or size.
    """
    names = list(POLICIES) if policies is None else list(policies)
    sizes = default_sizes(trace.num_experts) if sizes is None else sorted(set(sizes))
    _check(names, sizes, trace.num_experts)
    mask = {"decode": ~trace.prompt, "prompt": trace.prompt, "all": np.ones(trace.tokens, np.bool_)}[which]
    sets = trace.experts if mask.all() else trace.experts[mask]
    probabilities = trace.probabilities
    if probabilities is not None and not mask.all():
        probabilities = probabilities[mask]
    experts = trace.num_experts
    requests = int((sets < experts).sum())
    hits = {
        name: (hits_by_size(name, sets, experts, sizes, probabilities, advance).sum(axis=0) / max(requests, 1)).tolist()
        for name in (*names, OPTIMUM)
    }
    guesses = trace.guesses
    return Report(
        trace=trace,
        sets=sets,
        which=which,
        requests=requests,
        sizes=list(sizes),
        hits=hits,
        recall=None if guesses is None else recall(sets, guesses if mask.all() else guesses[mask], experts),
        distances=reuse_distances(sets, experts),
        uses=load(sets, experts),
    )


def default_sizes(experts: int) -> "list[int]":
    """Up to eight sizes, evenly spaced up to all experts."""
    return sorted({-(-experts * eighth // _SHARES) for eighth in range(1, _SHARES + 1)} - {0})


def _check(names: "list[str]", sizes: Sequence[int], experts: int) -> None:
    for name in names:
        if name not in POLICIES:
            raise ConfigError(f"unknown policy {name!r}: choose from {', '.join(POLICIES)}")
    for size in sizes:
        if not 0 <= size <= experts:
            raise ConfigError(f"{size} experts per layer: this trace has {experts}")


def _finite(value: float) -> "float | None":
    return value if np.isfinite(value) else None
