"""Which devices there are, and how many clips fit on one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.machine import cores

if TYPE_CHECKING:
    from whisper_at_cli.extract.backbones.load import Backbone


def choose_device(device: str = "auto") -> torch.device:
    """The torch device for a name; `auto` is CUDA, then MPS, then CPU. Raises UsageError where it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {device!r} cannot be used here ({reason}); leave out --device, or try cpu") from error
    return chosen


CPU_BATCH_SIZE = 2  # larger ones fall out of the processor's cache and gain nothing
GPU_BATCH_SIZES = (256, 128, 64, 32, 16, 8)
GPU_STREAMS = 2  # one batch is computed while another is copied
SHARE_OF_FREE_MEMORY = 0.8


def streams_of(device: torch.device) -> int:
    """How many batches are encoded side by side: one per core, each with one thread; two on an accelerator."""
    return cores() if device.type == "cpu" else GPU_STREAMS


def fitting_batch_size(backbone: Backbone, samples: int) -> int:
    """Clips of `samples` samples to encode together on a backbone's device.

    On CUDA the largest power of two up to 256 that fits into the free memory, judged by what eight clips took.
    """
    if backbone.device.type == "cpu":
        return CPU_BATCH_SIZE
    if backbone.device.type != "cuda":
        return GPU_BATCH_SIZES[-2]
    probe = GPU_BATCH_SIZES[-1]
    torch.cuda.reset_peak_memory_stats(backbone.device)
    before = torch.cuda.memory_allocated(backbone.device)
    backbone.encode(torch.zeros(probe, samples))
    per_clip = (torch.cuda.max_memory_allocated(backbone.device) - before) / probe
    free = torch.cuda.mem_get_info(backbone.device)[0] * SHARE_OF_FREE_MEMORY / GPU_STREAMS
    return next((size for size in GPU_BATCH_SIZES if size * per_clip <= free), probe)


@contextlib.contextmanager
def one_thread_per_operation(on: bool) -> Iterator[None]:
    """Keep torch from splitting single operations over threads, where that gains nothing: whole batches run side by
    side, or what is computed is small."""
    before = torch.get_num_threads()
    try:
        if on:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)
