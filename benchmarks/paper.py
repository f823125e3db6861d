"""docs/paper.md: each idea of the paper, where it lives, what shows it, and our figure beside the paper's.

    python -m benchmarks.paper          writes docs/paper.md from the results committed in benchmarks/results

The paper is Eliseev & Mazur 2023, arXiv:2312.17238; its figures here are those of its text and tables.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from greenroom.cli.grid import PAPER

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "paper.md"

IDEAS = (
    (
        "Experts live outside the device's memory, everything else inside",
        "`store`, `transfer`, `planner`",
        "`greenroom plan demo`",
    ),
    (
        "One expert, one contiguous buffer: one read or copy",
        "`packed` (records of 4 KiB pages, docs/format.md), `store.Arena`",
        "`greenroom verify demo`",
    ),
    (
        "HQQ: 4 bits in groups of 64, 3 bits of 64, 2 bits of 16, scales and zeros in 8 bits; attention apart",
        "`quant`, `packing`",
        "`greenroom pack demo DST --expert-bits 2 --attention-bits 4`",
    ),
    (
        "An LRU cache of k experts per layer",
        "`cache.policies.LRU`, `cache.core`",
        "`greenroom run demo PROMPT --experts-per-layer 2 --policy lru --stats`",
    ),
    (
        "Speculative loading: the next layer's gate on this layer's hidden state, one to two experts, started "
        "after this layer's own loads",
        "`prefetch`, `cache.core.issue`",
        "`greenroom run demo PROMPT --policy lru --prefetch 1 --stats`",
    ),
    (
        "Guesses go to b = 4 staging buffers and take a slot only when they are used",
        "`cache.core` (slot and staging buffer are roles of one pool: no copy)",
        "the same; `staging` of `greenroom.load`",
    ),
    (
        "Prompts layer by layer: each expert is loaded at most once per layer",
        "`runner._in_turn`",
        "`prompt_bytes_read` of `greenroom run --json`",
    ),
)


def page() -> str:
    """The whole page."""
    demo, gpt_oss = result("analyze-demo"), result("analyze-gpt-oss-20b")
    ideas = table(("idea", "where", "what shows it"), IDEAS)
    parts = [
        "# The paper, idea by idea",
        "Eliseev & Mazur 2023, *Fast Inference of Mixture-of-Experts Language Models with Offloading* "
        "(arXiv:2312.17238), and what became of it here. This page is written by `python -m benchmarks.paper` "
        "from `benchmarks/results`; its own figures are of the demo (SmolLM2-135M upcycled to a Mixtral of 30 "
        "layers × 8 experts: lifelike routing, no quality benchmark) and of a trace of gpt-oss-20b, the paper's "
        "of Mixtral-8x7B.",
        ideas,
        "Beyond the paper: any family that transformers knows, disk as a tier, policies better than LRU, compute "
        "on the CPU at the memory bus's pace, one bit-exact answer whatever the memory.",
        *_figure_1(demo),
        *_figure_2(demo, gpt_oss),
        *_table_1(result("grid-demo"), result("grid-smollm2")),
        *_table_2(result("demo")["results"]),
    ]
    return "\n\n".join(parts) + "\n"


def _figure_1(demo: "dict[str, Any]") -> "list[str]":
    reuse = demo["reuse"]
    return [
        "## Figure 1: how long experts stay active",
        "`greenroom trace demo --prompts FILE --guess-layers 10 --out demo.npz`, then `greenroom analyze demo.npz`: "
        f"{demo['tokens']:,} generated tokens of {demo['prompts']} prompts.",
        "![chosen experts by token](figures/activation.svg)",
        f"{reuse['next_token']:.0%} of uses repeat one of the token before (two of eight at random: 25 %), "
        f"{reuse['within_16_tokens']:.0%} one of the last 16.",
    ]


def _figure_2(demo: "dict[str, Any]", gpt_oss: "dict[str, Any]") -> "list[str]":
    sizes = demo["sizes"][:6]
    paper = {1: "≈ 0.2", 4: "0.6–0.7"}
    rows = [("the paper, LRU", *(paper.get(size, "") for size in sizes))]
    rows += [
        (f"demo, {_name(policy)}", *_cells(demo["hit_rate"][policy], 6)) for policy in ("lru", "learned", "belady")
    ]
    shares = [size / gpt_oss["num_experts"] for size in gpt_oss["sizes"]][:6]
    others = [(_name(policy), *_cells(gpt_oss["hit_rate"][policy], 6)) for policy in ("lru", "learned", "belady")]
    recall, fetched = demo["recall"], range(1, demo["num_experts"])
    ahead = [(f"{step}", *(f"{recall[step - 1][m - 1]:.2f}" for m in fetched)) for step in (1, 2, 10)]
    return [
        "## Figure 2, left: hit ratio by cache size",
        table(("slots per layer, of 8", *sizes), rows),
        f"gpt-oss-20b, {gpt_oss['tokens']:,} generated tokens, 4 of {gpt_oss['num_experts']} experts a token:",
        table(("share of the experts kept", *(f"{share:.0%}" for share in shares)), others),
        "`learned` is the default, `lru` the paper's, Belady with bypass the best that any cache could do.",
        "![hit ratio by cache size](figures/hits.svg)",
        "## Figure 2, right: recall of speculative loading",
        "Share of the chosen experts among the first so many of the guess, from the gate so many layers ahead. "
        "The paper draws 1, 2 and 10 layers ahead and loads one or two experts.",
        table(("layers ahead \\ experts fetched", *fetched), ahead),
        "![recall](figures/recall.svg)",
    ]


def _table_1(*grids: "dict[str, Any]") -> "list[str]":
    """Perplexity over that of 16 bits, which is what models of different size have in common."""
    rows = []
    for attention in (16, 4, 3, 2):
        paper = [PAPER[attention, experts][1] for experts in (16, 4, 3, 2)]
        rows.append(
            (f"Mixtral-8x7B, the paper, attention {attention}", *(f"{one / PAPER[16, 16][1]:.3f}" for one in paper))
        )
        for grid in grids:
            ratios = [_cell(grid, attention, experts)["perplexity_ratio"]["value"] for experts in (16, 4, 3, 2)]
            rows.append((f"{grid['model']}, attention {attention}", *(f"{ratio:.3f}" for ratio in ratios)))
    return [
        "## Table 1: quality by attention and expert bits",
        "`greenroom eval MODEL --grid --text FILE`; sizes, KL divergences and standard errors are in "
        "[quality.md](quality.md). Perplexity on WikiText-2 over that of the original, by experts' bits:",
        table(("", 16, 4, 3, 2), rows),
        "Models of 135 million parameters lose far more by few bits than one of 47 billion does. In the demo as in the "
        "paper, a bit taken from attention costs more than one taken from the experts.",
    ]


def _cell(grid: "dict[str, Any]", attention: int, experts: int) -> "dict[str, Any]":
    bits = (attention, experts)
    found: dict[str, Any] = next(
        cell["summary"] for cell in grid["cells"] if (cell["attention_bits"], cell["expert_bits"]) == bits
    )
    return found


def _table_2(results: "dict[str, Any]") -> "list[str]":
    """The paper's ablation with the disk for a link."""
    paper = {"full": "1.35–1.79 ×", "no prefetch": "1.29–1.36 ×", "no cache": "1"}
    steps = (
        ("full algorithm", "a third, LRU, `--prefetch 1`", paper["full"]),
        ("without pre-loading", "a third, LRU (the paper's)", paper["no prefetch"]),
        ("without LRU cache and pre-loading", "no expert kept", paper["no cache"]),
        ("ours: `learned`, pre-loading where it pays (the default)", "a third, learned (the default)", ""),
    )
    base = results["no expert kept"]["tokens_per_s"]
    rows = [
        (
            name,
            beside,
            f"{results[setting]['tokens_per_s']:.1f}",
            f"{results[setting]['tokens_per_s'] / base:.2f} ×",
            f"{results[setting]['hit_rate']:.0%}",
            f"{results[setting]['bytes_read_per_token'] / 2**20:.1f}",
        )
        for name, setting, beside in steps
    ]
    return [
        "## Table 2: what each part is worth",
        "The paper: Mixtral-8x7B with 2-bit experts, tokens/s over those without cache and pre-loading, on four "
        "GPUs. Here: the demo at 4 bits with a third of the experts kept, on a CPU, the disk in the link's place "
        "(`python benchmarks/demo_table.py`).",
        table(("", "paper", "tokens/s", "over no cache", "hits", "MiB read a token"), rows),
        "`greenroom bench MODEL --paper` measures the paper's own rows on a GPU, naive offloading by "
        "accelerate among them.",
        "Pre-loading costs the disk more bytes than it saves in waiting where the disk is busy anyway, so live timings "
        "decide which guesses are loaded.",
    ]


def _name(policy: str) -> str:
    return {"lru": "LRU", "belady": "optimum (Belady)"}.get(policy, f"`{policy}`")


def _cells(values: "Sequence[float]", count: int) -> "list[str]":
    return [f"{value:.2f}" for value in values[:count]]


def table(head: "Sequence[object]", rows: "Sequence[Sequence[object]]") -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def result(name: str) -> "dict[str, Any]":
    """A committed result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


if __name__ == "__main__":
    PAGE.write_text(page())
