"""The composition root: the only place that constructs store, cache, transfer, prefetcher, runner and model."""

import contextlib
import dataclasses
import functools
import gc
import random
import statistics
import weakref
from collections.abc import Callable
from typing import Any

import torch

from greenroom import dropped, kernels, planner, seam, threads
from greenroom.buffers import give_back, give_back_large
from greenroom.cache import POLICIES, EvictionPolicy, ExpertCache, VictimCache
from greenroom.cache.curve import MissRatioCurve
from greenroom.config import EngineSettings
from greenroom.decode import DecodeStep
from greenroom.device import Device, find_gpu
from greenroom.device_runner import DeviceRunner
from greenroom.errors import BudgetError, ConfigError
from greenroom.history import History
from greenroom.identity import Identity
from greenroom.kernels import native, over_slots
from greenroom.layer_steps import LayerSteps
from greenroom.machine import available_memory
from greenroom.metrics import Metrics, process_memory
from greenroom.model import MappedEmbedding, build, keep_from_copies, keep_in_place, routers
from greenroom.packed import PackedModel
from greenroom.placement import Placement
from greenroom.prefetch import AUTOMATIC, Prefetcher
from greenroom.prompts import Prompts
from greenroom.runner import ExpertRunner
from greenroom.sizes import format_bytes
from greenroom.store import Arena, DiskStore, Store
from greenroom.tiers import DeviceArena, Link, TierTransfer
from greenroom.token_model import TokenModel
from greenroom.transfer import Transfer

_RUNNING: "weakref.WeakSet[Engine]" = weakref.WeakSet()
"""Engines of this process: memory that one was promised and has not touched is not another's."""


def _stop(transfer: "Transfer | TierTransfer", store: Store) -> None:
    """Stop an engine's threads and close its files."""
    transfer.close()
    store.close()
    threads.give_back()


