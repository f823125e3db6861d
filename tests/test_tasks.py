"""Tasks: what a local file becomes for lm-eval, and, where that is installed, the answers of transformers' model."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from greenroom import library
from greenroom.errors import ConfigError
from greenroom.evaluate import tasks
from greenroom.packing import pack
from test_cli import cache, call, packed, refused  # noqa: F401

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs greenroom[eval]")

FILES: "dict[str, list[dict[str, Any]]]" = {
    "choice": [
        {"query": f"Question: what is {n}?\n", "choices": ["he", "well", f"{n}", "hello"], "gold": 2} for n in range(6)
    ],
    "last": [{"context": f"hello, hello {n}: well,", "continuation": "well"} for n in range(6)],
    "sums": [{"question": f"{n} and {n}?", "answer": f"{n}+{n}.\n#### {2 * n}"} for n in range(7)],
}
KINDS = {"choice": "multiple_choice", "last": "loglikelihood", "sums": "generate_until"}


@pytest.fixture
def files(tmp_path: Path) -> "dict[str, Path]":
    paths = {name: tmp_path / f"{name}.jsonl" for name in FILES}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(line) + "\n" for line in FILES[name]))
    return paths


def test_fields_say_the_kind(files: "dict[str, Path]") -> None:
    for name, path in files.items():
        task = tasks.task_of(path)
        assert task["output_type"] == KINDS[name] and task["task"] == name
        assert task["dataset_kwargs"] == {"data_files": str(path)}


@pytest.mark.parametrize("text", ["", "[1]\n", '{"query": "q"}\n', "no json\n"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"odd\.jsonl"):
        tasks.task_of(path)


def test_without_lm_eval_one_line_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "greenroom[eval]" in refused(capsys, "eval", "demo", "--tasks", "piqa")
    assert "--text" in refused(capsys, "eval", "demo", "--tasks", "piqa", "--text", "x")
    assert "--limit" in refused(capsys, "eval", "demo", "--tasks", "piqa", "--limit", "0")


def test_the_dtype_of_activations_is_passed_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(tasks, "run", lambda *_, **others: given.update(others) or {})
    assert call(capsys, "eval", "demo", "--tasks", "piqa", "--dtype", "bfloat16", "--prefetch", "2")[0] == 0
    assert given["dtype"] == "bfloat16" and given["prefetch"] == 2
    assert library.engine_settings(**{name: given[name] for name in ("dtype", "prefetch")}).dtype == "bfloat16"


@needs_lm_eval
def test_a_task_that_nobody_knows(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert "no-such-task" in refused(capsys, "eval", str(packed), "--tasks", "no-such-task")


@needs_lm_eval
def test_an_answer_needs_room(
    packed: Path,  # noqa: F811
    files: "dict[str, Path]",
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "256" in refused(capsys, "eval", str(packed), "--tasks", str(files["sums"]), "--context", "128")


@needs_lm_eval
def test_answers_equal_those_of_transformers(
    cache: Path,  # noqa: F811
    files: "dict[str, Path]",
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At 16 bits, beside lm-eval's own adapter around the checkpoint; at 2 bits something must differ."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    library.find("demo")
    source = cache / "demo" / "checkpoint"
    bits = {"expert_bits": 16, "attention_bits": 16, "head_bits": 16}
    exact = pack(source, tmp_path / "exact", **bits).folder
    flags = ["--tasks", ",".join(map(str, files.values())), "--limit", "5", "--context", "512", "--json"]
    code, out, _ = call(capsys, "eval", str(exact), *flags)
    got = json.loads(out[-1])["tasks"]
    own = HFLM(str(source), device="cpu", dtype="float32", batch_size=1, max_length=512)
    jobs = [tasks.task_of(path) for path in files.values()]
    want = lm_eval.simple_evaluate(model=own, tasks=jobs, limit=5, log_samples=False, bootstrap_iters=10)["results"]
    assert code == 0 and got.keys() == set(FILES)
    for name, result in got.items():
        assert result["questions"] == 5 and result["metrics"]
        for metric, figure in result["metrics"].items():
            key = metric.replace(" (", ",").rstrip(")") if "(" in metric else f"{metric},none"
            assert figure["value"] == pytest.approx(want[name][key], rel=1e-3), (name, metric)
    coarse = pack(source, tmp_path / "coarse", expert_bits=2, attention_bits=2, head_bits=2).folder
    code, out, _ = call(capsys, "eval", str(coarse), *flags)
    other = json.loads(out[-1])["tasks"]["last"]["metrics"]["perplexity"]["value"]
    assert other != pytest.approx(want["last"]["perplexity,none"], rel=1e-2)
