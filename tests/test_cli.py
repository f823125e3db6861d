"""The command line and `greenroom.load`, end to end, on a demo built from a tiny fake wheel."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import greenroom
from greenroom import library
from greenroom import tokenizer as tokenizer_module
from greenroom.cli import chat, generation, main
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


def test_too_little_memory_is_said_in_a_line(
    packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def takes_too_much(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("greenroom.packed.PackedModel.verify", takes_too_much)
    assert "no more memory" in refused(capsys, "verify", str(packed))


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
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n"))
    with_cache = call(capsys, "chat", "demo", "--max-new-tokens", "6", "--json")[1]
    monkeypatch.setattr(chat._Conversation, "_goes_on", lambda self, ids: False)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n"))
    without = call(capsys, "chat", "demo", "--max-new-tokens", "6", "--json")[1]
    assert json.loads(with_cache[-1])["text"] == json.loads(without[-1])["text"]


REWRITTEN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'][:2] if m['role'] == 'assistant' else m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""Of earlier answers two characters are left."""


def test_chat_goes_back_to_where_the_template_rewrites(
    packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same answer as when all is read again, from fewer tokens; control: what is kept matters."""
    from greenroom.decode.kv import CompiledDynamicLayer

    fed: list[int] = []
    answer, tokenizer_of, crop = generation.answer, tokenizer_module.tokenizer_of, CompiledDynamicLayer.crop

    def counted(engine: Any, tokenizer: Any, inputs: Any, options: Any, **extra: Any) -> Any:
        past = extra.get("past_key_values")
        fed.append(inputs["input_ids"].shape[1] - (0 if past is None else past.get_seq_length()))
        return answer(engine, tokenizer, inputs, options, **extra)

    def rewriting(folder: Path) -> Any:
        tokenizer = tokenizer_of(folder)
        tokenizer.chat_template = REWRITTEN
        return tokenizer

    def shifted(layer: Any, tokens_to_remove: int) -> None:
        crop(layer, tokens_to_remove)
        layer.values = layer.values.roll(1, dims=-2)

    def talk() -> "tuple[str, list[int]]":
        fed.clear()
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello there, you\nand again\nonce more\n"))
        out = call(capsys, "chat", "demo", "--max-new-tokens", "12", "--json")[1]
        return json.loads(out[-1])["text"], list(fed)

    monkeypatch.setattr(generation, "answer", counted)
    monkeypatch.setattr(tokenizer_module, "tokenizer_of", rewriting)
    text, few = talk()
    with monkeypatch.context() as patch:
        patch.setattr(CompiledDynamicLayer, "crop", shifted)
        other, _ = talk()
    monkeypatch.setattr(chat._Conversation, "_goes_on", lambda self, ids: False)
    fresh, all_ = talk()
    assert text == fresh and few[0] == all_[0] and few[1] < all_[1] and few[2] < all_[2]
    assert other != fresh, "another cache would not have shown"


def test_only_a_cache_of_all_positions_is_cropped() -> None:
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

    def cache(*layers: Any) -> Any:
        made = DynamicCache()
        made.layers = list(layers)
        return made

    assert chat._can_be_cropped(cache(DynamicLayer(), DynamicLayer()))
    assert not chat._can_be_cropped(cache(DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=8)))
    assert not chat._can_be_cropped(cache(DynamicLayer(), LinearAttentionLayer()))
    assert not chat._can_be_cropped(None)


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


@pytest.mark.parametrize("flag", ["--ram", "--experts-per-layer"])
def test_plan_says_what_is_not_free(
    packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    arguments = ["plan", "demo", flag, "2GiB" if flag == "--ram" else "8"]
    monkeypatch.setattr("greenroom.machine.available_memory", lambda: 64 << 30)
    assert "may run out" not in "".join(call(capsys, *arguments)[1])
    monkeypatch.setattr("greenroom.machine.available_memory", lambda: 1 << 20)
    assert f"with {flag} {arguments[-1]} this machine may run out" in "".join(call(capsys, *arguments)[1])


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


@pytest.mark.parametrize("command", [["run", "demo", "hello"], ["chat", "demo"], ["bench", "demo"], ["plan", "demo"]])
@pytest.mark.parametrize(
    "flags,words",
    [
        (["--ram", "12Gigs"], "12Gigs"),
        (["--ram", "9" * 400], "a size must be below"),
        (["--policy", "lruu-shared"], "unknown policy 'lruu-shared'"),
        (["--lookahead", "0"], "lookahead must be at least 1"),
        (["--context", "0"], "context must be at least 1"),
        (["--prefetch", "-1"], "prefetch must be at least 0"),
        (["--experts-per-layer", "-1"], "experts_per_layer must be at least 0"),
        (["--group-size", "50"], "group size"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_fetched(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: "list[str]",
    flags: "list[str]",
    words: str,
) -> None:
    monkeypatch.setenv("GREENROOM_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "_in_child", lambda job: pytest.fail("packed, and refused then"))
    monkeypatch.setattr(library, "demo_checkpoint", lambda: pytest.fail("fetched, and refused then"))
    assert words in refused(capsys, *command, *flags)


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "x"},
        {"policy": None},
        {"prefetch": "1"},
        {"prefetch": True},
        {"experts_per_layer": 2.5},
        {"activation_bits": 8.0},
        {"context": "many"},
        {"dtype": []},
        {"expert_bits": 4.0},
        {"group_size": "64"},
    ],
)
def test_load_refuses_wrong_settings_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: "dict[str, Any]"
) -> None:
    monkeypatch.setenv("GREENROOM_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "_in_child", lambda job: pytest.fail("packed, and refused then"))
    with pytest.raises(ConfigError):
        greenroom.load("demo", **settings)


def test_a_packed_copy_is_not_taken_for_an_edited_checkpoint(tmp_path: Path) -> None:
    """Whatever packing reads or copies counts; what it does not, and the group size that is the default, do not."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.model", "merges.txt"):
        (source / name).write_text("1")

    def name(**bits: int) -> str:
        return library.place(source, {**bits})[0].name

    seen = {name()}
    for path in sorted(source.iterdir()):
        path.write_text("22")
        assert name() not in seen, f"an edit of {path.name} is not noticed"
        seen.add(name())
    (source / "README.md").write_text("3")
    assert name() in seen and name(group_size=64) == name() != name(group_size=32)
    assert name(expert_bits=2, group_size=16) == name(expert_bits=2) != name(expert_bits=2, group_size=64)
    assert library.place("owner/name", {"group_size": 64})[0].name == "owner--name-e4-a8-h8"


