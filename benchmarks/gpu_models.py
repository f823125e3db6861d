"""The synthetic models that `gpu_tier` measures, written in processes beside one another."""

import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import packed_folder
from benchmarks.shapes import PAIRINGS, SHAPES, Shape
from greenroom.packed import PackedModel


@dataclasses.dataclass(frozen=True)
class Model:
    """What a model is written as: `pairing` names its experts' format, `distinct` is `packed_folder.write`'s."""

    shape: Shape
    pairing: str
    distinct: "int | None" = None


_MIXTRAL = dataclasses.replace(SHAPES["mixtral-8x7b-4"], name="mixtral-8x7b", layers=32)
_SMALL: dict[str, Any] = {"layers": 24, "hidden": 256, "intermediate": 256, "heads": 4, "kv_heads": 2, "head_dim": 64}
MODELS = {
    "small": Model(dataclasses.replace(_MIXTRAL, name="small", vocab=600, **_SMALL), "2"),
    "mixtral-8x7b-2bit": Model(_MIXTRAL, "2", 8),
    "qwen3-30b-a3b-4bit": Model(SHAPES["qwen3-30b-a3b-48"], "4", 12),
    "gpt-oss-20b-4bit": Model(SHAPES["gpt-oss-20b-24"], "4", 6),
    "mixtral-8x7b-3bit": Model(_MIXTRAL, "3", 8),
}
"""By folder and name in the result. The small one's layers take a device no time: what is measured is the host."""


def say(text: str) -> None:
    """On stderr, at once."""
    print(f"tier, {text}", file=sys.stderr, flush=True)


def write(folder: Path, model: Model) -> None:
    """Write one packed model."""
    start_s = time.monotonic()
    packed_folder.write(folder, model.shape, PAIRINGS[model.pairing], model.distinct)
    say(f"{folder.name} is written: {time.monotonic() - start_s:.0f} s")


class Models:
    """Packed models in a folder, by name."""

    def __init__(self, folder: Path, models: "dict[str, Model]") -> None:
        self._folder, self._models = folder, models
        self._writers: dict[str, Any] = {}

    def start(self, names: "Sequence[str]") -> None:
        """Write those that are missing, each in a process that ends with this one."""
        for name in names:
            if not (self._folder / name).exists() and name not in self._writers:
                arguments = self._folder / name, self._models[name]
                writer = multiprocessing.get_context("spawn").Process(target=write, args=arguments, daemon=True)
                writer.start()
                self._writers[name] = writer

    def wait(self, names: "Sequence[str]", seconds: "float | None" = None) -> None:
        """Until those are written, or for so long: what is not written by then is given up, until it is asked for."""
        start_s = time.monotonic()
        for writer in [self._writers.pop(name) for name in names if name in self._writers]:
            writer.join(None if seconds is None else max(0.0, start_s + seconds - time.monotonic()))
            writer.terminate()
            writer.join()
        say(f"waited {time.monotonic() - start_s:.0f} s for {', '.join(names)}")

    def __call__(self, name: str) -> PackedModel:
        """The model, written if nobody has."""
        if not (self._folder / name).exists():
            write(self._folder / name, self._models[name])
        return PackedModel(self._folder / name)
