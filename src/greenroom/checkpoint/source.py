"""Where a checkpoint lies: a local folder, or a hub id that is downloaded through huggingface_hub."""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from greenroom.errors import CheckpointError, first_line
from greenroom.folders import nearest
from greenroom.machine import free_disk
from greenroom.sizes import format_bytes

_SIDECARS = ["*.json", "*.jinja", "*.model", "*.txt"]
_WANTED = [*_SIDECARS, "*.safetensors"]
_COPIES = ["*/*", "consolidated*"]
"""The same weights in their authors' own format, beside the shards or in a folder below."""


def sidecars(folder: Path) -> "list[Path]":
    """A checkpoint's configuration and tokenizer files: what a packed model keeps unchanged, but for its own names."""
    found = {path for pattern in _SIDECARS for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not path.name.endswith(".index.json"))


def resolve(source: "str | Path", target: "Path | None" = None, bits: int = 0) -> Path:
    """The local folder of `source`; a hub id such as `mistralai/Mixtral-8x7B-Instruct-v0.1` is fetched first.

    `target`: where it will be packed with at least `bits` a weight; before anything is fetched, there must be room for
    that, too. Raises CheckpointError where there is neither folder nor hub id, too little room, or a packed model.
    """
    check_name(source)
    folder = Path(source).expanduser()
    return folder if folder.is_dir() else _download(str(source), target, bits)


def check_name(source: "str | Path") -> None:
    """Raises CheckpointError where `source` is neither a checkpoint's folder nor what a hub id looks like."""
    folder = Path(source).expanduser()
    if (folder / "greenroom.json").is_file():
        raise CheckpointError(f"{source} is packed already: give the checkpoint it was packed from")
    if folder.is_dir():
        return
    if folder.exists():
        raise CheckpointError(f"{source} is a file: give the folder that holds config.json and the safetensors shards")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(source)):
        raise CheckpointError(f"{source} does not exist: give a model folder or a hub id like owner/name")


def _check_room(hub_id: str, target: "Path | None", bits: int) -> None:
    """Raises CheckpointError where the disk cannot hold what is still to be fetched: the hub's client notices at the
    file that no longer fits, after hours. Says nothing where the hub is not reached; fetching does."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    try:
        info = HfApi().model_info(hub_id, files_metadata=True)
    except Exception:  # see `_download`
        return
    cache = Path(constants.HF_HUB_CACHE)
    wanted = [file for file in info.siblings or [] if _is_wanted(file.rfilename)]
    there = cache / repo_folder_name(repo_id=hub_id, repo_type="model") / "blobs"
    held = sum(path.stat().st_size for path in there.iterdir()) if there.is_dir() else 0
    needed = sum(file.size or 0 for file in wanted) - held
    packed = _weights(info) * bits // 8 if target is not None and _same_disk(target, cache) else 0
    if needed > 0 and needed + packed > (free := free_disk(cache)):
        beside = f" (about {format_bytes(packed)} by its bits)" if packed else ""
        raise CheckpointError(
            f"{hub_id} needs {format_bytes(needed)} more in {cache}, where {format_bytes(free)} are free, and the "
            f"packed model comes beside it{beside}: set HF_HOME to a larger disk, or give a folder that was packed "
            "elsewhere"
        )


def _is_wanted(name: str) -> bool:
    def fits(patterns: "list[str]") -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    return fits(_WANTED) and not fits(_COPIES)


def _weights(info: Any) -> int:
    """How many weights the hub counts, or 0 where it does not; two that share a byte count as one."""
    return getattr(getattr(info, "safetensors", None), "total", None) or 0


def _same_disk(one: Path, other: Path) -> bool:
    return nearest(one).stat().st_dev == nearest(other).stat().st_dev


def _download(hub_id: str, target: "Path | None", bits: int) -> Path:
    import huggingface_hub

    _check_room(hub_id, target, bits)
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_WANTED, ignore_patterns=_COPIES))
    except Exception as error:  # the hub client raises a dozen kinds, from several HTTP libraries
        raise CheckpointError(
            f"{hub_id} is no local folder and could not be fetched from the hub ({first_line(error)}): download it "
            "elsewhere and give its folder"
        ) from error
