"""What `CudaDevice` asks of torch.cuda, which is a stand-in here: there need be no GPU."""

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from greenroom.device import CudaDevice
from greenroom.device import cuda as room


class Runtime:
    """Registers pages, up to a number of ranges; keeps an error until somebody asks, as CUDA's does."""

    def __init__(self, most: int = 1 << 30) -> None:
        self.most, self.registered, self.latched = most, set[int](), 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if address in self.registered or len(self.registered) == self.most:
            self.latched = 712 if address in self.registered else 2
            return self.latched
        self.registered.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.registered.remove(address)
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    stand_in = SimpleNamespace(
        get_device_capability=lambda place: (7, 5), Stream=lambda place: None, cudart=lambda: made,
        synchronize=lambda place: None,
    )  # fmt: skip
    monkeypatch.setattr(room, "cuda", stand_in)

    def allocate(device: CudaDevice, nbytes: int) -> Any:
        """Memory whose first kernel asks for errors."""

        def zero_() -> None:
            error, made.latched = made.latched, 0
            if error:
                raise RuntimeError("CUDA error: out of memory")

        return SimpleNamespace(zero_=zero_)

    monkeypatch.setattr(CudaDevice, "allocate", allocate)
    return made


def test_pages_are_registered_once_and_given_up(runtime: Runtime) -> None:
    device, memory = CudaDevice(0), torch.zeros(8, dtype=torch.uint8)
    for _ in range(2):
        device.pin(memory)
    assert runtime.registered == {memory.data_ptr()} and not runtime.latched
    device.close()
    assert not runtime.registered
    device.pin(memory)
    del device
    gc.collect()
    assert not runtime.registered, "a device that is gone leaves registered pages behind"


def test_memory_that_cannot_be_pinned_is_copied_all_the_same(runtime: Runtime) -> None:
    runtime.most = 1
    device, memory = CudaDevice(0), torch.zeros(3, 8, dtype=torch.uint8)
    device.pin(memory[0])
    with pytest.warns(RuntimeWarning, match="and no more"):
        device.pin(memory[1])
    device.pin(memory[2])  # and says so once
    assert runtime.registered == {memory[0].data_ptr()} and not runtime.latched, "the next launch would fail"
    device.close()
    assert not runtime.registered
