"""greenroom's models for EleutherAI's lm-eval, as its model type `greenroom`. Importing this needs lm_eval.

import greenroom.evaluate.adapter
lm_eval.simple_evaluate(model="greenroom", model_args="pretrained=demo,ram=600MiB", tasks=["piqa"])
"""

import dataclasses
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from greenroom import library
from greenroom.errors import ConfigError
from greenroom.tokenizer import tokenizer_of

_BITS = ("expert_bits", "attention_bits", "head_bits", "group_size")


@register_model("greenroom")
class GreenroomLM(HFLM):  # type: ignore[misc]
    """lm-eval's own transformers model around a running engine; one sequence at a time.

    `pretrained`: whatever names a model for `greenroom.load`. `context`: the longest prompt with its answer, tokens;
    longer ones lose their beginning. `others`: bits and memory as in `greenroom.load`.
    """

    def __init__(self, pretrained: str, context: int = 2048, **others: Any) -> None:
        for unused in ("batch_size", "max_batch_size", "device"):  # lm-eval gives them to every model
            others.pop(unused, None)
        bits = {name: others.pop(name) for name in _BITS if name in others}
        settings = library.engine_settings(**others, context=context)
        folder = library.find(pretrained, **bits)
        tokenizer = tokenizer_of(folder)
        if tokenizer is None:
            raise ConfigError(
                f"{pretrained} has no tokenizer: add its tokenizer files to the checkpoint and pack again"
            )
        self.engine = library.start(pretrained, folder, dataclasses.replace(settings, prompt_chunk=context))
        self.engine.model.tie_weights = lambda *_, **__: None  # they are tied; packed ones have no parameter to tie
        super().__init__(
            pretrained=self.engine.model, tokenizer=tokenizer, backend="causal", batch_size=1, max_length=context
        )

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()
