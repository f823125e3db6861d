"""Does the compiled decoder compute what the modules compute?

A few tokens go through the modules, layer by layer, with stand-ins for the experts; the compiled layers get the same
inputs, one by one and several at a time, and must give the same outputs. So a family is served because it agrees, not
because its name is on a list.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache

from greenroom.decode.describe import DecoderParts

TOKENS = 4
FAR_TOKENS = 2
"""As many more at the end of the context: attention may depend on positions otherwise than by their distance."""
TOLERANCE = 5e-3
"""Of what a layer adds, root mean square: float16 keys and values give 1e-3 at most, a wrong formula 0.1 and more."""


def disagreement(step: Any, base: Any, parts: DecoderParts) -> str:
    """Nothing, or which layer disagrees."""
    near, end = range(TOKENS), parts.limit or getattr(base.config, "max_position_embeddings", None) or 1 << 12
    far = range(max(end - FAR_TOKENS, 0), max(end, FAR_TOKENS))
    inputs, outputs, embedded, last = _through_modules(base, parts, near)
    differs = _layers_differ(step, parts, near, inputs, outputs)
    differs = differs or _layers_differ(step, parts, far, *_through_modules(base, parts, far)[:2])
    if differs:
        return differs
    if not torch.equal(embedded, torch.stack(inputs[0])):
        return f"{type(base).__name__} does more to its embeddings than look them up"
    if not torch.allclose(parts.norm(torch.stack(outputs[-1])), last, rtol=1e-4, atol=1e-5):
        return f"{type(base).__name__} does more after its last layer than norm it"
    return ""


def _layers_differ(
    step: Any,
    parts: DecoderParts,
    positions: range,
    inputs: "list[list[torch.Tensor]]",
    outputs: "list[list[torch.Tensor]]",
) -> str:
    for index, (given, made) in enumerate(zip(inputs, outputs, strict=True)):
        for go in (_one_by_one, _together):
            found = go(step, parts, index, positions, given)
            errors = [
                float((got - out).norm() / (out - before).norm().clamp_min(1e-12))
                for got, out, before in zip(found, made, given, strict=True)
            ]
            # one token's router may stand between two experts, and fall to either side
            if not sorted(errors)[len(errors) // 2] < TOLERANCE:
                name = type(parts.layers[index]).__name__
                return f"layer {index} ({name}) differs from its module by {max(errors):.1g}"
    return ""


def _one_by_one(
    step: Any, parts: DecoderParts, index: int, positions: range, inputs: "list[torch.Tensor]"
) -> "list[torch.Tensor]":
    kv, found = parts.no_kv(index), []
    for position, given in zip(positions, inputs, strict=True):
        step.hidden.copy_(given)
        step.layer(index, kv, parts.turn([position]), _stand_in_token)
        kv.length += 1
        found.append(step.hidden[0].clone())
    return found


def _together(
    step: Any, parts: DecoderParts, index: int, positions: range, inputs: "list[torch.Tensor]"
) -> "list[torch.Tensor]":
    """As a prompt of all tokens but one, and one of the last, which sees the first through a cache."""
    kv, found = parts.no_kv(index), []
    with _standing_in([parts.moe[index]]):
        for part in (slice(-1), slice(-1, None)):
            prompt = step.prompt(torch.stack(inputs[part]), list(positions[part]))
            prompt.layer(index, kv)
            kv.length += len(prompt.hidden)
            found += list(prompt.hidden)
    return found


@torch.no_grad()
def _through_modules(
    base: Any, parts: DecoderParts, positions: range
) -> "tuple[list[list[torch.Tensor]], list[list[torch.Tensor]], torch.Tensor, torch.Tensor]":
    """(each layer's inputs by token, its outputs, the embeddings, the last norm's outputs); vectors [H]."""
    inputs: list[list[torch.Tensor]] = [[] for _ in parts.layers]
    outputs: list[list[torch.Tensor]] = [[] for _ in parts.layers]
    ids = [token % base.config.vocab_size for token in range(1, len(positions) + 1)]
    hooks = []
    try:
        for index, layer in enumerate(parts.layers):
            hooks.append(layer.register_forward_hook(_note(inputs[index], outputs[index]), with_kwargs=True))
        cache = DynamicCache(config=base.config)
        with _standing_in(parts.moe):
            last = [
                type(base).forward(
                    base,
                    input_ids=torch.tensor([[one]]),
                    position_ids=torch.tensor([[position]]),
                    past_key_values=cache,
                    use_cache=True,
                )
                for one, position in zip(ids, positions, strict=True)
            ]
    finally:
        for hook in hooks:
            hook.remove()
    embedded = torch.stack([parts.embed(torch.tensor([[one]]))[0, 0] for one in ids])
    return inputs, outputs, embedded, torch.stack([one.last_hidden_state[0, 0] for one in last])


@contextlib.contextmanager
def _standing_in(modules: "list[Any]") -> "Iterator[None]":
    """Experts are stand-ins meanwhile; None is a layer without."""
    served = [(module, module.greenroom_serve) for module in modules if module is not None]
    try:
        for module, _ in served:
            module.greenroom_serve = _stand_in
        yield
    finally:
        for module, serve in served:
            module.greenroom_serve = serve


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
    layer: int, module: Any, x: Any, experts: "list[int]", weights: Any, outputs: torch.Tensor, meanwhile: Any, *_: Any
) -> None:
    meanwhile()
    for row, expert in enumerate(experts):
        outputs[row] = x[0] * torch.cos(torch.tensor(float(expert)))
