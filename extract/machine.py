"""What this machine is: processor, cores, memory, file systems. Known without importing anything heavy."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CONTROL_GROUP = Path("/sys/fs/cgroup")
IN_MEMORY = ("tmpfs", "ramfs")  # file systems


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def load() -> float | None:
    """How many programs wanted a core, on average of the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def free_memory_bytes() -> int | None:
    """Main memory that is free, None where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return min([free, *_left_in_container()])


def _left_in_container() -> list[int]:
    """What a container's limit on memory leaves of it, where there is one (control groups, version 2 or 1)."""
    version_2, version_1 = ("memory.max", "memory.current"), ("limit_in_bytes", "usage_in_bytes")
    for names in (version_2, [f"memory/memory.{name}" for name in version_1]):
        try:
            limit, used = (int((CONTROL_GROUP / name).read_text()) for name in names)
            return [limit - used]
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return []


def file_system(folder: Path) -> str | None:
    """The kind of file system that a folder lies on, as ext4 or nfs4; None where the system does not say."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return None
    folder = folder.resolve()
    above = [(len(place), index, kind) for index, (_, place, kind, *_) in enumerate(mounts) if _is_in(folder, place)]
    return max(above)[2] if above else None  # of several mounts on one place the last counts


def _is_in(folder: Path, place: str) -> bool:
    return folder.is_relative_to(place.replace("\\040", " "))  # how a blank is written there
