"""The benchmark's own parts: its synthetic models run in greenroom, route as promised, and its tables add up."""

import dataclasses
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from benchmarks import cpu, gguf_file, limits, packed_folder, report, routing
from benchmarks.cells import Cell
from benchmarks.shapes import PAIRINGS, SHAPES, Shape
from benchmarks.turns import TurnError, Worker
from benchmarks.work import Work
from safetensors import safe_open

from greenroom.cache import ExpertCache, replay
from greenroom.config import EngineSettings
from greenroom.engine import Engine
from greenroom.errors import ConfigError
from greenroom.evaluate.rounding import rounded
from greenroom.packed import PackedModel
from greenroom.quant import Format, Layout, dequantize

TINY = Shape(
    name="tiny",
    family="qwen3_moe",
    layers=2,
    hidden=256,
    intermediate=256,
    experts=8,
    top_k=2,
    heads=4,
    kv_heads=2,
    head_dim=64,
    vocab=2048,
)
TINY_MIXTRAL = dataclasses.replace(TINY, name="tiny-mixtral", family="mixtral")
TINY_GPT_OSS = dataclasses.replace(TINY, name="tiny-gpt-oss", family="gpt_oss", hidden=192, intermediate=320)
"""Rows of 3 and 5 groups of 64, as gpt-oss-20b's 45 are no power of two."""


def top_experts(shape: Shape, kind: str, count: int) -> "list[list[int]]":
    """What the first layer's router chooses for each token's bare embedding, least wanted first."""
    x = routing.embedding(shape.vocab, shape.hidden)[routing.token_ids(kind, shape.vocab, 0, count)].float()
    logits = x @ routing.router(0, shape.experts, shape.hidden).float().T
    return [row.flip(0).tolist() for row in logits.topk(shape.top_k).indices]


@pytest.mark.parametrize("shape", [TINY, TINY_MIXTRAL, TINY_GPT_OSS], ids=lambda shape: shape.name)
@pytest.mark.parametrize("width", list(PAIRINGS))
def test_a_synthetic_model_is_intact_and_routes_by_its_embeddings(tmp_path: Path, shape: Shape, width: str) -> None:
    packed_folder.write(tmp_path / "model", shape, PAIRINGS[width])
    packed = PackedModel(tmp_path / "model")
    assert packed.verify() == []
    tensors = [tensor for entry in packed.manifest.experts for tensor in entry.tensors]
    assert {t.format.bits for t in tensors if not t.name.endswith("_bias")} == {PAIRINGS[width].bits}
    engine = Engine(packed, EngineSettings(experts_per_layer=shape.experts, context=64))
    engine.runner.trace = trace = []
    ids = routing.token_ids("uniform", shape.vocab, 0, 16)
    with torch.no_grad():
        for token in ids:
            logits = engine.model(torch.tensor([[token]])).logits
    engine.close()
    assert torch.isfinite(logits).all()
    assert 0.1 < float(logits.std()) < 10
    routed = [set(experts) for layer, experts, _ in trace if layer == 0]
    wanted = [set(experts) for experts in top_experts(shape, "uniform", 16)]
    assert sum(a == b for a, b in zip(routed, wanted, strict=True)) >= 15  # a tie may tip
    assert sum(a == b for a, b in zip(routed, wanted[::-1], strict=True)) < 15  # the control: other tokens' experts


