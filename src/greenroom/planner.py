"""A memory plan: what a budget holds, how many experts get a slot, and whether it fits at all.

Arithmetic over the manifest and the model's configuration; measures nothing itself.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from greenroom.cache.curve import divide
from greenroom.config import EngineSettings
from greenroom.errors import BudgetError, ConfigError
from greenroom.footprint import KERNEL_NBYTES, Footprint
from greenroom.packed import Manifest
from greenroom.sizes import format_bytes

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
    `element_size`: bytes of one activation. `compiled`: the compiled decoder serves, where it may: float32 on the CPU.
    `scores`: attention's modules make all of a prompt's scores at once. `gains[l][n]`: the hit rate of layer l with n
    slots, by which a budget is divided; without it, and where slots are asked for per layer, all layers get as many.
    Raises BudgetError, saying what would do, where the budget cannot hold the fixed parts.
    """
    footprint = Footprint(manifest, config, settings, element_size, compiled, scores)
    plan = _without_slots(footprint, runtime, budget)
    plan = allot(plan, _slots(plan, settings), None if settings.experts_per_layer is not None else gains)
    return plan if settings.vram is None else dataclasses.replace(plan, ram=_plan_ram(plan, settings, runtime, budget))


def _plan_ram(plan: Plan, settings: EngineSettings, runtime: int, budget: "int | None") -> RamPlan:
    """What RAM keeps behind `plan`'s slots: as many experts as its budget holds."""
    assert budget is not None
    empty = RamPlan(
        budget=budget,
        runtime=runtime,
        staging=plan.staging,
        working_set=KERNEL_NBYTES,
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


def _without_slots(footprint: Footprint, runtime: int, budget: "int | None") -> Plan:
    """The fixed parts, in RAM or on the device."""
    manifest, settings = footprint.manifest, footprint.settings
    if settings.vram is not None:
        runtime = _DEVICE_RUNTIME + _CAPTURED_NBYTES * len(manifest.experts)
        budget = settings.vram
    experts = tuple(entry.num_experts for entry in manifest.experts)
    record_nbytes = max(entry.record_nbytes for entry in manifest.experts)
    return Plan(
        budget=budget,
        runtime=runtime,
        dense=footprint.dense,
        mapped=footprint.mapped,
        kv_cache=footprint.kv_cache,
        working_set=footprint.working_set + _policy_nbytes(settings.policy, experts) + settings.reserve,
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


def _policy_nbytes(policy: str, experts: "tuple[int, ...]") -> int:
    """The learned policy's weights: for each layer 8 sets, each with a float32 for every pair of experts."""
    return sum(8 * 4 * count**2 for count in experts) if policy.startswith("learned") else 0


def check_policy(name: str, known: "list[str]") -> str:
    """The eviction policy without its `-shared` suffix. Raises ConfigError for an unknown one."""
    plain = name.removesuffix("-shared")
    if plain not in known:
        raise ConfigError(f"unknown policy {name!r}: choose one of {', '.join(known)}, each also with -shared")
    return plain
