"""Launches that are bound once: what goes Triton's own way, and what is handed to what it compiled."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from greenroom.kernels import device
from greenroom.kernels.gpu.bound import Bound


def test_what_triton_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles some C when a GPU is first used."""

    class Driver:
        @property
        def active(self) -> Any:
            raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(device.triton.runtime, "driver", Driver())
    assert device._no_launcher().startswith("triton cannot compile its launcher (Failed to find C compiler.)")
    monkeypatch.setattr(
        device.triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=int))
    )
    assert device._no_launcher() == ""


class Kernel:
    """Stands for a kernel of Triton's; `compiles`: on a GPU and not in the interpreter."""

    arg_names = ("x", "width", "out", "BITS")

    def __init__(self, compiles: bool = True) -> None:
        self.compiles, self.calls = compiles, list[tuple[str, Any]]()

    def __getitem__(self, grid: "tuple[int, ...]") -> Any:
        assert grid == (3, 2, 1)

        def launch(**arguments: Any) -> "Compiled | None":
            self.calls.append(("triton", arguments))
            return Compiled(self) if self.compiles else None

        return launch


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: "tuple[int, ...]") -> Any:
        assert grid == (3, 2, 1)
        return lambda *arguments: self.kernel.calls.append(("compiled", arguments))


def bound(kernel: Kernel) -> Bound:
    return Bound(kernel, (3, 2), ("x", "out"), {"width": 64, "BITS": 4}, num_warps=1)


def floats(offset: int = 0) -> torch.Tensor:
    """Whose address is that many times 4 bytes beyond a multiple of 64."""
    return torch.zeros(64)[offset:]


def test_the_second_launch_goes_to_what_was_compiled() -> None:
    kernel, x, out = Kernel(), floats(), floats()
    launch = bound(kernel)
    launch(x, out)
    launch(out, None)
    (first, named), (second, given) = kernel.calls
    assert (first, second) == ("triton", "compiled")
    assert named == {"x": x, "out": out, "width": 64, "BITS": 4, "num_warps": 1}
    assert given[0] is out and given[1:] == (64, None, 4)


def test_addresses_that_are_no_multiple_of_16_go_the_long_way() -> None:
    """What was compiled for multiples of 16 may read 16 bytes at once."""
    kernel = Kernel()
    launch = bound(kernel)
    for offset in (0, 1, 0, 4):
        launch(floats(), floats(offset))
    assert [name for name, _ in kernel.calls] == ["triton", "triton", "compiled", "compiled"]
    kernel = Kernel()
    launch = bound(kernel)
    for offset in (1, 0, 0, 3):  # what was compiled for a tensor that is none may still read 16 bytes of another
        launch(floats(offset), floats())
    assert [name for name, _ in kernel.calls] == ["triton", "triton", "compiled", "triton"]


def test_the_interpreter_is_asked_every_time() -> None:
    kernel = Kernel(compiles=False)
    launch = bound(kernel)
    launch(floats(), floats())
    launch(floats(), floats())
    assert [name for name, _ in kernel.calls] == ["triton", "triton"]
