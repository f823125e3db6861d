"""A Hugging Face checkpoint, one expert at a time.

Covers: finding a model's folder (`source`), reading safetensors shards without mapping them (`shards`), and
transformers' own weight conversion applied to one expert or one dense tensor at a time (`mapping`). Does not cover:
quantisation, devices, caches.
"""

from greenroom.checkpoint.mapping import Checkpoint, DenseGroup
from greenroom.checkpoint.shards import Shards, TensorInfo
from greenroom.checkpoint.source import check_name, resolve, sidecars

__all__ = ["Checkpoint", "DenseGroup", "Shards", "TensorInfo", "check_name", "resolve", "sidecars"]
