"""What a routing trace shows: hits by cache size and policy, recall of guesses, reuse, load; numbers and pictures.

Knows traces and the pure cache; no torch. Does not cover: recording; see `trace`.
"""

from greenroom.analyze.report import Report, analyze

__all__ = ["Report", "analyze"]
