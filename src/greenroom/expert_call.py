"""One call of a layer's experts: its routing, sorted by expert, and how outputs are summed."""

import functools

import torch

from greenroom.buffers import sent
from greenroom.kernels import native
from greenroom.packed import ExpertsEntry

Shares = list[float]
"""What a router thinks of all experts for one token: shares of 1 that float16 can hold, as traces do."""

_FEW_ROWS = 8
"""Up to this many rows are added one by one: index_add_ starts torch's threads even for one row, and where a core is
busy it waits milliseconds for them."""


class Call:
    """One call's routing, sorted by expert. x [T, H] may lie on a device; index and weights [T, k] and, where the cache
    is told of them, the router's `shares` [1, experts] lie on the host."""

    def __init__(
        self,
        entry: ExpertsEntry,
        x: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        shares: "torch.Tensor | None",
    ) -> None:
        self.x = x
        self.shares: Shares | None = None if shares is None else shares[0].tolist()
        top_k = top_k_index.shape[1]
        flat = top_k_index.reshape(-1)
        self.order = torch.argsort(flat, stable=True)
        """pairs (token · k + place) by expert"""
        self._rows = self.order // top_k
        self._host_weights = top_k_weights.reshape(-1)[self.order]
        experts, counts = torch.unique_consecutive(flat[self.order], return_counts=True)
        self.spans: dict[int, tuple[int, int]] = {}
        """expert → the first of its pairs in `order`, and the first that is not"""
        end = 0
        for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
            start, end = end, end + count
            if 0 <= expert < entry.num_experts:
                self.spans[expert] = (start, end)
        self.experts = list(self.spans)
        """distinct experts, ascending: the order of computing and of summing"""
        ends = [end - 1 for _, end in self.spans.values()]
        last = zip(self._rows[ends].tolist(), self._host_weights[ends].tolist(), self.experts, strict=True)
        self.valued = [expert for _, _, expert in sorted(last)]
        """the same, least valuable first: by the last token that uses it, then by its weight there"""

    @functools.cached_property
    def placed_rows(self) -> torch.Tensor:
        """int64 [P]: each pair's token, pairs sorted by expert, where x is."""
        return sent(self._rows, self.x.device)

    @functools.cached_property
    def _weights(self) -> torch.Tensor:
        return sent(self._host_weights, self.x.device).unsqueeze(1)

    def rows(self, expert: int) -> torch.Tensor:
        """Tokens routed to the expert, int64 [n], where x is."""
        start, end = self.spans[expert]
        return self.placed_rows[start:end]

    def add(self, out: torch.Tensor, expert: int, output: torch.Tensor) -> None:
        """Add the expert's weighted output [n, H] to out [T, H] (float32)."""
        start, end = self.spans[expert]
        if native.add_weighted(out, output, self.placed_rows[start:end], self._weights[start:end]):
            return
        weighted = (output * self._weights[start:end]).to(torch.float32)
        if end - start > _FEW_ROWS or out.device.type != "cpu":
            out.index_add_(0, self.placed_rows[start:end], weighted)
            return
        for row, one in zip(self._rows[start:end].tolist(), weighted, strict=True):
            out[row] += one
