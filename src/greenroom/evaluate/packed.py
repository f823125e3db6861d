"""What a packed model's head sees: by a forward over a whole window, or token by token as decoding does."""

from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from greenroom.engine import Engine
    from greenroom.original import Window


@torch.no_grad()
def whole_window(engine: "Engine", window: "Window") -> "tuple[torch.Tensor, type]":
    """One forward over the window without a cache: (states [scored, hidden] that predict its targets, the class of
    what `base_model` returns)."""
    ids = window.ids.to(engine.model.device)
    out = engine.model.base_model(input_ids=ids[None], use_cache=False)
    return window.predicting(out.last_hidden_state[0]), type(out)


@torch.no_grad()
def token_by_token(engine: "Engine", window: "Window") -> "tuple[torch.Tensor, type]":
    """The same, a token at a time with a KV cache: what decoding computes."""
    out: Any = None
    states, first = [], len(window.ids) - window.scored - 1
    cache = transformers.DynamicCache(config=engine.model.config)
    for number, token in enumerate(window.ids[:-1].to(engine.model.device)):
        out = engine.model.base_model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        if number >= first:
            states.append(out.last_hidden_state[0, 0])
    return torch.stack(states), type(out)
