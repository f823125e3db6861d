"""Guess the experts of the layers ahead, by the paper's rule: the next layer's gate on the hidden state that this
layer's gate saw, though as the next layer's norm would have made it. Ranks experts; how their bytes move, and when,
is not its business.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch

Guesses = list[tuple[int, list[int]]]
"""(layer ahead, experts likeliest first), nearest layer first"""

AUTOMATIC = 8
"""Experts ranked per layer where nobody says how many: what is unlikely is not loaded."""
_LEAST = 1e-3
"""Of the largest weight of a norm: what is smaller is not divided by."""


@dataclasses.dataclass(frozen=True, slots=True)
class Router:
    """A gate: `weight` [num_experts, hidden], and its vectors [num_experts], if it has them: `bias` is added to the
    logits, `correction` to their sigmoid. `norm` [hidden]: the weight of the RMS norm before it, if there is one."""

    weight: torch.Tensor
    bias: "torch.Tensor | None" = None
    correction: "torch.Tensor | None" = None
    norm: "torch.Tensor | None" = None

    def reads(self, hidden: torch.Tensor) -> bool:
        """Whether the gate's width is that of `hidden`; a vision tower's is not the text model's."""
        return self.weight.shape[1] == hidden.shape[1]

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores [T, num_experts] that rank experts like the gate does on `hidden` [T, hidden]."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return logits if self.correction is None else logits.sigmoid() + self.correction

    def shares(self, scores: torch.Tensor) -> torch.Tensor:
        """`scores` [T, num_experts] as shares of 1, float16, which traces hold: the softmax of the logits, or, without
        the correction that only ranks, their sigmoids over their sum."""
        if self.correction is None:
            return scores.float().softmax(dim=1).half()
        plain = scores.float() - self.correction.float()
        return (plain / plain.sum(dim=1, keepdim=True)).half()


class Foresight:
    """What gates ahead would see if nothing were added to the residual stream until then.

    This layer's gate sees norm(r) = w · r / rms(r), the one ahead norm'(r) = w' · r / rms(r). So no residual is needed:
    norm'(r) = norm(r) · w' / w. Where a norm is no such thing, what this layer's gate saw.
    """

    def __init__(self, routers: "Sequence[Router | None]") -> None:
        self._routers = routers
        self._factors: dict[tuple[int, int], torch.Tensor | None] = {}

    def __call__(self, layer: int, ahead: int, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` [T, H], which `layer`'s gate saw, for the gate of the layer `ahead`."""
        if ahead == layer:
            return hidden
        if (layer, ahead) not in self._factors:
            self._factors[layer, ahead] = self._factor(self._routers[layer], self._routers[ahead])
        factor = self._factors[layer, ahead]
        return hidden if factor is None else hidden * factor

    def _factor(self, here: "Router | None", there: "Router | None") -> "torch.Tensor | None":
        if (
            here is None
            or there is None
            or here.norm is None
            or there.norm is None
            or len(here.norm) != len(there.norm)
        ):
            return None
        now, then = here.norm.float(), there.norm.float()
        seen = now.abs() > _LEAST * now.abs().max()  # what this norm hides cannot be told
        return torch.where(seen, then / now, 1.0).to(here.norm.dtype)


class Prefetcher:
    """Ranked guesses for `lookahead` layers ahead.

    `routers`: one per MoE layer, None where a family's gate is not a plain matrix (that layer is never guessed).
    `experts`: how many to rank per layer while decoding; for a prompt, as many as there are staging buffers.
    """

    def __init__(self, routers: "list[Router | None]", experts: int, lookahead: int, staging: int) -> None:
        self._routers, self.experts, self.lookahead, self._staging = routers, experts, lookahead, staging
        self._foresight = Foresight(routers)

    def guess(self, layer: int, hidden: torch.Tensor, top_k: int, prompt: bool) -> Guesses:
        """For `hidden` [T, H] seen by `layer`'s gate."""
        count = self._staging if prompt else self.experts
        if count == 0:
            return []
        routers = ((other, self._routers[other]) for other in self._ahead(layer, 1 if prompt else self.lookahead))
        return [
            (other, self._rank(router, self._foresight(layer, other, hidden), top_k, count))
            for other, router in routers
            if router is not None and router.reads(hidden)
        ]

    def foresee(self, layer: int, foresee: "Callable[[int, int], list[int]]") -> Guesses:
        """For one token of the compiled decode step, which ranks experts itself: see `decode.ServeToken`."""
        return [(other, foresee(other, self.experts)) for other in self._ahead(layer, self.lookahead)]

    def _ahead(self, layer: int, lookahead: int) -> range:
        return range(layer + 1, min(layer + lookahead, len(self._routers) - 1) + 1)

    def _rank(self, router: Router, hidden: torch.Tensor, top_k: int, count: int) -> "list[int]":
        scores = router.scores(hidden)
        num_experts = scores.shape[1]
        if scores.shape[0] > 1:  # many tokens: the experts that most of them would choose
            chosen = scores.topk(min(top_k, num_experts), dim=1).indices.reshape(-1)
            votes = torch.bincount(chosen, minlength=num_experts)
            order = torch.argsort(votes, descending=True, stable=True)
            return [int(e) for e in order[:count] if votes[e] > 0]
        ranked: list[int] = scores[0].topk(min(count, num_experts)).indices.tolist()
        return ranked
