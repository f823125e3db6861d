"""The architecture as a test: each part imports only what lies below it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import greenroom

ROOMS = [
    "errors", "sizes", "progress", "environment", "folders", "machine", "smoothing", "buffers", "checksum", "threads",
    "dropped", "quant", "config", "seam", "tokenizer", "checkpoint", "packed", "original", "calibration",
    "expert_records", "packing",
    "cache", "history", "store", "readers", "transfer", "device", "tiers", "placement", "speculation", "prefetch",
    "trace", "analyze", "metrics", "kernels", "expert_call", "runner", "device_runner", "static_kv", "hooks",
    "identity", "prompts", "token_inputs", "token_layers", "layer_steps", "token_model", "model", "naive", "decode",
    "footprint", "planner", "probe", "wheels", "demo", "engine", "library", "evaluate", "cli",
]  # fmt: skip
"""Lowest first: a room may import itself and what stands before it."""

SOURCE = Path(greenroom.__file__).parent


def imported(tree: ast.AST, package: "list[str]") -> "set[str]":
    """Rooms that a module of `package` imports, anywhere in its text; `""` is the top package itself."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            # `from greenroom import x` names a room in x
            names.update(f"{start}.{alias.name}" if start == "greenroom" else start for alias in node.names)
    parts = [name.split(".") for name in names]
    return {(path[1] if len(path) > 1 else "") for path in parts if path[0] == "greenroom"}


def violations(room: str, source: str, package: "list[str]") -> "list[str]":
    """What a module of `room` imports against the order."""
    allowed = ROOMS[: ROOMS.index(room) + 1]
    return sorted(imported(ast.parse(source), package) - {*allowed, "__version__"})


def modules() -> "list[tuple[str, Path]]":
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__"):
            found.append((room, path))
    return found


@pytest.mark.parametrize("room,path", modules(), ids=lambda value: value if isinstance(value, str) else value.stem)
def test_a_module_imports_only_what_lies_below_it(room: str, path: Path) -> None:
    assert room in ROOMS, f"{path} is a new room: give it a place in the order"
    package = ["greenroom", *path.relative_to(SOURCE).parts[:-1]]
    assert violations(room, path.read_text(), package) == []


def test_every_room_exists() -> None:
    assert {room for room, _ in modules()} >= set(ROOMS)


@pytest.mark.parametrize(
    "source",
    [
        "from greenroom import engine",
        "from greenroom.engine import Engine",
        "import greenroom.engine as e",
        "from ..engine import Engine",
        "from .. import engine",
        "def late():\n    from greenroom.engine import Engine",
        "if TYPE_CHECKING:\n    import greenroom.engine",
    ],
)
def test_the_order_catches_a_planted_import(source: str) -> None:
    """Negative control."""
    assert violations("packed", source, ["greenroom", "packed"]) == ["engine"]
    assert violations("cli", source, ["greenroom", "cli"]) == []


def test_an_import_of_the_top_package_is_caught() -> None:
    assert violations("packed", "import greenroom", ["greenroom", "packed"]) == [""]


def loaded_by(statement: str) -> "set[str]":
    program = f"{statement}\nimport sys; print(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    return set(out.split())


@pytest.mark.parametrize(
    "statement",
    ["import greenroom", "import greenroom.cache", "import greenroom.analyze", "import greenroom.planner"],
)
def test_light_modules_load_no_torch(statement: str) -> None:
    heavy = {"torch", "transformers", "gguf", "matplotlib"} | ({"numpy"} if statement == "import greenroom" else set())
    if statement.endswith("planner"):
        assert loaded_by(statement) >= {"torch"}  # negative control: it knows the formats, which are torch's
    else:
        assert not loaded_by(statement) & heavy


def test_the_public_names() -> None:
    assert sorted(greenroom.__all__) == [
        "BudgetError",
        "CheckpointError",
        "ConfigError",
        "DemoError",
        "GreenroomError",
        "PackError",
        "PackedModelError",
        "UnsupportedModelError",
        "__version__",
        "load",
        "pack",
    ]
    for name in greenroom.__all__:
        assert getattr(greenroom, name) is not None
