"""Folders that may not be there yet."""

from pathlib import Path


def nearest(folder: Path) -> Path:
    """The folder, or what is there of the way to it: the same disk and, where it will be made, the same rights."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())
