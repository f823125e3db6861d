"""Where a checkpoint lies: a local folder, or a hub id that is downloaded through huggingface_hub."""

import re
from pathlib import Path

from greenroom.errors import CheckpointError

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


def _download(hub_id: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_WANTED))
    except Exception as error:  # the hub client raises a dozen kinds, from several HTTP libraries
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{hub_id} is no local folder and could not be fetched from the hub ({reason}): download it elsewhere and "
            "give its folder"
        ) from error
