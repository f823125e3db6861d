"""What counts as another model."""

import torch
from torch import nn

from greenroom.identity import Identity


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.rotary_emb = nn.Linear(4, 4), nn.Linear(4, 4)
        self.top_k, self.name = 2, "layer"
        self.register_buffer("bias", torch.zeros(4))


def test_what_is_replaced_set_or_written_shows() -> None:
    base = nn.ModuleList([Layer(), Layer()])
    layer, seen = base[1], Identity(base)

    def shows() -> bool:
        nonlocal seen
        before, seen = seen, Identity(base)
        return not before.holds() and seen.holds()

    assert seen.holds()
    layer.top_k = 3
    assert shows()
    layer.forward = lambda x: x
    assert shows()
    with torch.no_grad():
        layer.gate.weight.mul_(2)
    assert shows()
    layer.bias = torch.zeros(4)
    assert shows()
    layer.gate = nn.Linear(4, 4)
    assert shows()
    base.append(Layer())
    assert shows()


def test_what_modules_do_by_themselves_does_not() -> None:
    base = nn.ModuleList([Layer()])
    seen = Identity(base)
    base[0].rotary_emb.weight = nn.Parameter(torch.zeros(4, 4))
    base[0]._kept = 5
    assert seen.holds()
    with torch.inference_mode():
        base[0].bias = torch.zeros(4)
        assert not seen.holds() and Identity(base).holds(), "these have no versions"
