"""Which devices there are, and how many clips fit on one at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.cache.storage import to_storage
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.extract.machine import cores

if TYPE_CHECKING:
    from whisper_at_cli.extract.backbones.load import Backbone


def choose_device(device: str = "auto") -> torch.device:
    """The torch device for a name; `auto` is CUDA, then MPS, then CPU. `cuda` is the current one, such as `cuda:0`.

    Raises UsageError where it is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {device!r} cannot be used here ({reason}); leave out --device, or try cpu") from error
    return with_index(chosen)


def with_index(device: torch.device) -> torch.device:
    """`cuda` as the current device, `cuda:0`: tensors and streams say where they are with an index, and `cuda` equals
    none of those."""
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


@contextlib.contextmanager
def random_numbers(seed: int | None, device: torch.device | None = None) -> Iterator[None]:
    """torch's random numbers from `seed` inside, on the CPU and on a device; outside they are left as they were. None
    leaves them alone inside too."""
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


CPU_BATCH_SIZE = 2  # larger ones fall out of the processor's cache and gain nothing
MPS_BATCH_SIZE = 16
LARGEST_BATCH_SIZE = 256  # powers of two up to it: they fill a shard of as many clips without a rest
PROBE_CLIPS = 8
GPU_STREAMS = 2  # one batch is computed while another is copied
SHARE_OF_FREE_MEMORY = 0.8


def streams_of(device: torch.device) -> int:
    """How many batches are encoded side by side: one per core, each with one thread; two on an accelerator."""
    return cores() if device.type == "cpu" else GPU_STREAMS


def fitting_batch_size(backbone: Backbone, samples: int, dtype: str = "float16") -> int:
    """Clips of `samples` samples to encode together on a backbone's device, for features that are stored as `dtype`.

    On CUDA the largest power of two up to 256 that fits into the free memory, judged by what eight clips took, or fewer
    where not even eight fit. Raises WhisperATError where one clip does not fit.
    """
    if backbone.device.type == "cpu":
        return CPU_BATCH_SIZE
    if backbone.device.type != "cuda":
        return MPS_BATCH_SIZE
    clips = PROBE_CLIPS
    while (per_clip := _bytes_per_clip(backbone, samples, dtype, clips)) is None:
        if clips == 1:
            raise does_not_fit(backbone, samples)
        clips //= 2
    torch.cuda.empty_cache()  # what the probe took is free again
    free = torch.cuda.mem_get_info(backbone.device)[0] * SHARE_OF_FREE_MEMORY / GPU_STREAMS
    size = LARGEST_BATCH_SIZE
    while size > clips and size * per_clip > free:
        size //= 2
    return size


def _bytes_per_clip(backbone: Backbone, samples: int, dtype: str, clips: int) -> float | None:
    """Bytes of device memory that each of so many clips takes at most; None if they do not fit."""
    torch.cuda.reset_peak_memory_stats(backbone.device)
    before = torch.cuda.memory_allocated(backbone.device)
    try:
        to_storage(backbone.encode(torch.zeros(clips, samples)), dtype)
        torch.cuda.synchronize(backbone.device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return (torch.cuda.max_memory_allocated(backbone.device) - before) / clips


class FittingBatches:
    """How many clips of a length fit on a device at once, learnt from what did not fit. Safe between threads."""

    def __init__(self) -> None:
        self._most: dict[tuple, int] = {}
        self._lock = threading.Lock()

    def most(self, backbone: Backbone, samples: int) -> int | None:
        """The largest batch to try; None while every batch fitted."""
        return self._most.get(self._key(backbone, samples))

    def failed(self, backbone: Backbone, samples: int, clips: int) -> None:
        """So many clips did not fit: try half of them from now on. Raises WhisperATError if it was one."""
        if clips == 1:
            raise does_not_fit(backbone, samples)
        key = self._key(backbone, samples)
        with self._lock:  # two threads may fail with batches of one size: that halves it once
            self._most[key] = min(self._most.get(key, clips), (clips + 1) // 2)

    def note(self, backbone: Backbone, samples: int, batch_size: int) -> str | None:
        """For the user, if batches of `batch_size` clips had to be split."""
        most = self.most(backbone, samples)
        if most is None or most >= batch_size:
            return None
        return notes.BATCHES_SPLIT(size=batch_size, device=backbone.device, most=most)

    @staticmethod
    def _key(backbone: Backbone, samples: int) -> tuple:
        return (backbone.weights_sha256, backbone.precision, str(with_index(backbone.device)), samples)


FITTING = FittingBatches()  # of this process


def does_not_fit(backbone: Backbone, samples: int) -> WhisperATError:
    return WhisperATError(
        f"one clip of {samples / backbone.sample_rate:g} s does not fit in the memory of {backbone.device}; free some "
        "memory or choose a smaller model, and run the same command again"
    )


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
