"""The notebook's cells run from top to bottom on a CPU, with the demo."""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "mixtral_on_colab.ipynb"


def cells(kind: str) -> "list[str]":
    return ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def run(sources: "list[str]") -> "dict[str, Any]":
    """The names that are left after all cells; lines for the notebook's shell are skipped."""
    names: dict[str, Any] = {}
    for source in sources:
        plain = "\n".join(line for line in source.split("\n") if not line.startswith(("%", "!")))
        exec(compile(plain, str(NOTEBOOK), "exec"), names)
    return names


def test_its_cells_run(packed_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.setenv("GREENROOM_CACHE", str(packed_demo.parents[1]))
    names = run(cells("code"))
    assert names["MODEL"] == "demo" and len(names["messages"]) == 4
    assert names["metrics"].requests > 0 and len(names["rates"]) == 1 + max(names["engine"].plan.experts)
    assert "experts have a slot" in capsys.readouterr().out


def test_it_keeps_no_outputs() -> None:
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")


@pytest.mark.parametrize("free,vram,model", [(120e9, 13, "mistralai/Mixtral-8x7B"), (70e9, 3, "allenai/OLMoE")])
def test_its_settings_for_a_gpu_are_settings(free: float, vram: int, model: str) -> None:
    """They are not run here."""
    from greenroom.library import engine_settings

    first = next(source for source in cells("code") if "SETTINGS" in source)
    first = first.replace("torch.cuda.is_available()", "True").replace('shutil.disk_usage(".").free', str(free))
    names = run([first])
    bits = {"expert_bits", "attention_bits"}
    settings = engine_settings(**{name: value for name, value in names["SETTINGS"].items() if name not in bits})
    assert settings.vram == vram << 30 and names["MODEL"].startswith(model)
