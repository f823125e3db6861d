"""`greenroom plan MODEL`: what fits where, and how fast; nothing is packed or loaded."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greenroom.cli import options as shared
from greenroom.cli import receipt
from greenroom.cli.generation import step_nbytes
from greenroom.errors import BudgetError
from greenroom.sizes import format_bytes

if TYPE_CHECKING:
    from greenroom.config import EngineSettings
    from greenroom.packed import Manifest
    from greenroom.planner import Plan


def add(commands: Any) -> None:
    """Register the command."""
    parser: argparse.ArgumentParser = commands.add_parser("plan", help="what fits where, and how fast")
    parser.add_argument("model", help=shared.MODEL_HELP)
    shared.add_memory(parser)
    shared.add_bits(parser)
    shared.add_common(parser)
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Print the plan; exit code 2 where the budget cannot hold the model."""
    from greenroom import library, planner, seam
    from greenroom.decode import DecodeStep
    from greenroom.history import History
    from greenroom.machine import available_memory
    from greenroom.metrics import process_memory

    settings = shared.settings_of(options, context=2048)
    manifest, config_folder, weights = _describe(options)
    config = seam.load_config(config_folder)
    runtime, free = process_memory()["anonymous"], available_memory()
    if library.is_demo(options.model):
        settings = library.with_demo_share(settings, manifest)
    gains = History(manifest).gains()
    try:
        plan = planner.make_plan(
            manifest,
            config,
            settings,
            runtime=runtime,
            budget=planner.budget_of(settings, runtime, free),
            element_size=settings.element_size,
            compiled=DecodeStep.may_serve(),
            scores=seam.makes_scores(config),
            gains=gains,
        )
    except BudgetError as error:
        raise BudgetError(f"{options.model} cannot run: {error}") from None
    if plan.ram is None:
        found = _speed(plan, manifest, config, weights, gains, fixed=settings.experts_per_layer is not None)
        lines = [*_outlook(plan, found), *_quality(manifest), *_scarcity(options, settings, plan, runtime + free)]
    else:
        found = {"ram": dataclasses.asdict(plan.ram)}
        lines = [*_ram_table(plan), *_quality(manifest)]
    print("\n".join([*_table(options.model, manifest, plan, free), *lines]))
    if options.json:
        shared.print_json({**_report(plan, free), **found, "receipt": receipt.fields(manifest.receipt)})
    return 0


def _speed(
    plan: "Plan", manifest: "Manifest", config: Any, weights: Path, gains: "list[list[float]] | None", fixed: bool
) -> "dict[str, Any]":
    """What is predicted of the plan and of others, and measured for it; `fixed`: layers have their slots as told."""
    from greenroom import planner, probe

    rates = probe.measure(manifest, weights)

    def outlook(plan: "Plan") -> "dict[str, float]":
        hit_rate = planner.hit_rate(plan, gains)
        speed = probe.predict(plan, manifest, config, rates, hit_rate)
        return {"slots_nbytes": plan.slots_nbytes, "hit_rate": hit_rate, "tokens_per_s": speed}

    return {
        **outlook(plan),
        "tokens_per_s_resident": probe.predict(plan, manifest, config, rates, 1.0),
        **rates,
        "routing_known": gains is not None,
        "what_if": [outlook(planner.allot(plan, slots, None if fixed else gains)) for slots in _others(plan)],
    }


def _scarcity(options: argparse.Namespace, settings: "EngineSettings", plan: "Plan", free: int) -> "list[str]":
    """Whether there is less than the plan takes, or may take."""
    if max(plan.total, settings.ram or 0) <= free:
        return []
    flag = "experts-per-layer" if settings.ram is None else "ram"
    value = settings.experts_per_layer if settings.ram is None else options.ram
    return [f"only {format_bytes(free)} are free now: with --{flag} {value} this machine may run out"]


def _describe(options: argparse.Namespace) -> "tuple[Manifest, Path, Path]":
    """(the manifest the model has or would have, the folder of its config, a weight file to time the disk with)."""
    from greenroom import library
    from greenroom.checkpoint import Checkpoint, resolve
    from greenroom.packed import PackedModel
    from greenroom.packing import preview

    bits = shared.bits_of(options)
    target, settings = library.place(options.model, bits)
    if (target / "greenroom.json").is_file():
        packed = PackedModel(target)
        return packed.manifest, target, target / packed.manifest.experts[0].file
    source = library.demo_checkpoint() if library.is_demo(options.model) else resolve(options.model)
    checkpoint = Checkpoint(source)
    with checkpoint.shards:
        return preview(checkpoint, settings), source, checkpoint.shards.paths[0]


