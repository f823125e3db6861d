"""Shared by all tests: a tiny Mixtral on disk and packed, one thread, and a quiet transformers."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tests run tiny matrices, and beside each other: threads would wait for threads
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton's kernels are imported

from families import FAMILIES
from greenroom import static_kv
from greenroom.config import EngineSettings
from greenroom.device import FakeDevice
from greenroom.engine import Engine
from greenroom.packed import PackedModel
from greenroom.packing import pack
from on_device import VRAM, Engines

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[None]":
    """What runs learn of models does not go to the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GREENROOM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of 3 layers of 6 experts, every weight exact in bfloat16."""
    folder = tmp_path_factory.mktemp("mixtral")
    FAMILIES["mixtral"].build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def packed4(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """`checkpoint` at 4 bits. Read only: copy it to damage it."""
    return pack(checkpoint, tmp_path_factory.mktemp("packed4") / "model", expert_bits=4)


@pytest.fixture(scope="session")
def packed16(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """`checkpoint` at 16 bits: the same weights to the last bit."""
    return pack(
        checkpoint, tmp_path_factory.mktemp("packed16") / "model", expert_bits=16, attention_bits=16, head_bits=16
    )


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the demo's wheel, a tiny fake one."""
    from test_demo_checkpoint import make_wheel

    folder = tmp_path_factory.mktemp("demo-cache")
    make_wheel(folder / "demo")
    return folder


@pytest.fixture(scope="session")
def packed_demo(demo_cache: Path) -> Path:
    """The tiny demo, packed; it has a tokenizer."""
    from greenroom import library

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GREENROOM_CACHE", str(demo_cache))
        return library.find("demo")


@pytest.fixture
def device_engines(packed4: PackedModel, monkeypatch: pytest.MonkeyPatch) -> "Iterator[Engines]":
    """Makes engines whose slots are on a fake device, with a number of slots in RAM."""
    monkeypatch.setattr("greenroom.engine.process_memory", lambda: {"anonymous": 0})
    monkeypatch.setattr(Engine, "owed", 0)
    made = Engines(packed4)
    yield made
    made.close()


@pytest.fixture(scope="session")
def device_logits(packed4: PackedModel) -> "list[torch.Tensor]":
    """`test_engine.logits_of` with everything on the device."""
    from test_engine import EXPERTS, logits_of

    settings = EngineSettings(experts_per_layer=EXPERTS, vram=VRAM, cpu_experts=False)
    engine = Engine(packed4, settings, device=FakeDevice())
    found = logits_of(engine.model)
    engine.close()
    return found


@pytest.fixture
def small_rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values on a device get so little room that a few tokens outgrow it."""
    monkeypatch.setattr(static_kv, "SMALLEST", 4)
