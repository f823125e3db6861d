"""Engines on fake devices, and kernels that take simulated time."""

from collections.abc import Sequence
from typing import Any

import torch

from greenroom.config import EngineSettings
from greenroom.device import FakeDevice
from greenroom.engine import Engine
from greenroom.footprint import KERNEL_NBYTES
from greenroom.kernels import Activation, slots
from greenroom.packed import PackedModel, RecordTensor

VRAM = 1 << 30


class Timed:
    """The reference kernels, each taking the time of its bytes on a device's queue; knows until when buffers are
    read."""

    def __init__(self, device: FakeDevice, seconds_per_expert: float = 1e-3) -> None:
        self.device, self.seconds_per_expert = device, seconds_per_expert
        self.read_until: dict[int, float] = {}

    def _spend(self, buffers: "Sequence[int]") -> None:
        self.device.spend(len(buffers) * self.seconds_per_expert)
        self.read_until |= dict.fromkeys(buffers, self.device.compute_s)

    def pairs(
        self,
        x: torch.Tensor,
        arena: torch.Tensor,
        places: torch.Tensor,
        layout: "Sequence[RecordTensor]",
        activation: Activation,
        out: torch.Tensor,
    ) -> None:
        slots.pairs(x, arena, places, layout, activation, out)
        self._spend([int(slot) for slot in places.unique() if slot >= 0])

    def prompt(
        self,
        x: torch.Tensor,
        arena: torch.Tensor,
        spans: "Sequence[tuple[int, int, int]]",
        rows: torch.Tensor,
        layout: "Sequence[RecordTensor]",
        activation: Activation,
        out: torch.Tensor,
    ) -> None:
        slots.prompt(x, arena, spans, rows, layout, activation, out)
        self._spend([slot for slot, _, _ in spans])

    def combine(
        self, out: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, own: bool = False
    ) -> torch.Tensor:
        return slots.combine(out, places, weights, own)


class Engines:
    """Makes engines on fake devices with every check on, and closes them."""

    def __init__(self, packed: PackedModel) -> None:
        self._packed, self._made = packed, list[Engine]()
        self._experts = sum(entry.num_experts for entry in packed.manifest.experts)
        self.record = max(entry.record_nbytes for entry in packed.manifest.experts)

    def __call__(self, ram_slots: int = 1 << 30, **options: Any) -> Engine:
        made = {name: options.pop(name) for name in ("store", "shuffle", "device", "slots_kernel") if name in options}
        made.setdefault("device", FakeDevice())
        given = {"experts_per_layer": 2, "validate": True, "vram": VRAM, "cpu_experts": False, "staging": 4, **options}
        ram_slots = min(ram_slots, self._experts)
        ram = KERNEL_NBYTES + (given["staging"] + ram_slots) * self.record
        self._made.append(Engine(self._packed, EngineSettings(ram=ram, **given), **made))
        assert self._made[-1].plan.ram is not None and self._made[-1].plan.ram.slots == ram_slots
        return self._made[-1]

    def close(self) -> None:
        while self._made:
            self._made.pop().close()
