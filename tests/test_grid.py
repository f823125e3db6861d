"""The grid against models that are really packed: the same bytes, the same figures; with controls that must fail."""

import functools
import json
from pathlib import Path

import pytest
import torch
import transformers

import families
from families import FAMILIES
from greenroom import library, seam
from greenroom.cli import grid as command
from greenroom.config import EngineSettings
from greenroom.errors import ConfigError
from greenroom.evaluate import WindowScore, score, summarise
from greenroom.evaluate import packed as packed_states
from greenroom.evaluate.cells import Cells
from greenroom.evaluate.grid import Cell, measure
from greenroom.evaluate.rounding import SharesLinear, rounded
from greenroom.original import Head, Original, Window, cut, stream
from greenroom.packing import pack
from greenroom.quant import Format, Layout
from test_cli import cache, call, refused  # noqa: F401

ROOM = 1 << 30
WIDTHS = (16, 4, 2)


def windows() -> "list[Window]":
    generator = torch.Generator().manual_seed(2)
    return cut(torch.randint(families.FIRST_ID, families.LAST_ID, (60,), generator=generator), 20)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    FAMILIES["mixtral"].build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cells(checkpoint: Path) -> "dict[tuple[int, int], Cell]":
    found = measure(checkpoint, windows(), ROOM, widths=WIDTHS)
    return {(cell.attention_bits, cell.expert_bits): cell for cell in found}


def divergence(checkpoint: Path, folder: Path) -> float:
    """KL of the model packed in `folder`, run by the reference kernels."""
    with Original(checkpoint) as original:
        states = stream(original, windows(), ROOM)
        running = library.start(folder, folder, EngineSettings(experts_per_layer=2, context=20, prompt_chunk=20))
        scores = []
        for number, window in enumerate(windows()):
            own, output = packed_states.whole_window(running, window)
            scores.append(score(window, own, Head(running.model, output), states.get(number), original.head))
        running.close()
        states.close()
    kl = summarise(scores, True).kl
    assert kl is not None
    return kl.value


@pytest.mark.parametrize("bits", [(16, 4), (4, 2), (2, 16)])
def test_a_cell_is_what_packing_gives(
    bits: "tuple[int, int]",
    checkpoint: Path,
    cells: "dict[tuple[int, int], Cell]",
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GREENROOM_ISA", "none")  # float32 products, as the grid's
    packed = pack(checkpoint, tmp_path / "packed", attention_bits=bits[0], expert_bits=bits[1])
    assert cells[bits].nbytes == packed.nbytes
    got = divergence(checkpoint, packed.folder)
    kl = {key: cell.summary.kl.value for key, cell in cells.items() if cell.summary.kl}
    assert got == pytest.approx(kl[bits], rel=1e-3)
    others = [value for key, value in kl.items() if key != bits]
    assert all(got != pytest.approx(value, rel=1e-3) for value in others), "control: the cells do not differ"


def test_fewer_bits_cost_quality(cells: "dict[tuple[int, int], Cell]") -> None:
    for row in ([(16, 16), (16, 4), (16, 2)], [(16, 16), (4, 16), (2, 16)]):
        kl = [cells[bits].summary.kl.value for bits in row if cells[bits].summary.kl]  # type: ignore[union-attr]
        assert kl == sorted(kl) and kl[0] < kl[-1]
        assert [cells[bits].nbytes for bits in row] == sorted((cells[bits].nbytes for bits in row), reverse=True)


def test_a_dense_models_mlps_are_its_experts(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=families.LAST_ID + 8,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path)
    found = {
        (c.attention_bits, c.expert_bits): c for c in measure(tmp_path, windows(), ROOM, widths=(16, 2), head_bits=16)
    }
    saved = {False: 0, True: 0}
    with torch.device("meta"):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}":
                shape = (module.out_features, module.in_features)
                wide, narrow = (Layout(*shape, Format.of(bits)).nbytes for bits in (16, 2))
                saved[seam.in_attention(name)] += wide - narrow
    assert found[16, 16].nbytes - found[2, 16].nbytes == saved[True]
    assert found[16, 16].nbytes - found[16, 2].nbytes == saved[False]
    kl = {bits: cell.summary.kl.value for bits, cell in found.items() if cell.summary.kl}
    assert kl[16, 16] < 1e-9 < min(kl[16, 2], kl[2, 16])