def _others(plan: "Plan") -> "list[int]":
    """Slots that a little less and a little more memory would hold."""
    step = max(int(step_nbytes(sum(plan.experts) * plan.record_nbytes) // plan.record_nbytes), 1)
    less, more = max(plan.slots - step, 0), min(plan.slots + step, sum(plan.experts))
    return [slots for slots in (less, more) if slots != plan.slots]


def _report(plan: "Plan", free: int) -> "dict[str, Any]":
    return {
        "budget": plan.budget,
        "free": free,
        "total": plan.total,
        "runtime": plan.runtime,
        "dense": plan.dense,
        "mapped": plan.mapped,
        "kv_cache": plan.kv_cache,
        "working_set": plan.working_set,
        "staging": plan.staging,
        "slots": plan.slots,
        "experts": sum(plan.experts),
        "record_nbytes": plan.record_nbytes,
        "resident_share": plan.resident_share,
    }


def _table(model: str, manifest: "Manifest", plan: "Plan", free: int) -> "list[str]":
    experts = sum(plan.experts)
    settings = manifest.settings
    low, high = min(plan.capacities), max(plan.capacities)
    slots = f"{low}" if low == high else f"{low}–{high}"
    allowed = "" if plan.budget is None else f"of {format_bytes(plan.budget)} allowed, "
    kept, note = (0, "Python, torch, transformers") if plan.ram is None else (plan.ram.slots, "the driver's, about")
    free_now = f"{format_bytes(free)} free now" if plan.ram is None else "on the GPU"
    rows = [
        ("runtime", plan.runtime, note),
        ("dense weights", plan.dense, f"attention {settings['attention_bits']}-bit, head {settings['head_bits']}-bit"),
        ("KV cache", plan.kv_cache, "for the context asked for"),
        ("working set", plan.working_set, "activations and dequantised tiles"),
        ("staging", plan.staging, "buffers for guesses and passing experts"),
        (
            "slots",
            plan.slots_nbytes,
            f"{plan.slots} of {experts} experts ({slots} per layer), {settings['expert_bits']}-bit",
        ),
        ("total", plan.total, f"{allowed}{free_now}"),
    ]
    left = max(experts - plan.slots - kept, 0) * plan.record_nbytes + plan.mapped
    disk = ("left on disk", left, "experts and embeddings")
    lines = [f"{model}: {manifest.architecture}, {len(plan.experts)} MoE layers, {experts} experts"]
    return lines + [f"  {name:<14} {format_bytes(size):>10}   {note}" for name, size, note in [*rows, disk]]


def _ram_table(plan: "Plan") -> "list[str]":
    """What lies behind the GPU's slots."""
    assert plan.ram is not None
    ram, experts = plan.ram, sum(plan.experts)
    together = "with the GPU's all of them" if ram.slots + plan.slots >= experts else "the rest stay on disk"
    rows = [
        ("runtime", ram.runtime, "Python, torch, transformers"),
        ("working set", ram.working_set, "experts computed on the CPU"),
        ("staging", ram.staging, "buffers between disk and GPU"),
        ("slots", ram.slots_nbytes, f"{ram.slots} of {experts} experts, {together}"),
        ("total", ram.total, f"of {format_bytes(ram.budget)} allowed, in RAM"),
    ]
    return [f"  {name:<14} {format_bytes(size):>10}   {note}" for name, size, note in rows]


def _outlook(plan: "Plan", speed: "dict[str, Any]") -> "list[str]":
    """How fast, now and with other budgets."""
    basis = "LRU, as in earlier runs" if speed["routing_known"] else "if experts were chosen evenly"
    lines = [
        f"  predicted: {speed['tokens_per_s']:.2f} tokens/s, {speed['hit_rate']:.0%} hits ({basis}), "
        f"{speed['tokens_per_s_resident']:.2f} if every expert hit"
    ]
    for other in speed["what_if"]:
        change = other["slots_nbytes"] - plan.slots_nbytes
        lines.append(
            f"  with {format_bytes(abs(change))} {'more' if change > 0 else 'less'}: "
            f"{other['tokens_per_s']:.2f} tokens/s, {other['hit_rate']:.0%} hits"
        )
    lines.append(
        f"  measured: disk {speed['disk_bytes_per_s'] / 1e9:.2f} GB/s, "
        f"kernels {speed['kernel_bytes_per_s'] / 1e9:.2f} GB/s of packed weights"
    )
    return lines


def _quality(manifest: "Manifest") -> "list[str]":
    """What packing cost, where it was measured."""
    return [] if manifest.receipt is None else [f"  quality: {receipt.line(manifest.receipt)}"]
