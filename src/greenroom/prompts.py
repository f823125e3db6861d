"""A prompt's way through a model, in pieces: what its activations take is bounded, whoever calls.

How long a piece is depends on the batch alone, so that neither a budget nor what the cache holds changes an answer.
"""

import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from greenroom.hooks import Hooks

_CUT = ("attention_mask", "position_ids", "past_key_values")
OUTPUTS = {"output_attentions", "output_hidden_states", "output_router_logits"}
"""Arguments that ask for what every layer gave."""


class Prompts:
    """Takes the place of `base.forward`: of more tokens than `most`, of all sequences together, as many at a time as
    that allows. `continues`: see `seam.continues`; without it, a prompt goes through whole, and what follows it token
    by token.

    Only what `generate` asks for is cut: tokens with a cache. Calls that are watched by hooks are not, where the answer
    is the same. `begin` is called before the first tokens of a sequence.
    """

    def __init__(self, base: Any, most: int, continues: bool, begin: "Callable[[], None]" = lambda: None) -> None:
        self._most, self._continues, self._config, self._begin = most, continues, base.config, begin
        self._forward, self._hooks = base.forward, Hooks(base)
        self._process, self._one_at_a_time = os.getpid(), threading.RLock()
        base.forward = self.forward

    def forget(self) -> None:
        """Look for hooks anew."""
        self._hooks.renew()

    def forward(self, input_ids: "torch.Tensor | None" = None, *rest: Any, **others: Any) -> Any:
        """As the model's own forward, for one thread at a time: the engine behind it has one state."""
        if os.getpid() != self._process:  # whoever held it is not in this child
            self._process, self._one_at_a_time = os.getpid(), threading.RLock()
        with self._one_at_a_time:
            if _begins(input_ids, others.get("past_key_values")):
                self._begin()
            if rest:
                return self._forward(input_ids, *rest, **others)
            if input_ids is None or not (width := self._width(input_ids, others)):
                return self._forward(input_ids=input_ids, **others)
            return self._in_pieces(width, input_ids, others)

    def _in_pieces(self, width: int, input_ids: torch.Tensor, others: "dict[str, Any]") -> Any:
        cache: Any = others.get("past_key_values")
        found, before = [], _length(cache)
        for start in range(0, input_ids.shape[1], width):
            end = min(start + width, input_ids.shape[1])
            part = {**_part(others, before, start, end), "past_key_values": cache}
            out = self._forward(input_ids=input_ids[:, start:end], **part)
            found.append(out.last_hidden_state)
            cache = out.past_key_values
        out.last_hidden_state = torch.cat(found, dim=1)
        return out

    def _width(self, input_ids: torch.Tensor, others: "dict[str, Any]") -> int:
        """How many tokens of each sequence go through at once; 0 for all."""
        if input_ids.ndim != 2 or input_ids.shape[1] < 2 or not self._keeps(others) or not self._understood(others):
            return 0
        if not self._continues:
            return 1 if _length(others.get("past_key_values")) else 0
        width = max(self._most // len(input_ids), 1)
        return 0 if input_ids.shape[1] <= width or torch.is_grad_enabled() or self._hooks else width

    def _keeps(self, others: "dict[str, Any]") -> bool:
        """Whether there is a cache, or will be."""
        use_cache = others.get("use_cache")
        wanted = getattr(self._config, "use_cache", False) if use_cache is None else use_cache
        return wanted is not False or others.get("past_key_values") is not None

    def _understood(self, others: "dict[str, Any]") -> bool:
        """Whether arguments can be cut: nothing of tokens but what is known, and nothing wanted but hidden states."""
        mask = others.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            return False
        if others.get("return_dict", getattr(self._config, "return_dict", True)) is False:
            return False
        if any(others.get(name) or getattr(self._config, name, False) for name in OUTPUTS):
            return False
        return all(_of_no_token(value) for name, value in others.items() if name not in _CUT)


def _begins(input_ids: "torch.Tensor | None", cache: Any) -> bool:
    """Whether a sequence does; single tokens are not asked where that would be asking a device."""
    if input_ids is None or cache is None:
        return True
    return (input_ids.shape[-1] > 1 or type(cache) is DynamicCache) and not _length(cache)


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _of_no_token(value: Any) -> bool:
    """Whether an argument says nothing of single tokens; what images would have become is None or a dict of that."""
    if isinstance(value, dict):
        return all(map(_of_no_token, value.values()))
    return value is None or isinstance(value, bool | int | float | str)


def _part(others: "dict[str, Any]", before: int, start: int, end: int) -> "dict[str, Any]":
    """The arguments for tokens `start` to `end` of those that follow `before` others."""
    mask, positions = others.get("attention_mask"), others.get("position_ids")
    return {
        **others,
        "attention_mask": None if mask is None else mask[:, : before + end],
        "position_ids": None if positions is None else positions[..., start:end],
    }
