"""`greenroom plan MODEL`: what fits where, and how fast; nothing is packed or loaded."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greenroom.cli import options as shared
from greenroom.errors import BudgetError
from greenroom.sizes import format_bytes

if TYPE_CHECKING:
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
    from greenroom import library, planner, probe, seam
    from greenroom.cache import POLICIES
    from greenroom.machine import available_memory
    from greenroom.metrics import process_memory

    manifest, config_folder, weights = _describe(options)
    config = seam.load_config(config_folder)
    runtime = process_memory()["anonymous"]
    settings = shared.settings_of(options, context=2048)
    if library.is_demo(options.model):
        settings = library.with_demo_share(settings, manifest)
    planner.check_policy(settings.policy, sorted(POLICIES))
    free = available_memory()
    budget = planner.budget_of(settings, runtime, free)
    try:
        plan = planner.make_plan(manifest, config, settings, runtime=runtime, budget=budget, element_size=4)
    except BudgetError as error:
        raise BudgetError(f"{options.model} cannot run: {error}") from None
    speed = probe.predict(plan, manifest, config, weights)
    print(_table(options.model, manifest, plan, speed, free))
    if settings.ram is not None and settings.ram > runtime + free:
        print(f"only {format_bytes(runtime + free)} are free now: with --ram {options.ram} this machine may run out")
    if options.json:
        shared.print_json(_report(plan, speed, free))
    return 0


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


def _report(plan: "Plan", speed: "dict[str, float]", free: int) -> "dict[str, Any]":
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
        "slots_nbytes": plan.slots_nbytes,
        "experts": sum(plan.experts),
        "record_nbytes": plan.record_nbytes,
        "resident_share": plan.resident_share,
        **speed,
    }


def _table(model: str, manifest: "Manifest", plan: "Plan", speed: "dict[str, float]", free: int) -> str:
    experts = sum(plan.experts)
    settings = manifest.settings
    low, high = min(plan.capacities), max(plan.capacities)
    slots = f"{low}" if low == high else f"{low}–{high}"
    allowed = "" if plan.budget is None else f"of {format_bytes(plan.budget)} allowed, "
    rows = [
        ("runtime", plan.runtime, "Python, torch, transformers"),
        ("dense weights", plan.dense, f"attention {settings['attention_bits']}-bit, head {settings['head_bits']}-bit"),
        ("KV cache", plan.kv_cache, "for the context asked for"),
        ("working set", plan.working_set, "activations and dequantised tiles"),
        ("staging", plan.staging, "buffers for guesses and passing experts"),
        (
            "slots",
            plan.slots_nbytes,
            f"{plan.slots} of {experts} experts ({slots} per layer), {settings['expert_bits']}-bit",
        ),
        ("total", plan.total, f"{allowed}{format_bytes(free)} free now"),
        ("left on disk", (experts - plan.slots) * plan.record_nbytes + plan.mapped, "experts and embeddings"),
    ]
    lines = [f"{model}: {manifest.architecture}, {len(plan.experts)} MoE layers, {experts} experts"]
    lines += [f"  {name:<14} {format_bytes(size):>10}   {note}" for name, size, note in rows]
    lines.append(
        f"  predicted: {speed['tokens_per_s']:.2f} tokens/s if experts were chosen evenly "
        f"({speed['hit_rate']:.0%} hits), {speed['tokens_per_s_resident']:.2f} if every expert hit"
    )
    lines.append(
        f"  measured: disk {speed['disk_bytes_per_s'] / 1e9:.2f} GB/s, "
        f"kernels {speed['kernel_bytes_per_s'] / 1e9:.2f} GB/s of packed weights"
    )
    return "\n".join(lines)
