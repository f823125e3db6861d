"""`greenroom eval` and receipts, end to end, against transformers' own perplexity by the same protocols."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from greenroom import library
from greenroom.packed import PackedModel
from greenroom.packing import pack
from test_cli import cache, call, packed, refused  # noqa: F401

CONTEXT = 48


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_bytes("".join(f"hello {n}, well met;\r\nhell is {n * 7 % 13} others.\n" for n in range(12)).encode())
    return path


@pytest.fixture(scope="module")
def exact(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The demo at 16 bits."""
    folder = tmp_path_factory.mktemp("exact") / "model"
    library.find("demo")
    source = cache / "demo" / "checkpoint"
    return pack(source, folder, expert_bits=16, attention_bits=16, head_bits=16).folder


class Oracle:
    """transformers' model, and perplexity as GPTQ's and transformers' own scripts compute it."""

    def __init__(self, folder: Path, text: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids

    @torch.no_grad()
    def separate(self) -> float:
        count = self.ids.shape[1] // CONTEXT
        windows = [self.ids[:, i * CONTEXT : (i + 1) * CONTEXT] for i in range(count)]
        return math.exp(sum(float(self.model(one, labels=one).loss) for one in windows) / count)

    @torch.no_grad()
    def strided(self, stride: int) -> float:
        total, tokens, done = 0.0, 0, 0
        for start in range(0, self.ids.shape[1], stride):
            end = min(start + CONTEXT, self.ids.shape[1])
            window, labels = self.ids[:, start:end], self.ids[:, start:end].clone()
            labels[:, : -(end - done)] = -100
            count = int((labels[:, 1:] != -100).sum())
            total += float(self.model(window, labels=labels).loss) * count
            tokens, done = tokens + count, end
            if end == self.ids.shape[1]:
                break
        return math.exp(total / tokens)


@pytest.fixture(scope="module")
def oracle(cache: Path, text: Path) -> Oracle:  # noqa: F811
    library.find("demo")
    return Oracle(cache / "demo" / "checkpoint", text)


def measure(capsys: pytest.CaptureFixture[str], model: "str | Path", text: Path, *flags: str) -> "dict[str, Any]":
    common = ["--text", str(text), "--context", str(CONTEXT), "--json"]
    code, out, err = call(capsys, "eval", str(model), *common, *flags)
    assert code == 0, err
    report: dict[str, Any] = json.loads(out[-1])
    return report


def source_of(cache: Path) -> str:  # noqa: F811
    return str(cache / "demo" / "checkpoint")


@pytest.mark.parametrize("stride", [None, 17, 32])
def test_perplexity_at_16_bits_equals_transformers(
    exact: Path,
    cache: Path,  # noqa: F811
    text: Path,
    oracle: Oracle,
    stride: "int | None",
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--original", source_of(cache)] + ([] if stride is None else ["--stride", str(stride)])
    report = measure(capsys, exact, text, *flags)
    want = oracle.separate() if stride is None else oracle.strided(stride)
    assert report["perplexity"]["value"] == pytest.approx(want, rel=2e-5)
    assert report["original_perplexity"]["value"] == pytest.approx(want, rel=1e-6)
    assert report["perplexity_ratio"]["value"] == pytest.approx(1, abs=2e-5)
    assert 0 <= report["kl"]["value"] < 1e-7 and report["top1_agreement"]["value"] == 1
    assert report["same_source"] is True and report["stride"] == stride
    if stride is not None:
        assert report["tokens"] == oracle.ids.shape[1] - 1
        assert abs(want - oracle.separate()) > 1e-3 * want, "negative control: the protocols differ"


def test_fewer_bits_differ(
    packed: Path,  # noqa: F811
    exact: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Negative control: at 4 bits the same comparison finds a difference, and says how sure it is."""
    report = measure(capsys, "demo", text)
    assert report["kl"]["value"] > 1e-5 and 0 < report["kl"]["se"] < report["kl"]["value"]
    assert report["nbytes"] < PackedModel(exact).nbytes and report["settings"]["expert_bits"] == 4


def test_token_by_token_equals_the_whole_window(
    packed: Path,  # noqa: F811
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = measure(capsys, "demo", text, "--windows", "2")
    steps = measure(capsys, "demo", text, "--windows", "2", "--token-by-token")
    strided = measure(capsys, "demo", text, "--windows", "2", "--token-by-token", "--stride", "20")
    assert (whole["mode"], steps["mode"]) == ("whole-window", "token-by-token")
    assert steps["perplexity"]["value"] == pytest.approx(whole["perplexity"]["value"], rel=1e-3)
    assert steps["kl"]["value"] == pytest.approx(whole["kl"]["value"], rel=0.05)
    assert strided["perplexity"]["value"] != pytest.approx(whole["perplexity"]["value"], rel=1e-3)


def test_figures_do_not_depend_on_memory(
    packed: Path,  # noqa: F811
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = measure(capsys, "demo", text, "--windows", "2", "--experts-per-layer", "1")
    many = measure(capsys, "demo", text, "--windows", "2", "--experts-per-layer", "8", "--ram", "2GiB")
    assert few["perplexity"] == many["perplexity"] and few["kl"] == many["kl"]


def test_perplexity_alone(packed: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    report = measure(capsys, packed, text, "--no-original", "--windows", "1")
    assert report["kl"] is None and report["perplexity"]["se"] is None and report["original_nbytes"] is None


@pytest.mark.slow
def test_an_unpacked_checkpoint_is_packed_first(
    cache: Path,  # noqa: F811
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    library.find("demo")
    report = measure(capsys, source_of(cache), text, "--windows", "1", "--expert-bits", "2")
    assert report["settings"]["expert_bits"] == 2 and report["same_source"] is True


def test_what_cannot_be_measured_is_one_line(
    packed: Path,  # noqa: F811
    cache: Path,  # noqa: F811
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty, latin = tmp_path / "empty", tmp_path / "latin"
    empty.write_text("")
    latin.write_bytes(b"caf\xe9")
    model = ["eval", str(packed), "--original", source_of(cache)]
    there = [*model, "--context", str(CONTEXT), "--text"]
    for arguments, words in [
        (model, "--text"),
        ([*there, str(tmp_path / "nowhere")], "nowhere"),
        ([*there, str(empty)], "0 tokens"),
        ([*there, str(latin)], "UTF-8"),
        ([*there, str(text), "--stride", "0"], "--stride"),
        ([*there, str(text), "--windows", "0"], "--windows"),
        ([*model, "--text", str(text), "--context", "1"], "--context"),
        ([*model, "--text", str(text), "--context", "4096"], "positions"),
        (["eval", str(packed), "--text", str(text)], "--original"),
        ([*there, str(text), "--original", str(packed)], "packed"),
        ([*there, str(text), "--original", "nowhere"], "nowhere"),
        ([*there, str(text), "--no-original", "--receipt"], "--no-original"),
        ([*there, str(text), "--receipt", "--activation-bits", "8"], "--activation-bits"),
        ([*there, str(text), "--receipt", "--dtype", "bfloat16"], "--dtype"),
        ([*there, str(text), "--limit", "3"], "--tasks"),
        ([*there, str(text), "--include-path", str(tmp_path)], "--tasks"),
        ([*there, str(text), "--ram", "1MiB"], "--ram"),
        (["pack", "demo", str(tmp_path / "new"), "--windows", "3"], "--receipt"),
        (["pack", "demo", str(tmp_path / "new"), "--receipt", str(empty / "x")], "read"),
    ]:
        assert words in refused(capsys, *arguments), arguments
    assert not (tmp_path / "new").exists()


# --- receipts


def test_pack_keeps_a_receipt_that_others_show(
    cache: Path,  # noqa: F811
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "model"
    code, out, _ = call(capsys, "pack", "demo", str(target), "--receipt", str(text), "--windows", "2", "--json")
    kept = json.loads(out[-1])["receipt"]
    assert code == 0 and kept["windows"] == 2 and kept["kl"]["value"] > 0 and kept["text"] == text.name
    again = measure(capsys, target, text, "--original", source_of(cache), "--windows", "2", "--context", "128")
    assert kept["sha256"] == again["text"]["sha256"] and kept["context"] == 128
    assert kept["kl"]["value"] == pytest.approx(again["kl"]["value"], rel=1e-6)
    code, out, err = call(capsys, "run", str(target), "hello", "--max-new-tokens", "2", "--stats", "--json")
    assert code == 0 and json.loads(out[-1])["receipt"] == kept
    assert f"quality: KL {kept['kl']['value']:.4g}" in err
    code, out, _ = call(capsys, "plan", str(target), "--json")
    assert code == 0 and json.loads(out[-1])["receipt"] == kept and any("quality: KL" in line for line in out)
    assert call(capsys, "verify", str(target))[0] == 0
    code, out, _ = call(capsys, "pack", "demo", str(target), "--json")
    assert code == 0, "the same pack again is no other model"
    assert PackedModel(target).manifest.receipt is not None


def test_eval_replaces_a_receipt(
    packed: Path,  # noqa: F811
    cache: Path,  # noqa: F811
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "model"
    shutil.copytree(packed, target)
    before = PackedModel(target).manifest
    assert before.receipt is None and '"receipt"' not in (target / "greenroom.json").read_text()
    flags = ["--original", source_of(cache), "--receipt"]
    for windows in ("1", "2"):
        measure(capsys, target, text, *flags, "--windows", windows)
        receipt = PackedModel(target).manifest.receipt
        assert receipt is not None and receipt.windows == int(windows)
    assert not list(target.glob("*.partial"))


def test_a_receipt_needs_the_source(
    packed: Path,  # noqa: F811
    cache: Path,  # noqa: F811
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another checkpoint of the same shape may be compared with, but makes no receipt."""
    other = tmp_path / "other"
    shutil.copytree(source_of(cache), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    report = measure(capsys, packed, text, "--original", str(other), "--windows", "1")
    assert report["same_source"] is False
    flags = ["--text", str(text), "--context", str(CONTEXT), "--original", str(other), "--receipt"]
    assert "not the checkpoint" in refused(capsys, "eval", str(packed), *flags)
