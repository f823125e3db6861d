"""The pictures of a report, PNG and SVG, readable in greyscale. Importing this needs matplotlib."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from greenroom.analyze.report import Report
from greenroom.cache import POLICIES, ExpertCache, replay
from greenroom.cache.simulate import OPTIMUM
from greenroom.errors import ConfigError

_LINES = [("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ("-", "v"), ("--", "x"), ("-.", "P"), (":", "*")]
_MAP_TOKENS, _MAP_LAYERS = 96, 4
_STYLE: Any = {"svg.hashsalt": "greenroom", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
"""With a fixed salt and no date, a report always gives the same bytes."""


def draw(report: Report, folder: Path) -> "list[Path]":
    """Write every picture that the report has figures for into `folder`. Raises ConfigError where it cannot."""
    pictures: dict[str, Callable[[Report], Figure]] = {
        "activation": activation,
        "hits": hits,
        "recall": recall,
        "reuse": reuse,
        "load": load,
    }
    if report.recall is None or np.isnan(report.recall).all():
        del pictures["recall"]
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(_STYLE):
            for name, picture in pictures.items():
                figure = picture(report)
                for suffix in ("png", "svg"):
                    path = folder / f"{name}.{suffix}"
                    figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == "svg" else {})
                    paths.append(path)
    except OSError as error:
        raise ConfigError(
            f"cannot draw into {folder} ({error.strerror or error}): give another with --plots"
        ) from error
    return paths


def activation(report: Report) -> Figure:
    """The paper's Figure 1: experts of a few layers, token by token; black as chosen, grey as held by an LRU cache of a
    quarter of the experts."""
    trace = report.trace
    sets = report.sets[:_MAP_TOKENS]
    layers = np.unique(np.linspace(0, trace.layers - 1, min(_MAP_LAYERS, trace.layers)).round().astype(int))
    slots = max(1, trace.num_experts // 4)
    figure = Figure(figsize=(9, 1 + 1.7 * len(layers)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(layers), sharex=True))
    for axis, layer in zip(axes, layers, strict=True):
        shade = _activation_map(sets[:, layer], trace.num_experts, slots)
        axis.imshow(shade, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest", origin="lower")
        axis.set_ylabel(f"layer {layer}\nexpert")
        axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[-1].set_xlabel(f"{report.which} token")
    figure.suptitle(f"{trace.model}: chosen experts (black), held by LRU with {slots} slots a layer (grey)")
    return figure


def _activation_map(sets: Any, experts: int, slots: int) -> Any:
    """[experts, tokens]: 1 where chosen, 0.3 where an LRU cache holds the expert before the token, else 0."""
    shade = np.zeros((experts, len(sets)))
    cache = ExpertCache(layers=1, capacities=[slots], staging=1, policy=POLICIES["lru"])
    for token, row in enumerate(sets.tolist()):
        chosen = [expert for expert in row if expert < experts]
        for expert in range(experts):
            if cache.ready(0, expert) is not None:
                shade[expert, token] = 0.3
        shade[chosen, token] = 1.0
        replay(cache, [(0, chosen[::-1])])
    return shade


def hits(report: Report) -> Figure:
    """The paper's Figure 2, left: hit ratio by cache size, for every policy and the optimum; beside it, the misses."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    order = [OPTIMUM, *sorted((name for name in report.hits if name != OPTIMUM), key=lambda n: -sum(report.hits[n]))]
    for number, name in enumerate(order):
        line, marker = _LINES[number % len(_LINES)]
        style = {"marker": marker, "color": str(0.0 if number == 0 else 0.1 + 0.5 * number / len(order))}
        label = "optimum (Belady, bypass)" if name == OPTIMUM else name
        left.plot(report.sizes, report.hits[name], line, ms=4, lw=1.2, label=label, **style)
        over = [np.nan if value is None else value for value in report.over_optimum(name)]
        right.plot(report.sizes, over, line, ms=4, lw=1.2, **style)
    _shares(left)
    left.set_ylabel("hit ratio")
    left.legend(frameon=False)
    right.set_ylabel("misses over the optimum's")
    right.grid(color="0.9", lw=0.6)
    for axis in (left, right):
        axis.set_xlabel(f"experts kept per layer, of {report.trace.num_experts}")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(report.trace.model)
    return figure


def recall(report: Report) -> Figure:
    """The paper's Figure 2, right: recall of speculative loading by the number of experts fetched."""
    assert report.recall is not None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    steps = [step for step, row in enumerate(report.recall) if not np.isnan(row).all()]
    for number, step in enumerate(steps):
        line, marker = _LINES[number % len(_LINES)]
        row = report.recall[step]
        label = f"{step + 1} layer{'s' if step else ''} ahead"
        shade = str(0.6 * number / max(len(steps), 1))
        axis.plot(np.arange(1, len(row) + 1), row, line, marker=marker, color=shade, ms=4, lw=1.2, label=label)
    axis.axvline(report.trace.top_k, color="0.8", lw=1, zorder=0)
    _shares(axis)
    axis.set_xlabel(f"experts fetched (line: the {report.trace.top_k} that will be chosen)")
    axis.set_ylabel("recall of the chosen experts")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False)
    axis.set_title(report.trace.model)
    return figure


def reuse(report: Report) -> Figure:
    """Share of uses by the tokens since the expert was last used, and what even, independent choices would give."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    distance = np.arange(1, max(len(report.distances), 2))
    within = np.zeros(len(distance))
    within[: len(report.distances) - 1] = report.distances[1:]
    share = min(1.0, report.trace.top_k / max(report.trace.num_experts, 1))
    axis.plot(distance, within.cumsum() / report.requests, "-", color="0", lw=1.4, label=report.trace.model or "trace")
    axis.plot(distance, 1 - (1 - share) ** distance, "--", color="0.5", lw=1.2, label="even, independent choices")
    _shares(axis)
    axis.set_xscale("log")
    axis.set_xlabel("tokens since the last use in the layer")
    axis.set_ylabel("uses, cumulated")
    axis.legend(frameon=False, loc="lower right")
    return figure


def load(report: Report) -> Figure:
    """Each layer's experts from the most to the least used, as multiples of an even share."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    ordered = np.sort(report.uses, axis=1)[:, ::-1]
    even = np.maximum(ordered.sum(axis=1, keepdims=True), 1) / ordered.shape[1]
    picture = axis.imshow(ordered / even, cmap="Greys", vmin=0, aspect="auto", interpolation="nearest")
    axis.set_xlabel("expert, the most used first")
    axis.set_ylabel("layer")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(picture, label="uses over an even share")
    axis.set_title(report.trace.model)
    return figure


def _shares(axis: Any) -> None:
    axis.set_ylim(0, 1.02)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.grid(color="0.9", lw=0.6)
