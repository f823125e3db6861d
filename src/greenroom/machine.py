"""What this machine has: memory, disk, and bandwidths that are measured, never assumed."""

import re
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from greenroom.folders import nearest

_UNLIMITED = 1 << 60


def available_memory() -> int:
    """Bytes this process may still take: free memory, or what its cgroup's limit leaves, whichever is less."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    free = int(match[1]) * 1024 if match else 0
    return min([free, *_cgroup_rooms()])


def free_disk(folder: Path) -> int:
    """Bytes that are free where `folder` lies, or will."""
    return shutil.disk_usage(nearest(folder)).free


def _cgroup_rooms() -> "list[int]":
    """Room under every memory limit of this process's cgroups (versions 1 and 2)."""
    rooms = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            files = ("memory.max", "memory.current")
            root = Path("/sys/fs/cgroup")
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            root = Path("/sys/fs/cgroup/memory")
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            limit, usage = (_number(group / name) for name in files)
            if limit is not None and usage is not None and limit < _UNLIMITED:
                rooms.append(max(limit - usage, 0))
            if group == root:
                break
    return rooms


def _number(path: Path) -> "int | None":
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def ram_bandwidth(nbytes: int = 256 << 20) -> float:
    """Bytes per second at which all threads together read memory: the floor of every kernel on a CPU."""
    data = torch.ones(nbytes // 8, dtype=torch.int64)
    return nbytes / median_s(lambda: data.sum(), trials=3)


def median_s(action: "Callable[[], object]", trials: int) -> float:
    """Median seconds of `action` over `trials` runs after one warm-up."""
    action()
    times = []
    for _ in range(trials):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
