"""What the paper calls naive: whole layers moved to the device when they are computed, by accelerate. For comparison
only.

Dense weights stay on the device, so that only what is offloaded differs from the engine; the kernels are the engine's.
"""

from typing import Any

import torch
from torch import nn

from greenroom import seam
from greenroom.buffers import allocate, byte_view
from greenroom.device import Device
from greenroom.errors import ConfigError
from greenroom.kernels import over_slots
from greenroom.model import build
from greenroom.packed import PackedModel
from greenroom.runner import activation_of
from greenroom.store import DiskStore


class _Records(nn.Module):
    """All records of a layer, uint8 [num_experts, record_nbytes]: what accelerate moves."""

    def __init__(self, records: torch.Tensor) -> None:
        super().__init__()
        self.records = nn.Parameter(records, requires_grad=False)

    def forward(self) -> torch.Tensor:
        """The records where they are now."""
        return self.records


class NaiveModel:
    """A packed model on `device` whose experts lie in RAM: `model` is transformers'. `bytes_up` counts what was moved.

    Raises ConfigError without accelerate.
    """

    def __init__(
        self, packed: PackedModel, device: Device, slots_kernel: "over_slots.SlotsKernel | None" = None
    ) -> None:
        try:
            from accelerate import cpu_offload
        except ImportError:
            raise ConfigError("naive offloading is accelerate's: pip install accelerate") from None
        self._entries, self._device = packed.manifest.experts, device
        self._kernel = slots_kernel or over_slots.choose(device.place)
        config = seam.load_config(packed.folder)
        self.model: Any = build(packed, config, device.dtype, self._serve).to(device.place)
        self._layers = [_Records(records) for records in _all_records(packed)]
        for layer in self._layers:
            cpu_offload(layer, execution_device=device.place)
        self.bytes_up = 0

    def _serve(
        self, layer: int, module: Any, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        entry = self._entries[layer]
        records = self._layers[layer]()
        self.bytes_up += records.numel()
        out = torch.empty((*top_k_index.shape, entry.tensors[1].rows), dtype=torch.float32, device=x.device)
        slots = top_k_index.to(torch.int32)
        for start in range(0, len(x), 16):  # as many tokens as the kernels take at once
            some = slice(start, start + 16)
            self._kernel.pairs(x[some], records, slots[some], entry.tensors, activation_of(module), out[some])
        places = torch.arange(slots.numel(), dtype=torch.int32, device=x.device).view(slots.shape)
        return self._kernel.combine(out.flatten(0, 1), places, top_k_weights).to(x.dtype)


def _all_records(packed: PackedModel) -> "list[torch.Tensor]":
    store, found = DiskStore(packed), []
    try:
        for layer, entry in enumerate(packed.manifest.experts):
            memory = allocate(entry.num_experts * entry.record_nbytes).view(entry.num_experts, -1)
            for expert in range(entry.num_experts):
                store.read(layer, expert, 0, byte_view(memory[expert]))
            found.append(memory)
    finally:
        store.close()
    return found
