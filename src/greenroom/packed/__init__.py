"""The packed model on disk: docs/format.md in code.

Covers: the manifest (`manifest`) and the receipt in it (`receipt`), writing files so that a kill loses at most one of
them (`writer`), one writer at a time (`lock`), reading and verifying them (`reader`). Does not cover: what the bytes of
a record mean (see `greenroom.quant`), which experts deserve memory.
"""

from greenroom.packed.lock import locked
from greenroom.packed.manifest import (
    MANIFEST_NAME,
    RECORD_ALIGNMENT,
    ExpertsEntry,
    FileEntry,
    LinearEntry,
    Manifest,
    RecordTensor,
    TensorEntry,
)
from greenroom.packed.reader import PackedModel, corrupted, ended
from greenroom.packed.receipt import Estimate, Receipt
from greenroom.packed.writer import Entry, Journal, header_of, replace_text, write_file

__all__ = [
    "MANIFEST_NAME",
    "RECORD_ALIGNMENT",
    "Entry",
    "Estimate",
    "ExpertsEntry",
    "FileEntry",
    "Journal",
    "LinearEntry",
    "Manifest",
    "PackedModel",
    "Receipt",
    "RecordTensor",
    "TensorEntry",
    "corrupted",
    "ended",
    "header_of",
    "locked",
    "replace_text",
    "write_file",
]