def test_a_child_that_packs_ends_with_its_parent() -> None:
    """However the parent ends."""
    child = (
        "import time; from greenroom import library; "
        "library._build = lambda: [print('ready', flush=True), time.sleep(10), print('outlived it')]; library._child()"
    )
    program = f"import subprocess, sys; subprocess.call([sys.executable, '-c', {child!r}, '{{}}'])"
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    parent.kill()
    parent.wait()
    assert parent.stdout.read() == ""  # until the child, too, has closed it


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
        (["run", "demo", "hello", "--seed", "9" * 20], "--seed must be from"),
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


def test_stdin_that_is_no_text(
    packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (["run", str(packed), "-"], ["chat", str(packed)]):
        for errors in ("strict", "surrogateescape"):  # the second is Python's choice in the C locale
            stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors)
            monkeypatch.setattr(sys, "stdin", stdin)
            code, _, err = call(capsys, *command)
            goes_on = command[0] == "chat" and errors != "strict"  # without that line
            assert code == (0 if goes_on else 2) and "iconv" in err.splitlines()[-1] and "Traceback" not in err
    assert "iconv" in refused(capsys, "run", str(packed), "caf\udce9")


def test_stdout_that_lacks_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    monkeypatch.setattr("greenroom.cli.run.execute", lambda options: print("café →") or 0)
    assert main(["run", "demo", "hello"]) == 0
    assert raw.getvalue() == "café ?\n".encode("latin-1")


def test_an_answer_that_was_cut_says_so(
    packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = "greenroom: the answer was cut at --max-new-tokens 2"
    _, out, err = call(capsys, "run", "demo", "hello", "--max-new-tokens", "2", "--json")
    assert cut in err.splitlines() and "was cut" not in "".join(out)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert cut in call(capsys, "chat", "demo", "--max-new-tokens", "2")[2].splitlines()
    ends = SimpleNamespace(model=SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7, 9])))
    assert [generation._is_cut(ends, ids, 2) for ids in ([7, 8], [8, 9], [8])] == [True, False, False]
    ends.model.generation_config.eos_token_id = 8
    assert [generation._is_cut(ends, ids, 2) for ids in ([7, 8], [8, 9])] == [False, True]


def test_verify_finds_what_a_checkpoint_is_packed_to(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library.find("demo")
    source = str(cache / "demo" / "checkpoint")
    assert "run greenroom pack first" in refused(capsys, "verify", source, "--expert-bits", "2")
    packed, bits = library.place(source, {"expert_bits": 2})
    greenroom.pack(source, packed, **bits)
    code, out, _ = call(capsys, "verify", source, "--expert-bits", "2")
    assert code == 0 and out[0].startswith(f"{packed}: ")
    assert "is packed already" in refused(capsys, "pack", str(packed), str(cache / "again"))


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
        "group_size": 0,
    }
    assert library.settled_bits("demo", {"expert_bits": 2})["group_size"] == 32
    with pytest.raises(ConfigError, match="no groups"):
        library.settled_bits("other", {"expert_bits": 16, "group_size": 64})


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
