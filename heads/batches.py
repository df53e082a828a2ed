"""Training batches: which clips an epoch draws, mixed and masked how; random choices on the CPU, work on the device.

All choices of an epoch are drawn at once from one generator, so a seed decides them on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.heads.data import Clips
from whisper_at_cli.heads.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Draw:
    """What was drawn for each place of an epoch, or of a batch of it."""

    clip: Tensor  # position in Clips
    partner: Tensor  # position of the clip it is mixed with
    share: Tensor  # share of the first clip, float32; 1 where it is not mixed
    mask_start: Tensor  # frames from here
    mask_end: Tensor  # to before here are zeroed

    def batches(self, size: int) -> Iterator[Draw]:
        """Batches of at most `size`, whose sizes differ by one at most: no clip is dropped and none is nearly alone."""
        count = -(-len(self.clip) // size)
        columns = [getattr(self, column.name).tensor_split(count) for column in fields(self)]
        return (Draw(*batch) for batch in zip(*columns, strict=True))

    def to(self, device: torch.device) -> Draw:
        return Draw(*(getattr(self, column.name).to(device) for column in fields(self)))


def draw_epoch(positions: np.ndarray, recipe: Recipe, rng: np.random.Generator, *, frames: int, weights=None) -> Draw:
    """An epoch over these positions: each clip once in random order, or with `weights` (n,) drawn with replacement.

    Mixup partners are drawn uniformly from all positions, also where clips are not (as the original project does).
    """
    count = max(1, round(recipe.epoch_share * len(positions)))
    if weights is None:
        clip = rng.permutation(positions)[:count]
    else:
        clip = rng.choice(positions, size=count, p=weights / weights.sum())
    partner = rng.choice(positions, size=count)
    mixed = rng.random(count) < recipe.mixup_rate
    share = np.where(mixed, rng.beta(recipe.mixup_alpha, recipe.mixup_alpha, size=count), 1)
    length = rng.integers(0, recipe.time_mask_frames, size=count, endpoint=True)
    start = rng.integers(0, frames - length, endpoint=True)
    columns = (clip, partner, share.astype(np.float32), start, start + length)
    return Draw(*(torch.from_numpy(column) for column in columns))


def balancing_weights(labels: np.ndarray) -> np.ndarray:
    """(n,) sampling weight of each clip: the sum over its labels of 1000 / (clips with that label + 0.01)."""
    per_class = 1000 / (labels.sum(axis=0, dtype=np.int64) + 0.01)
    return labels.astype(np.float64) @ per_class


def make_batch(clips: Clips, draw: Draw, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Inputs (B, L, T, D) float32 and targets (B, C) float32 in 0..1: mixed, then masked in time; labels smoothed.

    The draw has to be on the clips' device."""
    inputs, targets = clips.batch(draw.clip), clips.labels[draw.clip].float()
    if recipe.mixup_rate:
        inputs = torch.lerp(clips.batch(draw.partner), inputs, draw.share[:, None, None, None])
        targets = torch.lerp(clips.labels[draw.partner].float(), targets, draw.share[:, None])
    if recipe.time_mask_frames:
        frame = torch.arange(clips.frames, device=clips.device)
        hidden = (frame >= draw.mask_start[:, None]) & (frame < draw.mask_end[:, None])
        inputs = inputs.masked_fill(hidden[:, None, :, None], 0)
    smoothing = recipe.label_smoothing
    return inputs, targets * (1 - smoothing) + smoothing / targets.shape[1]
