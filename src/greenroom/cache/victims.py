"""What RAM holds behind a device's slots, as a pure state machine.

Experts climb from RAM to the device and leave it again. While there is room RAM keeps a copy of what has climbed, so
that leaving costs nothing; where room is short such copies go first. So the two tiers hold the same experts where all
fit into RAM, and different ones where only both together hold them: nothing is then read from disk twice.
"""

from collections import OrderedDict
from collections.abc import Container

from greenroom.cache.policies import Key


class VictimCache:
    """`slots` places for experts in RAM. `busy` slots (their bytes are being copied) are given to nobody."""

    def __init__(self, slots: int, validate: bool = False) -> None:
        self.slots = slots
        self._free = list(range(slots))
        self._held: OrderedDict[Key, int] = OrderedDict()  # the only copy above disk, the longest unwanted first
        self._doubled: OrderedDict[Key, int] = OrderedDict()  # also on the device, the first to climb first
        self._validate = validate

    def find(self, key: Key) -> "int | None":
        """The slot that holds the expert's bytes, or None."""
        return self._held.get(key, self._doubled.get(key))

    def climb(self, key: Key) -> None:
        """The expert is on its way to the device."""
        if key in self._held:
            self._doubled[key] = self._held.pop(key)
        self._check()

    def place(self, key: Key, busy: "Container[int]" = ()) -> "int | None":
        """A slot for an expert that is read from disk on its way to the device, or None where none is free. The expert
        counts as climbed."""
        assert self.find(key) is None, "the expert is here"
        slot = self._take_free(busy)
        if slot is not None:
            self._doubled[key] = slot
        self._check()
        return slot

    def leave(self, key: Key, busy: "Container[int]" = ()) -> "int | None":
        """The expert leaves the device. Returns the slot to save its bytes to, or None where they are here already or
        nothing can make room."""
        if key in self._doubled:
            self._held[key] = self._doubled.pop(key)
        slot = None
        if key not in self._held:
            slot = self._take_free(busy)
            for group in (self._doubled, self._held):
                slot = _take(group, busy) if slot is None else slot
            if slot is not None:
                self._held[key] = slot
        if key in self._held:
            self._held.move_to_end(key)
        self._check()
        return slot

    def forget(self, key: Key) -> None:
        """The expert's bytes never came: its slot is free."""
        slot = self._held.pop(key, None)
        slot = self._doubled.pop(key, None) if slot is None else slot
        if slot is not None:
            self._free.append(slot)
        self._check()

    @property
    def keys(self) -> "set[Key]":
        """All experts that are here."""
        return {*self._held, *self._doubled}

    def _take_free(self, busy: "Container[int]") -> "int | None":
        slot = next((slot for slot in reversed(self._free) if slot not in busy), None)
        if slot is not None:
            self._free.remove(slot)
        return slot

    def _check(self) -> None:
        if self._validate:
            used = [*self._free, *self._held.values(), *self._doubled.values()]
            assert sorted(used) == list(range(self.slots)), "a slot is lost or doubled"
            assert not self._held.keys() & self._doubled.keys(), "an expert is here twice"


def _take(group: "OrderedDict[Key, int]", busy: "Container[int]") -> "int | None":
    """The slot of the first expert of `group` whose slot is not busy; that expert is dropped."""
    for key, slot in group.items():
        if slot not in busy:
            del group[key]
            return slot
    return None
