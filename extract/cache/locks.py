"""Who is at work on a cache in a folder: a lock file for each slot, held as long as its process lives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from whisper_at_cli.extract.errors import CacheError
from whisper_at_cli.extract.folders import take_lock


def lock_slot(path: Path, slot: tuple[int, int]) -> IO:
    """Hold this process's slot. Raises CacheError if a running process holds a slot whose shards overlap."""
    index, of = slot
    folder = lock_folder(path)
    folder.mkdir(parents=True, exist_ok=True)
    with at_door(path):  # one process at a time looks at the other locks
        for (other_index, other_of), file in lock_files(path).items():
            if other_of == of and other_index != index:
                continue
            if _is_held(file):
                raise CacheError(
                    f"another process is writing to {path} as --shard {other_index}/{other_of}; wait for it, or "
                    "give every process its own --shard I/N with the same N"
                )
        held = open(folder / f"{index}-of-{of}", "w")  # noqa: SIM115 - the lock lasts as long as it is open
        take_lock(held)
    return held


def lock_folder(path: Path) -> Path:
    return path / "status" / ".locks"  # within an array, where no reader of Zarr looks for other arrays


def lock_files(path: Path) -> dict[tuple[int, int], Path]:
    """The lock file of every slot (i, n) that was ever at work on a cache in a folder."""
    files = {}
    for file in lock_folder(path).glob("*-of-*"):
        index, _, of = file.name.partition("-of-")
        if file.name.isascii() and index.isdecimal() and of.isdecimal() and 1 <= int(index) <= int(of):
            files[int(index), int(of)] = file
    return files


def running_slots(path: Path) -> set[tuple[int, int]]:
    """The slots that running processes hold. Empty where the file system has no locks: then nobody can know."""
    files = lock_files(path)
    if not files or not (lock_folder(path) / "door").exists():
        return set()
    with at_door(path, "r"):  # else a process that starts now would find its lock taken
        return {slot for slot, file in files.items() if _is_held(file)}


def _is_held(path: Path) -> bool:
    with open(path) as file:
        return not take_lock(file)


@contextlib.contextmanager
def at_door(path: Path, mode: str = "w") -> Iterator[None]:
    """A context that one process at a time is in, of all that have to do with a cache. Who looks only, where nothing
    may be written, opens the door to read."""
    with open(lock_folder(path) / "door", mode) as door:
        take_lock(door, wait=True)
        yield
