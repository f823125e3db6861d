"""The command line and `greenroom.load`, end to end, on a demo built from a tiny fake wheel."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import greenroom
from greenroom import library
from greenroom.cli import main
from greenroom.device import FakeDevice
from greenroom.errors import ConfigError
from test_demo_checkpoint import make_wheel

RUN_FIELDS = {
    "text", "prompt_tokens", "new_tokens", "tokens_per_s", "ttft_s", "hit_rate", "bytes_read_per_token", "stall_s",
    "peak_memory_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> "Any":
    folder = tmp_path_factory.mktemp("cache")
    make_wheel(folder / "demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GREENROOM_CACHE", str(folder))
        yield folder


@pytest.fixture
def packed(cache: Path) -> Path:
    """The demo, packed as on first use."""
    return library.find("demo")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> "tuple[int, list[str], str]":
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out.rstrip("\n").split("\n"), captured.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a call is refused, exit code 2."""
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("greenroom: "), captured.err
    return lines[0]


def test_run_streams_and_reports(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "run", "demo", "hello", "--max-new-tokens", "5", "--stats", "--json")
    report = json.loads(out[-1])
    assert code == 0 and report.keys() >= RUN_FIELDS
    assert 1 <= report["new_tokens"] <= 5 and report["prompt_tokens"] > 5
    assert "\n".join(out[:-1]).strip() == report["text"].strip()
    assert "tokens/s" in err and "hit rate" in err and "peak memory" in err


