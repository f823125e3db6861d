"""Packing for a text: nearer to the original in the same bytes, resumed to the same bytes, and refused early."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from greenroom import calibration, library, packing
from greenroom.calibration import Calibration, Inputs, windows_of
from greenroom.checkpoint import Checkpoint
from greenroom.config import EngineSettings
from greenroom.errors import BudgetError, ConfigError, PackError
from greenroom.evaluate import evaluate
from greenroom.original import Text
from greenroom.packed import PackedModel
from greenroom.packing import pack
from greenroom.quant import dequantize
from test_cli import cache, call, refused  # noqa: F401

WORDS = [
    "the",
    "lighthouse",
    "keeper",
    "finds",
    "a",
    "map",
    "of",
    "an",
    "island",
    "where",
    "nobody",
    "has",
    "ever",
    "been",
    "and",
    "sails",
    "there",
    "at",
    "once",
]


def prose(seed: int) -> str:
    order = torch.randint(len(WORDS), (4000,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in order.tolist())


@pytest.fixture(scope="module")
def source(demo_cache: Path) -> Path:
    """A tiny talking checkpoint with a tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GREENROOM_CACHE", str(demo_cache))
        return library.demo_checkpoint()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(prose(0))
    return path


@pytest.fixture(scope="module")
def calibrated(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return pack(source, tmp_path_factory.mktemp("packed") / "model", expert_bits=2, calibrate=text)


def divergence(packed: PackedModel, source: Path, tmp_path: Path) -> float:
    """KL to the original on another text."""
    (tmp_path / "other.txt").write_text(prose(1))
    text = Text.read(tmp_path / "other.txt")
    found = evaluate(packed.folder, packed.folder, text, EngineSettings(), original=source, context=64, most=8)
    assert found.summary.kl is not None and found.same_source
    return found.summary.kl.value


def files(packed: PackedModel) -> "dict[str, bytes]":
    return {path.name: path.read_bytes() for path in packed.folder.iterdir() if path.suffix == ".safetensors"}


def test_it_is_nearer_to_the_original_in_the_same_bytes(
    source: Path, text: Path, calibrated: PackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pack(source, tmp_path / "plain", expert_bits=2)
    nearest = divergence(plain, source, tmp_path)
    assert divergence(calibrated, source, tmp_path) < 0.9 * nearest
    assert {name: len(data) for name, data in files(plain).items()} == {
        name: len(data) for name, data in files(calibrated).items()
    }
    assert plain.manifest.source.keys() == {"fingerprint"}
    assert calibrated.manifest.source["calibration"] == Text.read(text).sha256
    given = Inputs.of

    def other_columns(inputs: Inputs, expert: int) -> Any:
        x, roots = given(inputs, expert)
        return x.roll(1, dims=1), roots

    monkeypatch.setattr(Inputs, "of", other_columns)
    wrong = pack(source, tmp_path / "wrong", expert_bits=2, calibrate=text)
    assert divergence(wrong, source, tmp_path) > 0.9 * nearest  # control


def test_an_interrupted_pack_resumes_to_the_same_bytes(
    source: Path, text: Path, calibrated: PackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = packing.write_file, [2]

    def interrupted(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_file", interrupted)
        with pytest.raises(PackError, match="interrupted"):
            pack(source, tmp_path / "model", expert_bits=2, calibrate=text)
    assert (tmp_path / "model" / "experts-00000.safetensors").exists()
    with pytest.raises(PackError, match="unfinished"):
        pack(source, tmp_path / "model", expert_bits=2)
    assert files(pack(source, tmp_path / "model", expert_bits=2, calibrate=text)) == files(calibrated)


def test_another_text_wants_another_folder(source: Path, text: Path, calibrated: PackedModel, tmp_path: Path) -> None:
    assert pack(source, calibrated.folder, expert_bits=2, calibrate=text).folder == calibrated.folder
    (tmp_path / "other.txt").write_text(prose(1))
    for other in (None, tmp_path / "other.txt"):
        with pytest.raises(PackError, match="another source"):
            pack(source, calibrated.folder, expert_bits=2, calibrate=other)


def test_what_cannot_be_is_refused_before_anything_is_written(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.txt").write_text("a map of an island")
    with pytest.raises(ConfigError, match=r"short\.txt has \d+ tokens"):
        pack(source, tmp_path / "model", calibrate=tmp_path / "short.txt")
    with pytest.raises(ConfigError, match="cannot read"):
        pack(source, tmp_path / "model", calibrate=tmp_path / "missing.txt")
    with pytest.raises(ConfigError, match="16 bits"):
        pack(source, tmp_path / "model", expert_bits=16, calibrate=text)
    shutil.copytree(source, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ConfigError, match="no tokenizer"):
        pack(tmp_path / "mute", tmp_path / "model", calibrate=text)
    assert not (tmp_path / "model").exists()
    with monkeypatch.context() as patch, pytest.raises(BudgetError, match="without --calibrate"):
        patch.setattr(packing, "available_memory", lambda: 1 << 20)
        pack(source, tmp_path / "model", expert_bits=2, calibrate=text)


def test_the_command(
    source: Path, text: Path, calibrated: PackedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "model")
    assert call(capsys, "pack", str(source), target, "--expert-bits", "2", "--calibrate", str(text))[0] == 0
    assert files(PackedModel(tmp_path / "model")) == files(calibrated)
    assert "cannot read" in refused(capsys, "pack", str(source), target, "--calibrate", str(tmp_path / "no"))


def test_an_expert_is_given_its_own_tokens_and_where_they_are_few_others_too(monkeypatch: pytest.MonkeyPatch) -> None:
    states = torch.arange(40, dtype=torch.bfloat16)[:, None].expand(40, 3).contiguous()
    index = torch.stack([torch.arange(40) % 4, 4 + torch.arange(40) % 2], dim=1).to(torch.int32)
    weights = torch.stack([torch.full((40,), 0.75), torch.full((40,), 0.25)], dim=1)
    inputs = Inputs(states, index, weights)
    monkeypatch.setattr(calibration, "_ENOUGH", 10)
    x, roots = inputs.of(1)
    assert x[:, 0].tolist() == list(range(1, 40, 4)) and roots.unique().tolist() == [0.75]
    x, roots = inputs.of(5)
    assert x[:, 0].tolist() == list(range(1, 40, 2)) and roots.unique().tolist() == [0.25]
    monkeypatch.setattr(calibration, "_ENOUGH", 14)
    x, roots = inputs.of(1)
    assert x[:, 0].tolist() == [*range(1, 40, 4), 0, 10, 20, 30]
    assert roots[10:, 0].square().tolist() == pytest.approx([0.1 * 0.75**2] * 4)
    x, roots = inputs.of(9)  # nobody wants it
    assert len(x) == 14 and bool((roots > 0).all())


def test_the_comparison_with_llama_cpp_rounds_as_packing_does(
    source: Path, text: Path, calibrated: PackedModel, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    from benchmarks.peer_rounding import way

    checkpoint = Checkpoint(source)
    module, entry = checkpoint.experts[1], calibrated.manifest.experts[1]
    with Calibration(source, windows_of(source, Text.read(text)), tmp_path, 1 << 30) as given:
        found = {
            name: way(name, None, given).of_expert(checkpoint, module, 2, checkpoint.expert(module, 2))  # type: ignore[arg-type]
            for name in ("2g16+", "2g16")
        }
    raw = (calibrated.folder / entry.file).read_bytes()[entry.offset + 2 * entry.record_nbytes :][: entry.record_nbytes]
    record = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    for tensor in entry.tensors:
        packed = dequantize(tensor.part(record), tensor.rows, tensor.cols, tensor.format)
        assert torch.equal(found["2g16+"][tensor.name], packed)
        assert not torch.equal(found["2g16"][tensor.name], packed), "control"


def test_what_all_are_given_counts_as_a_few_tokens() -> None:
    states = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    inputs = Inputs(states, torch.zeros(3000, 1, dtype=torch.int32), torch.full((3000, 1), 0.5))
    expected = states.float().T @ states.float() / 3000
    torch.testing.assert_close(inputs.moments, expected)
    weights = {"up_proj": torch.randn(4, 8), "down_proj": torch.randn(8, 4)}
    module = SimpleNamespace(has_gate=False, has_bias=False, act_fn=torch.relu)
    given = inputs.of_matrices(0, module, weights)
    assert given["up_proj"].prior is not None and given["down_proj"].prior is None
    torch.testing.assert_close(given["up_proj"].prior, expected * (0.25 * 8 * 0.5**2))
    torch.testing.assert_close(given["down_proj"].inputs, 0.5 * torch.relu(states.float() @ weights["up_proj"].T))
