"""Packing end to end: kills, full disks, damaged sources, damaged results, and memory."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from greenroom import expert_records
from greenroom.checkpoint.source import resolve
from greenroom.config import EngineSettings
from greenroom.engine import Engine
from greenroom.errors import CheckpointError, GreenroomError, PackedModelError, PackError, UnsupportedModelError
from greenroom.packed import MANIFEST_NAME, RECORD_ALIGNMENT, PackedModel, locked, writer
from greenroom.packing import pack

IDS = torch.arange(4, 64)[None]  # enough tokens that every expert of every layer is used

PACKER = """
import os, signal, shutil, sys, json
from pathlib import Path
import torch
torch.set_num_threads(1)
from greenroom.packing import pack

def arm(kill_at):
    left = [kill_at]
    def step():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    def armed(function):
        def run(*args, **kwargs):
            step()
            result = function(*args, **kwargs)
            step()
            return result
        return run
    for owner, name in [(os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir"),
                        (shutil, "copyfile")]:
        setattr(owner, name, armed(getattr(owner, name)))

pack(sys.argv[1], sys.argv[2])  # all lazy imports are done before the first fork
print("ready", flush=True)
for line in sys.stdin:
    src, dst, bits, kill_at = json.loads(line)
    child = os.fork()
    if child == 0:
        arm(kill_at)
        pack(src, dst, expert_bits=bits)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Packer:
    """Packs in a fresh process for each job, without importing torch for each."""

    def __init__(self, warm_up: Path, scratch: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", PACKER, warm_up, scratch],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, src: Path, dst: Path, bits: int = 4, kill_at: int = 0) -> int:
        """The process id; `kill_at` kills it at that durable operation, counting before and after each."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(src), str(dst), bits, kill_at]) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        return int(self._line())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


@pytest.fixture(scope="module")
def packer(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Packer]":
    made = Packer(tiny, tmp_path_factory.mktemp("warm_up") / "m")
    yield made
    made.close()


def write_mixtral(folder: Path, seed: int = 0, shards: int = 1, **config: Any) -> Path:
    """A random Mixtral in bfloat16 under the hub's names, one tensor per expert."""
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 2,
             "max_position_embeddings": 64}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MixtralForCausalLM(MixtralConfig(**{**small, **config})).to(torch.bfloat16)
    size = sum(p.numel() for p in model.parameters()) * 2
    model.save_pretrained(folder, max_shard_size=size // shards + 1 if shards > 1 else "50GB")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixtral(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> "dict[str, bytes]":
    return files_of(pack(tiny, tmp_path_factory.mktemp("tiny_packed") / "m").folder)


@pytest.fixture
def source(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "source"))


@pytest.fixture
def damaged(packed4: PackedModel, tmp_path: Path) -> Path:
    """A copy of the packed model to damage."""
    return Path(shutil.copytree(packed4.folder, tmp_path / "damaged"))


def files_of(folder: Path) -> "dict[str, bytes]":
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def one_line(caught: "pytest.ExceptionInfo[GreenroomError]", *words: str) -> str:
    """The message, checked to be one line that holds every word and a remedy."""
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700, message
    for word in words:
        assert word in message, message
    remedies = "fetch|give|choose|delete|make room|run |pack (the model )?again|so take|incomplete|nothing to offload"
    assert re.search(remedies, message), f"no remedy in {message!r}"
    return message


# --- kills and interrupts


def test_packing_is_deterministic(tiny: Path, tiny_packed: "dict[str, bytes]", packer: Packer, tmp_path: Path) -> None:
    packer.start(tiny, tmp_path / "m")
    assert packer.wait() == 0
    assert files_of(tmp_path / "m") == tiny_packed


def test_a_kill_at_any_durable_step_resumes_to_the_same_files(
    tiny: Path, tiny_packed: "dict[str, bytes]", packer: Packer, tmp_path: Path
) -> None:
    """Killed before and after every flush, rename, removal and copy, each time from nothing."""
    kills = 0
    for kill_at in range(1, 1000):
        dst = tmp_path / f"m{kill_at}"
        packer.start(tiny, dst, kill_at=kill_at)
        status = packer.wait()
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        pack(tiny, dst)
        assert files_of(dst) == tiny_packed, f"killed at step {kill_at}"
        shutil.rmtree(dst)
    assert kills >= 20


@pytest.mark.slow
def test_kills_at_random_moments_resume_to_the_same_files(packer: Packer, tmp_path: Path) -> None:
    config = {"num_hidden_layers": 4, "num_local_experts": 8, "hidden_size": 256, "intermediate_size": 256}
    src = write_mixtral(tmp_path / "source", **config, shards=3)
    whole = files_of(pack(src, tmp_path / "whole").folder)
    rng = random.Random(0)
    for trial in range(3):
        dst, kills = tmp_path / f"killed{trial}", 0
        for _ in range(4):
            child = packer.start(src, dst)
            time.sleep(rng.uniform(0.05, 0.5))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            kills += packer.wait() != 0
        assert kills > 0
        pack(src, dst)
        assert files_of(dst) == whole


def test_a_kill_leaves_no_readable_model(tiny: Path, packer: Packer, tmp_path: Path) -> None:
    packer.start(tiny, tmp_path / "m", kill_at=8)
    assert packer.wait() == -signal.SIGKILL
    with pytest.raises(PackedModelError) as caught:
        PackedModel(tmp_path / "m")
    one_line(caught, "no packed model")


@pytest.mark.parametrize("call", [1, 3, 6, 8])
def test_an_interrupt_says_that_it_resumes(
    tiny: Path, tiny_packed: "dict[str, bytes]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    real, count = expert_records.quantize_into, [0]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(expert_records, "quantize_into", interrupted)
        with pytest.raises(PackError) as caught:
            pack(tiny, tmp_path / "m")
    one_line(caught, "interrupted", "resumes", str(tmp_path / "m"))
    assert not list(tmp_path.glob("m/*.partial"))
    pack(tiny, tmp_path / "m")
    assert files_of(tmp_path / "m") == tiny_packed


def test_a_resumed_run_does_not_repeat_complete_files(
    tiny: Path, packer: Packer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst, kill_at = tmp_path / "m", 1
    journal = dst / "packing.json"
    while not journal.is_file() or "experts-00000" not in journal.read_text():
        packer.start(tiny, dst, kill_at=kill_at)
        assert packer.wait() == -signal.SIGKILL
        kill_at += 1
    before = (dst / "experts-00000.safetensors").stat().st_mtime_ns
    pack(tiny, dst)
    assert (dst / "experts-00000.safetensors").stat().st_mtime_ns == before


# --- what is there already


@pytest.fixture
def unfinished(tiny: Path, packer: Packer, tmp_path: Path) -> Path:
    packer.start(tiny, tmp_path / "unfinished", kill_at=14)
    assert packer.wait() == -signal.SIGKILL
    assert (tmp_path / "unfinished" / "packing.json").is_file()
    return tmp_path / "unfinished"


def test_an_unfinished_pack_of_other_settings_is_refused(tiny: Path, unfinished: Path) -> None:
    before = files_of(unfinished)
    with pytest.raises(PackError) as caught:
        pack(tiny, unfinished, expert_bits=3)
    one_line(caught, "another source or settings", str(unfinished))
    assert files_of(unfinished) == before


@pytest.mark.parametrize("other", [{"seed": 1}, {"intermediate_size": 128}, {"rms_norm_eps": 1e-3}])
def test_an_unfinished_pack_of_another_source_is_refused(
    unfinished: Path, tmp_path: Path, other: "dict[str, Any]"
) -> None:
    """Also of one that differs in nothing but its weights."""
    with pytest.raises(PackError) as caught:
        pack(write_mixtral(tmp_path / "other", **other), unfinished)
    one_line(caught, "another source or settings")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"plan": 1}', '{"plan": "x", "done": []}', "\x00\xff"])
def test_a_damaged_journal_is_refused(tiny: Path, unfinished: Path, text: str) -> None:
    (unfinished / "packing.json").write_text(text)
    with pytest.raises(PackError) as caught:
        pack(tiny, unfinished)
    one_line(caught, "packing.json", "damaged")


def test_packing_again_rewrites_nothing(tiny: Path, tmp_path: Path) -> None:
    dst = pack(tiny, tmp_path / "m").folder
    before = {path.name: path.stat().st_mtime_ns for path in dst.iterdir()}
    assert pack(tiny, dst).manifest == PackedModel(dst).manifest
    assert {path.name: path.stat().st_mtime_ns for path in dst.iterdir()} == before


def test_a_model_of_other_settings_or_source_is_refused(tiny: Path, tmp_path: Path) -> None:
    dst = pack(tiny, tmp_path / "m").folder
    before = files_of(dst)
    for src, bits in ((tiny, 3), (write_mixtral(tmp_path / "other", seed=1), 4)):
        with pytest.raises(PackError) as caught:
            pack(src, dst, expert_bits=bits)
        one_line(caught, "another source or settings")
    assert files_of(dst) == before


def test_a_damaged_model_is_not_taken_for_a_finished_one(tiny: Path, tmp_path: Path) -> None:
    dst = pack(tiny, tmp_path / "m").folder
    os.truncate(dst / "dense-00000.safetensors", 5000)
    with pytest.raises(PackError) as caught:
        pack(tiny, dst)
    one_line(caught, "dense-00000.safetensors", "delete")


def test_foreign_folders_and_files_are_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for dst in (tmp_path / "foreign", tmp_path / "file", tiny):
        with pytest.raises(PackError) as caught:
            pack(tiny, dst)
        one_line(caught, str(dst), "choose another folder")
    assert files_of(tmp_path / "foreign") == {"thesis.txt": b"x"}
    with pytest.raises(PackError) as caught:
        pack(tiny, tmp_path / "file" / "m")
    one_line(caught, str(tmp_path / "file" / "m"))


def test_one_at_a_time_packs_into_a_folder(tiny: Path, tiny_packed: "dict[str, bytes]", tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with locked(tmp_path / "m"):
        with pytest.raises(PackError) as caught:
            pack(tiny, tmp_path / "m")
        assert f"another greenroom packs into {tmp_path / 'm'}: wait for it" in str(caught.value)
        assert files_of(tmp_path / "m") == {}
    pack(tiny, tmp_path / "m")
    assert files_of(tmp_path / "m") == tiny_packed


def test_an_empty_folder_will_do(tiny: Path, tiny_packed: "dict[str, bytes]", tmp_path: Path) -> None:
    pack(tiny, tmp_path)
    assert files_of(tmp_path) == tiny_packed


# --- disk space


def test_too_little_space_is_refused_before_anything_is_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, 10 << 10))
    with pytest.raises(PackError) as caught:
        pack(tiny, tmp_path / "deep" / "m")
    message = one_line(caught, "10 KiB", "make room")
    needed = re.search(r"needs (\d+) KiB", message)
    assert needed is not None and int(needed[1]) > 10
    assert not (tmp_path / "deep").exists()


def test_the_space_asked_for_is_what_is_written(
    tiny: Path, tiny_packed: "dict[str, bytes]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = sum(len(data) for name, data in tiny_packed.items() if name.endswith(".safetensors"))
    for free in (weights - 1, weights):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(1, 1, free))
        if free < weights:
            with pytest.raises(PackError):
                pack(tiny, tmp_path / "m")
        else:
            pack(tiny, tmp_path / "m")


class _Limited:
    """A file of a full disk."""

    def __init__(self, disk: "Full", file: Any) -> None:
        self._disk, self._file = disk, file

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        self._disk.left -= len(data) if isinstance(data, str) else memoryview(data).nbytes
        if self._disk.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self._file.write(data))


