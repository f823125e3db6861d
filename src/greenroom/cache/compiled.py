"""The compiled loops of the cache's room, where installing found a compiler."""

from types import ModuleType


def extension() -> "ModuleType | None":
    """The extension, or None: then the loops in Python serve, with the same results and far slower."""
    try:
        import greenroom.cache._replay as replay
    except ImportError:
        return None
    return replay
