"""Experts and packed linears on a GPU, from records that lie in its memory.

Experts lie in an `arena` uint8 [buffers, record_nbytes] on the device, in the layout of the packed file; a *slot* is a
buffer's number, and −1 says that an expert is not there or that there is none (a router's sentinel). A *pair* is one of a
token's k experts. Nothing here waits for the device, and every call can be captured in a CUDA graph.

    lookup      experts → slots, and what is missing, told to the host in pinned memory
    token       1 to 16 tokens whose experts are all there: the weighted sum
    pairs       the same without the sum, so that experts may come in turns: one row per pair
    prompt      many rows of a few experts, whoever is there: one row per pair
    combine     the weighted sum over a token's pairs, in their order
    linear      a dense packed matrix

Results have no atomics in them: a pair's row depends on its record and its token alone (and on which of the kernels
its number of tokens chooses), and the sum runs over a token's pairs in the order in which they are given. So bits do not
depend on slots, on the order of arrival, or on what was there.
"""

import dataclasses
from collections.abc import Sequence

import torch

from greenroom.kernels import reference
from greenroom.kernels.reference import Activation
from greenroom.packed import RecordTensor
from greenroom.quant import Format

MOST_TOKENS = 16
"""What `token` and `pairs` take at once; more go through `prompt`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """One expert at work in a prompt: its `slot`, and its pairs `start` to `start + count` (exclusive)."""

    slot: int
    start: int
    count: int


def unusable(device: "torch.device | str" = "cuda") -> str:
    """Why these kernels do not serve on `device`, or nothing: no triton, no such device, one older than 7.5."""
    raise NotImplementedError


def describe(device: "torch.device | str" = "cuda") -> str:
    """For people: "triton 3.6 (NVIDIA H100, 9.0)", or "reference (torch): …" with the reason."""
    raise NotImplementedError


def declines(layout: "Sequence[RecordTensor]", activation: Activation) -> str:
    """Why these kernels do not compute such experts, or nothing: an activation without a kind, or with a norm after."""
    raise NotImplementedError


def lookup(table: torch.Tensor, top_k_index: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    """Slots int32 [T, k] of the experts top_k_index int64 [T, k], T ≤ 16; −1 where there is none.

    table: int32 [num_experts], one layer's row of the device table: an expert's slot, or −1. missing: int32 [1 + T·k], in
    pinned memory or on the device: [0] becomes the number of pairs whose expert has no slot, and [1 + p] the expert of
    pair p if it has none, else −1. An index outside the table (a sentinel) has slot −1 and is not missing.
    """
    raise NotImplementedError


def token(
    x: torch.Tensor,
    arena: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    layout: "Sequence[RecordTensor]",
    kind: str,
) -> torch.Tensor:
    """The experts' weighted sum, float32 [T, H], of x [T ≤ 16, H] in float16, bfloat16 or float32.

    slots: int32 [T, k], distinct within a token but for −1, which adds nothing. weights: [T, k], any float dtype.
    Same bits as `combine` over `pairs`.
    """
    raise NotImplementedError


def pairs(
    x: torch.Tensor,
    arena: torch.Tensor,
    slots: torch.Tensor,
    layout: "Sequence[RecordTensor]",
    kind: str,
    out: "torch.Tensor | None" = None,
) -> torch.Tensor:
    """Each pair's expert applied to its token: out float32 [T, k, H] (made if None), unweighted.

    As `token` otherwise. Rows of slots that are −1 stay untouched, so that several calls fill one `out`: first who is there,
    then who has come.
    """
    raise NotImplementedError


def prompt(
    x: torch.Tensor,
    arena: torch.Tensor,
    spans: "Sequence[Span]",
    rows: torch.Tensor,
    layout: "Sequence[RecordTensor]",
    kind: str,
    out: torch.Tensor,
) -> None:
    """The pairs of several experts in one go: out[p] becomes expert(x[rows[p]]) for every pair p of the spans.

    x [T, H]; rows int32 [P], the token of each pair, pairs sorted by expert; out float32 [P, H]. Pairs of other experts
    stay untouched: calls follow the experts as they cross the link, in any order.
    """
    raise NotImplementedError


def combine(out: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """float32 [T, H]: Σ_j weights[t, j] · out[places[t, j]], j ascending.

    out: float32 [P, H], as `prompt` left it (or `pairs`, viewed so). places: int32 [T, k]; −1 adds nothing. weights:
    [T, k]. A caller who wants ascending order of expert sorts places and weights so.
    """
    raise NotImplementedError


def linear(
    x: torch.Tensor, packed: torch.Tensor, rows: int, cols: int, format: Format, bias: "torch.Tensor | None" = None
) -> torch.Tensor:
    """x [n, cols] times the packed [rows, cols] matrix, transposed: [n, rows] in x's dtype, plus `bias` [rows]."""
    return reference.linear(x, packed, rows, cols, format, bias)
