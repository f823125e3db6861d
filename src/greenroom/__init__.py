"""Run Mixture-of-Experts language models that are bigger than the memory they run in.

    model, tokenizer = greenroom.load("demo", ram="600MiB")     # a transformers model: model.generate(...)
    greenroom.pack("path/to/checkpoint", "path/to/packed", expert_bits=4)

Everything heavy is imported on first use.
"""

from typing import TYPE_CHECKING, Any

from greenroom.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DemoError,
    GreenroomError,
    PackedModelError,
    PackError,
    UnsupportedModelError,
)
from greenroom.library import load

if TYPE_CHECKING:
    from greenroom.packing import pack

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "DemoError",
    "GreenroomError",
    "PackError",
    "PackedModelError",
    "UnsupportedModelError",
    "__version__",
    "load",
    "pack",
]


def __getattr__(name: str) -> Any:
    if name == "pack":
        import importlib

        return importlib.import_module("greenroom.packing").pack
    raise AttributeError(f"module 'greenroom' has no attribute {name!r}")
