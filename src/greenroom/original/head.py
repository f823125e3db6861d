"""From what the head sees to logits, a few tokens at a time: what a family does after its decoder, by its own code."""

from typing import Any

import torch

from greenroom.threads import lent_to_torch


class Head:
    """The part of `model` after `model.base_model`: scaling, the output matrix, caps.

    `output` is what `model.base_model` returned once: its class is what the model's own code expects.
    """

    def __init__(self, model: Any, output: type) -> None:
        self._model, self._output = model, output
        self.vocabulary = int(model.config.get_text_config().vocab_size)

    @torch.no_grad()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, V] of `states` [n, hidden]."""
        base, ids = self._model.base_model, torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
        forward = base.__dict__.get("forward")
        base.forward = lambda **_: self._output(last_hidden_state=states[None])
        try:
            with lent_to_torch():
                out = self._model(input_ids=ids, use_cache=False)
        finally:
            if forward is None:
                del base.forward
            else:
                base.forward = forward
        logits: torch.Tensor = out.logits[0].float().cpu()
        return logits