class Full:
    """Opens files that take `limit` bytes in all and then report a full disk; `only` those with that in their names."""

    def __init__(self, limit: int, only: str) -> None:
        self.left, self.only = limit, only
        self._open = Path.open

    def __call__(self, path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = self._open(path, mode, *args, **kwargs)
        if "w" not in mode or self.only not in path.name:
            return file
        return _Limited(self, file)


@pytest.mark.parametrize(
    "limit,only",
    [(0, ""), (3000, ""), (30_000, ""), (45_000, ""), (100, "greenroom.json"), (500, "packing.json"), (0, "dense")],
)
def test_a_disk_that_fills_up_keeps_what_is_complete(
    tiny: Path, tiny_packed: "dict[str, bytes]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, only: str
) -> None:
    dst = tmp_path / "m"
    with monkeypatch.context() as patch:
        full = Full(limit, only)
        patch.setattr(Path, "open", lambda path, *args, **kwargs: full(path, *args, **kwargs))
        with pytest.raises(PackError) as caught:
            pack(tiny, dst)
    one_line(caught, "No space left on device", "make room")
    left = files_of(dst)
    assert not [name for name in left if name.endswith(".partial")]
    for name, data in left.items():
        assert name == "packing.json" or data == tiny_packed[name], f"{name} is incomplete"
    pack(tiny, dst)
    assert files_of(dst) == tiny_packed


def test_a_disk_that_fills_up_with_sidecars(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(PackError) as caught:
        pack(tiny, tmp_path / "m")
    one_line(caught, "No space left on device", "make room")


# --- damaged sources


def shard(folder: Path) -> Path:
    return folder / "model.safetensors"


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(shard(folder))
    change(tensors)
    save_file(tensors, shard(folder), metadata={"format": "pt"})


def header(folder: Path, change: Any) -> None:
    """Change the header's text, keeping the data."""
    raw = shard(folder).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    table = json.loads(raw[8 : 8 + length])
    text = json.dumps(change(table) or table).encode()
    shard(folder).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def set_value(name: str, value: float) -> Any:
    def change(tensors: "dict[str, torch.Tensor]") -> None:
        tensors[name].view(-1)[7] = value

    return change


def write_index(folder: Path, **files: str) -> None:
    names = dict.fromkeys(load_file(shard(folder)), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**names, **files}}))


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
DAMAGES: "dict[str, tuple[Any, list[str]]]" = {
    "truncated shard": (lambda f: os.truncate(shard(f), 100_000), ["model.safetensors", "100000 bytes"]),
    "empty shard": (lambda f: os.truncate(shard(f), 0), ["model.safetensors", "truncated"]),
    "shard cut in its header": (lambda f: os.truncate(shard(f), 100), ["model.safetensors", "truncated"]),
    "shard with a byte too many": (lambda f: shard(f).open("ab").write(b"x"), ["model.safetensors", "bytes where"]),
    "no shard": (lambda f: shard(f).unlink(), ["source", "no safetensors"]),
    "only bin": (lambda f: shard(f).rename(f / "pytorch_model.bin"), ["pytorch_model.bin"]),
    "index lists a missing file": (lambda f: write_index(f, x="model-2.safetensors"), ["model-2.safetensors"]),
    "index is no JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), ["index.json"]),
    "index without a map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), ["index.json"]),
    "index of another kind": (lambda f: (f / "model.safetensors.index.json").write_text("[1]"), ["index.json"]),
    "two shards, no index": (
        lambda f: shutil.copyfile(shard(f), f / "model-2.safetensors"),
        ["model.safetensors.index.json"],
    ),
    "header is no JSON": (lambda f: shard(f).write_bytes(struct.pack("<Q", 4) + b"{{{{"), ["damaged header"]),
    "header is a list": (lambda f: header(f, lambda t: [1, 2]), ["damaged header"]),
    "header of unknown dtype": (lambda f: header(f, lambda t: t[EXPERT].update(dtype="F4")), ["damaged header"]),
    "header of another shape": (lambda f: header(f, lambda t: t[EXPERT].update(shape=[80, 97])), ["damaged header"]),
    "header of bad offsets": (lambda f: header(f, lambda t: t[EXPERT].update(data_offsets=[5, 2])), ["damaged header"]),
    "expert missing": (lambda f: rewrite(f, lambda t: t.pop(EXPERT)), ["model.layers.1", "experts"]),
    "norm missing": (lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")), ["model.norm.weight"]),
    "expert of another shape": (
        lambda f: rewrite(f, lambda t: t.update({EXPERT: torch.zeros(80, 97)})),
        ["model.layers.1"],
    ),
    "norm of another shape": (
        lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": torch.zeros(97)})),
        ["model.norm.weight", "97"],
    ),
    "NaN in an expert": (
        lambda f: rewrite(f, set_value(EXPERT, float("nan"))),
        ["expert 3", "model.layers.1.mlp.experts", "not finite"],
    ),
    "infinity in the head": (
        lambda f: rewrite(f, set_value("lm_head.weight", float("inf"))),
        ["lm_head.weight", "not finite"],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{,"), ["config.json"]),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), ["config.json"]),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), ["config.json"]),
    "config is a number": (lambda f: (f / "config.json").write_text("5"), ["config.json"]),
    "config of no model": (lambda f: (f / "config.json").write_text("{}"), ["config.json"]),
    "config of an unknown model": (
        lambda f: (f / "config.json").write_text('{"model_type": "grok_9"}'),
        ["config.json", "grok_9"],
    ),
    "config with a text for a size": (lambda f: edit_config(f, hidden_size="many"), ["config.json"]),
    "config with a negative size": (lambda f: edit_config(f, hidden_size=-96), ["config.json"]),
    "config of more experts": (lambda f: edit_config(f, num_local_experts=7), ["experts", "7"]),
    "config of more layers": (lambda f: edit_config(f, num_hidden_layers=4), ["model.layers.3"]),
    "config of a dense model": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}'),
        ["dense"],
    ),
    "quantised already": (
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        ["gptq", "quantised"],
    ),
}


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_source_is_one_line(source: Path, tmp_path: Path, damage: str) -> None:
    change, words = DAMAGES[damage]
    change(source)
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        pack(source, tmp_path / "m")
    one_line(caught, *words)
    assert not (tmp_path / "m" / MANIFEST_NAME).exists()
    assert not list(tmp_path.glob("m/*.partial"))


def test_a_packed_source_says_so(packed4: PackedModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        pack(packed4.folder, tmp_path / "m")
    one_line(caught, str(packed4.folder), "is packed already")


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        pack("demo", tmp_path / "m")
    assert "or demo" not in one_line(caught, "demo does not exist")
    for src in (tmp_path / "nowhere", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError) as caught:
            pack(src, tmp_path / "m")
        one_line(caught, str(src))


@pytest.mark.parametrize("free", [(3 << 30) - 1, 3 << 30])
def test_what_the_disk_cannot_hold_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Two shards of 2 GiB, of which half of one lies there; pictures and copies of the weights are not fetched."""
    shards = {"a.safetensors": 2 << 30, "b.safetensors": (2 << 30) + 1024}
    others = ("paper.pdf", "original/model-1.safetensors", "consolidated.00.safetensors", "original/config.json")
    sizes = {**shards, **dict.fromkeys(others, 9 << 30)}
    files = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
    fetched: set[str] = set()
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir(parents=True)
    with (blobs / "1").open("wb") as file:
        file.truncate((1 << 30) + 1024)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda _, **patterns: fetched.update(filter_repo_objects(sizes, **patterns)) or str(tmp_path / "fetched"),
    )
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    if free == 3 << 30:
        assert resolve("owner/name") == tmp_path / "fetched" and fetched == shards.keys()
    else:
        with pytest.raises(CheckpointError, match=r"needs 3.00 GiB more") as caught:
            resolve("owner/name")
        one_line(caught, "owner/name")


@pytest.mark.parametrize("there,refused", [("nothing", True), ("all of it", False)])
def test_what_is_packed_beside_it_wants_room_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str, refused: bool
) -> None:
    """A billion weights in 2 GB, for which 2.2 GB are free; what lies there already is packed without a word."""
    files = [SimpleNamespace(rfilename="model.safetensors", size=2 * 10**9)]
    info = SimpleNamespace(siblings=files, safetensors=SimpleNamespace(total=10**9))
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir(parents=True)
    if there == "all of it":
        with (blobs / "1").open("wb") as file:
            file.truncate(2 * 10**9)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "fetched"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=22 * 10**8))
    assert resolve("owner/name") == resolve("owner/name", tmp_path / "m", 1) == tmp_path / "fetched"
    if not refused:
        assert resolve("owner/name", tmp_path / "m", 4) == tmp_path / "fetched"
        return
    with pytest.raises(CheckpointError) as caught:
        pack("owner/name", tmp_path / "m")
    one_line(caught, "owner/name", "about 477 MiB")
    monkeypatch.setattr("greenroom.checkpoint.source._same_disk", lambda *_: False)
    assert resolve("owner/name", tmp_path / "m", 4) == tmp_path / "fetched"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_in_the_source_header_never_ends_in_another_error(tiny: Path, tmp_path: Path, data: Any) -> None:
    folder = tmp_path / "flipped"
    if not folder.exists():
        shutil.copytree(tiny, folder)
    raw = bytearray(shard(tiny).read_bytes())
    position = data.draw(st.integers(0, 8 + struct.unpack("<Q", raw[:8])[0] - 1))
    raw[position] ^= 1 << data.draw(st.integers(0, 7))
    shard(folder).write_bytes(raw)
    shutil.rmtree(tmp_path / "m", ignore_errors=True)
    try:
        pack(folder, tmp_path / "m", expert_bits=16)
    except GreenroomError as error:
        assert "\n" not in str(error)


# --- what is written


def test_weight_files_are_plain_safetensors(packed4: PackedModel, packed16: PackedModel) -> None:
    for packed in (packed4, packed16):
        entries = {}
        for layer in packed.manifest.experts:
            assert layer.offset % RECORD_ALIGNMENT == 0 and layer.record_nbytes % RECORD_ALIGNMENT == 0
            for expert in range(layer.num_experts):
                entries[f"{layer.module}.{expert}"] = (layer.file, "U8", [layer.record_nbytes])
        entries |= {e.module: (e.file, "U8", [e.nbytes]) for e in packed.manifest.linears}
        names = {"float32": "F32", "bfloat16": "BF16"}
        entries |= {e.name: (e.file, names[e.dtype], list(e.shape)) for e in packed.manifest.tensors}
        found = {}
        for file in packed.manifest.files:
            with safe_open(packed.folder / file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # not a dictionary
                    part = tensors.get_slice(name)
                    found[name] = (file, part.get_dtype(), part.get_shape())
        assert found == entries


def test_records_lie_where_the_manifest_says(packed4: PackedModel) -> None:
    for layer in packed4.manifest.experts:
        raw = (packed4.folder / layer.file).read_bytes()
        with safe_open(packed4.folder / layer.file, "pt") as tensors:
            for expert in range(layer.num_experts):
                offset = layer.offset + expert * layer.record_nbytes
                assert offset % RECORD_ALIGNMENT == 0
                there = raw[offset : offset + layer.record_nbytes]
                assert tensors.get_tensor(f"{layer.module}.{expert}").numpy().tobytes() == there


def test_dense_weights_are_those_of_the_checkpoint(packed16: PackedModel, checkpoint: Path) -> None:
    original = load_file(shard(checkpoint))
    for entry in packed16.manifest.tensors:
        name = entry.name.replace(".mlp.", ".block_sparse_moe.")
        assert torch.equal(packed16.read_tensor(entry).float(), original[name])
    for linear in packed16.manifest.linears:
        raw = packed16.read_linears()[linear.module].view(torch.bfloat16)[: linear.rows * linear.cols]
        assert torch.equal(raw.view(linear.rows, linear.cols).float(), original[f"{linear.module}.weight"])


def test_a_sound_model_verifies(packed4: PackedModel, packed16: PackedModel) -> None:
    assert packed4.verify() == packed16.verify() == []


# --- damaged results


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def opens_clean(folder: Path) -> bool:
    """Whether neither opening nor verifying notices anything; every complaint must be one line."""
    try:
        complaints = PackedModel(folder).verify()
    except PackedModelError as error:
        complaints = [str(error)]
    assert not any("\n" in complaint for complaint in complaints)
    return not complaints


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_noticed(damaged: Path, data: Any) -> None:
    path = data.draw(st.sampled_from(sorted(damaged.iterdir())))
    spots = [0, 8, 4095, 4096, path.stat().st_size - 1]
    inside = [spot for spot in spots if 0 <= spot < path.stat().st_size]
    position = data.draw(st.sampled_from(inside) | st.integers(0, path.stat().st_size - 1))
    bit = data.draw(st.integers(0, 7))
    flip(path, position, bit)
    try:
        assert not opens_clean(damaged), f"bit {bit} of byte {position} of {path.name} goes unnoticed"
    finally:
        flip(path, position, bit)
    if data.draw(st.integers(0, 20)) == 0:
        assert opens_clean(damaged)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_truncation_is_noticed(damaged: Path, data: Any) -> None:
    path = data.draw(st.sampled_from(sorted(damaged.iterdir())))
    whole = path.read_bytes()
    left = whole[: data.draw(st.integers(0, len(whole) - 1))]
    path.write_bytes(left)
    try:
        assert not opens_clean(damaged) or (left == whole.rstrip() and path.name == MANIFEST_NAME)
    finally:
        path.write_bytes(whole)


def test_a_missing_file_is_noticed(damaged: Path) -> None:
    for path in sorted(damaged.iterdir()):
        whole = path.read_bytes()
        path.unlink()
        assert not opens_clean(damaged)
        path.write_bytes(whole)
    assert opens_clean(damaged)


def test_a_manifest_of_another_version_says_so(damaged: Path) -> None:
    text = (damaged / MANIFEST_NAME).read_text()
    (damaged / MANIFEST_NAME).write_text(text.replace('"version": 1', '"version": 3'))
    with pytest.raises(PackedModelError) as caught:
        PackedModel(damaged)
    one_line(caught, "version 3")


def run(engine: Engine) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = engine.model(IDS).logits
    return logits


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_record_stops_the_run_and_the_engine_survives(damaged: Path, packed4: PackedModel, data: Any) -> None:
    packed = PackedModel(damaged)
    layer = data.draw(st.integers(0, len(packed.manifest.experts) - 1))
    entry = packed.manifest.experts[layer]
    expert = data.draw(st.integers(0, entry.num_experts - 1))
    start = entry.offset + expert * entry.record_nbytes
    used = entry.tensors[-1].offset + entry.tensors[-1].nbytes
    position, bit = start + data.draw(st.integers(0, used - 1)), data.draw(st.integers(0, 7))
    slots, prefetch = data.draw(st.sampled_from([0, 1, 3, 6])), data.draw(st.sampled_from([0, 2]))
    options = EngineSettings(experts_per_layer=slots, prefetch=prefetch, staging=2, validate=True)
    sound = Engine(packed4, options)
    expected = run(sound)
    sound.close()
    flip(damaged / entry.file, position, bit)
    engine = Engine(packed, options)
    try:
        for _ in range(2):  # and it is not believed the second time
            with pytest.raises(PackedModelError) as caught:
                run(engine)
            one_line(caught, f"expert {expert} of {entry.module}", "corrupted")
        flip(damaged / entry.file, position, bit)
        assert torch.equal(run(engine), expected)
        assert torch.equal(run(engine), expected)
    finally:
        engine.close()


@pytest.mark.parametrize("slots", [0, 6])
def test_a_file_that_shrinks_while_running_stops_the_run(damaged: Path, packed4: PackedModel, slots: int) -> None:
    options = EngineSettings(experts_per_layer=slots, validate=True)
    engine = Engine(PackedModel(damaged), options)
    path = damaged / engine.packed.manifest.experts[1].file
    whole = path.read_bytes()
    os.truncate(path, 4096)
    for _ in range(2):
        with pytest.raises(PackedModelError, match="ended at byte"):
            run(engine)
    with path.open("r+b") as file:  # the same file: it is open
        file.write(whole)
    sound = Engine(packed4, options)
    assert torch.equal(run(engine), run(sound))
    engine.close(), sound.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_dense_weight_stops_the_model_from_opening(damaged: Path, data: Any) -> None:
    packed = PackedModel(damaged)
    kept = [entry for entry in packed.manifest.tensors if not entry.mappable]
    entry = data.draw(st.sampled_from([*packed.manifest.linears, *kept]))
    position = entry.offset + data.draw(st.integers(0, entry.nbytes - 1))
    bit = data.draw(st.integers(0, 7))
    flip(damaged / entry.file, position, bit)
    try:
        with pytest.raises(PackedModelError) as caught:
            Engine(packed, EngineSettings(experts_per_layer=1))
        one_line(caught, getattr(entry, "module", None) or entry.name, "corrupted")
    finally:
        flip(damaged / entry.file, position, bit)


def test_a_flipped_mapped_embedding_stops_the_model(damaged: Path) -> None:
    packed = PackedModel(damaged)
    (entry,) = [entry for entry in packed.manifest.tensors if entry.mappable]
    flip(damaged / entry.file, entry.offset + 10 * 2 * entry.shape[1] + 1, 6)  # an exponent of token 10
    with pytest.raises(PackedModelError):
        run(Engine(packed, EngineSettings(experts_per_layer=1)))


# --- memory

MEASURE = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
import greenroom.packing
from greenroom.metrics import process_memory
before = process_memory()["resident"]
Path("/proc/self/clear_refs").write_text("5")
greenroom.packing.pack(sys.argv[1], sys.argv[2], expert_bits=int(sys.argv[3]))
print(process_memory()["peak"] - before)
"""


def peak_of_packing(src: Path, dst: Path, bits: int) -> int:
    command = [sys.executable, "-c", MEASURE, str(src), str(dst), str(bits)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(out.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 4])
def test_memory_does_not_grow_with_the_number_of_experts(tmp_path: Path, bits: int) -> None:
    width, peaks = 1024, {}
    for experts in (8, 32):
        config = {"hidden_size": width, "intermediate_size": width, "num_local_experts": experts, "vocab_size": 4096}
        src = write_mixtral(tmp_path / f"s{experts}", **config, shards=2)
        # the lesser of two: how the caller and the worker meet adds to a peak, up to two experts now and then
        peaks[experts] = min(peak_of_packing(src, tmp_path / f"m{experts}-{turn}", bits) for turn in range(2))
        shutil.rmtree(src)
    expert_nbytes = 3 * width * width * 4
    # at a time: one expert being read, one that waits, one that is packed, one that is written
    assert peaks[32] < 4 * expert_nbytes + 4096 * width * 4 + (64 << 20)
    assert peaks[32] - peaks[8] < 3 * expert_nbytes, peaks  # 24 experts more


def test_the_writer_notices_data_that_is_not_as_announced(tmp_path: Path) -> None:
    entry = writer.Entry(name="x", dtype="U8", shape=(8,), nbytes=8)
    with pytest.raises(AssertionError, match="announced"):
        writer.write_file(tmp_path / "f", [entry], [memoryview(b"short")])
    assert list(tmp_path.iterdir()) == []
