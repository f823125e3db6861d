"""The paper's table, at a small scale on a fake device."""

import argparse
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from greenroom.cli import bench as bench_command
from greenroom.cli import main, paper
from greenroom.config import EngineSettings
from greenroom.device import FakeDevice
from greenroom.engine import Engine
from greenroom.errors import ConfigError
from greenroom.packed import PackedModel
from greenroom.packing import pack
from on_device import VRAM


def given(*arguments: str) -> argparse.Namespace:
    """What `greenroom bench` would be given."""
    parser = argparse.ArgumentParser()
    bench_command.add(parser.add_subparsers())
    return parser.parse_args(["bench", "-", *arguments])


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greenroom.device.find_gpu", lambda: FakeDevice(link_bytes_per_s=1e8))


def bench(packed: PackedModel, capsys: pytest.CaptureFixture[str], *more: str) -> "tuple[list[str], dict[str, Any]]":
    command = ["bench", str(packed.folder), "--paper", "--tokens", "6", "--trials", "1", "--json", *more]
    assert main(command) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    return lines[:-1], json.loads(lines[-1])


@pytest.mark.slow
def test_the_papers_rows(packed4: PackedModel, capsys: pytest.CaptureFixture[str], a_gpu: None) -> None:
    pytest.importorskip("accelerate")
    lines, report = bench(packed4, capsys)
    names = [(row["name"], row["slots"]) for row in report["rows"]]
    all_fit = packed4.manifest.experts[0].num_experts
    assert names == [
        *(("full", 2), ("full", 4), ("without prefetch", 2), ("without prefetch", 4)),
        *(("without cache and prefetch", 0), ("naive", 0), ("greenroom's defaults", all_fit)),
    ]
    rows = {(row["name"], row["slots"]): row for row in report["rows"]}
    # what is sent follows from the rows' own rules
    record, layers = packed4.manifest.experts[0].record_nbytes, len(packed4.manifest.experts)
    assert rows["naive", 0]["bytes_up_per_token"] == layers * 6 * record
    assert rows["without cache and prefetch", 0]["hit_rate"] == 0 < rows["without prefetch", 2]["hit_rate"]
    assert rows["without prefetch", 2]["hit_rate"] < rows["without prefetch", 4]["hit_rate"]
    for row in report["rows"]:
        if row["name"] != "greenroom's defaults":
            assert row["tokens_per_s"] <= 1.01 * row["floor_tokens_per_s"] or row["name"] == "naive"
        assert row["paper"] == []  # the paper has no 4 bits
        assert row["bytes_read_per_token"] == 0  # what is timed waits for no disk
        assert row["vram"] == (None if row["name"] == "naive" else 1 << 30)  # all that the device has
    assert sum("times the floor's time" in line for line in lines) == len(names)
    assert any(line.startswith("full, k = 2 in 1.07 GB: ") for line in lines)


def _cases(free: int, *more: str) -> "list[tuple[str, int, int]]":
    return paper.cases(given(*more), free)


def test_each_k_has_its_gpus_memory() -> None:
    gb = 10**9
    assert _cases(80 * gb) == [
        *(("full", 2, 12 * gb), ("full", 4, 16 * gb)),
        *(("without prefetch", 2, 12 * gb), ("without prefetch", 4, 16 * gb)),
        *(("without cache and prefetch", 2, 12 * gb), ("naive", 2, 12 * gb)),
        *(("greenroom's defaults", 2, 12 * gb), ("greenroom's defaults", 4, 16 * gb)),
    ]
    assert {case[1:] for case in _cases(14 * gb)} == {(2, 12 * gb), (4, 14 * gb)}  # no more than what is free
    for case in (_cases(10 * gb), _cases(80 * gb, "--vram", "10GB")):
        assert {one[1:] for one in case} == {(2, 10 * gb), (4, 10 * gb)}
        assert [one[0] for one in case].count("greenroom's defaults") == 1
    assert {case[1:] for case in _cases(80 * gb, "--experts-per-layer", "3")} == {(3, 80 * gb)}
    assert {case[1:] for case in _cases(80 * gb, "--experts-per-layer", "2")} == {(2, 12 * gb)}


