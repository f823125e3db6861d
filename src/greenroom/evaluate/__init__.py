"""Quality on a text: perplexity, and KL divergence, agreement and perplexity ratio against the original checkpoint.

Covers: what a packed model computes (`packed`), the figures (`score`), all of it in turn (`evaluation`), many formats
at once (`grid`). Does not cover: the original and the text (`greenroom.original`), tasks that generate (`tasks` hands
the model to lm-eval), printing.
"""

from greenroom.evaluate.evaluation import Evaluation, evaluate, windows_of
from greenroom.evaluate.score import Summary, WindowScore, score, summarise
from greenroom.packed import Estimate

__all__ = ["Estimate", "Evaluation", "Summary", "WindowScore", "evaluate", "score", "summarise", "windows_of"]
