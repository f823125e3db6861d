"""What recording a trace costs a decoded token: the time inside the recorder, and pairs of trials with and without.

    python benchmarks/recording.py [MODEL]

All experts are resident, so that a token is at its fastest and the share at its worst. Prints each pair, then medians.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from greenroom import library
from greenroom.model import routers
from greenroom.trace.recorder import Recorder

TOKENS, PAIRS, LOOKAHEAD = 64, 5, 3


def decode(engine: Any, past: Any, token: torch.Tensor) -> float:
    """Seconds a token, greedy."""
    start_s = time.perf_counter()
    with torch.no_grad():
        for _ in range(TOKENS):
            token = engine.model(token, past_key_values=past, use_cache=True).logits[:, -1:].argmax(-1)
    return (time.perf_counter() - start_s) / TOKENS


class Timed:
    """A recorder that counts the seconds it takes."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.spent_s = recorder, 0.0

    def __call__(self, *call: Any) -> None:
        """One layer."""
        start_s = time.perf_counter()
        self.recorder(*call)
        self.spent_s += time.perf_counter() - start_s

    def finish(self) -> float:
        """Compute what is pending; seconds in all, a token."""
        start_s = time.perf_counter()
        self.recorder.begin(0)
        return (self.spent_s + time.perf_counter() - start_s) / TOKENS


def trial(engine: Any, path: "Path | None") -> "tuple[float, float]":
    """Seconds a token, and of them in the recorder: a prompt of 16 tokens, not timed, and TOKENS generated. The last
    step, packing the file, is not a token's."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1000, (1, 16), generator=generator)
    engine.runner.observer = None
    with torch.no_grad():
        out = engine.model(prompt, use_cache=True)
    token = out.logits[:, -1:].argmax(-1)
    if path is None:
        return decode(engine, out.past_key_values, token), 0.0
    experts = max(entry.num_experts for entry in engine.packed.manifest.experts)
    with Recorder(path, routers(engine.model, engine.packed), experts, lookahead=LOOKAHEAD, ranked=8) as recorder:
        recorder.begin(0)
        timed = engine.runner.observer = Timed(recorder)
        return decode(engine, out.past_key_values, token), timed.finish()


def main() -> None:
    """Measure."""
    model = sys.argv[1] if len(sys.argv) > 1 else "demo"
    engine = library.start(model, library.find(model), library.engine_settings(experts_per_layer=10**6))
    plain, recording, inside = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(PAIRS + 1):
            without, (with_it, part) = trial(engine, None)[0], trial(engine, Path(scratch) / "t.npz")
            if number == 0:
                continue  # warm-up
            plain.append(without)
            recording.append(with_it)
            inside.append(part)
            print(
                f"{without * 1e3:.2f} ms a token, recording {with_it * 1e3:.2f} ms, in it {part * 1e3:.3f}", flush=True
            )
    engine.close()
    medians = {"plain_s": statistics.median(plain), "recording_s": statistics.median(recording)}
    print(
        json.dumps(
            {**medians, "inside_s": statistics.median(inside), "share": statistics.median(inside) / medians["plain_s"]}
        )
    )


if __name__ == "__main__":
    main()