def test_shares_of_a_batch_meet_their_own_rounding() -> None:
    linear = torch.nn.Linear(64, 8)
    formats = [Format.of(2), Format.of(8)]
    x = torch.randn(4, 3, 64)
    got = SharesLinear(linear, [functools.partial(rounded, format=format) for format in formats])(x)
    for share, format in enumerate(formats):
        part = slice(2 * share, 2 * share + 2)
        want = x[part] @ rounded(linear.weight, format).T + linear.bias
        assert torch.allclose(got[part], want, atol=1e-5)
        other = x[part] @ rounded(linear.weight, formats[1 - share]).T + linear.bias
        assert not torch.allclose(got[part], other, atol=1e-5), "control"


# --- a run that was stopped


def test_a_stopped_grid_goes_on(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, subject = tmp_path / "cells", {"text": "a"}
    first = measure(checkpoint, windows(), ROOM, widths=(16, 2), cells=Cells(path, subject))
    text = path.read_text()
    path.write_text(text[:-9])  # killed while it wrote
    kept = Cells(path, subject)
    assert not kept.complete((2, 2), len(windows())) and kept.complete((16, 16), len(windows()))
    again = measure(checkpoint, windows(), ROOM, widths=(16, 2), cells=kept)
    assert again == first and path.read_text() == text
    monkeypatch.setattr("greenroom.evaluate.grid.stream", lambda *_: pytest.fail("measured twice"))
    assert measure(checkpoint, windows(), ROOM, widths=(16, 2), cells=Cells(path, subject)) == first


def test_scores_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cells"
    Cells(path, {"text": "a"}).put((16, 4), 0, WindowScore(tokens=1, nll=1.0))
    with pytest.raises(ConfigError, match="of another model"):
        Cells(path, {"text": "b"})
    assert Cells(path, {"text": "a"}).has((16, 4), 0)
    path.write_text("no json\nat all")
    with pytest.raises(ConfigError, match="is no file of"):
        Cells(path, {"text": "a"})
    assert path.read_text() == "no json\nat all", "somebody's file was changed"
    for foreign in ("no line end", '{"text": "b"', '{"text": "a"} and more'):
        path.write_text(foreign)
        with pytest.raises(ConfigError, match="is no file of"):
            Cells(path, {"text": "a"})
        assert path.read_text() == foreign, "somebody's file was changed"
    for cut_off in ("", '{"te'):  # killed while it wrote the first line
        path.write_text(cut_off)
        Cells(path, {"text": "a"})
        assert path.read_text() == '{"text": "a"}\n'
    with pytest.raises(ConfigError, match="cannot use"):
        Cells(tmp_path / "missing" / "cells", {})


# --- what is printed


def test_the_papers_figures_stand_beside_its_model(cells: "dict[tuple[int, int], Cell]") -> None:
    lines = command.table(list(cells.values()), command.PAPER).splitlines()
    assert len(lines) == 2 + len(cells) and "3.59" in lines[2] and "25.82" in lines[3]
    assert "3.59" not in command.table(list(cells.values()), {})


@pytest.mark.parametrize(
    "flags",
    [
        ["--stride", "4"],
        ["--expert-bits", "4"],
        ["--no-original"],
        ["--token-by-token"],
        ["--activation-bits", "8"],
        ["--dtype", "bfloat16"],
    ],
)
def test_flags_without_a_meaning_are_refused(
    flags: "list[str]",
    cache: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text"
    text.write_text("hello " * 50)
    library.find("demo")
    assert flags[0] in refused(capsys, "eval", "demo", "--grid", "--text", str(text), *flags)
    assert "--grid" in refused(capsys, "eval", "demo", "--text", str(text), "--cells", str(tmp_path / "cells"))


def test_the_command_prints_every_cell(
    cache: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text"
    text.write_text("hello there, well met; hell is others.\n" * 20)
    library.find("demo")
    flags = ["--text", str(text), "--context", "48", "--windows", "2", "--cells", str(tmp_path / "cells"), "--json"]
    code, out, err = call(capsys, "eval", "demo", "--grid", *flags)
    assert code == 0, err
    report = json.loads(out[-1])
    assert len(report["cells"]) == 25 and len(out) == 1 + 2 + 25 + 1
    assert report["windows"] == 2 and report["context"] == 48 and report["head_bits"] == 8
    assert report["text"]["name"] == "text"
    bits = {(cell["attention_bits"], cell["expert_bits"]): cell for cell in report["cells"]}
    assert bits[2, 2]["summary"]["kl"]["value"] > bits[16, 16]["summary"]["kl"]["value"] >= 0
    assert bits[2, 2]["nbytes"] < bits[16, 2]["nbytes"] < bits[16, 16]["nbytes"]
    assert call(capsys, "eval", "demo", "--grid", *flags)[1] == out
    text.write_text("another text, " * 40)
    assert "another --cells" in refused(capsys, "eval", str(cache / "demo" / "checkpoint"), "--grid", *flags)
