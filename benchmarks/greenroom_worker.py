"""Runs greenroom, one process a turn; see `turns` for what the lines it speaks mean."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import greenroom
from greenroom.cache import POLICIES, ExpertCache, replay
from greenroom.config import EngineSettings
from greenroom.engine import Engine
from greenroom.errors import GreenroomError
from greenroom.metrics import Metrics, process_memory
from greenroom.packed import PackedModel

BATCH = 512


class Model:
    """A packed model, running: `feed` decodes given tokens; none is sampled."""

    def __init__(self, path: str, *, context: int, ram: "int | None", activation_bits: int, kv_bits: int) -> None:
        packed = PackedModel(Path(path))
        slots = None if ram else max(entry.num_experts for entry in packed.manifest.experts)
        bits = {"activation_bits": activation_bits, "kv_bits": kv_bits}
        settings = EngineSettings(ram=ram, experts_per_layer=slots, context=context, **bits)
        self.engine = Engine(packed, settings)
        self.trace: list[tuple[int, tuple[int, ...], list[float] | None]] = []
        self.engine.runner.trace = self.trace
        self.forget()

    @torch.no_grad()
    def feed(self, tokens: "list[int]") -> torch.Tensor:
        """Decode `tokens` after those before; logits [vocab] of the last."""
        for start in range(0, len(tokens), BATCH):
            ids = torch.tensor([tokens[start : start + BATCH]])
            out = self.engine.model(ids, past_key_values=self._past, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = out.logits[0, -1]
        return logits

    def forget(self) -> None:
        """Start a new sequence; residency stays."""
        self._past = DynamicCache(config=self.engine.model.config)

    def metrics(self) -> Metrics:
        """Totals, with nothing under way."""
        self.engine.runner.drain()
        return self.engine.metrics()

    def predicted_bytes(self, calls: int) -> "int | None":
        """Bytes that the cache core says the last `calls` layers' calls read without guesses; None where no trace is
        kept."""
        settings, plan = self.engine.settings, self.engine.plan
        layers = self.engine.packed.manifest.experts
        if calls == 0 or len(self.trace) < calls:
            return None
        cache = ExpertCache(
            layers=len(layers),
            capacities=plan.capacities,
            staging=plan.staging_buffers,
            policy=POLICIES[settings.policy.removesuffix("-shared")],
        )
        last = replay(cache, self.trace)[-calls:]
        return sum(layers[layer].record_nbytes for access in last for layer, _ in access.misses)


def trial(model: Model, prompt: "list[int]", warm: "list[int]", timed: "list[int]") -> "dict[str, Any]":
    """A prompt, tokens that warm caches up, and tokens that count."""
    model.forget()
    cpu_s, start_s = time.process_time(), time.perf_counter()
    model.feed(prompt)
    prompt_s = time.perf_counter() - start_s
    for token in warm:
        model.feed([token])
    before, calls, start_s = model.metrics(), len(model.trace), time.perf_counter()
    for token in timed:
        logits = model.feed([token])
    decode_s = time.perf_counter() - start_s
    spent = model.metrics() - before
    if not torch.isfinite(logits).all():
        raise GreenroomError("greenroom's logits are not finite")
    predicted = model.predicted_bytes(len(model.trace) - calls)
    # what was guessed and not used; shapes here have records of one size
    vain = (spent.guesses - spent.prefetched - spent.late) * model.engine.packed.manifest.experts[0].record_nbytes
    return {
        "prompt_tokens_per_s": len(prompt) / prompt_s,
        "tokens_per_s": len(timed) / decode_s,
        "cpu_s": time.process_time() - cpu_s,
        "bytes_read_per_token": spent.bytes_read / len(timed),
        "bytes_predicted_per_token": None if predicted is None else (predicted + vain) / len(timed),
        "bytes_guessed_in_vain_per_token": vain / len(timed),
        "hit_rate": spent.hit_rate,
        "stall_share": spent.stall_s / decode_s,
        "experts_share": spent.compute_s / decode_s,
        "dense_share": spent.dense_s / decode_s,
        "anonymous_nbytes": process_memory()["anonymous"],
        "decode": str(getattr(model.engine, "decode", "transformers' modules")),
        "guesses": str(model.engine.runner.speculation),
    }


def main() -> None:
    """Load what the first argument says, then answer each line of stdin."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    try:
        model = Model(job["model"], **{name: job[name] for name in ("context", "ram", "activation_bits", "kv_bits")})
    except GreenroomError as error:
        sys.exit(str(error))
    model.feed(job["first"])
    plan = model.engine.plan
    about = {"engine": f"greenroom {greenroom.__version__}", "system": model.engine.kernel}
    print(json.dumps({**about, "slots": plan.slots, "experts": sum(plan.experts)}), flush=True)
    for line in sys.stdin:
        print(json.dumps(trial(model, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
