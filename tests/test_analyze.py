"""What analyze says of a trace, against figures counted by hand, and that it says it without torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from greenroom.analyze import analyze
from greenroom.analyze.report import default_sizes
from greenroom.analyze.reuse import evenness, load, quantile, recall, reuse_distances
from greenroom.cache import POLICIES
from greenroom.cli import main
from greenroom.errors import ConfigError
from greenroom.trace import RoutingTrace, TraceWriter, write_trace

from test_trace import example  # isort: skip


def trace_of(experts: Any, num_experts: int, **others: Any) -> RoutingTrace:
    experts = np.array(experts, np.uint8)
    tokens = len(experts)
    given = {"offsets": np.array([0, tokens]), "prompt": np.zeros(tokens, np.bool_), "passes": np.arange(tokens + 1)}
    return RoutingTrace(num_experts=num_experts, experts=experts, **(given | others))


def test_reuse_by_hand() -> None:
    sets = np.array([[[0]], [[1]], [[0]], [[0]], [[2]], [[1]], [[9]]], np.uint8)
    distances = reuse_distances(sets, 3)
    assert distances.tolist() == [3, 1, 1, 0, 1]  # first uses; 0 after 1 and 2 tokens, 1 after 4
    assert quantile(distances, 0.5) == 2 and quantile(distances, 1.0) == 4
    assert quantile(np.array([3]), 0.5) is None
    assert load(sets, 3).tolist() == [[3, 2, 1]]


def test_evenness_by_hand() -> None:
    assert evenness(np.array([[2, 2, 2, 2], [8, 0, 0, 0], [0, 0, 0, 0]])).tolist() == [1.0, 0.0, 1.0]
    assert evenness(np.array([[5]])).tolist() == [1.0]


def test_recall_by_hand() -> None:
    sets = np.array([[[0, 1], [2, 3]]], np.uint8)
    guesses = np.array([[[[4, 4, 4]], [[3, 0, 2]]]], np.uint8)  # nobody guesses for the first layer
    assert recall(sets, guesses, 4).tolist() == [[0.5, 0.5, 1.0]]
    assert np.isnan(recall(sets[:0], guesses[:0], 4)).all()


def test_hits_by_hand() -> None:
    """One layer, one expert at a time, one slot: LRU holds the last; the optimum keeps 0 and lets 1 pass."""
    report = analyze(trace_of([[[0]], [[1]], [[0]], [[0]], [[1]]], 2), sizes=[0, 1, 2])
    assert report.hits["lru"] == [0.0, 0.2, 0.6] and report.hits["belady"] == [0.0, 0.4, 0.6]
    assert report.over_optimum("lru") == [1.0, pytest.approx(4 / 3), 1.0]


def test_prompt_and_decode_are_told_apart() -> None:
    trace = example(60)
    counts = {which: analyze(trace, which=which, policies=["lru"]).tokens for which in ("decode", "prompt", "all")}
    assert counts["prompt"] == trace.prompt.sum() and counts["decode"] + counts["prompt"] == counts["all"] == 60


def test_every_policy_and_all_figures_are_there() -> None:
    body = analyze(example(60)).json()
    assert body["hit_rate"].keys() == {*POLICIES, "belady"}
    assert json.loads(json.dumps(body)) == body
    assert all(len(row) == len(body["sizes"]) for row in body["hit_rate"].values())
    assert sum(body["reuse"]["counts"]) == body["tokens"] * 3 * 2


@pytest.mark.parametrize("experts,sizes", [(32, [4, 8, 12, 16, 20, 24, 28, 32]), (3, [1, 2, 3]), (1, [1]), (0, [])])
def test_default_sizes(experts: int, sizes: "list[int]") -> None:
    assert default_sizes(experts) == sizes


@pytest.mark.parametrize(
    "experts,num_experts",
    [
        (np.zeros((5, 1, 1)), 1),
        (np.zeros((0, 3, 2)), 4),
        (np.zeros((0, 0, 0)), 0),
        (np.full((4, 2, 1), 3), 3),
        (np.zeros((1, 1, 1)), 8),
    ],
)
def test_small_traces_have_a_sensible_outcome(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], experts: Any, num_experts: int
) -> None:
    path = tmp_path / "t.npz"
    write_trace(path, trace_of(experts, num_experts))
    assert main(["analyze", str(path), "--json"]) == 0
    body = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert body["tokens"] == len(experts) and body["num_experts"] == num_experts
    assert all(0 <= hit <= 1 for row in body["hit_rate"].values() for hit in row)


def test_analyze_prints_draws_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.npz"
    write_trace(path, example(60))
    assert main(["analyze", str(path), "--json", "--sizes", "1,3", "--policies", "lru,learned"]) == 0
    out = capsys.readouterr().out
    body = json.loads(out.splitlines()[-1])
    assert body["sizes"] == [1, 3] and body["hit_rate"].keys() == {"lru", "learned", "belady"}
    assert "recall" in out and "reuse" in out and "load" in out
    names = {f"{name}.{kind}" for name in ("activation", "hits", "recall", "reuse", "load") for kind in ("png", "svg")}
    assert {Path(plot).name for plot in body["plots"]} == names == {p.name for p in (tmp_path / "t").iterdir()}


def test_a_trace_without_a_suffix_has_its_pictures_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_trace(tmp_path / "T", example(30))
    assert main(["analyze", str(tmp_path / "T"), "--json", "--sizes", "1", "--policies", "lru"]) == 0
    plots = json.loads(capsys.readouterr().out.splitlines()[-1])["plots"]
    assert plots and {Path(plot).parent for plot in plots} == {tmp_path / "T-plots"}


@pytest.mark.slow
def test_pictures_are_the_same_bytes_again(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    write_trace(path, example(60))
    for folder in ("one", "two"):
        assert main(["analyze", str(path), "--plots", str(tmp_path / folder)]) == 0
    for one in (tmp_path / "one").glob("*.svg"):
        assert one.read_bytes() == (tmp_path / "two" / one.name).read_bytes()


def test_without_matplotlib_the_table_still_comes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_trace(tmp_path / "t.npz", example(30))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "greenroom.analyze.figures", raising=False)
    assert main(["analyze", str(tmp_path / "t.npz"), "--json"]) == 0
    captured = capsys.readouterr()
    assert "hit ratio" in captured.out and json.loads(captured.out.splitlines()[-1])["plots"] == []
    assert captured.err.splitlines() == ["greenroom: no pictures without matplotlib: pip install 'greenroom[plot]'"]


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--sizes", "1,x"], "--sizes"),
        (["--sizes", "9"], "9 experts"),
        (["--policies", "magic"], "magic"),
        (["--plots", "t.npz/below"], "cannot draw"),
    ],
)
def test_what_cannot_be_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: Any, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_trace("t.npz", example(30))
    assert main(["analyze", "t.npz", *flags]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("greenroom: ") and err.count("\n") == 1 and words in err
    assert out == "", "noticed after the analysis"
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_a_damaged_trace_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.npz").write_bytes(b"PK\x03\x04 no trace")
    assert main(["analyze", str(tmp_path / "t.npz")]) == 2
    assert capsys.readouterr().err.startswith("greenroom: ")


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(ConfigError, match="magic"):
        analyze(example(30), policies=["magic"])


def test_analyze_loads_no_torch(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t.npz", layers=1, num_experts=2, top_k=1) as writer:
        writer.add([1], experts=np.zeros((1, 1, 1), np.uint8), prompt=np.zeros(1, np.bool_))
    program = (
        "import sys; from greenroom.cli import main\n"
        f"code = main(['analyze', {str(tmp_path / 't.npz')!r}])\n"
        "assert code == 0 and 'torch' not in sys.modules, [m for m in sys.modules if 'torch' in m][:1]"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
