"""A memory plan: what a budget holds, how many experts get a slot, and whether it fits at all.

Arithmetic over the manifest and the model's configuration; measures nothing itself.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from greenroom.cache.curve import divide
from greenroom.config import EngineSettings
from greenroom.errors import BudgetError, ConfigError
from greenroom.packed import Manifest
from greenroom.sizes import format_bytes
from greenroom.static_kv import most_room

_KERNEL_NBYTES = 48 << 20  # dequantised tiles and their temporaries; see kernels.reference.TILE
_SCRATCH_NBYTES = 32 << 20  # of compiled kernels, what making a model leaves, and what the heap has in pieces
_BATCH = 128  # rows of experts that compiled kernels take at a time; see native/compute.cpp
_LARGE_RECORD = 8 << 20  # the pieces of one such record keep four readers busy
_SPARE = 0.9  # without a budget: the share of free memory that greenroom takes at most


_DEVICE_RUNTIME = 512 << 20  # a GPU's driver context and loaded kernels
_CAPTURED_NBYTES = 2 << 20  # a layer's kernels as a graph, and its share of the memory that graphs compute in


@dataclasses.dataclass(frozen=True, kw_only=True)
class RamPlan:
    """What RAM holds behind a device's slots."""

    budget: int
    """what the process may hold"""
    runtime: int
    """Python, torch, transformers"""
    staging: int
    """buffers that experts pass through on their way from disk"""
    working_set: int
    """computing on the CPU"""
    record_nbytes: int
    slots: int
    """experts that are kept"""

    @property
    def fixed(self) -> int:
        """Everything but the slots."""
        return self.runtime + self.staging + self.working_set

    @property
    def slots_nbytes(self) -> int:
        """Bytes of all slots."""
        return self.slots * self.record_nbytes

    @property
    def total(self) -> int:
        """What the process will hold."""
        return self.fixed + self.slots_nbytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes by purpose, and slots by layer: in RAM or, where there is a plan `ram` for what lies behind, on a
    device."""

    budget: "int | None"
    """what may be held in all; None without a limit"""
    runtime: int
    """Python, torch, transformers"""
    dense: int
    """weights that are not experts and are held in memory"""
    mapped: int
    """embeddings that stay on disk and cost a row a token"""
    kv_cache: int
    working_set: int
    staging: int
    record_nbytes: int
    experts: "tuple[int, ...]"
    """experts per MoE layer"""
    capacities: "tuple[int, ...]"
    """slots per MoE layer, or one number that all layers share"""
    ram: "RamPlan | None" = None
    """None where the slots themselves are in RAM"""

    @property
    def slots(self) -> int:
        """Slots of all layers."""
        return sum(self.capacities)

    @property
    def slots_nbytes(self) -> int:
        """Bytes of all slots."""
        return self.slots * self.record_nbytes

    @property
    def staging_buffers(self) -> int:
        """How many records `staging` holds."""
        return self.staging // self.record_nbytes

    @property
    def fixed(self) -> int:
        """Everything but the slots."""
        return self.runtime + self.dense + self.kv_cache + self.working_set + self.staging

    @property
    def total(self) -> int:
        """What the process will hold."""
        return self.fixed + self.slots_nbytes

    @property
    def resident_share(self) -> float:
        """Share of all experts that have a slot."""
        return self.slots / sum(self.experts)


def make_plan(
    manifest: Manifest,
    config: Any,
    settings: EngineSettings,
    *,
    runtime: int,
    budget: "int | None",
    element_size: int,
    compiled: bool = True,
    scores: bool = False,
    gains: "Sequence[Sequence[float]] | None" = None,
) -> Plan:
    """Plan memory for a packed model.

    `runtime`: bytes the process holds before any weight. `budget`: bytes of RAM for everything, or None.
    `element_size`: bytes of one activation. `compiled`: the compiled decoder serves, where it may: float32 on the CPU;
    it caches float16. `scores`: attention's modules make all of a prompt's scores at once. `gains[l][n]`: the hit rate
    of layer l with n slots, by which a budget is divided; without it, and where slots are asked for per layer, all
    layers get as many. Raises BudgetError, saying what would do, where the budget cannot hold the fixed parts.
    """
    compiled = compiled and settings.vram is None and element_size == 4
    plan = _plan(manifest, config, settings, runtime, budget, element_size, compiled)
    scores = scores or (settings.vram is None and _unequal_widths(config))
    if scores and _modules_read(manifest, compiled):
        scores_nbytes = _scores_nbytes(config, settings, element_size)
        plan = dataclasses.replace(plan, working_set=plan.working_set + scores_nbytes)
    plan = allot(plan, _slots(plan, settings), None if settings.experts_per_layer is not None else gains)
    return plan if settings.vram is None else dataclasses.replace(plan, ram=_plan_ram(plan, settings, runtime, budget))


def _plan_ram(plan: Plan, settings: EngineSettings, runtime: int, budget: "int | None") -> RamPlan:
    """What RAM keeps behind `plan`'s slots: as many experts as its budget holds."""
    assert budget is not None
    empty = RamPlan(
        budget=budget,
        runtime=runtime,
        staging=plan.staging,
        working_set=_KERNEL_NBYTES,
        record_nbytes=plan.record_nbytes,
        slots=0,
    )
    room = (empty.budget - empty.fixed) // plan.record_nbytes
    if room < 0:
        raise BudgetError(
            f"{format_bytes(empty.budget)} of RAM is too small: the runtime {format_bytes(runtime)}, staging "
            f"{format_bytes(empty.staging)} and the working set {format_bytes(empty.working_set)} take "
            f"{format_bytes(empty.fixed)}; give --ram {_round_up(empty.fixed)}MiB or more"
        )
    return dataclasses.replace(empty, slots=min(room, sum(plan.experts)))


