"""Every environment variable greenroom reads.

GREENROOM_CACHE   folder for packed models and the demo      (default: the platform's cache directory)
XDG_CACHE_HOME    where that is on Linux                     (default: ~/.cache)
GREENROOM_ISA     avx512vnni, avxvnni, avx2, neon or portable: the compiled kernels' instruction set; none: compute
                  with torch, and read with Python's threads (default: the best this machine has)
GREENROOM_DECODE  modules: decode with transformers' modules   (default: compiled, for the decoders it is proved for)
"""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Where greenroom keeps what it makes."""
    if own := os.environ.get("GREENROOM_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "greenroom"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "greenroom"


def of_child(hub_token: "str | None") -> "dict[str, str]":
    """This process's environment for a child, with the token that the hub's client reads there."""
    return {**os.environ, **({"HF_TOKEN": hub_token} if hub_token else {})}


def isa() -> str:
    """The instruction set to compute with, in lower case; empty for the best."""
    return os.environ.get("GREENROOM_ISA", "").strip().lower()


def decode() -> str:
    """What decodes, in lower case: "modules" or nothing."""
    return os.environ.get("GREENROOM_DECODE", "").strip().lower()
