"""Record routing from a running model: set `ExpertRunner.observer` to a `Recorder`. The one file here that knows torch.

What a layer's gate thinks is computed again from its input, for many tokens at once and after the fact, so that a token
waits only for a copy of its inputs; what the cache was told of it is kept as it was told.
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from greenroom.prefetch import Foresight, Router
from greenroom.threads import kept_from_torch
from greenroom.trace.writer import TraceWriter

Rows = torch.Tensor | list[list[int]] | list[list[float]]
"""One row a token"""

_BATCH = 64
"""Generated tokens that are kept before their gates are computed."""


class Recorder:
    """Called by the runner as `runner.Observer`; writes the trace `path`.

    `routers`: one per layer, None where a gate is no plain matrix (then it has neither probabilities nor guesses).
    `lookahead`: layers ahead to guess; `ranked`: experts per guess. Use as a context manager, with `begin` before each
    prompt. An error inside leaves no trace.
    """

    def __init__(
        self,
        path: "str | Path",
        routers: "Sequence[Router | None]",
        num_experts: int,
        *,
        lookahead: int,
        ranked: int,
        probabilities: bool = True,
        model: str = "",
    ) -> None:
        self._path, self._routers, self._experts, self._model = path, list(routers), num_experts, model
        self._foresight = Foresight(self._routers)
        guessing = any(router is not None for router in routers)
        self._lookahead, self._ranked = (lookahead, min(ranked, num_experts)) if guessing else (0, 0)
        self._probabilities = probabilities and guessing
        self._writer: TraceWriter | None = None
        self._layers = [_Layer() for _ in routers]
        self._passes: list[int] = []
        self._unread = 0
        self.prompt_tokens = 0
        """tokens read so far, over all prompts"""

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: "type[BaseException] | None", error: "BaseException | None", trace: "TracebackType | None"
    ) -> None:
        if kind is None:
            self._flush()
        if self._writer is not None:
            self._writer.__exit__(kind, error, trace)

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return self._writer.tokens if self._writer is not None else 0

    def begin(self, prompt_tokens: int) -> None:
        """A prompt of so many tokens comes next."""
        self._flush()
        if self._writer is not None:
            self._writer.end_prompt()
        self._unread = prompt_tokens

    def __call__(
        self, layer: int, x: torch.Tensor, index: Rows, weights: Rows, probabilities: "Sequence[float] | None" = None
    ) -> None:
        """Note one layer's call."""
        if layer == 0:
            if len(x) > 1 or self._layers[0].finished or len(self._passes) >= _BATCH:
                self._flush()
            self._passes.append(len(x))
        self._layers[layer].add(x, index, weights, probabilities)
        if len(x) > 1:  # many tokens: compute at once, and keep no more inputs than the layers ahead need
            with torch.no_grad(), kept_from_torch():
                self._finish(layer)
            if layer >= self._lookahead:
                self._layers[layer - self._lookahead].inputs.clear()

    def _finish(self, layer: int) -> None:
        """What the layer's gate thinks, and the guesses for it."""
        self._compute(layer)
        self._layers[layer].put_told()

    def _compute(self, layer: int) -> None:
        """The layer's gate on its own input and on those of the layers before, in one product."""
        router, here = self._routers[layer], self._layers[layer]
        count = sum(self._passes)
        here.probabilities = np.zeros((count, self._experts), np.float16)
        here.guesses = np.full((count, self._lookahead, self._ranked), self._experts, np.uint16)
        here.inputs = [torch.cat(here.inputs)] if here.inputs else []
        back = self._layers[max(layer - self._lookahead, 0) : layer + 1][::-1]
        if router is None or not all(one.inputs and router.reads(one.inputs[0]) for one in back):
            return
        seen = [self._foresight(layer - distance, layer, x) for distance, one in enumerate(back) for x in one.inputs]
        scores = router.scores(torch.cat(seen))
        if self._probabilities:
            here.probabilities[:, : scores.shape[1]] = router.shares(scores[:count]).numpy()
        if len(back) > 1:
            best = scores[count:].topk(min(self._ranked, scores.shape[1]), dim=1).indices
            steps = best.numpy().reshape(len(back) - 1, count, -1).swapaxes(0, 1)
            here.guesses[:, : len(back) - 1, : steps.shape[2]] = steps

    def _flush(self) -> None:
        """Write what is pending."""
        if not self._passes:
            return
        with torch.no_grad(), kept_from_torch():
            for number, layer in enumerate(self._layers):
                if not layer.finished:
                    self._finish(number)
        count = sum(self._passes)
        top_k = max(layer.top_k for layer in self._layers)
        chosen = [layer.chosen(count, top_k, self._experts) for layer in self._layers]
        if self._writer is None:
            self._writer = TraceWriter(
                self._path,
                layers=len(self._layers),
                num_experts=self._experts,
                top_k=top_k,
                weights=True,
                probabilities=self._probabilities,
                lookahead=self._lookahead,
                ranked=self._ranked,
                model=self._model,
            )
        arrays = {
            "experts": np.stack([experts for experts, _ in chosen], axis=1),
            "weights": np.stack([weights for _, weights in chosen], axis=1),
            "prompt": np.arange(count) < self._unread,
        }
        if self._probabilities:
            arrays["probabilities"] = _stack([layer.probabilities for layer in self._layers])
        if self._lookahead:
            arrays["guesses"] = _stack([layer.guesses for layer in self._layers])
        self._writer.add(self._passes, **arrays)
        self.prompt_tokens += min(count, self._unread)
        self._unread -= min(count, self._unread)
        self._passes, self._layers = [], [_Layer() for _ in self._layers]