def _plan(
    manifest: Manifest,
    config: Any,
    settings: EngineSettings,
    runtime: int,
    budget: "int | None",
    element_size: int,
    compiled: bool,
) -> Plan:
    """The fixed parts, in RAM or on the device, and no slots yet."""
    if settings.vram is not None:
        runtime = _DEVICE_RUNTIME + _CAPTURED_NBYTES * len(manifest.experts)
        budget = settings.vram
    experts = tuple(entry.num_experts for entry in manifest.experts)
    record_nbytes = max(entry.record_nbytes for entry in manifest.experts)
    dense, mapped = _dense_nbytes(manifest, element_size, compiled)
    return Plan(
        budget=budget,
        runtime=runtime,
        dense=dense,
        mapped=mapped,
        kv_cache=_kv_positions(settings) * kv_nbytes_per_token(config, element_size, compiled),
        working_set=_working_set(manifest, config, min(settings.context, settings.prompt_chunk), element_size, compiled)
        + _context_nbytes(manifest, config, settings, element_size, compiled)
        + _policy_nbytes(settings.policy, experts)
        + settings.reserve,
        staging=_staging(settings, record_nbytes) * record_nbytes,
        record_nbytes=record_nbytes,
        experts=experts,
        capacities=(0,) if settings.policy.endswith("-shared") else (0,) * len(experts),
    )


def _staging(settings: EngineSettings, record_nbytes: int) -> int:
    """Buffers beside the slots: four, as the paper has, or two where one record keeps all readers busy and there are no
    guesses to hold; two more experts are then kept."""
    if settings.staging is not None:
        return settings.staging
    return 2 if record_nbytes >= _LARGE_RECORD and not settings.prefetch else 4


def budget_of(settings: EngineSettings, runtime: int, available: int) -> "int | None":
    """Bytes the process may hold: what the user said, else most of what is free, or None where slots in RAM were asked
    for."""
    unlimited = settings.experts_per_layer is not None and settings.vram is None
    if settings.ram is not None or unlimited:
        return settings.ram
    return runtime + int(available * _SPARE)


def _slots(plan: Plan, settings: EngineSettings) -> int:
    """Slots in all, by the most specific setting."""
    wanted = sum(plan.experts)
    if settings.experts_per_layer is not None:
        wanted = sum(min(settings.experts_per_layer, count) for count in plan.experts)
    elif settings.expert_budget is not None:
        wanted = min(wanted, settings.expert_budget // plan.record_nbytes)
    if plan.budget is None:
        return wanted
    room = (plan.budget - plan.fixed) // plan.record_nbytes
    asked = settings.experts_per_layer is not None
    if room < 0 or (asked and room < wanted):
        needed = plan.fixed + (wanted * plan.record_nbytes if asked else 0)
        raise BudgetError(
            f"{format_bytes(plan.budget)} is too small: {describe_fixed(plan)} take {format_bytes(plan.fixed)}; "
            f"give --{'ram' if settings.vram is None else 'vram'} {_round_up(needed)}MiB or more"
            + (
                f" or fewer experts per layer ({max(room, 0) // len(plan.experts)} fit)"
                if asked
                else f" or {_less(plan)}" * (plan.budget > plan.runtime)
            )
        )
    return min(wanted, room)


def _less(plan: Plan) -> str:
    """What makes the largest of the fixed parts smaller."""
    return "a smaller --context" if plan.kv_cache + plan.working_set > plan.dense else "pack fewer bits"


def describe_fixed(plan: Plan) -> str:
    """The fixed parts in words."""
    parts = [("the runtime", plan.runtime), ("dense weights", plan.dense), ("the KV cache", plan.kv_cache)]
    parts += [("the working set", plan.working_set), ("staging", plan.staging)]
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts)


