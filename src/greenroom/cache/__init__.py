"""Which experts have a slot, and who leaves next: a pure core without torch, threads or clock.

Covers: eviction policies (`policies`) and what they rank experts by (`scores`), the state machine that turns events
into loads (`core`) and what it says (`access`), what RAM keeps behind a device (`victims`), the replay of a recorded
routing trace through it (`replay`), and the same hits for every size at once (`stack`, `belady`, `simulate`, `curve`).
Does not cover: bits, files, how bytes move.
"""

from greenroom.cache.access import Access, Counters, Load
from greenroom.cache.core import ExpertCache
from greenroom.cache.policies import POLICIES, EvictionPolicy, Hints
from greenroom.cache.replay import replay
from greenroom.cache.victims import VictimCache

__all__ = ["POLICIES", "Access", "Counters", "EvictionPolicy", "ExpertCache", "Hints", "Load", "VictimCache", "replay"]
