"""The profile of a token's layers runs through, on a fake device and a tiny shape."""

from pathlib import Path

import pytest
from benchmarks import gpu_models, gpu_profile

from greenroom.device import FakeDevice
from greenroom.packed import PackedModel
from test_gpu_tier import MIXTRAL


def test_both_ways_are_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_profile, "REPEATS", 2)
    gpu_models.write(tmp_path / "small", MIXTRAL)
    device = FakeDevice(nbytes=1 << 30)
    found = list(gpu_profile.lines(PackedModel(tmp_path / "small"), device, tokens=2, most=3))
    text = "\n".join(found)
    assert "failed" not in text, text
    assert [line for line in found if line.startswith("==")] == [
        "== graphs, a fake device",
        "== read back, a fake device",
    ]
    assert text.count("cProfile") == 2 and text.count("operators") == 2 and "2 graphs in a row" in text
    assert all(f") {name}" in text for name in ("add", "send_back", "q_proj", "router"))


def test_what_fails_leaves_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> "list[str]":
        raise RuntimeError("no counters")

    monkeypatch.setattr(gpu_profile, "_operators", fails)
    monkeypatch.setattr(gpu_profile, "REPEATS", 2)
    gpu_models.write(tmp_path / "small", MIXTRAL)
    found = list(gpu_profile.lines(PackedModel(tmp_path / "small"), FakeDevice(nbytes=1 << 30), tokens=2, most=3))
    assert found.count("failed: RuntimeError: no counters") == 2 and any(line.endswith("router") for line in found)


def test_kernels_are_counted_once_where_they_overlap() -> None:
    class Range:
        def __init__(self, start: float, end: float) -> None:
            self.start, self.end = start, end

        def elapsed_us(self) -> float:
            return self.end - self.start

    class Kernel:
        def __init__(self, name: str, start: float, end: float) -> None:
            self.name, self.time_range = name, Range(start, end)

    events = [Kernel("a", 10, 14), Kernel("b", 12, 15), Kernel("a", 20, 21)]
    first, *others = gpu_profile._kernels(events, 0.5, 9)
    assert first == "device: 1.5 kernels a layer, busy for 3 of 6"
    assert others == ["  1.00    2.50 a", "  0.50    1.50 b"]