def test_the_same_answer_whatever_the_memory(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = set()
    for flags in (["--experts-per-layer", "0"], ["--experts-per-layer", "8"], ["--prefetch", "2", "--policy", "lfu"]):
        code, out, _ = call(capsys, "run", str(packed), "hello", "--max-new-tokens", "8", "--json", *flags)
        assert code == 0
        answers.add(json.loads(out[-1])["text"])
    assert len(answers) == 1


def test_a_seed_makes_sampling_repeatable(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(seed: str) -> str:
        flags = ["--temperature", "2", "--top-p", "0.9", "--seed", seed, "--max-new-tokens", "12", "--json"]
        return json.loads(call(capsys, "run", "demo", "hello", *flags)[1][-1])["text"]

    assert sample("1") == sample("1")
    assert sample("1") != sample("2")


def test_a_long_prompt_goes_in_chunks(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(
        capsys, "run", "demo", "lorem " * 110, "--max-new-tokens", "3", "--json", "--system", "Be brief."
    )
    assert code == 0 and json.loads(out[-1])["prompt_tokens"] > 512


def test_chat_remembers_and_ends(packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/stats\n/nonsense\nagain\n/reset\nafresh\n/exit\nnever\n"))
    code, out, err = call(capsys, "chat", "demo", "--max-new-tokens", "4", "--json")
    assert code == 0 and json.loads(out[-1])["new_tokens"] >= 1
    assert err.count("/exit leaves") == 2 and "tokens/s" in err


def test_chat_turns_equal_one_prompt(packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """The KV cache of earlier turns changes nothing but the time."""
    from greenroom.cli import chat

    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n"))
    with_cache = call(capsys, "chat", "demo", "--max-new-tokens", "6", "--json")[1]
    monkeypatch.setattr(chat._Conversation, "_continues", lambda self, ids: False)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n"))
    without = call(capsys, "chat", "demo", "--max-new-tokens", "6", "--json")[1]
    assert json.loads(with_cache[-1])["text"] == json.loads(without[-1])["text"]


def test_pack_verify_and_damage(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "pack", "demo", str(tmp_path / "three"), "--expert-bits", "3", "--json")
    assert code == 0 and json.loads(out[-1])["settings"]["expert_bits"] == 3
    code, out, _ = call(capsys, "verify", str(tmp_path / "three"), "--json")
    assert code == 0 and json.loads(out[-1])["ok"] is True
    file = next((tmp_path / "three").glob("experts-*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 1
    file.write_bytes(raw)
    code, out, err = call(capsys, "verify", str(tmp_path / "three"), "--json")
    assert code == 2 and json.loads(out[-1])["ok"] is False and file.name in err


def test_a_packed_copy_runs_anywhere(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(packed, tmp_path / "moved")
    code, out, _ = call(capsys, "run", str(tmp_path / "moved"), "hello", "--max-new-tokens", "2", "--json")
    assert code == 0 and json.loads(out[-1])["new_tokens"] >= 1


def test_plan_says_what_fits(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "plan", "demo", "--json")
    report = json.loads(out[-1])
    assert code == 0 and report["slots"] == report["experts"] // 3
    parts = ("runtime", "dense", "kv_cache", "working_set", "staging", "slots_nbytes")
    assert report["total"] == sum(report[part] for part in parts)
    assert report["tokens_per_s"] > 0 and report["disk_bytes_per_s"] > 0
    assert "too small" in refused(capsys, "plan", "demo", "--ram", "10MiB")


def test_plan_of_a_gpu_needs_none(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", "demo", "--vram", "1GiB", "--ram", "2GiB", "--experts-per-layer", "2", "--json"]
    code, out, _ = call(capsys, *plan)
    report = json.loads(out[-1])
    assert code == 0 and "on the GPU" in "\n".join(out) and "in RAM" in "\n".join(out)
    assert report["total"] <= report["budget"] == 1 << 30 and report["ram"]["budget"] == 2 << 30
    assert report["slots"] < report["experts"] == report["ram"]["slots"]
    assert "give --vram" in refused(capsys, "plan", "demo", "--vram", "10MiB")
    assert "give --ram" in refused(capsys, "plan", "demo", "--vram", "1GiB", "--ram", "10MiB")


def test_run_on_a_device(packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ask = ["run", str(packed), "hello", "--max-new-tokens", "6", "--json"]
    wanted = json.loads(call(capsys, *ask)[1][-1])["text"]
    monkeypatch.setattr("greenroom.engine.find_gpu", FakeDevice)
    code, out, err = call(capsys, *ask, "--vram", "1GiB", "--experts-per-layer", "1", "--stats")
    report = json.loads(out[-1])
    assert code == 0 and report["text"] == wanted
    assert report["bytes_up_per_token"] > 0 and "over the link" in report["placement"] + err
    off = json.loads(call(capsys, *ask, "--vram", "1GiB", "--experts-per-layer", "1", "--no-cpu-experts")[1][-1])
    assert off["text"] == wanted and "off" in off["placement"]


def test_plan_knows_earlier_runs(packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("GREENROOM_CACHE", str(packed.parent / "apart"))  # other tests run this model, too
    plan = [*("plan", str(packed), "--ram", "2GiB", "--experts-per-layer", "2"), "--json"]
    even = json.loads(call(capsys, *plan)[1][-1])
    assert not even["routing_known"] and even["hit_rate"] == even["resident_share"]
    run = ["run", str(packed), "hello", "--max-new-tokens", "20", "--experts-per-layer", "2", "--json", "--stats"]
    _, out, err = call(capsys, *run)
    report = json.loads(out[-1])
    less, more = report["what_if"]
    assert less["more_nbytes"] < 0 < more["more_nbytes"] and less["hit_rate"] <= report["hit_rate"] <= more["hit_rate"]
    assert less["tokens_per_s"] <= report["tokens_per_s"] * 1.001 <= more["tokens_per_s"] * 1.002
    assert "estimated: with" in err
    known = json.loads(call(capsys, *plan)[1][-1])
    assert known["routing_known"] and known["hit_rate"] != even["hit_rate"]
    assert [other["slots_nbytes"] < known["slots_nbytes"] for other in known["what_if"]] == [True, False]


def test_plan_needs_no_packing(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library.find("demo")
    source = cache / "demo" / "checkpoint"
    before = sorted((cache / "packed").iterdir())
    code, out, _ = call(capsys, "plan", str(source), "--expert-bits", "2", "--json")
    assert code == 0 and json.loads(out[-1])["experts"] > 0
    assert sorted((cache / "packed").iterdir()) == before


def test_bench_prints_the_floor_first(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tokens", "3", "--trials", "2", "--prompt-tokens", "5", "--experts-per-layer", "1", "--json"]
    code, out, _ = call(capsys, "bench", "demo", *flags)
    report = json.loads(out[-1])
    assert code == 0 and out[0].startswith("floor: ") and len(report["trials"]) == 2
    assert report["ratio_to_floor"] > 0


def test_a_gpu_is_looked_for_before_anything_is_packed(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_in_child", lambda job: pytest.fail("packed for a GPU that is not there"))
    monkeypatch.setenv("GREENROOM_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", None)
    for command in (["run", "demo", "hello"], ["chat", "demo"], ["bench", "demo"]):
        assert "built for CUDA" in refused(capsys, *command, "--vram", "1GiB")
    with pytest.raises(ConfigError, match="built for CUDA"):
        greenroom.load("demo", vram="1GiB")


def test_a_child_that_packs_may_fetch_what_its_parent_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's secrets are not in its environment."""
    given: list[Any] = []

    class Child:
        returncode = 0

        def __init__(self, command: "list[str]", env: "dict[str, str]", **_: Any) -> None:
            given.append(env.get("HF_TOKEN"))

        def communicate(self) -> "tuple[str, None]":
            return "", None

    monkeypatch.setattr(subprocess, "Popen", Child)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for token in (lambda: "secret", lambda: None, lambda: 1 / 0):
        monkeypatch.setattr("huggingface_hub.get_token", token)
        library._in_child({})
    assert given == ["secret", None, None]


def test_bench_on_a_device_knows_the_link(
    packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("greenroom.engine.find_gpu", lambda: FakeDevice(link_bytes_per_s=1e5))
    flags = ["--tokens", "3", "--trials", "1", "--prompt-tokens", "5", "--json", "--no-cpu-experts", "--vram", "1GiB"]
    code, out, _ = call(capsys, "bench", str(packed), *flags, "--experts-per-layer", "0")
    report = json.loads(out[-1])
    assert code == 0 and "link 0.0 GB/s" in out[0]
    assert report["floor_tokens_per_s"] == pytest.approx(1e5 / report["bytes_up_per_token"])


def test_eval_refuses_a_device(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "leave --vram out" in refused(capsys, "eval", str(packed), "--text", "t", "--vram", "1GiB")


def test_bench_answers_a_prompt(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tokens", "3", "--trials", "1", "--json", "--prompt"]
    reports = [json.loads(call(capsys, "bench", "demo", *flags, text)[1][-1]) for text in ("hello", "hello there, you")]
    assert reports[0]["prompt_bytes_read"] <= reports[1]["prompt_bytes_read"] and reports[0]["tokens_per_s"] > 0


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["run", "demo", "  "], "empty"),
        (["run", "nowhere", "hello"], "nowhere does not exist"),
        (["run", "demo", "hello", "--temperature", "-1"], "--temperature"),
        (["run", "demo", "hello", "--top-p", "0"], "--top-p"),
        (["run", "demo", "hello", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["run", "demo", "hello", "--ram", "a lot"], "a lot"),
        (["run", "demo", "hello", "--ram", "1MiB"], "too small"),
        (["run", "demo", "hello", "--vram", "8GiB"], "needs a"),
        (["run", "demo", "hello", "--policy", "magic"], "magic"),
        (["run", "demo", "hello", "--prefetch", "-1"], "prefetch"),
        (["run", "demo", "hello", "--context", "0"], "context"),
        (["run", "demo", "hello", "--expert-bits", "5"], "invalid choice"),
        (["run", "demo", "hello", "--dtype", "int8"], "invalid choice"),
        (["bench", "demo", "--trials", "0"], "--trials"),
        (["dance"], "invalid choice"),
        (["verify", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_one_line(
    packed: Path, capsys: pytest.CaptureFixture[str], arguments: "list[str]", words: str
) -> None:
    assert words in refused(capsys, *arguments)


def test_other_bits_than_packed_are_refused(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expert_bits=4" in refused(capsys, "run", str(packed), "hello", "--expert-bits", "2")


@pytest.mark.slow
def test_verbose_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "run", "nowhere", "hello", "--verbose")
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("greenroom: ")


@pytest.mark.slow
def test_an_error_of_the_packing_child_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "dense" in refused(capsys, "run", str(tmp_path), "hello")


@pytest.mark.slow
def test_an_error_of_the_packing_child_that_python_has_a_kind_of(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ConfigError is a ValueError, too: it must not pass for a line that is no JSON."""
    assert "group size" in refused(capsys, "run", "demo", "hello", "--expert-bits", "16", "--group-size", "64")


def test_the_demo_at_16_bits_has_no_groups(cache: Path) -> None:
    assert library.settled_bits("demo", {"expert_bits": 16, "group_size": None}) == {
        "expert_bits": 16,
        "attention_bits": 8,
        "head_bits": 8,
    }
    assert library.settled_bits("demo", {"expert_bits": 2})["group_size"] == 32
    assert library.settled_bits("other", {"expert_bits": 16, "group_size": 64})["group_size"] == 64


def test_help_needs_no_torch() -> None:
    program = (
        "import sys; from greenroom.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "run" in done.stdout, done.stderr


def test_load_returns_a_transformers_model_and_its_tokenizer(packed: Path) -> None:
    model, tokenizer = greenroom.load("demo", ram="2GiB", experts_per_layer=2, prefetch=1)
    ids = tokenizer("hello", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > ids.shape[1] and model.greenroom.metrics().requests > 0
    model.greenroom.close()
    with pytest.raises(RuntimeError, match="closed"):
        model(ids)


def test_numbers_that_float16_cannot_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names the remedy, and the remedy."""
    from greenroom.model import MappedEmbedding

    folder, embed = library.find("demo"), MappedEmbedding.forward
    monkeypatch.setattr(MappedEmbedding, "forward", lambda self, ids: embed(self, ids) * 1e8)
    arguments = ["run", str(folder), "hello", "--max-new-tokens", "2", "--dtype"]
    line = refused(capsys, *arguments, "float16")
    assert "float16" in line and "--dtype float32" in line
    assert call(capsys, *arguments, "float32")[0] == 0


def test_load_in_bfloat16(packed: Path) -> None:
    model, tokenizer = greenroom.load(packed, dtype="bfloat16")
    logits = model(tokenizer("hello", return_tensors="pt").input_ids).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    model.greenroom.close()
    for wrong in ("int8", "nonsense"):
        with pytest.raises(ConfigError):
            greenroom.load(packed, dtype=wrong)


@pytest.mark.slow
def test_a_checkpoint_without_tokenizer(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library.find("demo")
    source = tmp_path / "bare"
    shutil.copytree(cache / "demo" / "checkpoint", source)
    for path in source.glob("*token*"):
        path.unlink()
    model, tokenizer = greenroom.load(source)
    assert tokenizer is None and model.config.num_local_experts == 8
    model.greenroom.close()
    assert "tokenizer" in refused(capsys, "run", str(source), "hello")
