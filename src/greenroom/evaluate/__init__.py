"""Quality on a text: perplexity, and KL divergence, agreement and perplexity ratio against the original checkpoint.

Covers: a text as windows of tokens (`windows`), the original streamed in bounded memory (`original`, `states`), what a
packed model computes (`packed`), logits of either (`head`), the figures (`score`), all of it in turn (`evaluation`).
Does not cover: tasks that generate (`tasks` hands the model to lm-eval), printing.
"""

from greenroom.evaluate.evaluation import Evaluation, evaluate, windows_of
from greenroom.evaluate.head import Head
from greenroom.evaluate.original import Original
from greenroom.evaluate.score import Summary, WindowScore, score, summarise
from greenroom.evaluate.states import StatesFile, stream
from greenroom.evaluate.windows import Text, Window, cut, tokens_of
from greenroom.packed import Estimate

__all__ = [
    "Estimate", "Evaluation", "Head", "Original", "StatesFile", "Summary", "Text", "Window", "WindowScore", "cut",
    "evaluate", "score", "stream", "summarise", "tokens_of", "windows_of",
]  # fmt: skip
