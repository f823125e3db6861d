"""Settings as frozen dataclasses; bad values raise ConfigError when they are made. No I/O."""

import dataclasses
import numbers
from typing import Any

from greenroom.errors import ConfigError
from greenroom.quant import DEFAULT_GROUP_SIZE, Format

_BITS = (2, 3, 4, 8, 16)
_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How many bits a weight gets. `group_size` is for the experts; None takes the paper's for their bits."""

    expert_bits: int = 4
    attention_bits: int = 8
    head_bits: int = 8
    group_size: "int | None" = None

    def __post_init__(self) -> None:
        for name in ("expert_bits", "attention_bits", "head_bits"):
            value = getattr(self, name)
            if type(value) is not int or value not in _BITS:
                raise ConfigError(f"{name} must be one of 2, 3, 4, 8, 16, not {value!r}")
        if self.group_size is None:
            object.__setattr__(self, "group_size", DEFAULT_GROUP_SIZE[self.expert_bits])
        Format.of(self.expert_bits, self.group_size)  # refuses a group size that cannot be

    def format(self, bits: int, dtype: str, group_size: "int | None" = None) -> Format:
        """The format of one weight; `dtype` is its 16-bit dtype, "bfloat16" or "float16", and matters at 16 bits."""
        return Format.of(bits, group_size) if bits < 16 else Format(bits=16, group_size=0, dtype=dtype)

    @property
    def bits_per_weight(self) -> int:
        """The fewest bits that any weight gets, scales left out: what a packed model takes at least."""
        return min(self.expert_bits, self.attention_bits, self.head_bits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What a running model may use.

    `ram`: bytes for everything the process holds, or None for what the machine has to spare. `vram`: bytes of a GPU for
    everything but the embeddings and the experts that do not fit, which RAM holds as far as it can; None computes on
    the CPU. `cpu_experts`: compute experts that the GPU lacks on the CPU where that is faster. `experts_per_layer`:
    slots per layer (the paper's k); overrides what `ram` would give. `expert_budget`: bytes for slots alone, shared by
    all layers. `policy`: an eviction policy, per layer, or over all layers at once with the suffix `-shared`.
    `staging`: buffers beside the slots, for guesses and for experts that get no slot (the paper's b); None for as many
    as keep the readers busy. `prefetch`: experts guessed at most per token and layer ahead, loaded where that pays;
    None for guesses on the CPU, where experts are missing, and none on a GPU. `lookahead`: how many layers ahead.
    `activation_bits`: of a prompt's activations on the CPU, beside weights of 4 bits or fewer: 16, or 8 for speed.
    `kv_bits`: of cached keys and values where the compiled decoder serves: 16, or 8 for half of their bytes.
    `context`: tokens of KV cache to reserve memory for; `prompt_chunk`: the most tokens of a prompt that go through the
    model at once, whose activations are reserved. `reserve`: bytes that whoever runs the model takes for its own work,
    counted with the working set. `readers`: reads in flight. `dtype`: of activations, "float32", "bfloat16" or
    "float16"; None for float32 on the CPU, and on a GPU the one of 16 bits that it has.
    """

    ram: "int | None" = None
    vram: "int | None" = None
    experts_per_layer: "int | None" = None
    expert_budget: "int | None" = None
    policy: str = "learned"
    staging: "int | None" = None
    cpu_experts: bool = True
    prefetch: "int | None" = None
    lookahead: int = 1
    activation_bits: int = 16
    kv_bits: int = 16
    context: int = 2048
    prompt_chunk: int = 512
    reserve: int = 0
    readers: int = 4
    dtype: "str | None" = None
    validate: bool = False

    def __post_init__(self) -> None:
        _at_least(1, ram=self.ram, vram=self.vram, staging=self.staging, lookahead=self.lookahead, context=self.context)
        _at_least(1, prompt_chunk=self.prompt_chunk, readers=self.readers)
        if self.dtype is not None and self.dtype not in list(_DTYPES):
            raise ConfigError(f"dtype must be float32, bfloat16 or float16, not {self.dtype}")
        if not isinstance(self.policy, str):
            raise ConfigError(f"policy must be a name such as learned or lru, not {self.policy!r}")
        for name in ("activation_bits", "kv_bits"):
            value = getattr(self, name)
            if not _is_whole(value) or value not in (8, 16):
                raise ConfigError(f"{name} must be 8 or 16, not {value!r}")
        if self.kv_bits == 8 and self.vram is not None:
            raise ConfigError("kv_bits 8 is for the CPU: leave out either it or vram")
        _at_least(
            0,
            reserve=self.reserve,
            expert_budget=self.expert_budget,
            experts_per_layer=self.experts_per_layer,
            prefetch=self.prefetch,
        )

    @property
    def element_size(self) -> int:
        """Bytes of one activation."""
        return _DTYPES[self.dtype or ("float32" if self.vram is None else "bfloat16")]


def _at_least(least: int, **values: "int | None") -> None:
    for name, value in values.items():
        if value is None:
            continue
        if not _is_whole(value):
            raise ConfigError(f"{name} must be a whole number, not {value!r}")
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, not {value}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
