"""Tables in Markdown from what `cells` measured."""

from typing import Any

Row = dict[str, Any]

DISTURBING = 0.25
"""Cores; what is at work on a quiet machine takes a tenth of that."""
PEERS = ("llama.cpp", "llama.cpp, mapped")
EIGHT_BITS = "greenroom, a prompt's activations in 8 bits"


def floors_line(floors: "dict[str, float]") -> str:
    """The machine's floors."""
    return f"floors: RAM {floors['ram'] / 1e9:.1f} GB/s, disk {floors['disk'] / 1e9:.2f} GB/s (direct reads of 2 MiB)"


def tables(rows: "list[Row]") -> str:
    """A table of what fits in RAM and one of what does not."""
    parts = []
    if ram := [row for row in rows if row["fits"] == 1]:
        parts.append("\n".join([_RAM_HEAD, *map(_ram_line, ram)]))
    if limited := [row for row in rows if row["fits"] < 1]:
        parts.append("\n".join([_LIMITED_HEAD, *map(_limited_line, limited)]))
    return "\n\n".join([*parts, *_sequences(rows)])


_RAM_HEAD = """\
| all in RAM | experts | GB | MB a token | greenroom tokens/s | of the floor | no weights | llama.cpp tokens/s \
| of the floor | ratio | prompt tokens/s, 16 / 8 bits / llama.cpp |
|---|---|---|---|---|---|---|---|---|---|---|"""

_LIMITED_HEAD = """\
| does not fit | experts | fits | routing | hits | greenroom tokens/s | MB read a token | of the disk | stalled \
| llama.cpp tokens/s | MB read a token | of the disk | ratio |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def _ram_line(row: Row) -> str:
    peer = best_peer(row)
    prompts = [
        row["medians"][name]["prompt_tokens_per_s"] for name in ("greenroom", EIGHT_BITS) if name in row["medians"]
    ]
    prompts += [max(row["medians"][name]["prompt_tokens_per_s"] for name in _peers(row))] if peer else []
    cells = [
        row["shape"],
        _formats(row),
        " / ".join(f"{nbytes / 1e9:.1f}" for nbytes in row["nbytes"].values()),
        " / ".join(f"{nbytes / 1e6:.0f}" for nbytes in row["touched_per_token"].values()),
        _spread(row, "greenroom"),
        f"{share_of_floor(row, 'greenroom'):.2f}",
        f"{share_without_weights(row):.0%}",
        _spread(row, peer) if peer else "–",
        f"{share_of_floor(row, peer):.2f}" if peer else "–",
        f"**{ratio(row):.2f}**" if peer else "–",
        " / ".join(f"{speed:.0f}" for speed in prompts),
    ]
    return f"| {' | '.join(cells)} |"


def _limited_line(row: Row) -> str:
    ours, peer = row["medians"]["greenroom"], best_peer(row)
    cells = [
        row["shape"],
        _formats(row),
        f"{row['fits']:.0%}",
        row["routing"],
        f"{ours['hit_rate']:.0%}",
        _spread(row, "greenroom"),
        f"{ours['bytes_read_per_token'] / 1e6:.0f}",
        f"{share_of_disk(row, 'greenroom'):.2f}",
        f"{ours['stall_share']:.0%}",
        _spread(row, peer) if peer else "–",
        f"{row['medians'][peer]['bytes_read_per_token'] / 1e6:.0f}" if peer else "–",
        f"{share_of_disk(row, peer):.2f}" if peer else "–",
        f"**{ratio(row):.2f}**" if peer else "–",
    ]
    return f"| {' | '.join(cells)} |"


def _sequences(rows: "list[Row]") -> "list[str]":
    """One line for each shape: what its tokens are."""
    made: dict[str, dict[str, str]] = {}
    for row in rows:
        made.setdefault(row["shape"], {})[row["routing"]] = row["sequence"]
    return [
        f"{shape}: " + ", ".join(f"{kind} is {tokens}" for kind, tokens in found.items())
        for shape, found in made.items()
    ]


def best_peer(row: Row) -> "str | None":
    """The variant of llama.cpp that decodes faster here; None without a peer."""
    return max(_peers(row), key=lambda name: float(row["medians"][name]["tokens_per_s"]), default=None)


def ratio(row: Row) -> float:
    """greenroom's median tokens per second over those of llama.cpp's faster variant."""
    peer = best_peer(row)
    assert peer is not None
    return float(row["medians"]["greenroom"]["tokens_per_s"] / row["medians"][peer]["tokens_per_s"])


def share_of_floor(row: Row, name: str) -> float:
    """Bytes that the tokens touched a second over the RAM's rate, probed beside the same trials."""
    touched = row["touched_per_token"]["llama.cpp" if name in PEERS else "greenroom"]
    medians = row["medians"][name]
    return float(touched * medians["tokens_per_s"] / medians["ram_bytes_per_s"])


def share_without_weights(row: Row) -> float:
    """Of greenroom's time decoding, what it neither multiplied with weights nor waited for them."""
    ours = row["medians"]["greenroom"]
    return float(1 - ours["experts_share"] - ours["dense_share"] - ours["stall_share"])


def share_of_disk(row: Row, name: str) -> float:
    """Bytes that were read a second over the disk's rate, probed beside the same trials."""
    medians = row["medians"][name]
    return float(medians["bytes_read_per_token"] * medians["tokens_per_s"] / medians["disk_bytes_per_s"])


def disturbed(rows: "list[Row]") -> "list[str]":
    """One line for every trial beside which other processes kept more than DISTURBING cores busy."""
    return [
        f"{row['shape']} {row['formats']['greenroom']}, {name}: {trial['tokens_per_s']:.2f} tokens/s while others kept "
        f"{trial['others_cores']:.1f} cores busy"
        for row in rows
        for name, trials in row["trials"].items()
        for trial in trials
        if trial["others_cores"] > DISTURBING
    ]


def mispredicted(rows: "list[Row]") -> "list[str]":
    """One line for every greenroom trial that read other bytes than the cache core predicts from its trace."""
    found = []
    for row in rows:
        for trial in row["trials"]["greenroom"]:
            read, predicted = trial["bytes_read_per_token"], trial.get("bytes_predicted_per_token")
            if predicted is not None and predicted != read:
                found.append(
                    f"{row['shape']} {row['routing']}: read {read:.0f} bytes a token, predicted {predicted:.0f}"
                )
    return found


def _peers(row: Row) -> "list[str]":
    return [name for name in PEERS if name in row["medians"]]


def _formats(row: Row) -> str:
    return f"{row['formats']['greenroom']} / {row['formats']['llama.cpp']}"


def _spread(row: Row, name: str) -> str:
    """Median and, where there are several rounds, the least and the most."""
    speeds = [trial["tokens_per_s"] for trial in row["trials"][name]]
    middle = f"{row['medians'][name]['tokens_per_s']:.{1 if min(speeds) > 10 else 2}f}"
    return middle if len(speeds) == 1 else f"{middle} ({min(speeds):.3g}–{max(speeds):.3g})"
