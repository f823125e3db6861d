"""From logits to figures: negative log-likelihood, perplexity, KL divergence, agreement; with standard errors.

Tokens of a window are not independent, so standard errors are clustered by window: for a mean m = Σ sᵥ / Σ nᵥ over
V windows with sums sᵥ over nᵥ tokens, se² = V / (V − 1) · Σ (sᵥ − m nᵥ)² / (Σ nᵥ)², the ratio estimator (Cochran,
Sampling Techniques, chapter 6). That of a perplexity exp(m) is exp(m) · se, by the delta method. One window gives none.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch

from greenroom.original import Head, Window
from greenroom.packed import Estimate

_LOGITS_NBYTES = 16 << 20
"""float32 logits that are held at a time, of either model."""
_FEWEST = 64
"""Tokens whose logits are computed together at least: fewer would spend the time on reading the head."""
_COMPARED = 8
"""Tokens that are compared at a time, in float64."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowScore:
    """Sums over a window's scored tokens, natural logarithms. The last three are zero without an original."""

    tokens: int
    nll: float
    """negative log-likelihood"""
    original_nll: float = 0.0
    kl: float = 0.0
    """KL(original ‖ model)"""
    agreed: int = 0
    """tokens for which both models' likeliest next token is the same"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Figures over all windows. The last four are None without an original; `kl` in nats per token."""

    windows: int
    tokens: int
    perplexity: Estimate
    original_perplexity: "Estimate | None" = None
    perplexity_ratio: "Estimate | None" = None
    kl: "Estimate | None" = None
    top1_agreement: "Estimate | None" = None


def score(
    window: Window,
    states: torch.Tensor,
    head: Head,
    original_states: "torch.Tensor | None" = None,
    original_head: "Head | None" = None,
) -> WindowScore:
    """Score one window: `states` [scored, hidden] are those that predict its targets, of the model and, where given, of
    the original. Logits of a few tokens at a time are held, and compared in float64."""
    sums = torch.zeros(4, dtype=torch.float64)
    step = _tokens_at_a_time(head.vocabulary)
    for start in range(0, window.scored, step):
        part = slice(start, start + step)
        logits = head.logits(states[part])
        reference = None
        if original_states is not None and original_head is not None:
            reference = original_head.logits(original_states[part])
        sums += _compare(window.targets[part], logits, reference)
    nll, original_nll, kl, agreed = sums.tolist()
    return WindowScore(tokens=window.scored, nll=nll, original_nll=original_nll, kl=kl, agreed=int(agreed))


def scoring_nbytes(vocabulary: int) -> int:
    """Bytes that `score` takes at most."""
    return vocabulary * (3 * 4 * _tokens_at_a_time(vocabulary) + 6 * 8 * _COMPARED)


def _tokens_at_a_time(vocabulary: int) -> int:
    return max(_FEWEST, _LOGITS_NBYTES // (4 * vocabulary))


def _compare(targets: torch.Tensor, logits: torch.Tensor, reference: "torch.Tensor | None") -> torch.Tensor:
    """Sums over tokens, float64 [4]: nll, the reference's, KL(reference ‖ logits), tokens with equal first choice."""
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(targets), _COMPARED):
        part = slice(start, start + _COMPARED)
        target = targets[part, None]
        logp = logits[part].double().log_softmax(-1)
        sums[0] -= logp.gather(1, target).sum()
        if reference is not None:
            logq = reference[part].double().log_softmax(-1)
            q = logq.exp()
            sums[1] -= logq.gather(1, target).sum()
            sums[2] += (q * (logq - logp)).masked_fill_(q == 0, 0).sum()
            sums[3] += (logp.argmax(-1) == logq.argmax(-1)).sum()
    return sums


def summarise(scores: "Sequence[WindowScore]", against_original: bool) -> Summary:
    """Figures over `scores`, of which there is at least one."""
    tokens = [one.tokens for one in scores]
    nll = [one.nll for one in scores]
    summary = Summary(windows=len(scores), tokens=sum(tokens), perplexity=_exp(mean(nll, tokens)))
    if not against_original:
        return summary
    original = [one.original_nll for one in scores]
    difference = [one - other for one, other in zip(nll, original, strict=True)]
    return dataclasses.replace(
        summary,
        original_perplexity=_exp(mean(original, tokens)),
        perplexity_ratio=_exp(mean(difference, tokens)),
        kl=mean([one.kl for one in scores], tokens),
        top1_agreement=mean([float(one.agreed) for one in scores], tokens),
    )


def mean(sums: "Sequence[float]", counts: "Sequence[int]") -> Estimate:
    """Σ sums / Σ counts with its standard error clustered by window."""
    value = math.fsum(sums) / sum(counts)
    if len(sums) < 2:
        return Estimate(value=value, se=None)
    squares = math.fsum((s - value * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return Estimate(value=value, se=math.sqrt(len(sums) / (len(sums) - 1) * squares) / sum(counts))


def _exp(estimate: Estimate) -> Estimate:
    value = math.exp(estimate.value) if estimate.value < 700 else math.inf
    return Estimate(value=value, se=None if estimate.se is None else value * estimate.se)