def test_a_synthetic_gpt_oss_has_biases_and_sinks(tmp_path: Path) -> None:
    packed_folder.write(tmp_path / "model", TINY_GPT_OSS, PAIRINGS["4"])
    packed = PackedModel(tmp_path / "model")
    plain = {entry.name: packed.read_tensor(entry) for entry in packed.manifest.tensors}
    entry = packed.manifest.experts[0]
    for layer in range(TINY_GPT_OSS.layers):
        at = f"model.layers.{layer}"
        assert not plain[f"{at}.mlp.router.bias"].any() and (plain[f"{at}.input_layernorm.weight"] == 1).all()
        for name in ("sinks", "q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias"):
            wanted = routing.BIAS * routing.deviation(1, into_residual=name.startswith("o_proj"))
            assert 0.1 * wanted < plain[f"{at}.self_attn.{name}"].abs().max() < 5 * wanted
    with safe_open(packed.folder / entry.file, "pt") as file:
        records = [file.get_tensor(f"{entry.module}.{expert}") for expert in range(entry.num_experts)]
    for tensor, cols, size in zip(entry.tensors[2:], (640, 192), (1.0, routing.ADDED * routing.SIZE), strict=True):
        assert (tensor.name.endswith("_bias"), tensor.cols, tensor.format.name) == (True, cols, "16-bit bfloat16")
        found = torch.cat([dequantize(tensor.part(record), 1, cols, tensor.format) for record in records])
        assert float(found.std()) == pytest.approx(routing.BIAS * size, rel=0.1)
        assert len(found.unique(dim=0)) == entry.num_experts


def test_a_synthetic_gpt_oss_s_logits_depend_on_its_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def logits(name: str) -> torch.Tensor:
        packed_folder.write(tmp_path / name, TINY_GPT_OSS, PAIRINGS["4"])
        engine = Engine(PackedModel(tmp_path / name), EngineSettings(experts_per_layer=2, context=256))
        config = engine.model.config
        assert (config.sliding_window, config.layer_types) == (128, ["sliding_attention", "full_attention"])
        assert config.rope_parameters["rope_type"] == "yarn"
        try:
            with torch.no_grad():
                return engine.model(torch.arange(160)[None]).logits  # more than a window
        finally:
            engine.close()

    wanted = logits("model")
    assert torch.equal(logits("again"), wanted)
    monkeypatch.setattr(routing, "BIAS", 0.0)  # the control
    assert (logits("without") - wanted).norm() > 0.01 * wanted.norm()


@pytest.mark.parametrize("links", [True, False])
def test_layers_may_repeat_the_experts_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refused(source: Path, target: Path) -> None:
        raise PermissionError("no links here")

    if not links:
        monkeypatch.setattr("os.link", refused)
    shape = dataclasses.replace(TINY, layers=12)  # of which some have longer names than those that they repeat
    packed_folder.write(tmp_path / "model", shape, PAIRINGS["2"], distinct=5)
    packed = PackedModel(tmp_path / "model")
    assert packed.verify() == []
    experts = packed.manifest.experts
    assert [entry.crc32 for entry in experts] == [experts[n % 5].crc32 for n in range(12)]
    assert len({entry.crc32 for entry in experts}) == 5 and len({entry.file for entry in experts}) == 12
    assert len({(packed.folder / entry.file).stat().st_ino for entry in experts}) == (5 if links else 12)
    engine = Engine(packed, EngineSettings(experts_per_layer=2, context=64))
    with torch.no_grad():
        assert torch.isfinite(engine.model(torch.arange(8)[None]).logits).all()
    engine.close()
    path = packed.folder / experts[11].file  # the control: a wrong byte of a repeated record is seen
    raw = bytearray(path.read_bytes())
    raw[experts[11].offset] ^= 1
    path.write_bytes(raw)
    assert any(experts[11].module in line for line in packed.verify())


@pytest.mark.parametrize("width", ["4", "3", "2"])
def test_a_gguf_file_holds_the_same_model(tmp_path: Path, width: str) -> None:
    path = tmp_path / "model.gguf"
    gguf_file.write(path, TINY, PAIRINGS[width])
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    embedding = tensors["token_embd.weight"].data.reshape(TINY.vocab, TINY.hidden)
    assert (embedding == routing.embedding(TINY.vocab, TINY.hidden).float().numpy()).all()
    for layer in range(TINY.layers):
        router = tensors[f"blk.{layer}.ffn_gate_inp.weight"].data
        assert (router == routing.router(layer, TINY.experts, TINY.hidden).float().numpy()).all()
        for part, into_residual in (("up", False), ("down", True)):
            found = tensors[f"blk.{layer}.ffn_{part}_exps.weight"]
            assert found.tensor_type.name == PAIRINGS[width].peer
            values = gguf.dequantize(found.data, found.tensor_type)
            wanted = routing.deviation(256, into_residual=into_residual)
            assert values.std() == pytest.approx(wanted, rel=0.2)
            assert abs(values.mean()) < 0.2 * wanted
            first, second = values.reshape(TINY.experts, -1)[:2]
            assert not np.array_equal(first, second)


