"""The tier's measurements run through, on a fake device and a tiny shape."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from benchmarks import gpu_tier
from benchmarks.shapes import SHAPES

from greenroom.device import FakeDevice


def test_everything_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    shape = dataclasses.replace(
        SHAPES["mixtral-8x7b-4"], layers=2, hidden=128, intermediate=128, heads=2, kv_heads=1, head_dim=64, vocab=600
    )
    result: dict[str, Any] = {}
    kept: list[int] = []
    device = FakeDevice(nbytes=13 << 30, link_bytes_per_s=1e9)
    gpu_tier.measure(result, tmp_path, shape, device, keep=lambda: kept.append(len(result["tier"])))
    assert len(kept) == 8
    tier = result["tier"]
    assert tier["link_bytes_per_s"] == pytest.approx(1e9) and len(tier["rows"]) == 5
    assert set(tier["tokens"]) == set(tier["host"]["us_per_layer"]) == {"read back", "ahead", "graphs"}
    assert tier["host"]["same_bits"] and tier["host"]["captured"].endswith("as graphs") and not tier["failed"]
    assert tier["prompt"]["link_s"] > 0 and tier["prompt"]["streamed_s"] >= tier["prompt"]["link_s"] * 0.99
