"""Does the compiled decoder compute what the modules compute?

A few tokens go through the modules, layer by layer, with stand-ins for the experts; the compiled layers get the same
inputs, and must give the same outputs. So a family is served because it agrees, not because its name is on a list.
"""

from typing import Any

import torch
from transformers import DynamicCache

from greenroom.decode import kv
from greenroom.decode.describe import DecoderParts, Turn

TOKENS = 4
TOLERANCE = 5e-3
"""Of what a layer adds, root mean square: float16 keys and values give 1e-3 at most, a wrong formula 0.1 and more."""


def disagreement(step: Any, base: Any, parts: DecoderParts) -> str:
    """Nothing, or which layer disagrees."""
    inputs, outputs, embedded, last = _through_modules(base, parts)
    for index in range(len(parts.layers)):
        errors, half = [], _empty(parts, index)
        for token in range(TOKENS):
            step.hidden.copy_(inputs[index][token])
            step.layer(index, half, Turn(parts.rotary, token, parts.width), _stand_in_token)
            half.length += 1
            added = outputs[index][token] - inputs[index][token]
            error = (step.hidden[0] - outputs[index][token]).norm() / added.norm().clamp_min(1e-12)
            errors.append(float(error))
        # one token's router may stand between two experts, and fall to either side
        if not sorted(errors)[TOKENS // 2] < TOLERANCE:
            return f"layer {index} ({type(parts.layers[index]).__name__}) differs from its module by {max(errors):.1g}"
    if not torch.equal(embedded, torch.stack(inputs[0])):
        return f"{type(base).__name__} does more to its embeddings than look them up"
    if not torch.allclose(parts.norm(torch.stack(outputs[-1])), last, rtol=1e-4, atol=1e-5):
        return f"{type(base).__name__} does more after its last layer than norm it"
    return ""


def _empty(parts: DecoderParts, index: int) -> kv.HalfKV:
    keys, values = parts.layouts[index].empty()
    return kv.HalfKV(keys, values, parts.windows[index], forget=False)


@torch.no_grad()
def _through_modules(
    base: Any, parts: DecoderParts
) -> "tuple[list[list[torch.Tensor]], list[list[torch.Tensor]], torch.Tensor, torch.Tensor]":
    """(each layer's inputs by token, its outputs, the embeddings, the last norm's outputs); vectors [H]."""
    inputs: list[list[torch.Tensor]] = [[] for _ in parts.layers]
    outputs: list[list[torch.Tensor]] = [[] for _ in parts.layers]
    ids = [token % base.config.vocab_size for token in range(1, TOKENS + 1)]
    served = [None if module is None else module.greenroom_serve for module in parts.moe]
    hooks = []
    try:
        for index, (layer, module) in enumerate(zip(parts.layers, parts.moe, strict=True)):
            if module is not None:
                module.greenroom_serve = _stand_in
            hooks.append(layer.register_forward_hook(_note(inputs[index], outputs[index]), with_kwargs=True))
        cache = DynamicCache(config=base.config)
        last = [
            type(base).forward(base, input_ids=torch.tensor([[one]]), past_key_values=cache, use_cache=True)
            for one in ids
        ]
    finally:
        for hook in hooks:
            hook.remove()
        for module, serve in zip(parts.moe, served, strict=True):
            if module is not None:
                module.greenroom_serve = serve
    embedded = torch.stack([parts.embed(torch.tensor([[one]]))[0, 0] for one in ids])
    return inputs, outputs, embedded, torch.stack([one.last_hidden_state[0, 0] for one in last])


def _note(inputs: "list[torch.Tensor]", outputs: "list[torch.Tensor]") -> Any:
    def hook(module: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        made = result if isinstance(result, torch.Tensor) else result[0]
        inputs.append(given[0, 0].clone())
        outputs.append(made[0, 0].clone())

    return hook


def _stand_in(layer: int, module: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Experts that multiply by a number of their own: enough to tell which was chosen, and with which weight."""
    factors = (weights * torch.cos(index.to(weights.dtype))).sum(dim=-1, keepdim=True)
    return (x * factors).to(x.dtype)


def _stand_in_token(
    layer: int, module: Any, x: Any, experts: "list[int]", weights: Any, outputs: torch.Tensor, meanwhile: Any, _: Any
) -> None:
    meanwhile()
    for row, expert in enumerate(experts):
        outputs[row] = x[0] * torch.cos(torch.tensor(float(expert)))
