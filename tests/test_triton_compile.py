"""The GPU's kernels through Triton's compiler and NVIDIA's assembler, which need no GPU: what the interpreter forgives,
they refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
ptxas = pytest.importorskip("triton.backends.nvidia", reason="triton has no NVIDIA backend")

ROOT = Path(__file__).parent.parent


def compiled(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """In a process of its own: this one interprets."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_compile", *arguments],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip


@pytest.mark.slow
def test_they_compile_and_nothing_is_spilled() -> None:
    """For a T4 and an H100."""
    done = compiled("--kernels", "vector 3g64", "matrix 4g64 16", "arrange", "combine", "lookup")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("sm_75 ") for line in lines) == sum(line.startswith("sm_90 ") for line in lines) > 5
    assert lines[-1] == "nothing is spilled"


def test_every_launch_binds_its_arguments() -> None:
    """Triton makes a function of each kernel's signature, and has names of its own in it: `params`, `options`."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", Path(__file__).with_name("launches.py")],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = "matrix.dequantised matrix.products pairs.combine pairs.lookup vector.arrange vector.products"
    assert done.stdout.split() == names.split()


def test_a_kernel_that_does_not_exist() -> None:
    done = compiled("--kernels", "vector 5g64")
    assert done.returncode == 2 and "no kernel is called vector 5g64" in done.stderr
