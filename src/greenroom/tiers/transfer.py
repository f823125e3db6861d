"""Carry out what the cache decided where its buffers are a device's: disk → RAM → device.

A record that RAM holds goes over the link at once; another is read from disk first, by a `Transfer`, into the slot that
RAM keeps it in or a staging buffer. A buffer is reported as soon as its copy is queued: the device's own queues wait
for the bytes (`DeviceArena`), the host does not. An expert that leaves the device is saved to RAM where the victim
cache wants it.
"""

from collections import deque
from collections.abc import Iterable

import torch

from greenroom.cache import Load, VictimCache
from greenroom.cache.policies import Key
from greenroom.device import Event
from greenroom.store import Arena
from greenroom.tiers.arena import DeviceArena
from greenroom.tiers.link import Link
from greenroom.transfer import Transfer


class TierTransfer:
    """Fills `arena` from `host`, whose first `victims.slots` buffers are RAM's slots and whose others are staging.

    `disk` reads into `host`; `nbytes[layer]` is the size of a layer's records. The interface is `Transfer`'s.
    """

    def __init__(
        self,
        arena: DeviceArena,
        host: Arena,
        disk: Transfer,
        link: Link,
        victims: VictimCache,
        nbytes: "list[int]",
    ) -> None:
        self._arena, self._host, self._disk, self.link, self._nbytes = arena, host, disk, link, nbytes
        self.victims = victims
        self._staging = range(victims.slots, host.count)
        self._waiting: list[Load] = []  # for host memory to read into
        self._reading: dict[int, tuple[Key, list[Load]]] = {}  # host buffer → what is read into it, and for which loads
        self._spoiled: set[int] = set()  # host buffers that are being read into for nobody
        self._lent: set[int] = set()  # host buffers that are computed from
        self._sent: deque[int] = deque()  # queued on the link, not reported yet
        self._unreported: set[int] = set()
        self._contents: dict[int, Key] = {}  # what each device buffer holds, wanted or not
        self._saved: dict[int, tuple[int, Event]] = {}  # device buffer → the host buffer it was last saved to, and when

    @property
    def bytes_read(self) -> int:
        """Bytes of all records read from disk so far."""
        return self._disk.bytes_read

    @property
    def seconds_per_byte(self) -> "float | None":
        """Of the link's latest uploads; None before the first."""
        return self.link.seconds_per_byte

    @property
    def queued_s(self) -> float:
        """Seconds that the link's uploads under way will take, about."""
        return self.link.queued_s

    def start(self, load: Load) -> None:
        """Begin filling; `poll` reports `load.buffer` when that is queued."""
        self._unreported.add(load.buffer)
        self.link.settle()
        self._retire(load.buffer)
        self._waiting.append(load)
        self._waiting.sort(key=lambda one: one.speculative)
        self._serve_waiting()

    def poll(self, wait: bool) -> "list[int]":
        """Buffers whose copies have been queued since the last call; with `wait`, at least one.

        Raises the error of a read that failed; its buffer is reported after `abandon`.
        """
        while True:
            self.link.settle()
            self._serve_waiting()
            for buffer in self._disk.poll(wait=wait and not self._sent and bool(self._reading or self._spoiled)):
                self._arrived(buffer)
            if self._sent or not wait:
                break
            if not self._reading and not self._spoiled:
                freed = self.link.wait()
                assert self._waiting and freed, "nothing is on its way"
        self._serve_waiting()
        done = list(self._sent)
        self._sent.clear()
        self._unreported.difference_update(done)
        return done

    @property
    def under_way(self) -> "set[int]":
        """Buffers that `poll` still has to report."""
        return set(self._unreported)

    def abandon(self) -> None:
        """Forget errors and what is read from disk: the access that wanted it has been given up."""
        self._disk.abandon()
        for key, _ in self._reading.values():
            self.victims.forget(key)
        self._reading.clear()
        self._waiting.clear()
        self._lent.clear()
        self._spoiled = self._disk.under_way
        self._sent = deque(self._unreported)

    def in_ram(self, key: Key) -> bool:
        """Whether the host can read the expert's record now."""
        slot = self.victims.find(key)
        return slot is not None and slot not in self._reading and slot not in self.link.writing

    def borrow(self, key: Key) -> torch.Tensor:
        """The record of an expert that is in RAM, uint8 [record_nbytes]; it stays there until `give_back`."""
        slot = self.victims.find(key)
        assert slot is not None
        self._lent.add(slot)
        return self._host.record(slot)[: self._nbytes[key[0]]]

    def give_back(self) -> None:
        """What was borrowed is no longer read."""
        self._lent.clear()

    def retire(self, buffers: "Iterable[int]") -> None:
        """Experts in device buffers have lost their places: save those that RAM wants."""
        for buffer in buffers:
            self._retire(buffer)

    def _retire(self, buffer: int) -> None:
        key = self._contents.pop(buffer, None)
        if key is None:
            return
        slot = self.victims.leave(key, self._read_or_written())
        if slot is not None:
            target = self._record(slot, key)
            source = self._arena.memory[buffer, : target.numel()]
            after = [*self._arena.arrival(buffer), *self.link.events_on(slot)]
            self._saved[buffer] = slot, self.link.download(target, source, after, slot)

    def vacate(self) -> None:
        """Wait for all copies and give up the arena: nothing is on the device any more."""
        self.abandon()
        while self.link.wait():
            pass
        for key in self._contents.values():
            self.victims.leave(key, busy=range(self.victims.slots))  # what RAM holds stays there
        self._contents.clear()
        self._saved.clear()
        self._sent.clear()
        self._unreported.clear()
        self._arena.release()

    def occupy(self, arena: DeviceArena) -> None:
        """Fill another arena from now on."""
        self._arena = arena

    def close(self) -> None:
        """Stop the threads, wait for what is under way and give the arena's memory back; nothing in a forked child."""
        if not self._disk.ours:
            return
        self._disk.close()
        while self.link.wait():
            pass
        self._arena.release()

    def _busy(self) -> "set[int]":
        """Host buffers that are in use."""
        return self._read_or_written() | self.link.using

    def _read_or_written(self) -> "set[int]":
        """Those that the host uses; copies wait for each other without it."""
        return {*self._reading, *self._spoiled, *self._lent}

    def _serve_waiting(self) -> None:
        """Send what RAM holds, and read from disk as far as there is host memory to read into."""
        self._waiting = [load for load in self._waiting if not self._serve(load)]

    def _serve(self, load: Load) -> bool:
        """Whether the load is on its way."""
        busy = self._busy()
        reading = next((loads for key, loads in self._reading.values() if key == load.key), None)
        if reading is not None:
            reading.append(load)
            return True
        slot = self.victims.find(load.key)
        if slot is not None:
            self._send(load, slot)
            return True
        buffer = self.victims.place(load.key, busy)
        if buffer is None:
            buffer = next((one for one in self._staging if one not in busy), None)
        if buffer is None:
            return False
        self._reading[buffer] = (load.key, [load])
        self._disk.start(Load(load.key, buffer, load.speculative))
        return True

    def _arrived(self, buffer: int) -> None:
        """A record has come from disk."""
        if buffer in self._spoiled:
            self._spoiled.remove(buffer)
            return
        key, loads = self._reading.pop(buffer)
        for load in loads:
            assert load.key == key
            self._send(load, buffer)

    def _send(self, load: Load, buffer: int) -> None:
        """Queue the copy of a host buffer to the load's, after what either was last saved from or to."""
        source = self._record(buffer, load.key)
        target = self._arena.memory[load.buffer, : source.numel()]
        after = [event for saved, (slot, event) in self._saved.items() if saved == load.buffer or slot == buffer]
        event = self.link.upload(target, source, after, buffer)
        self._saved.pop(load.buffer, None)
        self._arena.filled_at(load.buffer, event)
        self._contents[load.buffer] = load.key
        self.victims.climb(load.key)
        self._sent.append(load.buffer)

    def _record(self, buffer: int, key: Key) -> torch.Tensor:
        """A host buffer's bytes, pinned."""
        record = self._host.record(buffer)
        self.link.device.pin(record)
        return record[: self._nbytes[key[0]]]