def _round_up(nbytes: int) -> int:
    """MiB that are enough for `nbytes`, and for what the runtime varies by from start to start."""
    return -(-nbytes // (1 << 20)) + 8


def allot(plan: Plan, slots: int, gains: "Sequence[Sequence[float]] | None") -> Plan:
    """The plan with `slots` slots in all, at most one an expert; `gains` as in `make_plan`."""
    if len(plan.capacities) == 1:
        return dataclasses.replace(plan, capacities=(min(slots, sum(plan.experts)),))
    return dataclasses.replace(plan, capacities=tuple(divide(gains or _equal(plan), slots)))


def _equal(plan: Plan) -> "list[list[float]]":
    """Gains by which all layers get as many slots."""
    return [[0.0] * (count + 1) for count in plan.experts]


def hit_rate(plan: Plan, gains: "Sequence[Sequence[float]] | None") -> float:
    """Mean over the layers of what their slots hit by `gains`, or, where these are not known, if every expert were
    equally likely: the worst case for a cache. A pool that all layers share is taken as divided at best."""
    if gains is None:
        return plan.resident_share
    slots = divide(gains, plan.slots) if len(plan.capacities) == 1 else plan.capacities
    return sum(curve[n] for curve, n in zip(gains, slots, strict=True)) / len(gains)


def _dense_nbytes(manifest: Manifest, element_size: int, compiled: bool) -> "tuple[int, int]":
    """(held in memory, left mapped on disk); `compiled`: by the compiled decoder too."""
    held = sum(entry.nbytes for entry in manifest.linears)
    held += sum(math.prod(entry.shape) * element_size for entry in manifest.tensors if not entry.mappable)
    if compiled:  # it has routers, and what latent attention absorbs, once more in 16 bits
        matrices = [entry for entry in manifest.tensors if not entry.mappable and len(entry.shape) > 1]
        held += sum(2 * math.prod(entry.shape) for entry in matrices)
        held += sum(2 * entry.rows * entry.cols for entry in manifest.linears if entry.module.endswith("kv_b_proj"))
    return held, sum(entry.nbytes for entry in manifest.tensors if entry.mappable)


def _kv_positions(settings: EngineSettings) -> int:
    """Positions of keys and values: on a device a conversation's prompts, and the room that single tokens go to."""
    return settings.context if settings.vram is None else settings.context + most_room(settings.context)


def kv_nbytes_per_token(config: Any, element_size: int, compiled: bool) -> int:
    """Bytes of KV cache that one more token takes, of numbers of `element_size` bytes, or as the compiled decoder holds
    them.

    Sliding-window layers are counted as if they grew (a safe side's estimate), recurrent ones not at all.
    """
    config = config.get_text_config()
    layers = _layers(config)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    recurrent = [any(word in kind for word in ("linear", "mamba", "conv", "recurrent")) for kind in kinds]
    widths = [_kv_width(layer, compiled) for layer in layers]
    return (2 if compiled else element_size) * sum(
        width for width, skip in zip(widths, recurrent, strict=False) if not skip
    )


def _layers(config: Any) -> "list[Any]":
    """A text model's configuration for each of its layers."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * int(getattr(config, "num_hidden_layers", 0) or 0)


def _kv_width(config: Any, compiled: bool) -> int:
    """Numbers that one layer caches for one token."""
    heads = int(getattr(config, "num_attention_heads", 1) or 1)
    if rank := int(getattr(config, "kv_lora_rank", None) or 0):  # multi-head latent attention caches latents
        indexed = int(getattr(config, "index_head_dim", None) or 0)  # DeepSeek-V3.2's second, small attention
        return rank * (2 if compiled else 1) + int(config.qk_rope_head_dim) + indexed
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return 2 * kv_heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def _context_nbytes(
    manifest: Manifest, config: Any, settings: EngineSettings, element_size: int, compiled: bool
) -> int:
    """What one layer makes of all of a context while it reads a prompt."""
    layers = _layers(config.get_text_config())
    modules = _modules_read(manifest, compiled)
    positions = settings.context if settings.vram is None else most_room(settings.context)
    tokens = min(settings.context, settings.prompt_chunk)
    width = max((_expanded_width(layer, modules) for layer in layers), default=0)
    if modules and settings.vram is None:  # what is cached, once more while it grows, or as the modules see it
        cached = max((_kv_width(layer, compiled) for layer in layers), default=0)
        width += cached * (2 + 4) // element_size if compiled else cached
    mask = tokens * (1 + element_size) if modules else 0  # of truth values, and of numbers
    indexers = max((int(getattr(layer, "index_n_heads", None) or 0) for layer in layers), default=0)
    scores = 2 * 4 * tokens * indexers  # of DeepSeek-V3.2's second attention, in float32, and what its ReLU leaves
    return positions * (width * element_size + mask) + settings.context * scores


def _expanded_width(config: Any, modules: bool) -> int:
    """Numbers of one position that attention makes of what is cached while one layer reads a prompt. Latent attention:
    the latent widened, and for each head what the up-projection makes, keys with their rotated part, and values. Else
    `modules` repeat each head of keys and values for all heads of queries that share it."""
    heads = int(getattr(config, "num_attention_heads", 1) or 1)
    if not (rank := int(getattr(config, "kv_lora_rank", None) or 0)):
        shared = heads // int(getattr(config, "num_key_value_heads", None) or heads)
        return shared * _kv_width(config, False) if modules and shared > 1 else 0
    nope, rope, value = (int(getattr(config, f"{name}_head_dim")) for name in ("qk_nope", "qk_rope", "v"))
    return rank + rope + heads * (2 * nope + rope + 2 * value)


def _working_set(manifest: Manifest, config: Any, tokens: int, element_size: int, compiled: bool) -> int:
    """Activations of `tokens` of a prompt, logits, and what kernels need."""
    text = config.get_text_config()
    hidden, vocab = int(text.hidden_size), int(text.vocab_size)
    wide = max(tensor.rows for entry in manifest.experts for tensor in entry.tensors)
    logits = 4 * vocab * 4
    if _modules_read(manifest, compiled):
        return _KERNEL_NBYTES + tokens * (12 * hidden + 3 * wide) * element_size + logits
    widest = max((entry.rows for entry in manifest.linears if entry.rows != vocab), default=hidden)
    outputs = experts_per_token(config) * hidden
    activations = tokens * (4 * hidden + outputs + 2 * widest) + _BATCH * 3 * wide
    return _SCRATCH_NBYTES + activations * element_size + logits


def experts_per_token(config: Any) -> int:
    """top-k of the router, under any of the names configurations give it."""
    text = config.get_text_config()
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k"):
        value = getattr(text, name, None)
        if isinstance(value, list | tuple):
            value = max(value)
        if isinstance(value, int):
            return value
    return 2


def _modules_read(manifest: Manifest, compiled: bool) -> bool:
    """Whether transformers' modules read long prompts: torch multiplies many vectors with what has 16 bits."""
    if not compiled:
        return True
    matrices = (tensor for entry in manifest.experts for tensor in entry.tensors[:2])  # then biases, of 16 bits always
    return any(tensor.format.bits == 16 for tensor in matrices) or any(
        entry.format.bits == 16 for entry in manifest.linears
    )


def _scores_nbytes(config: Any, settings: EngineSettings, element_size: int) -> int:
    """Scores of a prompt's piece for all of a context, in each head of one layer, and two copies of them: transformers'
    eager attention keeps what goes into its softmax, what comes out, and what either is made from."""
    heads = int(getattr(config.get_text_config(), "num_attention_heads", 1) or 1)
    return 3 * heads * min(settings.context, settings.prompt_chunk) * settings.context * element_size


def _unequal_widths(config: Any) -> bool:
    """Whether keys and values differ in width, as latent attention's do: torch has no fused attention for those on the
    CPU and makes all scores."""
    text = config.get_text_config()
    if not getattr(text, "kv_lora_rank", None):
        return False
    return int(text.qk_nope_head_dim) + int(text.qk_rope_head_dim) != int(text.v_head_dim)


def _policy_nbytes(policy: str, experts: "tuple[int, ...]") -> int:
    """The learned policy's weights: for each layer 8 sets, each with a float32 for every pair of experts."""
    return sum(8 * 4 * count**2 for count in experts) if policy.startswith("learned") else 0


def check_policy(name: str, known: "list[str]") -> str:
    """The eviction policy without its `-shared` suffix. Raises ConfigError for an unknown one."""
    plain = name.removesuffix("-shared")
    if plain not in known:
        raise ConfigError(f"unknown policy {name!r}: choose one of {', '.join(known)}, each also with -shared")
    return plain
