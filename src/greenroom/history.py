"""What earlier runs of a packed model saw of its routing: hit counts in the cache folder, one small file a model.

An estimate to plan by, never an input of an answer: a file that is missing, damaged or of another model counts as none,
and a folder that cannot be written keeps none.
"""

import contextlib
import json
import os
import zlib
from math import inf

from greenroom import environment
from greenroom.cache.curve import HitCounts
from greenroom.packed import Manifest

MOST = 100_000.0
"""Requested experts of a layer beyond which older runs fade, so that a model's use may change."""


class History:
    """The counts of one packed model, wherever its folder lies."""

    def __init__(self, manifest: Manifest) -> None:
        experts = [(entry.module, entry.num_experts, entry.crc32) for entry in manifest.experts]
        self._experts = [entry.num_experts for entry in manifest.experts]
        self.path = environment.cache_folder() / "history" / f"{zlib.crc32(repr(experts).encode()):08x}.json"

    def read(self) -> HitCounts:
        """The counts; zeros where there are none."""
        counts = HitCounts(len(self._experts))
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            body = json.loads(self.path.read_text())
            requested, found = body["requested"], body["found"]
            if _plausible(requested, found, self._experts):
                counts.requested, counts.found = requested, found
        return counts

    def gains(self) -> "list[list[float]] | None":
        """Estimated hit rates of 0, 1, … slots for each layer, up to all its experts; None before the first run."""
        counts = self.read()
        if not any(counts.requested):
            return None
        return [counts.rates(layer, experts) for layer, experts in enumerate(self._experts)]

    def add(self, counts: HitCounts) -> None:
        """Keep the counts of a run beside those of earlier ones."""
        if not any(counts.requested):
            return
        total = self.read()
        total.add(counts)
        for layer, requested in enumerate(total.requested):
            if requested > MOST:
                total.scale(layer, MOST / requested)
        body = json.dumps({"requested": total.requested, "found": total.found})
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(f".{os.getpid()}")
            temporary.write_text(body)
            temporary.replace(self.path)


def _plausible(requested: "list[float]", found: "list[list[float]]", experts: "list[int]") -> bool:
    """Whether the numbers can be counts of these layers."""
    if not len(requested) == len(found) == len(experts):
        return False
    return all(
        len(uses) <= count and min(uses, default=0.0) >= 0.0 and 0.0 <= sum(uses) <= wanted * 1.001 < inf
        for wanted, uses, count in zip(requested, found, experts, strict=True)
    )
