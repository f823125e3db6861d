"""Where experts are, in the device's own memory: so that kernels find them without the host."""

import torch


class SlotTable:
    """Expert → buffer, int32 [layers, num_experts + 1], −1 for what is not there. The last column stays −1: a router's
    sentinel.

    It is read and written in the order in which things are computed, so a buffer has to be entered after what is
    computed waits for its bytes, and taken out before it is filled again.
    """

    def __init__(self, layers: int, num_experts: int, place: torch.device) -> None:
        self._slots = torch.full((layers, num_experts + 1), -1, dtype=torch.int32, device=place)
        self._keys: dict[int, tuple[int, int]] = {}
        self._buffers: dict[tuple[int, int], int] = {}

    def enter(self, layer: int, expert: int, buffer: int) -> None:
        """The buffer holds the expert."""
        if self._buffers.get((layer, expert)) != buffer:
            self.take_out(buffer)
            self._keys[buffer], self._buffers[layer, expert] = (layer, expert), buffer
            self._slots[layer, expert].fill_(buffer)

    def take_out(self, buffer: int) -> None:
        """The buffer holds nothing any more."""
        key = self._keys.pop(buffer, None)
        if key is not None and self._buffers.get(key) == buffer:
            del self._buffers[key]
            self._slots[key].fill_(-1)

    def clear(self) -> None:
        """Nothing is there."""
        self._keys.clear()
        self._buffers.clear()
        self._slots.fill_(-1)

    def find(self, layer: int, top_k_index: torch.Tensor, slots: torch.Tensor) -> None:
        """`slots` int32 [T, k] become those of the experts top_k_index [T, k] of a layer."""
        torch.ops.aten.index.Tensor_out(self._slots[layer], [top_k_index], out=slots)
