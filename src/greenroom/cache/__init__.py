"""Which experts have a slot, and who leaves next: a pure core without torch, threads or clock.

Covers: eviction policies (`policies`), the state machine that turns events into loads (`core`) and the
replay of a recorded routing trace through it (`replay`). Does not cover: bits, files, how bytes move.
"""

from greenroom.cache.core import Access, Counters, ExpertCache, Load
from greenroom.cache.policies import POLICIES, EvictionPolicy
from greenroom.cache.replay import replay

__all__ = ["POLICIES", "Access", "Counters", "EvictionPolicy", "ExpertCache", "Load", "replay"]
