"""Many tokens of one sequence through the compiled layers, in float32 like the modules.

Keys and values stay in transformers' own cache, by way of its own `update`.
"""

from collections.abc import Callable
from typing import Any

import torch

from greenroom.decode.describe import DecoderParts, Turn
from greenroom.threads import count

Extend = Callable[[int, torch.Tensor, torch.Tensor], "tuple[torch.Tensor, torch.Tensor]"]
"""(layer, the tokens' keys, their values) → those of all positions that the tokens may see, theirs the last; each
[1, heads, n, dim] as transformers calls them"""


class Prompt:
    """The residual stream `hidden` [n, H], and its way through the layers, one after another. `rough`: see
    `kernels.native.experts`; here for projections."""

    def __init__(self, parts: DecoderParts, decoder: Any, hidden: torch.Tensor, turn: Turn, rough: bool) -> None:
        assert hidden.is_contiguous() and hidden.dtype == torch.float32 and len(hidden) == len(turn.cosine)
        self.hidden, self._parts, self._turn = hidden, parts, turn
        self._normed = torch.empty_like(hidden)
        self._compiled = decoder.prompt(
            len(hidden),
            hidden.data_ptr(),
            self._normed.data_ptr(),
            turn.cosine.data_ptr(),
            turn.sine.data_ptr(),
            rough,
        )

    def layer(self, index: int, extend: Extend) -> None:
        """`hidden` through one layer; its experts are served as the module's are."""
        parts, compiled, tokens = self._parts, self._compiled, len(self.hidden)
        empty = parts.layouts[index].from_pair(*parts.layouts[index].empty())
        keys, values = (one.new_empty(1, one.shape[1], tokens, one.shape[3]) for one in empty)
        compiled.project(index, keys.data_ptr(), values.data_ptr(), count())
        keys, values = (one.contiguous() for one in extend(index, keys, values))
        module, window = parts.moe[index], parts.windows[index] or 0
        top_k = 0 if module is None else parts.described[index].router.top_k
        weights = empty[0].new_empty(tokens, top_k)
        experts = torch.empty_like(weights, dtype=torch.int64)
        compiled.attend(
            index,
            keys.data_ptr(),
            values.data_ptr(),
            keys.shape[2],
            window,
            experts.data_ptr(),
            weights.data_ptr(),
            count(),
        )
        if module is not None:
            out = module.greenroom_serve(module.greenroom_layer, module, self._normed, experts, weights)
            compiled.combine(index, out.contiguous().data_ptr(), count())
