"""Guesses: what a gate ahead would see of this layer's input."""

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from greenroom import seam
from greenroom.prefetch import Foresight, Prefetcher, Router

HIDDEN, EXPERTS = 32, 6


def normed(residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * residual / residual.square().mean(dim=1, keepdim=True).sqrt()


def gates(norms: "list[torch.Tensor | None]") -> "list[Router | None]":
    return [Router(torch.randn(EXPERTS, HIDDEN), norm=norm) for norm in norms]


def test_a_gate_ahead_sees_its_own_norm() -> None:
    torch.manual_seed(0)
    residual, here, there = torch.randn(5, HIDDEN), torch.rand(HIDDEN) + 0.1, torch.randn(HIDDEN)
    routers = gates([here, there])
    seen = Foresight(routers)(0, 1, normed(residual, here))
    assert torch.allclose(seen, normed(residual, there), atol=1e-5)
    assert not torch.allclose(normed(residual, here), normed(residual, there), atol=1e-2)  # the control
    one = normed(residual, here)[:1]
    assert routers[1] is not None
    ranked = routers[1].scores(normed(residual, there)[:1])[0].topk(3).indices.tolist()
    assert Prefetcher(routers, 3, 1, 4).guess(0, one, 2, prompt=False) == [(1, ranked)]


def test_what_is_unknown_stays() -> None:
    """No norm, one of another width, no gate, the layer itself; and a column that the norm hides."""
    hidden = torch.randn(2, HIDDEN)
    some = torch.ones(HIDDEN)
    for norms in ([None, some], [some, None], [some, torch.ones(8)]):
        assert Foresight(gates(norms))(0, 1, hidden) is hidden
    assert Foresight([None, *gates([some])])(0, 1, hidden) is hidden
    assert Foresight(gates([some, some]))(1, 1, hidden) is hidden
    hides = torch.ones(HIDDEN)
    hides[3] = 0.0
    assert Foresight(gates([hides, 2 * some]))(0, 1, hidden).isfinite().all()


def test_the_norm_before_a_gate_is_found_by_what_it_computes() -> None:
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=64,
    )
    model = MixtralForCausalLM(config)
    layer = model.model.layers[1]
    nn.init.uniform_(layer.post_attention_layernorm.weight, 0.5, 2.0)
    experts = next(
        name for name, _ in model.named_modules() if name.startswith("model.layers.1.") and name.endswith("experts")
    )
    assert seam.norm_before(model, experts) is layer.post_attention_layernorm.weight

    class OnePlus(nn.Module):
        """A norm that multiplies by one more than its weight, as Gemma's does."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(HIDDEN))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.square().mean().sqrt() * (1 + self.weight)

    layer.post_attention_layernorm = OnePlus()
    assert seam.norm_before(model, experts) is None
    del layer.post_attention_layernorm
    assert seam.norm_before(model, experts) is None
