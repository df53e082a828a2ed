"""One process of several that train one head together, started by torchrun; alone, all of it does nothing.

Each process works on a part of every batch, and gradients are summed, so that all hold the same weights after each step
and the result is that of one process with the whole batch. The first process (`lead`) alone writes and prints.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from whisper_at_cli.extract.devices import choose_device


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train together."""

    rank: int = 0
    world: int = 1
    here: int = 1  # processes on this machine

    @property
    def lead(self) -> bool:
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def from_lead(self, value):
        """What the first process has; everything picklable."""
        if self.world == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]


def started_by_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def is_lead() -> bool:
    """Whether this process is the one that prints; asked before any group of processes exists."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def joined_ranks(device: str = "auto") -> Iterator[tuple[Ranks, torch.device]]:
    """This process's place and device. Under torchrun the processes of a machine share out its GPUs, or its CPU, and a
    group of processes exists while the context lasts. Raises UsageError for a device that is not there."""
    if not started_by_torchrun():
        yield Ranks(), choose_device(device)
        return
    target = choose_device(device)
    if target.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        target = choose_device(f"cuda:{local % torch.cuda.device_count()}")
        torch.cuda.set_device(target)
    joined = not torch.distributed.is_initialized()
    if joined:
        torch.distributed.init_process_group("nccl" if target.type == "cuda" else "gloo")
    try:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), here), target
    finally:
        if joined:
            torch.distributed.destroy_process_group()
