"""The command line: one file per command, flags that mean the same everywhere in `options`.

Torch and transformers are imported by the commands that need them, so that help and refusals are instant.
"""

from greenroom.cli.main import main

__all__ = ["main"]
