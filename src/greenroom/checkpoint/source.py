"""Where a checkpoint lies: a local folder, or a hub id that is downloaded through huggingface_hub."""

import re
from fnmatch import fnmatch
from pathlib import Path

from greenroom.errors import CheckpointError, first_line
from greenroom.machine import free_disk
from greenroom.sizes import format_bytes

_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve(source: "str | Path") -> Path:
    """The local folder of `source`; a hub id such as `mistralai/Mixtral-8x7B-Instruct-v0.1` is fetched first.

    Raises CheckpointError where there is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{source} is a file: give the folder that holds config.json and the safetensors shards")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(source)):
        raise CheckpointError(f"{source} does not exist: give a model folder, a hub id like owner/name, or demo")
    return _download(str(source))


def _check_room(hub_id: str) -> None:
    """Raises CheckpointError where the disk cannot hold what is still to be fetched: the hub's client notices at the
    file that no longer fits, after hours. Says nothing where the hub is not reached; fetching does."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    try:
        files = HfApi().model_info(hub_id, files_metadata=True).siblings or []
    except Exception:  # see `_download`
        return
    cache = Path(constants.HF_HUB_CACHE)
    wanted = [file for file in files if any(fnmatch(file.rfilename, pattern) for pattern in _WANTED)]
    there = cache / repo_folder_name(repo_id=hub_id, repo_type="model") / "blobs"
    held = sum(path.stat().st_size for path in there.iterdir()) if there.is_dir() else 0
    needed = sum(file.size or 0 for file in wanted) - held
    if needed > (free := free_disk(cache)):
        raise CheckpointError(
            f"{hub_id} needs {format_bytes(needed)} more in {cache}, where {format_bytes(free)} are free, and the "
            "packed model comes beside it: set HF_HOME to a larger disk, or give a folder that was packed elsewhere"
        )


def _download(hub_id: str) -> Path:
    import huggingface_hub

    _check_room(hub_id)
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_WANTED))
    except Exception as error:  # the hub client raises a dozen kinds, from several HTTP libraries
        raise CheckpointError(
            f"{hub_id} is no local folder and could not be fetched from the hub ({first_line(error)}): download it "
            "elsewhere and give its folder"
        ) from error
