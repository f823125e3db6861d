"""Slots in a device's memory, with RAM and disk behind them.

`DeviceArena` holds the slots; `TierTransfer` fills them: a `Transfer` whose records come from RAM where they are, else
from disk. What stays in RAM is decided by `cache.VictimCache`, what has a slot by `cache.ExpertCache`.
"""

from greenroom.tiers.arena import DeviceArena
from greenroom.tiers.link import Link
from greenroom.tiers.table import SlotTable
from greenroom.tiers.transfer import TierTransfer

__all__ = ["DeviceArena", "Link", "SlotTable", "TierTransfer"]