def test_defaults_take_the_slots_that_their_budget_holds(packed4: PackedModel) -> None:
    """And a row says how many that were."""
    device, record = FakeDevice(), packed4.manifest.experts[0].record_nbytes
    options = given("--tokens", "2", "--trials", "1")
    engine = Engine(packed4, EngineSettings(vram=VRAM), device=device)
    fixed, layers = engine.plan.fixed, len(engine.plan.experts)
    engine.close()
    row = paper.measure(paper.DEFAULTS, packed4, device, options, 2, fixed + (3 * layers + 1) * record, 1e9)
    assert row.slots == 3 + 1 / layers
    assert paper.measure("full", packed4, device, options, 2, VRAM, 1e9).slots == 2


@pytest.mark.slow
def test_naive_takes_a_quarter_of_the_tokens(packed4: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    taken: list[int] = []
    real = paper._advance

    def noted(running: Any, device: Any, ids: Any, prompt: int) -> Any:
        taken.append(len(ids) - prompt)
        return real(running, device, ids, prompt)

    monkeypatch.setattr(paper, "_advance", noted)
    for count, timed in (("24", 6), ("6", 4), ("2", 2)):
        options = given("--tokens", count, "--trials", "1")
        row = paper.measure("naive", packed4, FakeDevice(), options, 2, VRAM, 1e9)
        assert taken[-1] == timed and (row.vram, row.slots) == (None, 0)
        assert row.bytes_up_per_token == sum(e.num_experts * e.record_nbytes for e in packed4.manifest.experts)


@pytest.mark.parametrize("name", ["full", "naive"])
def test_a_row_leaves_nothing_behind(packed4: PackedModel, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The next one wants the memory, whether or not Python happens to look for cycles by itself."""
    pytest.importorskip("accelerate")
    left: list[Any] = []
    real = paper._advance

    def noted(running: Any, *others: Any, **named: Any) -> Any:
        left.append(weakref.ref(running.model))
        return real(running, *others, **named)

    monkeypatch.setattr(paper, "_advance", noted)
    device = FakeDevice()
    options = given("--tokens", "2", "--trials", "1")
    gc.disable()
    try:
        paper.measure(name, packed4, device, options, 2, VRAM, 1e9)
    finally:
        gc.enable()
    assert left and all(model() is None for model in left) and device.allocated == 0


def test_the_papers_figures_stand_beside_its_bits() -> None:
    assert paper.PAPER["full", 2][0] == 3.061 and paper.PAPER["naive", 3][-1] == 0.58
    for bits in (2, 3):
        full, naive = paper.PAPER["full", bits], paper.PAPER["naive", bits]
        assert all(2 < one / other < 3.5 for one, other in zip(full, naive, strict=True))


def test_naive_offloading_computes_the_same(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from greenroom.naive import NaiveModel

    # attention that rounds no activations, which would make more of small differences between the experts' kernels
    packed = pack(checkpoint, tmp_path / "packed", attention_bits=16)
    ours = Engine(packed, EngineSettings(experts_per_layer=2, vram=VRAM, cpu_experts=False), device=FakeDevice())
    prompt = torch.arange(4, 24)[None]
    with torch.no_grad():
        theirs = NaiveModel(packed, FakeDevice()).model(prompt).logits
        torch.testing.assert_close(theirs, ours.model(prompt).logits, rtol=1e-4, atol=1e-4)
    ours.close()


def test_without_accelerate_it_says_so(packed4: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from greenroom.naive import NaiveModel

    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(ConfigError, match="pip install accelerate"):
        NaiveModel(packed4, FakeDevice())


def test_the_links_rate() -> None:
    assert paper.link_bandwidth(FakeDevice(link_bytes_per_s=5e9)) == pytest.approx(5e9)


def test_no_gpu_is_one_line(packed4: PackedModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(packed4.folder), "--paper"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--vram needs" in error
