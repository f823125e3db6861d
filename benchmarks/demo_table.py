#!/usr/bin/env python3
"""The README's table: `greenroom bench demo` under different caches, one after the other, in rounds.

Rounds visit every setting in turn, so that drift of a shared machine falls on all alike; figures are medians over the
rounds. Prints the table as Markdown and, as the last line, one JSON object.

    python benchmarks/demo_table.py [--rounds 3] [--tokens 96]
"""

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

PROMPT = "Write a short story about a lighthouse keeper who finds a map."
SETTINGS: "dict[str, list[str]]" = {
    "no expert kept": ["--experts-per-layer", "0", "--prefetch", "0"],
    "a third, learned (the default)": [],
    "a third, learned, `--prefetch 0`": ["--prefetch", "0"],
    "a third, LRU (the paper's)": ["--policy", "lru", "--prefetch", "0"],
    "a third, LRU, `--prefetch 1`": ["--policy", "lru", "--prefetch", "1"],
    "a third, decayed frequency": ["--policy", "lfu"],
    "a third, one LRU pool": ["--policy", "lru-shared"],
    "all resident": ["--experts-per-layer", "8"],
}


def bench(flags: "list[str]", tokens: int) -> "dict[str, Any]":
    """One `greenroom bench` of one trial."""
    command = [sys.executable, "-m", "greenroom", "bench", "demo", "--trials", "1", "--tokens", str(tokens), "--json"]
    command += ["--prompt", PROMPT]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


FIGURES = ("hit_rate", "bytes_read_per_token", "tokens_per_s", "ratio_to_floor", "stall_share")


def medians(reports: "list[dict[str, Any]]") -> "dict[str, float]":
    """Of each figure, over the rounds."""
    return {key: statistics.median(report[key] for report in reports) for key in FIGURES}


def table(results: "dict[str, dict[str, float]]") -> str:
    """Medians per setting, as Markdown."""
    lines = [
        "| experts in memory | hit rate | read per token | tokens/s | of the floor | stalled |",
        "|---|---|---|---|---|---|",
    ]
    for name, median in results.items():
        lines.append(
            f"| {name} | {median['hit_rate']:.1%} | {median['bytes_read_per_token'] / 2**20:.1f} MiB "
            f"| {median['tokens_per_s']:.1f} | {median['ratio_to_floor']:.2f} | {median['stall_share']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    options = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    for _ in range(options.rounds):
        for name, flags in SETTINGS.items():
            results[name].append(bench(flags, options.tokens))
    found = {name: medians(reports) for name, reports in results.items()}
    print(table(found))
    print(json.dumps({"rounds": options.rounds, "tokens": options.tokens, "prompt": PROMPT, "results": found}))


if __name__ == "__main__":
    main()
