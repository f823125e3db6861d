"""The tier's measurements run through, on a fake device and tiny shapes."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks import gpu_models, gpu_tier
from benchmarks.gpu_models import Model, Models
from benchmarks.gpu_tier import GB, Tier
from benchmarks.shapes import PAIRINGS, SHAPES

from greenroom.cli import paper
from greenroom.device import FakeDevice

SIZES: "dict[str, Any]" = {"hidden": 128, "intermediate": 128, "heads": 2, "kv_heads": 1, "head_dim": 64, "vocab": 600}
MIXTRAL = Model(dataclasses.replace(SHAPES["mixtral-8x7b-4"], layers=2, **SIZES), "2", 1)
QWEN3 = Model(dataclasses.replace(SHAPES["qwen3-30b-a3b-48"], layers=2, experts=16, **SIZES), "4", 1)
GPT_OSS = Model(dataclasses.replace(SHAPES["gpt-oss-20b-24"], layers=2, experts=8, **SIZES), "4", 1)
TINY = {"small": MIXTRAL, "mixtral": MIXTRAL, "qwen3": QWEN3, "gpt-oss": GPT_OSS}
ROWS = {
    "mixtral": [("full", 2, GB), (paper.DEFAULTS, 2, GB), ("naive", 2, GB), ("without cache and prefetch", 2, GB)],
    "qwen3": [("full", 4, GB)],
    "gpt-oss": [("full", 4, GB), ("naive", 4, GB)],
}


@pytest.mark.slow
def test_everything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    few = {"--tokens": "3", "--trials": "1"}
    monkeypatch.setattr(gpu_tier, "TAKEN", {"row": few, "naive": few})
    found: dict[str, Any] = {}
    kept: list[int] = []
    tier = Tier(found, 3600, keep=lambda: kept.append(len(found.get("rows", []))))
    models = Models(tmp_path, TINY)
    for name, model in TINY.items():
        gpu_models.write(tmp_path / name, model)
    gpu_tier.measure(tier, models, FakeDevice(nbytes=13 << 30, link_bytes_per_s=1e9), ROWS)
    assert kept == [0, 1, 2, 3, 4, 4, 5, 6, 7] and not found["failed"] and not found["cut"]  # kept at once
    assert found["link_bytes_per_s"] == pytest.approx(1e9) and len(found["seconds"]) == 9
    assert set(found["host"]["us_per_layer"]) == {"read back", "ahead", "graphs"}
    assert found["host"]["same_bits"] and found["host"]["captured"].endswith("as graphs")
    assert found["prompt"]["link_s"] > 0 and found["prompt"]["streamed_s"] >= found["prompt"]["link_s"] * 0.99
    assert found["prompt"]["resident_tokens_per_s"] > 0
    rows = {(row["model"], row["name"]): row for row in found["rows"]}
    assert list(rows) == [(name, case[0]) for name, cases in ROWS.items() for case in cases]
    assert rows["mixtral", "full"]["slots"] == 2 and rows["mixtral", paper.DEFAULTS]["slots"] == 8
    assert rows["mixtral", "full"]["vram"] == GB and all(row["bytes_read_per_token"] == 0 for row in rows.values())
    assert len(json.loads(json.dumps(found))["rows"]) == 7


@pytest.mark.slow
def test_models_are_written_in_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --out that is all that happens."""
    monkeypatch.setattr(gpu_tier, "MODELS", {"qwen3": QWEN3})
    monkeypatch.setattr(sys, "argv", ["gpu_tier", "--models", str(tmp_path)])
    assert gpu_tier.main() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["qwen3"]
    before = (tmp_path / "qwen3").stat().st_mtime_ns
    models = Models(tmp_path, TINY)
    models.start(["qwen3", "small"])
    models.wait(["qwen3", "small"], seconds=0)  # too short for the one, and the other is there
    assert (tmp_path / "qwen3").stat().st_mtime_ns == before and not (tmp_path / "small").exists()
    assert models("small").verify() == models("qwen3").verify() == []


def test_no_part_begins_that_would_not_end_in_time() -> None:
    clock, found = [0.0], dict[str, Any]()
    tier = Tier(found, 100, now=lambda: clock[0])

    def takes(seconds: float) -> "dict[str, Any]":
        clock[0] += seconds
        return {"name": seconds}

    def fails() -> "dict[str, Any]":
        raise RuntimeError("no such thing")

    assert tier.part("row", "first", lambda: takes(60)) == {"name": 60}
    assert tier.part("row", "second", lambda: takes(60)) is None  # the first took longer than what is left
    assert tier.part("host", "third", lambda: takes(1)) == {"name": 1}
    assert tier.part("host", "fourth", fails) is None
    assert found["cut"] == ["second"] and [one["part"] for one in found["failed"]] == ["fourth"]
    assert "no such thing" in found["failed"][0]["error"]
    assert [one["seconds"] for one in found["seconds"]] == [60, 1, 0]


def test_the_table_shows_what_a_row_is_of_naive_and_of_the_floor() -> None:
    row = dataclasses.asdict(
        paper.Row(
            name="full", vram=12 * GB, slots=2.0, tokens_per_s=6.0, hit_rate=0.5, bytes_up_per_token=1e9,
            bytes_read_per_token=0.0, floor_tokens_per_s=9.0, paper=paper.PAPER["full", 2], reason="",
        )
    )  # fmt: skip
    naive = row | {"name": "naive", "vram": None, "slots": 0.0, "tokens_per_s": 1.5, "paper": ()}
    lines = gpu_tier.table({"rows": [row | {"model": "a"}, naive | {"model": "a"}, row | {"model": "b"}], "cut": ["c"]})
    assert "12 GB" in lines[0] and "1.50 of the floor's time" in lines[0]
    assert "4.0 x naive" in lines[0] and lines[0].endswith("A100 3.06")
    assert "1.0 x naive" in lines[1] and "A100" not in lines[1] and "naive" not in lines[2]  # another model's
    assert lines[3] == "cut     tier: c: no time left" and gpu_tier.table({}) == []


def test_every_model_that_has_rows_is_written_and_holds_them() -> None:
    """The budgets hold the slots asked for, with room for everything else."""
    assert set(gpu_tier.ROWS) == set(gpu_tier.MODELS) - {"small"}
    for name, cases in gpu_tier.ROWS.items():
        shape, bits = gpu_tier.MODELS[name].shape, PAIRINGS[gpu_tier.MODELS[name].pairing].bits
        expert = 3 * shape.hidden * shape.intermediate * (bits + 0.5) / 8
        assert all(k * shape.layers * expert < vram - GB for _, k, vram in cases)


def test_a_model_that_cannot_be_written_is_one_failed_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(gpu_models, "write", refused)
    found: dict[str, Any] = {}
    gpu_tier.measure(Tier(found, 3600), Models(tmp_path, TINY), FakeDevice(), {})
    assert [one["part"] for one in found["failed"]] == ["host"] and "rows" not in found
