"""Reader threads and stores: errors surface, nothing hangs, demand goes first, every way of reading gives the bytes."""

import contextlib
import errno
import os
import random
import shutil
import signal
import threading
import time
import warnings
from pathlib import Path

import pytest

from greenroom.cache import Load
from greenroom.errors import ClosedError, PackedModelError
from greenroom.packed import PackedModel
from greenroom.readers import PIECE_NBYTES, open_readers
from greenroom.readers.compiled import CompiledReaders, extension
from greenroom.readers.threaded import ThreadedReaders
from greenroom.store import Arena, DiskStore, MemoryStore
from greenroom.transfer import Transfer

PAGE = 4096


def within(seconds: float, action):
    """The result of `action`, or a failure instead of a hang."""
    outcome: list = []

    def run() -> None:
        try:
            outcome.append((action(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, "it hangs"
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def records(experts: int = 4, nbytes: int = PAGE) -> "list[list[bytes]]":
    return [[random.Random(expert).randbytes(nbytes) for expert in range(experts)]]


def load(expert: int, buffer: int, speculative: bool = False) -> Load:
    return Load((0, expert), buffer, speculative)


class Gate(MemoryStore):
    """Reads wait until the gate opens, and fail for the experts in `broken`; every read is noted."""

    def __init__(self, records, broken=(), corrupted=()) -> None:
        super().__init__(records)
        self.open = threading.Event()
        self.begun = threading.Event()
        self.broken, self.corrupted, self.seen = set(broken), set(corrupted), []

    def read(self, layer, expert, start, into):
        self.seen.append((expert, start))
        self.begun.set()
        assert self.open.wait(20)
        if expert in self.broken:
            raise PackedModelError(f"expert {expert} is gone")
        super().read(layer, expert, start, into)

    def check(self, layer, expert, record):
        if expert in self.corrupted:
            raise PackedModelError(f"expert {expert} is corrupted")


@pytest.fixture
def transfers():
    made = []

    def make(store, buffers=8, readers=2, **options):
        arena = Arena(buffers, store.record_nbytes)
        made.append((Transfer(store, arena, readers, **options), store))
        return made[-1][0], arena

    yield make
    for transfer, store in made:
        if isinstance(store, Gate):
            store.open.set()
        within(10, transfer.close)


def collect(transfer: Transfer, count: int) -> "list[int]":
    done: list[int] = []
    while len(done) < count:
        done += within(10, lambda: transfer.poll(wait=True))
    return done


@pytest.mark.parametrize("nbytes", [PAGE, PIECE_NBYTES, PIECE_NBYTES + PAGE, 3 * PIECE_NBYTES])
@pytest.mark.parametrize("readers", [1, 3])
def test_records_arrive_whole(transfers, nbytes: int, readers: int) -> None:
    data = records(3, nbytes)
    transfer, arena = transfers(MemoryStore(data), readers=readers)
    for expert in range(3):
        transfer.start(load(expert, 5 - expert))
    assert sorted(collect(transfer, 3)) == [3, 4, 5]
    for expert in range(3):
        assert bytes(arena.view(5 - expert, nbytes)) == data[0][expert]
    assert transfer.bytes_read == 3 * nbytes
    assert transfer.poll(wait=False) == []


@pytest.mark.parametrize("kind", ["broken", "corrupted"])
@pytest.mark.parametrize("nbytes", [PAGE, 3 * PIECE_NBYTES])
def test_a_failed_read_is_raised_once_and_its_buffer_comes_back(transfers, kind: str, nbytes: int) -> None:
    store = Gate(records(2, nbytes), **{kind: [1]})
    transfer, _ = transfers(store)
    transfer.start(load(1, 0))
    store.open.set()
    with pytest.raises(PackedModelError, match="expert 1"):
        within(10, lambda: transfer.poll(wait=True))
    assert collect(transfer, 1) == [0]
    store.broken.clear(), store.corrupted.clear()
    transfer.start(load(1, 0))
    assert collect(transfer, 1) == [0]


@pytest.mark.parametrize("already", [True, False], ids=["failed", "reading"])
def test_abandoned_errors_reach_no_later_access(transfers, already: bool) -> None:
    store = Gate(records(), broken=[0, 1])
    transfer, _ = transfers(store)
    transfer.start(load(0, 0))
    transfer.start(load(1, 1))
    if already:
        store.open.set()
        with pytest.raises(PackedModelError):
            within(10, lambda: transfer.poll(wait=True))
        time.sleep(0.05)
    transfer.abandon()
    store.open.set()
    transfer.start(load(2, 2))
    assert sorted(collect(transfer, 3)) == [0, 1, 2]


def test_other_errors_surface_too(transfers) -> None:
    class Buggy(MemoryStore):
        def read(self, layer, expert, start, into):
            raise ZeroDivisionError

    transfer, _ = transfers(Buggy(records()))
    transfer.start(load(0, 0))
    with pytest.raises(ZeroDivisionError):
        within(10, lambda: transfer.poll(wait=True))


def test_close_waits_for_reads_in_flight_and_drops_the_rest(transfers) -> None:
    store = Gate(records())
    transfer, _ = transfers(store, readers=1)
    for expert in range(3):
        transfer.start(load(expert, expert))
    assert store.begun.wait(10)
    threading.Timer(0.05, store.open.set).start()
    within(10, transfer.close)
    assert store.seen == [(0, 0)]
    within(10, transfer.close)  # twice does no harm
    assert not [thread for thread in transfer._readers._threads if thread.is_alive()]


def test_a_closed_transfer_says_so_instead_of_hanging(transfers) -> None:
    transfer, _ = transfers(MemoryStore(records()))
    transfer.close()
    with pytest.raises(RuntimeError, match="closed"):
        transfer.start(load(0, 0))
    with pytest.raises(RuntimeError, match="closed"):
        within(10, lambda: transfer.poll(wait=True))


def test_closing_wakes_whoever_waits(transfers) -> None:
    transfer, _ = transfers(MemoryStore(records()))
    threading.Timer(0.05, transfer.close).start()
    with pytest.raises(RuntimeError, match="closed"):
        within(10, lambda: transfer.poll(wait=True))


def test_demand_overtakes_queued_guesses(transfers) -> None:
    store = Gate(records(6))
    transfer, _ = transfers(store, readers=1)
    transfer.start(load(0, 0, speculative=True))
    assert store.begun.wait(10)  # the only reader is busy: what follows queues
    for expert in (1, 2):
        transfer.start(load(expert, expert, speculative=True))
    for expert in (3, 4):
        transfer.start(load(expert, expert))
    store.open.set()
    collect(transfer, 5)
    assert [expert for expert, _ in store.seen] == [0, 3, 4, 1, 2]


def test_pieces_of_one_record_are_spread_over_readers(transfers) -> None:
    store = Gate(records(1, 4 * PIECE_NBYTES))
    transfer, _ = transfers(store, buffers=1, readers=3)
    transfer.start(load(0, 0))
    deadline = time.monotonic() + 10
    while len(store.seen) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert sorted(store.seen) == [(0, 0), (0, PIECE_NBYTES), (0, 2 * PIECE_NBYTES)]


def test_shuffle_only_reorders(transfers) -> None:
    transfer, _ = transfers(MemoryStore(records(6)), shuffle=random.Random(0).shuffle)
    for expert in range(6):
        transfer.start(load(expert, expert))
    assert sorted(collect(transfer, 6)) == list(range(6))


def everything(store: DiskStore, packed: PackedModel) -> "list[bytes]":
    arena = Arena(1, store.record_nbytes)
    found = []
    for layer, entry in enumerate(packed.manifest.experts):
        assert store.nbytes(layer) == entry.record_nbytes
        for expert in range(entry.num_experts):
            view = arena.view(0, entry.record_nbytes)
            store.read(layer, expert, PAGE, view[PAGE:])
            store.read(layer, expert, 0, view[:PAGE])
            store.check(layer, expert, view)
            found.append(bytes(view))
    store.close()
    return found


def test_direct_and_buffered_reads_give_the_same_bytes(packed4: PackedModel) -> None:
    direct, buffered = DiskStore(packed4), DiskStore(packed4, direct=False)
    assert not buffered.direct
    found = everything(direct, packed4)
    assert found == everything(buffered, packed4)
    assert len(set(found)) == len(found) == 18


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm")
def test_memory_backed_file_systems_are_read_too(packed4: PackedModel) -> None:
    folder = Path("/dev/shm") / f"greenroom-test-{os.getpid()}"
    shutil.copytree(packed4.folder, folder)
    try:
        copy = PackedModel(folder)
        assert everything(DiskStore(copy), copy) == everything(DiskStore(packed4), packed4)
    finally:
        shutil.rmtree(folder)


def test_without_direct_io_reads_are_buffered(packed4: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def no_direct(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", no_direct)
    store = DiskStore(packed4)
    assert not store.direct
    assert len(everything(store, packed4)) == 18


def test_a_file_that_vanishes_or_shrinks_is_one_line(packed4: PackedModel, tmp_path: Path) -> None:
    shutil.copytree(packed4.folder, tmp_path / "m")
    packed = PackedModel(tmp_path / "m")
    path = packed.folder / packed.manifest.experts[0].file
    store = DiskStore(packed)
    os.truncate(path, path.stat().st_size - PAGE)
    arena = Arena(1, store.record_nbytes)
    with pytest.raises(PackedModelError, match=r"ended at byte \d+") as caught:
        store.read(0, 5, 0, arena.view(0, store.record_nbytes))
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    store.close()
    path.unlink()
    with pytest.raises(PackedModelError, match="is missing: delete"):
        DiskStore(packed)


class InPython(DiskStore):
    """Not the store itself, so that Python's threads ask it."""


WAYS = [pytest.param(DiskStore, id="compiled", marks=pytest.mark.skipif(not extension(), reason="not built")), InPython]


def test_who_reads_follows_from_the_store(packed4: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(store) -> type:
        readers = open_readers(store, Arena(1, store.record_nbytes), 1)
        readers.close()
        return type(readers)

    assert kind(DiskStore(packed4)) is (CompiledReaders if extension() else ThreadedReaders)
    assert kind(InPython(packed4)) is kind(MemoryStore(records())) is ThreadedReaders
    monkeypatch.setenv("GREENROOM_ISA", "none")
    assert kind(DiskStore(packed4)) is ThreadedReaders


def some() -> "list[Load]":
    """Of two layers of six experts, every other one a guess."""
    return [Load((layer, expert), 3 * layer + expert, expert % 2 == 1) for layer in (0, 2) for expert in range(6)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("again", [False, True], ids=["compared", "trusted"])
def test_records_of_a_packed_model_arrive_whole(transfers, packed4: PackedModel, way, direct, again) -> None:
    store = way(packed4, direct)
    transfer, arena = transfers(store, buffers=12, readers=3)
    for turn in range(1 + again):
        for load in some():
            transfer.start(load)
        assert sorted(collect(transfer, 12)) == list(range(12)) and transfer.under_way == set()
        nbytes = sum(store.nbytes(load.key[0]) for load in some())
        assert transfer.bytes_read == (turn + 1) * nbytes and transfer.queued_s == 0 < transfer.seconds_per_byte
    wanted = Arena(1, store.record_nbytes)
    for load in some():
        view = wanted.view(0, store.nbytes(load.key[0]))
        store.read(*load.key, 0, view)
        assert bytes(arena.view(load.buffer, len(view))) == bytes(view)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_wrong_with_a_file_is_one_line(transfers, packed4: PackedModel, way, tmp_path: Path) -> None:
    shutil.copytree(packed4.folder, tmp_path / "m")
    packed = PackedModel(tmp_path / "m")
    entry = packed.manifest.experts[0]
    path = packed.folder / entry.file
    store = way(packed)
    transfer, _ = transfers(store)

    def outcome(expert: int) -> str:
        transfer.start(load(expert, 1))
        with pytest.raises(PackedModelError) as caught:
            within(10, lambda: transfer.poll(wait=True))
        assert collect(transfer, 1) == [1] and transfer.bytes_read == 0
        return str(caught.value)

    with path.open("r+b") as file:
        file.seek(entry.offset + 2 * entry.record_nbytes + 5)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
        os.fsync(file.fileno())
    assert f"{path}: expert 2 of {entry.module} is corrupted (its checksum does not match)" in outcome(2)
    end = entry.offset + 5 * entry.record_nbytes
    os.truncate(path, end)
    assert f"{path} ended at byte {end}: delete" in outcome(5)
    real = store._files[entry.file]
    store._files[entry.file] = os.open(tmp_path, os.O_RDONLY)  # a folder
    assert f"{path}: Is a directory at byte {entry.offset}: check the disk" in outcome(0)
    os.close(store._files[entry.file])
    store._files[entry.file] = real
    transfer.start(load(0, 1))
    assert collect(transfer, 1) == [1] and transfer.bytes_read == entry.record_nbytes


@pytest.mark.parametrize("way", WAYS)
def test_a_signal_ends_waiting(transfers, packed4: PackedModel, way) -> None:
    transfer, _ = transfers(way(packed4))
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            transfer.poll(wait=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    transfer.start(load(1, 0))
    assert collect(transfer, 1) == [0]


@pytest.mark.parametrize("way", WAYS)
def test_closed_readers_of_files_say_so(transfers, packed4: PackedModel, way) -> None:
    transfer, _ = transfers(way(packed4))
    threading.Timer(0.05, transfer.close).start()
    with pytest.raises(ClosedError):
        within(10, lambda: transfer.poll(wait=True))
    with pytest.raises(ClosedError):
        transfer.start(load(0, 0))
    within(10, transfer.close)


@pytest.mark.skipif(not extension(), reason="not built")
def test_compiled_readers_stay_in_their_memory_and_keep_it(packed4: PackedModel) -> None:
    owner = bytearray(100)
    nowhere = 1 << 40  # never written to
    readers = extension().Readers(memoryview(owner), nowhere, 100, 1, PIECE_NBYTES)
    with a_file(packed4) as file:
        for place, nbytes in [(-1, 10), (0, 101), (91, 10), (0, 0)]:
            with pytest.raises(ValueError, match="outside"):
                readers.start(0, 0, file, 0, nbytes, place, False, False, -1)
    with pytest.raises(BufferError):
        owner.append(1)  # while somebody holds its memory
    readers.close()
    del readers
    owner.append(1)
    for threads, piece in [(0, 1), (1, 0)]:
        with pytest.raises(ValueError):
            extension().Readers(owner, nowhere, 100, threads, piece)


@contextlib.contextmanager
def a_file(packed: PackedModel):
    file = os.open(packed.folder / packed.manifest.experts[0].file, os.O_RDONLY)
    yield file
    os.close(file)


@pytest.mark.parametrize("way", WAYS)
def test_a_forked_child_is_told(packed16: PackedModel, way) -> None:
    """It has no reader threads, and would wait for ever."""
    store = way(packed16)
    transfer = Transfer(store, Arena(1, store.record_nbytes), readers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that threads are not forked is what is tested
        child = os.fork()
    if not child:
        told = False
        with contextlib.suppress(BaseException):
            signal.alarm(20)
            try:
                transfer.poll(wait=True)
            except ClosedError as error:
                told = "forked" in str(error)
            del transfer  # which must not wait for threads that are not there
        os._exit(0 if told else 1)
    assert os.waitpid(child, 0)[1] == 0
    transfer.close()
    store.close()