class _Layer:
    """What one layer was asked since the last flush, and what its gate makes of it."""

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []
        self._index: list[Rows] = []
        self._weights: list[Rows] = []
        self._told: dict[int, Sequence[float]] = {}
        self.probabilities: NDArray[np.float16] | None = None
        self.guesses: NDArray[np.uint16] | None = None

    def add(self, x: torch.Tensor, index: Rows, weights: Rows, probabilities: "Sequence[float] | None") -> None:
        if probabilities is not None:
            self._told[sum(map(len, self._index))] = probabilities
        self.inputs.append(x.detach().clone())  # the model may write over it
        self._index.append(index)
        self._weights.append(weights)

    def put_told(self) -> None:
        """Let `probabilities` be what was told, where it was."""
        assert self.probabilities is not None
        for row, told in self._told.items():
            self.probabilities[row, : len(told)] = told

    @property
    def finished(self) -> bool:
        """Whether the gate has been computed."""
        return self.guesses is not None

    @property
    def top_k(self) -> int:
        return np.shape(self._index[0])[1] if self._index else 0

    def chosen(self, count: int, top_k: int, nobody: int) -> "tuple[NDArray[np.uint16], NDArray[np.float16]]":
        """(experts, weights) [count, top_k], most valuable first: by weight, then the higher expert."""
        experts = np.full((count, top_k), nobody, np.int64)
        weights = np.zeros((count, top_k), np.float32)
        if self._index:
            index = np.concatenate([np.asarray(rows, np.int64) for rows in self._index])
            experts[:, : index.shape[1]] = np.where((index >= 0) & (index < nobody), index, nobody)
            weights[:, : index.shape[1]] = np.concatenate([_floats(rows) for rows in self._weights])
        weights[experts == nobody] = 0.0
        order = np.lexsort((-experts, -weights, experts == nobody), axis=1)
        return (
            np.take_along_axis(experts, order, 1).astype(np.uint16),
            np.take_along_axis(weights, order, 1).astype(np.float16),
        )


def _floats(rows: Rows) -> "NDArray[np.float32]":
    return np.asarray(rows.detach().float() if isinstance(rows, torch.Tensor) else rows, np.float32)


def _stack(arrays: "Sequence[NDArray[np.generic] | None]") -> "NDArray[np.generic]":
    return np.stack([array for array in arrays if array is not None], axis=1)
