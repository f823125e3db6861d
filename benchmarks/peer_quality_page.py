"""The section of docs/quality.md on llama.cpp's formats, written from the results of `peer_quality`.

python -m benchmarks.peer_quality_page
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper import ROOT, result, table
from benchmarks.peer_rounding import CALIBRATED

PAGE = ROOT / "docs" / "quality.md"
HEADING = "## Beside llama.cpp's formats"
PARTS = ("experts", "all")
Point = tuple[float, float]
"""(bits a weight, KL divergence)"""


def section() -> str:
    """From its heading to the next."""
    smollm2, demo = result("peer-quality-smollm2"), result("peer-quality-demo")
    paragraphs = [
        HEADING,
        f"The same weights rounded by llama.cpp's own quantisers, {smollm2['engine']}, without an importance matrix: "
        "neither side sees calibration data. Experts alone, and experts and attention in one format; all else stays at "
        "16 bits. Bits a weight hold scales and zeros. K- and IQ-types have blocks of 256 weights, and these models' "
        "rows of 576 are no whole blocks. There `llama-quantize` takes a wider type (the row `Q3_K/Q4_0`); to "
        "compare the types themselves, four rows are joined to one, so that no group crosses a row and only a block's "
        "float16 scale serves parts of two. greenroom's parameters of a row cost 0.11 bits a weight where it has 576, "
        "0.03 where it has 2048.",
        "    python -m benchmarks.dense_smollm2 smollm2 --dither --one-expert\n"
        "    python -m benchmarks.peer_quality smollm2 wikitext2_raw_test.txt --windows 4 --out results.json\n"
        "    python -m benchmarks.peer_quality demo wikitext2_raw_test.txt --context 256 --windows 4 --out "
        "results.json",
        f"**SmolLM2-135M**, dithered ([results](../benchmarks/results/peer-quality-smollm2.json)), "
        f"{_windows(smollm2)}. Its MLPs are packed as a Mixtral's of one expert, with column scales.",
        _measured(smollm2),
        "What llama.cpp's types would take for the same divergence, along the line through its best types "
        "(logarithm of the divergence over bits):",
        _equal(smollm2),
        f"**The demo** ([results](../benchmarks/results/peer-quality-demo.json)), {_windows(demo)}.",
        _measured(demo),
        READING,
        WITH_A_TEXT,
        _calibrated(smollm2),
        READING_WITH_A_TEXT,
    ]
    return "\n\n".join(paragraphs) + "\n\n"


READING = (
    "**Reading.** For experts at three and four bits the divergences lie on one line, within 2 % of the bits: `4g64` "
    "stands where `Q4_K` and `IQ4_XS` stand, `3g64` and `3g32` on either side of `Q3_K`. By perplexity alone "
    "`Q4_K` and "
    "`Q3_K` are ahead of `4g64` and `3g64`. At two bits `2g32` is ahead of `Q2_K`, but neither is of use for "
    "so small a "
    "model. Where attention has the same bits, which no column scales reach here, llama.cpp's types need 3 to "
    "9 % fewer "
    "bits from two to four, but for `Q2_K`: keep attention at 8, as `pack` does. So at equal divergence experts take "
    "about as many bytes in either engine, and speed at equal bits is speed at equal quality, no more. On the demo, "
    "whose weights lie on Q4_1's blocks of 32, `Q4_K` nearly finds that grid and groups of 64 do not; `pack "
    "demo` takes "
    "groups of 32 ([eval.md](eval.md)).\n\n"
    "Not measured: llama.cpp's mixtures (`Q4_K_M`), which give some matrices wider types; large models, which lose far "
    "less by few bits."
)
WITH_A_TEXT = (
    "**With a text.** The same SmolLM2-135M, its experts rounded for the inputs that they get on 16,384 tokens of "
    "public-domain novels: here by `pack --calibrate`, there by an importance matrix, the mean squares of the same "
    "inputs. Divergence is measured on WikiText-2 as before.\n\n"
    "    python -m benchmarks.peer_quality smollm2 wikitext2_raw_test.txt 4g64+ Q4_K+ … --windows 4 --calibrate "
    "novels.txt --out results.json"
)
READING_WITH_A_TEXT = (
    "Either side gains. At four bits both take the same bytes for the same divergence (4.34 and 4.32 bits along "
    "the line through `Q3_K` and `Q4_K`), at three greenroom 4 % fewer, at two `Q2_K` is ahead. Where only "
    "greenroom sees a text, it needs 9, 11 and 18 % fewer bits than llama.cpp's types at four, three and two. At "
    "two bits `2g32` with a text diverges less than `2g16` does without, in 16 % fewer bytes."
)


def _calibrated(report: "dict[str, Any]") -> str:
    """Formats that saw a text, and what they are without."""
    plain = {row["name"]: row["experts"]["kl"] for row in report["rows"]}
    seen = [row for row in report["rows"] if row["name"].endswith(CALIBRATED)]
    rows = []
    for row in sorted(seen, key=lambda row: -row["experts"]["bits_per_weight"]):
        name, kl = row["name"].removesuffix(CALIBRATED), row["experts"]["kl"]
        bold = f"**{name}**" if row["greenrooms"] else name
        cells = [f"{one['value']:.3g} ± {one['se']:.1g}" for one in (plain[name], kl)]
        share = f"{kl['value'] / plain[name]['value']:.2f}"
        rows.append([bold, f"{row['experts']['bits_per_weight']:.2f}", *cells, share])
    return table(("format", "bits", "experts: KL", "with a text", "of it"), rows)


def _windows(report: "dict[str, Any]") -> str:
    tokens = report["rows"][0]["experts"]["tokens"]
    return f"the first {report['windows']} windows of {report['context']} tokens, {tokens} scored"


def _measured(report: "dict[str, Any]") -> str:
    head = ("format", "bits", "experts: KL", "perplexity ×", "with attention: KL", "perplexity ×")
    rows = sorted(_blind(report), key=lambda row: -row["experts"]["bits_per_weight"])
    return table(head, [_row(row) for row in rows])


def _blind(report: "dict[str, Any]") -> "list[dict[str, Any]]":
    """The formats that saw no text."""
    return [row for row in report["rows"] if not row["name"].endswith(CALIBRATED)]


def _row(row: "dict[str, Any]") -> "list[str]":
    name = f"**{row['name']}**" if row["greenrooms"] else row["name"]
    bits = dict.fromkeys(f"{row[part]['bits_per_weight']:.2f}" for part in PARTS)
    cells = [name, ", ".join(bits)]
    for part in PARTS:
        kl, ratio = row[part]["kl"], row[part]["perplexity_ratio"]
        cells += [f"{kl['value']:.3g} ± {kl['se']:.1g}", f"{ratio['value']:.3g}"]
    return cells


def _equal(report: "dict[str, Any]") -> str:
    """Our formats and the bits that llama.cpp's would take for their divergence."""
    rows = [row for row in _blind(report) if row["greenrooms"]]
    types = [row for row in _blind(report) if not row["greenrooms"] and "/" not in row["name"]]
    theirs = {part: frontier([_point(row, part) for row in types]) for part in PARTS}
    lines = []
    for row in sorted(rows, key=lambda row: -row["experts"]["bits_per_weight"]):
        cells = [row["name"], f"{row['experts']['bits_per_weight']:.2f}"]
        for part in PARTS:
            bits, kl = _point(row, part)
            same = bits_for(kl, theirs[part])
            cells.append("–" if same is None else f"{same:.2f} ({bits / same - 1:+.0%})")
        lines.append(cells)
    return table(("greenroom", "bits", "llama.cpp's, experts (ours over theirs)", "with attention"), lines)


def _point(row: "dict[str, Any]", part: str) -> Point:
    return row[part]["bits_per_weight"], row[part]["kl"]["value"]


def frontier(points: "Sequence[Point]") -> "list[Point]":
    """Those that no other beats in both, by ascending bits."""
    best: list[Point] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def bits_for(kl: float, points: "Sequence[Point]") -> "float | None":
    """Bits at which the line through `points`, a frontier, has the divergence `kl`; None beyond its ends."""
    for (few, high), (many, low) in itertools.pairwise(points):
        if low <= kl <= high:
            return few + (many - few) * math.log(high / kl) / math.log(high / low)
    return None


def page(text: str) -> str:
    """`text` with this section in the place of its like."""
    before, _, rest = text.partition(HEADING)
    _, heading, after = rest.partition("\n## ")
    return before + section() + heading.lstrip("\n") + after


def main(path: Path = PAGE) -> None:
    """Write."""
    path.write_text(page(path.read_text()))


if __name__ == "__main__":
    main()