def test_bytes_per_token_count_the_routed_share_of_the_experts(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_file.write(path, TINY, PAIRINGS["4"])
    one = gguf_file.bytes_per_token(path, TINY)
    two = gguf_file.bytes_per_token(path, dataclasses.replace(TINY, top_k=4))
    experts = 3 * TINY.layers * TINY.hidden * TINY.intermediate * 144 // 256
    assert two - one == 2 * experts


@pytest.mark.parametrize(
    ("name", "kind", "wanted"),
    [
        ("qwen3-30b-a3b-12", "uniform", {16: 0.12, 32: 0.25, 64: 0.5, 96: 0.75}),
        ("qwen3-30b-a3b-12", "lifelike", {32: 0.81, 48: 0.91}),
        ("gpt-oss-20b-24", "lifelike", {8: 0.66, 12: 0.80, 16: 0.90, 24: 0.98}),
    ],
)
def test_routing_hits_an_lru_cache_as_often_as_promised(name: str, kind: str, wanted: "dict[int, float]") -> None:
    shape = dataclasses.replace(SHAPES[name], vocab=4096 if kind == "lifelike" else routing.ROWS)
    choices = top_experts(dataclasses.replace(shape, hidden=512), kind, 600)
    for slots, share in wanted.items():
        cache = ExpertCache(layers=1, capacities=[slots], staging=1)
        accesses = replay(cache, [(0, experts) for experts in choices])[100:]
        hits = sum(len(access.hits) for access in accesses) / (len(accesses) * shape.top_k)
        assert hits == pytest.approx(share, abs=0.05)
    quarter = ExpertCache(layers=1, capacities=[shape.experts // 4], staging=1)
    shuffled = replay(quarter, [(0, experts) for experts in choices[::37] + choices[::41]])
    assert sum(len(access.hits) for access in shuffled) / (len(shuffled) * shape.top_k) < 0.5  # the control


def test_uniform_ids_do_not_come_again_soon() -> None:
    ids = routing.token_ids("uniform", 32000, 5, 2000)
    assert len(set(ids)) == 2000
    assert max(ids) < 32000


def test_a_cell_s_sequence_goes_on_where_the_last_one_ended() -> None:
    cell = Cell(shape=TINY, pairing=PAIRINGS["4"], fits=1.0, routing="lifelike", prompt=8, tokens=4)
    first, second = cell.sequence(0), cell.sequence(1)
    assert (len(first["prompt"]), len(first["timed"])) == (8, 4)
    flat = [first["prompt"], first["warm"], first["timed"], second["prompt"]]
    ids = [token for part in flat for token in part]
    assert ids == [(ids[0] + i) % TINY.vocab for i in range(len(ids))]


def test_an_unfinished_file_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(layer: int, experts: int, hidden: int) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(routing, "router", fail)
    for write in (
        lambda: packed_folder.write(tmp_path / "model", TINY, PAIRINGS["4"]),
        lambda: gguf_file.write(tmp_path / "model.gguf", TINY, PAIRINGS["4"]),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_drops_the_oldest_models_and_then_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(tmp_path)
    ours, theirs = work.models(TINY, PAIRINGS["4"], peer=True)
    assert theirs is not None
    before = ours.stat().st_mtime_ns
    assert work.models(TINY, PAIRINGS["4"], peer=True) == (ours, theirs)
    assert ours.stat().st_mtime_ns == before  # reused
    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr("benchmarks.work.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(ConfigError, match="--work"):
        work.models(TINY, PAIRINGS["3"], peer=True)
    assert list(tmp_path.iterdir()) == []


def test_readahead_is_put_back(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    setting = tmp_path / "class" / "bdi" / f"{device >> 8 & 0xFFF}:{device & 0xFF}" / "read_ahead_kb"
    setting.parent.mkdir(parents=True)
    setting.write_text("8192\n")
    with pytest.raises(KeyboardInterrupt), limits.readahead(tmp_path, 128 << 10, sys=tmp_path) as done:
        assert done and setting.read_text() == "128"
        raise KeyboardInterrupt
    assert setting.read_text() == "8192"
    with limits.readahead(tmp_path, 128 << 10, sys=tmp_path / "nowhere") as done:
        assert not done


@pytest.mark.parametrize(("root", "file"), [("v1", "memory.limit_in_bytes"), ("v2", "memory.max")])
def test_a_limit_is_a_group_of_either_version(tmp_path: Path, root: str, file: str) -> None:
    top = tmp_path / "memory" if root == "v1" else tmp_path
    top.mkdir(exist_ok=True)
    if root == "v1":
        (top / file).touch()
    with limits.Limit(1 << 20, root=tmp_path) as limit:
        group = limit._folder
        assert (group / file).read_text() == str(1 << 20)
        limit.enter()
        assert (group / "cgroup.procs").exists()
        for path in group.iterdir():  # a real group's files go with it
            path.unlink()
    assert not group.exists()


def test_a_limit_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot limit memory"), limits.Limit(1, root=tmp_path / "nowhere"):
        pass


def test_a_worker_that_dies_says_why() -> None:
    script = "import sys; print('{}', flush=True); input(); sys.exit('the disk is on fire')"
    with Worker("it", [sys.executable, "-c", script]) as worker, pytest.raises(TurnError, match="the disk is on fire"):
        worker.trial({})
    with (
        pytest.raises(TurnError, match="lack of memory"),
        Worker("it", [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]),
    ):
        pass


def test_a_worker_s_children_end_with_it(tmp_path: Path) -> None:
    script = f"echo '{{}}'; (sleep 1.5; touch {tmp_path}/alive) & wait"
    with pytest.raises(KeyboardInterrupt), Worker("it", ["sh", "-c", script]):
        raise KeyboardInterrupt
    time.sleep(2)
    assert not (tmp_path / "alive").exists()


def _row(ours: "list[float]", theirs: "list[float]", **more: float) -> "dict[str, object]":
    def trials(speeds: "list[float]") -> "list[dict[str, float]]":
        common = {
            "prompt_tokens_per_s": 100.0,
            "bytes_read_per_token": 0.0,
            "ram_bytes_per_s": 1e10,
            "disk_bytes_per_s": 1e9,
            "others_cores": 0.01,
        }
        shares = {"stall_share": 0.1, "experts_share": 0.5, "dense_share": 0.25}
        return [{**common, **shares, "hit_rate": 1.0, "tokens_per_s": speed} for speed in speeds]

    found = {"greenroom": trials(ours), "llama.cpp": trials(theirs), "llama.cpp, mapped": trials([1.0])}
    return {
        "shape": "tiny",
        "fits": 1.0,
        "routing": "uniform",
        "sequence": "ids far apart",
        "formats": {"greenroom": "4-bit g64", "llama.cpp": "Q4_K"},
        "nbytes": {"greenroom": 5 * 10**9, "llama.cpp": 6 * 10**9},
        "touched_per_token": {"greenroom": 5 * 10**8, "llama.cpp": 6 * 10**8},
        "trials": found,
        "medians": {name: {**trials[0], "tokens_per_s": sorted(t["tokens_per_s"] for t in trials)[len(trials) // 2]}
                    for name, trials in found.items()},
        **more,
    }  # fmt: skip


def test_the_table_takes_medians_and_the_peer_s_better_variant() -> None:
    row = _row([10.0, 12.0, 50.0], [5.0, 6.0, 7.0])
    assert report.ratio(row) == 2.0
    assert report.share_of_floor(row, "greenroom") == pytest.approx(0.6)
    assert "12.00 (10–50) | 0.60 | 15% | 6.00 (5–7) | 0.36 | **2.00**" in report.tables([row])
    assert "| uniform |" in report.tables([_row([1.0], [1.0], fits=0.5)])
    assert report.tables([row, row]).endswith("\n\ntiny: uniform is ids far apart")


def test_bytes_that_differ_from_the_cache_core_s_are_told() -> None:
    row = _row([1.0], [1.0])
    for trial in row["trials"]["greenroom"]:  # type: ignore[index]
        trial["bytes_predicted_per_token"] = 0.0
    assert report.mispredicted([row]) == []
    row["trials"]["greenroom"][0]["bytes_predicted_per_token"] = 4096.0  # type: ignore[index]
    assert len(report.mispredicted([row])) == 1


def test_disturbed_trials_are_told() -> None:
    row = _row([1.0], [1.0, 2.0])
    assert report.disturbed([row]) == []
    row["trials"]["llama.cpp"][1]["others_cores"] = 0.9  # type: ignore[index]
    assert report.disturbed([row]) == ["tiny 4-bit g64, llama.cpp: 2.00 tokens/s while others kept 0.9 cores busy"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shapes", "gpt-2"], "unknown shape"),
        (["--shapes", "gpt-oss-20b-24"], "unknown shape"),  # nobody writes its file for llama.cpp
        (["--bits", "5"], "unknown width of qwen3-30b-a3b-12 '5'"),
        (["--shapes", "demo-64", "--bits", "3"], "unknown width of demo-64 '3': choose from 4"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--fits", "50"], "between 0 and 1"),
        (["--json", "/nowhere/out.json"], "lies in no folder"),
        (["--peer", "/nowhere/python"], "cannot run /nowhere/python"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    tmp_path: Path, flags: "list[str]", message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cpu.main(["--work", str(tmp_path), "--only", "ram", *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_a_cell_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(bench: object, cell: Cell) -> "dict[str, object]":
        if cell.pairing.bits == 4:
            raise TurnError("it stopped")
        return _row([2.0], [1.0])

    monkeypatch.setattr("benchmarks.cpu.SHAPES", {"tiny": TINY})
    monkeypatch.setattr("benchmarks.cells.Bench.measure", measure)
    flags = ["--work", str(tmp_path), "--only", "ram", "--shapes", "tiny", "--bits", "4", "3", "--peer", sys.executable]
    monkeypatch.setattr("benchmarks.peer.check", lambda python: None)
    assert cpu.main(flags) == 2
    said = capsys.readouterr().out
    assert "**2.00**" in said and "failed: tiny, 4-bit g64 and Q4_K, in RAM: it stopped" in said
    found = json.loads(said.splitlines()[-1])
    assert (len(found["cells"]), len(found["failed"])) == (1, 1)


@pytest.mark.slow
def test_greenroom_s_worker_reads_what_the_cache_core_predicts(tmp_path: Path) -> None:
    packed_folder.write(tmp_path / "model", TINY, PAIRINGS["4"])
    job = {
        "model": str(tmp_path / "model"),
        "threads": 1,
        "context": 64,
        "ram": 1 << 30,
        "activation_bits": 16,
        "kv_bits": 16,
        "first": [1],
    }
    cell = Cell(shape=TINY, pairing=PAIRINGS["4"], fits=0.5, routing="uniform", prompt=8, tokens=4)
    command = [sys.executable, "-m", "benchmarks.greenroom_worker", json.dumps(job)]
    with Worker("greenroom", command) as worker:
        trial = worker.trial(cell.sequence(0))
    assert worker.about["experts"] == TINY.layers * TINY.experts
    assert trial["bytes_predicted_per_token"] == trial["bytes_read_per_token"]
    assert trial["tokens_per_s"] > 0


def test_the_page_on_the_paper_is_what_the_results_say() -> None:
    from benchmarks import paper

    assert paper.PAGE.read_text() == paper.page(), "run python -m benchmarks.paper"


def test_the_page_names_what_there_is() -> None:
    from benchmarks import paper

    for name in re.findall(r"figures/[\w.-]+", paper.page()):
        assert (paper.PAGE.parent / name).is_file()
    for _, where, command in paper.IDEAS:
        for room in re.findall(r"`([a-z]+)[`.]", where):
            assert any((paper.ROOT / "src" / "greenroom").glob(f"{room}*")), room
        assert "greenroom" in command or "prompt_bytes_read" in command


# --- llama.cpp's formats


def test_the_section_on_llama_cpps_formats_is_what_the_results_say() -> None:
    from benchmarks import peer_quality_page as pages

    text = pages.PAGE.read_text()
    assert pages.section() in text + "\n", "run python -m benchmarks.peer_quality_page"
    assert pages.page(text) == text and pages.page(text.replace(" KL", " LK")) != text


def test_bits_for_the_same_divergence_by_hand() -> None:
    from benchmarks.peer_quality_page import bits_for, frontier

    points = frontier([(4.0, 0.1), (3.0, 0.8), (3.5, 0.9), (5.0, 0.1), (2.0, 6.4)])
    assert points == [(2.0, 6.4), (3.0, 0.8), (4.0, 0.1)], "others are beaten in both"
    assert bits_for(0.1, points) == 4.0 and bits_for(6.4, points) == 2.0
    assert bits_for(0.8**0.5 * 0.1**0.5, points) == pytest.approx(3.5)
    assert bits_for(0.05, points) is None and bits_for(7.0, points) is None


class Halving:
    """A peer that halves what it is shown, and notes in which rows, and what it is told of their columns."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, tuple[int, ...]]] = []
        self.told: list[torch.Tensor | None] = []

    def round(self, kind: Any, weight: torch.Tensor, importance: "torch.Tensor | None") -> "tuple[torch.Tensor, int]":
        self.shown.append((kind.name, tuple(weight.shape)))
        self.told.append(importance)
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        return weight / 2, weight.numel() // block * nbytes


@pytest.mark.parametrize(
    ("name", "shape", "shown", "bits"),
    [
        ("Q4_K", (8, 512), ("Q4_K", (8, 512)), 4.5),
        ("Q4_K", (8, 576), ("Q4_K", (2, 2304)), 4.5),
        ("Q4_K/Q5_0", (8, 576), ("Q5_0", (8, 576)), 5.5),
        ("Q4_K/Q5_0", (8, 512), ("Q4_K", (8, 512)), 4.5),
        ("Q4_0", (8, 576), ("Q4_0", (8, 576)), 4.5),
        ("Q3_K", (4, 576), ("Q3_K", (1, 2304)), 3.4375),
    ],
)
def test_rows_that_are_no_whole_blocks(
    name: str, shape: "tuple[int, int]", shown: "tuple[str, tuple[int, int]]", bits: float
) -> None:
    from benchmarks.peer_rounding import way

    peer = Halving()
    one, weight = way(name, peer), torch.randn(*shape)
    assert torch.equal(one.round(weight), weight / 2) and peer.shown == [shown]
    assert one.nbytes(*shape) * 8 == bits * weight.numel()


def test_joined_rows_are_as_important_as_they_are() -> None:
    from benchmarks.peer_rounding import Ggml

    peer, inputs = Halving(), torch.tensor([[1.0, 2.0, 3.0] * 192, [0.0] * 576])
    Ggml("Q4_K+", peer, None).round(torch.randn(8, 576), inputs)
    assert peer.shown == [("Q4_K", (2, 2304))] and peer.told[0] is not None
    assert peer.told[0].tolist() == [0.5, 2.0, 4.5] * 768


@pytest.mark.parametrize("name", ["4g64+", "Q4_K+"])
def test_a_format_for_a_text_wants_one(name: str) -> None:
    from benchmarks.peer_rounding import way

    with pytest.raises(ConfigError, match="--calibrate"):
        way(name, Halving())


@pytest.mark.parametrize("name", ["Q9_K", "4g65", "4x", "Q4_K/Q4_0", ""])
def test_a_format_that_is_none_is_refused(name: str) -> None:
    from benchmarks.peer_rounding import way

    with pytest.raises(ConfigError):
        way(name, Halving())


def test_our_formats_round_as_packing_does() -> None:
    from benchmarks.peer_rounding import way

    weight = torch.randn(8, 128)
    one = way("3g32", Halving())
    assert torch.equal(one.round(weight), rounded(weight, Format(bits=3, group_size=32)))
    assert not torch.equal(one.round(weight), rounded(weight, Format(bits=3, group_size=64))), "control"
    assert one.nbytes(8, 128) == Layout(8, 128, Format(bits=3, group_size=32)).nbytes
