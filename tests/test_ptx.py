"""The GPU's kernels as compiled for a GPU, on the CPU: inline assembly, matrix units and layouts of threads, which the
interpreter does not show."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("triton.backends.nvidia", reason="triton has no NVIDIA backend")

KNOWN = "3.9"
"""The Triton whose instructions are all known; another's may be others."""
ROOT = Path(__file__).parent.parent
CASES = ["float16:4:64:1064:9:1", "bfloat16:3:64:72:11:1", "float16:2:16:600:11:5", "bfloat16:3:64:72:11:40"]
"""Several turns of a loop; both dtypes; each default width; one token and several."""
EVERY = [
    f"{dtype}:{bits}:{group}:72:19:{tokens}"
    for dtype in ("float16", "bfloat16")
    for bits in (2, 3, 4, 8)
    for group in (16, 32, 64, 128)
    for tokens in (1, 7)
]


def emulated(*arguments: str) -> "list[dict[str, Any]]":
    """In a process of its own: this one interprets."""
    path = f"{ROOT}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", Path(__file__).with_name("emulated.py"), *arguments],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path},
    )  # fmt: skip
    if "ptx.UnsupportedError" in done.stderr and not triton.__version__.startswith(KNOWN):
        pytest.skip(f"triton {triton.__version__} makes instructions that {KNOWN} did not: add them to tests/ptx.py")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_compiled_kernels_equal_the_reference() -> None:
    found = emulated(*CASES)
    assert [one["kernel"] for one in found] == [
        *(name for tokens in (1, 1, 5) for name in (f"token {tokens}", "prompt", "combine", "linear")),
        *("prompt", "combine", "linear"),  # 40 tokens
    ]
    assert all(one["right"] for one in found), found


@pytest.mark.slow
def test_a_wrong_register_is_seen() -> None:
    """Negative control: matrix units that multiply a column twice and another not at all; pairs of words swapped."""
    for broken in ([], ["--broken"]):
        found = emulated(*broken, "float16:4:64:72:11:1")
        assert [one["right"] for one in found] == 4 * [not broken], found


@pytest.mark.slow
def test_every_format() -> None:
    found = emulated(*EVERY)
    assert len(found) == 4 * len(EVERY) and all(one["right"] for one in found), [o for o in found if not o["right"]]
