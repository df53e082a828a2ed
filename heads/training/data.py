"""Clips that heads train from: features and labels of some rows of a cache, in the fastest place that holds them.

Three tiers: `device`, one tensor in the accelerator's memory; `memory`, one tensor in main memory; `stream`, left in
the cache. What is held keeps the cache's type (int8 with its scale) until a batch is made on the device.

n clips, L layers, T frames, D channels, C classes.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.devices import cores
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.extract.machine import free_memory_bytes
from whisper_at_cli.heads.training.batches import decoded

READ_BYTES = 64 << 20  # of features held twice, by each thread, while they are copied into place
READERS = 4  # threads
TIERS = ("device", "memory", "stream")
SHARE_OF_FREE = {"device": 0.8, "memory": 0.5}  # that features may take; heads and batches need some too


@dataclass(frozen=True, eq=False)
class Clips:
    """Rows of a cache, ready to be drawn as batches. Features keep the cache's type until a batch is made."""

    rows: np.ndarray  # (n,) ascending rows of the cache
    features: Tensor  # (n, L, T, D); (n, L, 1, D) where only the time mean was read, (n, 1, 1, D) for the last layer's
    labels: Tensor  # (n, C) uint8, where features are
    device: torch.device  # where heads compute; features may lie in main memory instead
    scale: Tensor | None = None  # (n, L, D) float16, with int8 features

    @property
    def tier(self) -> str:
        """`memory` also where heads compute on the CPU, whose own memory that is."""
        return "memory" if self.features.device.type == "cpu" else "device"

    @property
    def frames(self) -> int:
        """Frames of a clip here: 1 where only the time mean was read."""
        return self.features.shape[2]

    @property
    def layers(self) -> int:
        return self.features.shape[1]

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Where these rows of the cache lie in `features`."""
        found = np.searchsorted(self.rows, rows)
        assert (self.rows[found] == rows).all()
        return found

    def batch(self, positions: Tensor) -> Tensor:
        """Features of some clips, float32, where heads compute."""
        features, scale = self.stored(positions)
        return decoded(features.to(self.device), None if scale is None else scale.to(self.device))

    def stored(self, positions: Tensor, *, pin: bool = False) -> tuple[Tensor, Tensor | None]:
        """Features of some clips and their scale as they are held, where they are held; pinned for a fast copy."""
        positions = positions.to(self.features.device)
        scale = None if self.scale is None else _rows_of(self.scale, positions, pin)
        return _rows_of(self.features, positions, pin), scale


@dataclass(frozen=True, eq=False)
class StreamedClips(Clips):
    """Clips that stay in the cache. `features` has a shape and a type but no content (it is on the meta device)."""

    cache: FeatureCache = field(kw_only=True)
    reads: str = field(kw_only=True)

    @property
    def tier(self) -> str:
        return "stream"

    def stored(self, positions: Tensor, *, pin: bool = False) -> tuple[Tensor, Tensor | None]:
        parts = [torch.from_numpy(part) for part in _read(self.cache, self.rows[positions.cpu().numpy()], self.reads)]
        parts = [part.pin_memory() for part in parts] if pin else parts
        return parts[0], parts[1] if len(parts) > 1 else None


def _rows_of(values: Tensor, positions: Tensor, pin: bool) -> Tensor:
    if not pin:
        return values.index_select(0, positions)
    out = torch.empty((len(positions), *values.shape[1:]), dtype=values.dtype, pin_memory=True)
    return torch.index_select(values, 0, positions, out=out)


def load_clips(
    cache: FeatureCache, rows: np.ndarray, reads: str, device: torch.device, tier: str = "auto", *, processes: int = 1,
    labels: np.ndarray | None = None,
) -> Clips:  # fmt: skip
    """What a head reads (its `reads`) of these ascending rows, in the fastest tier that holds it or the one asked for.

    `labels` (n, C) take the place of the cache's. `processes` share this machine's main memory. Raises UsageError for a
    tier there is none of, WhisperATError for one that is too small.
    """
    shapes, size = _shapes(cache, len(rows), reads), stored_bytes(cache, len(rows), reads)
    tier = choose_tier(size, device, tier, processes=processes)
    targets = torch.from_numpy(cache.labels[rows] if labels is None else labels)
    if tier == "stream":
        shape, dtype = shapes[0]
        return StreamedClips(
            rows, torch.empty(shape, dtype=dtype, device="meta"), targets, device, cache=cache, reads=reads
        )
    place = device if tier == "device" else torch.device("cpu")
    parts = [torch.empty(shape, dtype=dtype, device=place) for shape, dtype in shapes]
    step = max(1, READ_BYTES * max(1, len(rows)) // max(1, size))

    def read(start: int) -> None:
        for part, values in zip(parts, _read(cache, rows[start : start + step], reads), strict=True):
            part[start : start + step] = torch.from_numpy(values)

    with ThreadPoolExecutor(min(READERS, cores())) as pool:
        list(pool.map(read, range(0, len(rows), step)))
    return Clips(rows, parts[0], targets.to(place), device, parts[1] if len(parts) > 1 else None)


def stored_bytes(cache: FeatureCache, count: int, reads: str) -> int:
    """Bytes that `count` clips take in memory."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in _shapes(cache, count, reads))


