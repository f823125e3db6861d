"""A folder's tokenizer."""

from pathlib import Path
from typing import Any

import transformers

from greenroom.errors import PackedModelError
from greenroom.seam import quiet

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


def tokenizer_of(folder: Path) -> Any:
    """The folder's tokenizer, or None where it has none. Raises PackedModelError where it cannot be loaded."""
    if not any((folder / name).is_file() for name in _FILES):
        return None
    with quiet():
        try:
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # tokenizers fail in many ways; the model still runs
            raise PackedModelError(
                f"the tokenizer in {folder} cannot be loaded ({(str(error) or 'damaged').splitlines()[0]}): "
                "delete the packed folder and pack again"
            ) from error
