"""Clips that heads train from: features and labels of some rows of a cache, in one tensor each, in the fastest memory
that holds them.

n clips, L layers, T frames, D channels, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.errors import UsageError, WhisperATError

READ_BYTES = 256 << 20  # of features held twice while they are copied into place


@dataclass(frozen=True, eq=False)
class Clips:
    """Rows of a cache, ready to be drawn as batches. Features keep the cache's type until a batch is made."""

    rows: np.ndarray  # (n,) ascending rows of the cache
    features: Tensor  # (n, L, T, D); (n, L, 1, D) where only the time mean was read, (n, 1, 1, D) for the last layer's
    labels: Tensor  # (n, C) uint8, on `device`
    device: torch.device  # where heads compute; features may lie in main memory instead

    @property
    def frames(self) -> int:
        """Frames of a clip here: 1 where only the time mean was read."""
        return self.features.shape[2]

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Where these rows of the cache lie in `features`."""
        found = np.searchsorted(self.rows, rows)
        assert (self.rows[found] == rows).all()
        return found

    def batch(self, positions: Tensor) -> Tensor:
        """Features of some clips, float32, where heads compute."""
        return self.features[positions.to(self.features.device)].to(self.device, dtype=torch.float32)


def load_clips(cache: FeatureCache, rows: np.ndarray, reads: str, device: torch.device) -> Clips:
    """What a head reads (its `reads`) of these ascending rows: on `device` if half its free memory holds it, else in
    main memory. Raises WhisperATError where that is too small as well."""
    spec = cache.spec
    layers, frames = {"last mean": (1, 1), "mean": (spec.layers, 1), "features": (spec.layers, spec.frames)}[reads]
    dtype = torch.float16 if reads == "features" and spec.dtype == "float16" else torch.float32
    place = _place_for(len(rows) * layers * frames * spec.dim * dtype.itemsize, device, cache)
    features = torch.empty((len(rows), layers, frames, spec.dim), dtype=dtype, device=place)
    step = max(1, READ_BYTES // (layers * frames * spec.dim * dtype.itemsize))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        if reads == "features":
            values = cache.features(some)
        elif reads == "mean":
            values = cache.mean(rows=some)[:, :, None, :]
        else:
            values = cache.mean(layer=spec.layers, rows=some)[:, None, None, :]
        features[start : start + step] = torch.from_numpy(values).to(dtype)
    return Clips(rows, features, torch.from_numpy(cache.labels[rows]).to(device), device)


def every_clip_has_one_label(labels: np.ndarray) -> bool:
    """Whether labels (n, C) name exactly one class for each clip. Raises UsageError where nothing can be learnt."""
    classes = int(labels.any(axis=0).sum())
    if classes < 2 and not (classes and (~labels.any(axis=1)).any()):
        raise UsageError(
            f"the {len(labels)} finished clips have {classes} of {labels.shape[1]} classes among them, which leaves "
            "nothing to tell apart; extract a labelled dataset"
        )
    return bool((labels.sum(axis=1) == 1).all())


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device, None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _place_for(size: int, device: torch.device, cache: FeatureCache) -> torch.device:
    main = torch.device("cpu")
    free = free_bytes(device)
    if free is None or size <= free / 2:
        return device
    free = free_bytes(main)
    if free is None or size <= free / 2:
        return main
    raise WhisperATError(
        f"the features to train on take {size / 1e9:.1f} GB and half of the free memory is {free / 2e9:.1f} GB: train "
        f"where there is more memory, or train last-mlp or wa-mlp, which need {cache.spec.frames} times less"
    )