def choose_tier(size: int, device: torch.device, tier: str = "auto", *, processes: int = 1) -> str:
    """The fastest tier for `size` bytes of features, or the one asked for if it is large enough."""
    if tier not in ("auto", *TIERS):
        raise UsageError(f"tier {tier!r} is not known; choose from auto, {', '.join(TIERS)}")
    if tier == "device" and device.type == "cpu":
        tier = "memory"
    free = {"device": free_bytes(device), "memory": free_bytes(torch.device("cpu"))}
    if free["memory"] is not None:
        free["memory"] //= processes
    if tier in free:
        room = free[tier]
        if room is not None and size > room:
            raise WhisperATError(
                f"the features to train on take {size / 1e9:.1f} GB and {room / 1e9:.1f} GB of {tier} memory are "
                "free: leave out --tier, or give --tier stream"
            )
        return tier
    if tier == "auto":
        for name in ("device", "memory")[device.type == "cpu" :]:
            room = free[name]
            if room is None or size <= SHARE_OF_FREE[name] * room:
                return name
    return "stream"


def _shapes(cache: FeatureCache, count: int, reads: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of what is held of `count` clips: features or means, and with int8 features their scale."""
    L, T, D = cache.spec.layers, cache.spec.frames, cache.spec.dim
    mean = getattr(torch, cache.spec.mean_dtype)
    if reads != "features":
        return [((count, L if reads == "mean" else 1, 1, D), mean)]
    features = ((count, L, T, D), getattr(torch, cache.spec.dtype))
    return [features, ((count, L, D), torch.float16)] if cache.spec.dtype == "int8" else [features]


def _read(cache: FeatureCache, rows: np.ndarray, reads: str) -> list[np.ndarray]:
    """What is held of these rows, in the types that `_shapes` gives (means come as float32)."""
    if reads == "features":
        features = cache.stored_features(rows)
        return [features, cache.scale(rows)] if cache.spec.dtype == "int8" else [features]
    if reads == "mean":
        return [cache.mean(rows=rows)[:, :, None, :]]
    return [cache.mean(layer=cache.spec.layers, rows=rows)[:, None, None, :]]


def every_clip_has_one_label(labels: np.ndarray) -> bool:
    """Whether labels (n, C) name exactly one class for each clip. Raises UsageError where nothing can be learnt."""
    classes = int(labels.any(axis=0).sum())
    if classes < 2 and not (classes and (~labels.any(axis=1)).any()):
        raise UsageError(
            f"the {len(labels)} finished clips have {classes} of {labels.shape[1]} classes among them, which leaves "
            "nothing to tell apart; extract a labelled dataset"
        )
    return bool((labels.sum(axis=1) == 1).all())


def why_not_accuracy(labels: np.ndarray, ids: np.ndarray) -> str:
    """Which clips, and how many, rule out accuracy as the metric: those with no label and those with several."""
    count = (labels > 0).sum(axis=1)
    said = []
    for what, which in (("several labels", np.flatnonzero(count > 1)), ("no label", np.flatnonzero(count == 0))):
        if len(which):
            named = ", ".join(str(ids[row]) for row in which[:3]) + (", ..." if len(which) > 3 else "")
            said.append(f"{len(which)} of {len(labels)} clips have {what} ({named})")
    return f"the metric is mAP and not accuracy: {' and '.join(said)}"


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device, None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory_bytes() if device.type == "cpu" else None
