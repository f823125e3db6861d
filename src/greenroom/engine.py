"""The composition root: the only place that constructs store, cache, transfer, prefetcher, runner and model."""

import dataclasses
import random
import statistics
from collections.abc import Callable
from typing import Any

import torch

from greenroom import kernels, planner, seam, threads
from greenroom.cache import POLICIES, EvictionPolicy, ExpertCache
from greenroom.cache.curve import MissRatioCurve
from greenroom.config import EngineSettings
from greenroom.decode import DecodeStep
from greenroom.history import History
from greenroom.machine import available_memory
from greenroom.metrics import Metrics, process_memory
from greenroom.model import build, routers
from greenroom.packed import PackedModel
from greenroom.prefetch import Prefetcher
from greenroom.runner import ExpertRunner
from greenroom.store import Arena, DiskStore, Store
from greenroom.transfer import Transfer


class Engine:
    """A packed model that runs: `engine.model` is the transformers model.

    `history`: what earlier runs saw of its routing divides the slots, and this run adds to it when it is closed.
    Raises BudgetError where `settings` cannot hold it, PackedModelError where its files are damaged.
    """

    def __init__(
        self,
        packed: PackedModel,
        settings: EngineSettings,
        dtype: torch.dtype = torch.float32,
        *,
        history: "History | None" = None,
        store: "Store | None" = None,
        shuffle: "random.Random | None" = None,
    ) -> None:
        policy = planner.check_policy(settings.policy, sorted(POLICIES))
        self.packed, self.settings = packed, settings
        threads.take_over()
        self.kernel = kernels.describe(dtype)
        """which kernel computes, for people"""
        config = seam.load_config(packed.folder)
        runtime = process_memory()["anonymous"]
        self.plan = planner.make_plan(
            packed.manifest,
            config,
            settings,
            runtime=runtime,
            budget=planner.budget_of(settings, runtime, available_memory()),
            element_size=dtype.itemsize,
            gains=history.gains() if history else None,
        )
        self._history = history
        self.model: Any = build(packed, config, dtype, self._serve)
        self._store = store if store is not None else DiskStore(packed)
        arena = Arena(self.plan.slots + settings.staging, self.plan.record_nbytes)
        self._transfer = Transfer(self._store, arena, settings.readers, shuffle.shuffle if shuffle else None)
        self.curve = MissRatioCurve(len(packed.manifest.experts))
        """LRU's hit rates for every number of slots, estimated while tokens are decoded"""
        self.runner = ExpertRunner(
            entries=packed.manifest.experts,
            cache=ExpertCache(
                layers=len(packed.manifest.experts),
                capacities=self.plan.capacities,
                staging=settings.staging,
                policy=self._policy(policy),
                validate=settings.validate,
            ),
            transfer=self._transfer,
            arena=arena,
            kernel=kernels.experts,
            curve=self.curve,
            prefetcher=Prefetcher(routers(self.model, packed), settings.prefetch, settings.lookahead, settings.staging),
        )

        self.decode = DecodeStep(self.model.base_model, self.runner.token)

        self.model.greenroom = self
        seam.load_generation_config(self.model, packed.folder)

    def _policy(self, name: str) -> "Callable[[int], EvictionPolicy]":
        """The policy, or a cheap one where there is room for all: then nothing is ever evicted."""
        counts = [entry.num_experts for entry in self.packed.manifest.experts]
        everything = sum(counts) if len(self.plan.capacities) == 1 < len(counts) else max(counts)
        return lambda capacity: POLICIES["lru" if capacity >= everything else name](capacity)

    def _serve(self, layer: int, module: Any, x: Any, top_k_index: Any, top_k_weights: Any) -> torch.Tensor:
        return self.runner(layer, module, x, top_k_index, top_k_weights)

    def metrics(self) -> Metrics:
        """A copy of the running totals."""
        return dataclasses.replace(self.runner.metrics)

    def lru_hit_rates(self) -> "list[float]":
        """LRU's estimated hit rate with 0, 1, … slots in every layer, up to all experts; empty before anything was
        decoded."""
        counts = self.curve.counts
        if not any(counts.requested):
            return []
        most = max(entry.num_experts for entry in self.packed.manifest.experts)
        layers = range(len(self.packed.manifest.experts))
        return [statistics.fmean(rates) for rates in zip(*(counts.rates(n, most) for n in layers), strict=True)]

    def close(self, *, remember: bool = True) -> None:
        """Stop the reader threads and close the files; the model no longer runs.

        `remember`: add what was seen of its routing to its history.
        """
        if self._history and remember:
            self._history.add(self.curve.counts)
        self._history = None
        self._transfer.close()
        self._store.close()
