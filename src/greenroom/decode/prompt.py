"""Many tokens of one sequence through the compiled layers, in float32 like the modules but for what is cached."""

from typing import Any

import torch

from greenroom.decode.describe import DecoderParts, Turn
from greenroom.decode.kv import CompiledKV
from greenroom.threads import count


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

    def layer(self, index: int, kv: CompiledKV) -> None:
        """`hidden` through one layer, the tokens' keys and values behind those of `kv`, which does not count them
        yet; its experts are served as the module's are."""
        parts, compiled, tokens = self._parts, self._compiled, len(self.hidden)
        module = parts.moe[index]
        weights = self.hidden.new_empty(tokens, 0 if module is None else parts.described[index].router.top_k)
        experts = torch.empty_like(weights, dtype=torch.int64)
        compiled.attend(
            index,
            *kv.place(tokens),
            kv.length,
            kv.window or 0,
            experts.data_ptr(),
            weights.data_ptr(),
            count(),
        )
        if module is not None:
            out = module.greenroom_serve(module.greenroom_layer, module, self._normed, experts, weights)
            compiled.combine(index, out.contiguous().data_ptr(), count())
