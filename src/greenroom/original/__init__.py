"""The original checkpoint as a model that never has to fit, and the text that goes through it.

Covers: a text as windows of tokens (`windows`), the original streamed layer by layer (`original`), its final states of
every window (`states`) and their logits (`head`). Does not cover: scores (`evaluate`).
"""

from greenroom.original.head import Head
from greenroom.original.original import ExpertTransform, Original, Transform
from greenroom.original.states import StatesFile, stream, windows_at_a_time
from greenroom.original.windows import Text, Window, cut, ids_of, positions_of, tokens_of

__all__ = [
    "ExpertTransform", "Head", "Original", "StatesFile", "Text", "Transform", "Window", "cut", "ids_of",
    "positions_of", "stream", "tokens_of", "windows_at_a_time",
]  # fmt: skip