class Engine:
    """A packed model that runs: `engine.model` is the transformers model.

    `history`: what earlier runs saw of its routing divides the slots, and this run adds to it when it is closed.
    Raises BudgetError where `settings` cannot hold it, PackedModelError where its files are damaged.
    """

    def __init__(
        self,
        packed: PackedModel,
        settings: EngineSettings,
        *,
        history: "History | None" = None,
        store: "Store | None" = None,
        shuffle: "random.Random | None" = None,
        device: "Device | None" = None,
        slots_kernel: "over_slots.SlotsKernel | None" = None,
    ) -> None:
        self._policy_name = planner.check_policy(settings.policy, sorted(POLICIES))
        self.packed, self.settings = packed, settings
        if list(_RUNNING):  # what somebody dropped lies in cycles, and its slots in memory
            gc.collect()
            dropped.stop_all()
        self.device = None if settings.vram is None else device or find_gpu()
        place = torch.float32 if self.device is None else self.device.dtype
        dtype = place if settings.dtype is None else getattr(torch, settings.dtype)
        with contextlib.ExitStack() as undo:
            threads.take_over()
            undo.callback(threads.give_back)
            self._start(dtype, history, store, shuffle, slots_kernel, undo)
            undo.pop_all()
        self._dropped = dropped.when_dropped(self, functools.partial(_stop, self._transfer, self._store))
        _RUNNING.add(self)

    def _start(
        self,
        dtype: torch.dtype,
        history: "History | None",
        store: "Store | None",
        shuffle: "random.Random | None",
        slots_kernel: "over_slots.SlotsKernel | None",
        undo: contextlib.ExitStack,
    ) -> None:
        """Make the model and what serves it; `undo` is called back where that fails."""
        give_back_large()
        packed, settings = self.packed, self.settings
        self.kernel = kernels.describe(dtype) if self.device is None else over_slots.describe(self.device.place)
        """which kernel computes, for people"""
        config = seam.load_config(packed.folder)
        make_plan = self._planner(config, dtype, history)
        self.plan = make_plan(compiled=DecodeStep.may_serve())
        self._history = history
        rough = settings.activation_bits == 8
        self.model: Any = build(packed, config, dtype, self._serve)
        self.decode = DecodeStep(self.model.base_model, rough, settings.kv_bits)
        self.decode.enabled = self.decode.enabled and self.device is None
        if self.device is None and (not self.decode.enabled or self.decode.prove()):  # a reason why it does not serve
            if settings.kv_bits != 16:
                wanted = f"kv_bits {settings.kv_bits} is for the compiled decoder"
                raise ConfigError(f"{wanted}, and this model has {self.decode}: leave it out")
            self.plan = make_plan(compiled=False)
        give_back()  # what a proof has left
        self._store = store if store is not None else DiskStore(packed)
        undo.callback(self._store.close)
        self._shuffle = shuffle.shuffle if shuffle else None
        self.curve = MissRatioCurve(len(packed.manifest.experts))
        """LRU's hit rates for every number of slots, estimated while tokens are decoded"""
        self._experts = functools.partial(kernels.experts, rough=rough)
        self.runner = self._on_cpu() if self.device is None else self._on_device(self.device, slots_kernel)
        undo.callback(self._transfer.close)
        self.decode.served_by(self.runner.token, self.runner)
        self.steps: LayerSteps | None = None
        self.around: TokenModel | None = None
        if isinstance(self.runner, DeviceRunner) and self.device is not None:
            names = [entry.module for entry in packed.manifest.experts]
            layers = seam.stacked_layers(self.model, names)
            self.steps = LayerSteps(layers, self.runner, self.device, self._shrink)
            if (owner := seam.owner(self.model, layers)) is not None:
                embeddings = [one for one in owner.modules() if isinstance(one, MappedEmbedding)]
                self.around = TokenModel(owner, self.steps, self.device, embeddings)
        base = self.model.base_model
        self.prompts = Prompts(base, settings.prompt_chunk, seam.continues(config), self._look)
        self._identity = Identity(base)
        self.model.greenroom = self
        seam.load_generation_config(self.model, packed.folder)
        keep_from_copies(self.model, packed.folder)
        keep_in_place(self.model, dtype, torch.device("cpu") if self.device is None else self.device.place)

    def _planner(self, config: Any, dtype: torch.dtype, history: "History | None") -> "Callable[..., planner.Plan]":
        """How to plan, but for whether the compiled step serves; `runtime` is what the process holds now."""
        owed = sum(other.owed for other in _RUNNING)
        runtime = process_memory()["anonymous"] + owed
        return functools.partial(
            planner.make_plan,
            self.packed.manifest,
            config,
            self.settings,
            runtime=runtime,
            budget=planner.budget_of(self.settings, runtime, available_memory() - owed),
            element_size=dtype.itemsize,
            scores=seam.makes_scores(config),
            gains=history.gains() if history else None,
        )

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def owed(self) -> int:
        """Bytes of RAM that this engine was promised and has not touched yet."""
        return self._host.untouched_nbytes

    def _look(self) -> None:
        """Forget what was made of the model's modules, where somebody has changed them since."""
        if not self._identity.holds():
            self.runner.forget()
            self.decode.forget()
            self._forget_captured()
            self.prompts.forget()
            self._identity = Identity(self.model.base_model)

    def _forget_captured(self) -> None:
        if self.steps is not None:
            self.steps.forget()
        if self.around is not None:
            self.around.forget()

    def _on_cpu(self) -> ExpertRunner:
        """Slots in RAM, the rest on disk."""
        self._host = arena = Arena(self.plan.slots + self.plan.staging_buffers, self.plan.record_nbytes)
        self._transfer: Transfer | TierTransfer = Transfer(self._store, arena, self.settings.readers, self._shuffle)
        return ExpertRunner(arena=arena, kernel=self._experts, **self._parts())

    def _on_device(self, device: Device, slots_kernel: "over_slots.SlotsKernel | None") -> DeviceRunner:
        """Slots on the device, what it lacks in RAM as far as that goes, the rest on disk."""
        assert self.plan.ram is not None
        settings, nbytes = self.settings, self.plan.record_nbytes
        self._check_free(device)
        try:
            self.model.to(device.place)
            arena = DeviceArena(device, self.plan.slots + self.plan.staging_buffers, nbytes)
        except torch.OutOfMemoryError as error:
            raise self._too_large_for(device) from error
        self._host = host = Arena(self.plan.ram.slots + self.plan.staging_buffers, nbytes)
        self._transfer = TierTransfer(
            arena,
            host,
            Transfer(self._store, host, settings.readers, self._shuffle),
            Link(device),
            VictimCache(self.plan.ram.slots, settings.validate),
            [entry.record_nbytes for entry in self.packed.manifest.experts],
        )
        return DeviceRunner(
            arena=arena,
            device=device,
            slots_kernel=slots_kernel or over_slots.choose(device.place),
            cpu_kernel=self._experts,
            placement=Placement(settings.cpu_experts),
            **self._parts(),
        )

    def _check_free(self, device: Device) -> None:
        """Some drivers (WSL's) give out more than there is, and move it to and fro. The driver's own part is taken by
        now."""
        device.trim()
        if self.plan.total - self.plan.runtime > device.memory()[0]:
            raise self._too_large_for(device)

    def _too_large_for(self, device: Device) -> BudgetError:
        free, total = device.memory()
        return BudgetError(
            f"{device.title()} has {format_bytes(free)} free of {format_bytes(total)}, which cannot hold "
            f"{format_bytes(self.plan.total - self.plan.runtime)}: give a smaller --vram, at most "
            f"{(free + self.plan.runtime) >> 20}MiB"
        )

    def _shrink(self) -> None:
        """Out of device memory: go on with three quarters of the slots, from an empty cache."""
        assert self.device is not None and isinstance(self.runner, DeviceRunner)
        assert isinstance(self._transfer, TierTransfer)
        if not self.plan.slots:
            raise BudgetError(
                f"{self.device.title()} ran out of memory with no slot left to give back: give a smaller --context, a "
                "shorter prompt, or free its memory of other processes"
            )
        self.plan = planner.allot(self.plan, self.plan.slots * 3 // 4, None)
        self._transfer.vacate()
        if self.around is not None:
            self.around.forget()
        self.device.trim()
        arena = DeviceArena(self.device, self.plan.slots + self.plan.staging_buffers, self.plan.record_nbytes)
        self.runner.occupy(arena, self._cache())

    def _cache(self) -> ExpertCache:
        return ExpertCache(
            layers=len(self.packed.manifest.experts),
            capacities=self.plan.capacities,
            staging=self.plan.staging_buffers,
            policy=self._policy(self._policy_name),
            validate=self.settings.validate,
        )

    def _parts(self) -> "dict[str, Any]":
        """What runners on every device have; the transfer has been made."""
        settings, entries = self.settings, self.packed.manifest.experts
        gates = routers(self.model, self.packed)
        return {
            "entries": entries,
            "cache": self._cache(),
            "transfer": self._transfer,
            "curve": self.curve,
            "routers": gates,
            "prefetcher": Prefetcher(gates, self._guesses(), settings.lookahead, self.plan.staging_buffers),
        }

    def _guesses(self) -> int:
        """How many experts to guess at most."""
        if self.settings.prefetch is not None:
            return self.settings.prefetch
        # on a device a layer that guesses is not captured
        fits = all(capacity >= self._everything() for capacity in self.plan.capacities)
        return AUTOMATIC if self.device is None and not fits else 0

    def _policy(self, name: str) -> "Callable[[int], EvictionPolicy]":
        """The policy, or a cheap one where there is room for all: then nothing is ever evicted."""
        everything = self._everything()
        return lambda capacity: POLICIES["lru" if capacity >= everything else name](capacity)

    def _everything(self) -> int:
        """Slots that a group needs to hold all that it may be asked for."""
        counts = self.plan.experts
        return sum(counts) if len(self.plan.capacities) == 1 < len(counts) else max(counts)

    def _serve(self, layer: int, module: Any, x: Any, top_k_index: Any, top_k_weights: Any) -> torch.Tensor:
        return self.runner(layer, module, x, top_k_index, top_k_weights)

    def placement(self) -> str:
        """Where missed experts are computed, what is guessed and captured, and why, for people; empty where there is
        no choice."""
        placement = self.runner.placement if isinstance(self.runner, DeviceRunner) else ""
        return "; ".join(
            filter(None, map(str, (placement, self.runner.speculation, self.steps or "", self.around or "")))
        )

    def metrics(self) -> Metrics:
        """A copy of the running totals."""
        return dataclasses.replace(self.runner.metrics, dense_s=native.linears_s())

    def lru_hit_rates(self) -> "list[float]":
        """LRU's estimated hit rate with 0, 1, … slots in every layer, up to all experts; empty before anything was
        decoded."""
        counts = self.curve.counts
        if not any(counts.requested):
            return []
        most, layers = max(self.plan.experts), range(len(self.plan.experts))
        return [statistics.fmean(rates) for rates in zip(*(counts.rates(n, most) for n in layers), strict=True)]

    def close(self, *, remember: bool = True) -> None:
        """Stop the reader threads, close the files and give a device's slots back; the model no longer runs.

        `remember`: add what was seen of its routing to its history.
        """
        if self._history and remember:
            self._history.add(self.curve.counts)
        self._history = None
        self._forget_captured()
        _RUNNING.discard(self)
        if self._dropped.detach():
            _stop(self._transfer, self._store)
        if self.device is not None:
            self.device.close()
            self.device.trim()
