"""What training draws at random: which clips an epoch takes, with whom each is mixed, which frames are hidden.

All choices of an epoch are drawn at once on the CPU, so a seed decides them on any device and from any tier. Heads that
train side by side keep draws of their own; a `Step` lines them up. Mixing and masking happen on the device, on batches.

M heads side by side, B in a batch, L layers, T frames, D channels, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.heads.training.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Draw:
    """What was drawn for each of the n places of an epoch."""

    clip: np.ndarray  # (n,) position in Clips
    partner: np.ndarray | None  # (n,) position of the clip it is mixed with; None: its neighbour in the batch
    share: np.ndarray  # (n,) float32, share of the first clip; 1 where it is not mixed
    mask_start: np.ndarray  # (n, L) or (n, 1) where it is the same in all layers: frames from here
    mask_end: np.ndarray  # to before here are zeroed

    def __len__(self) -> int:
        return len(self.clip)


def draw_epoch(
    positions: np.ndarray, recipe: Recipe, rng: np.random.Generator, *, frames: int, layers: int,
    weights: np.ndarray | None = None,
) -> Draw:  # fmt: skip
    """An epoch over these positions: each clip once in random order, or with `weights` (n,) drawn with replacement.

    Mixup partners are neighbours in the batch, so they are drawn as clips are; or uniform over all positions, also
    where clips are not (as the original project does).
    """
    count = recipe.epoch_clips(len(positions))
    if weights is None:
        clip = rng.permutation(positions)[:count]
    else:
        clip = rng.choice(positions, size=count, p=weights / weights.sum())
    mixed = rng.random(count) < recipe.mixup_rate
    share = np.where(mixed, rng.beta(recipe.mixup_alpha, recipe.mixup_alpha, size=count), 1)
    partner = None
    if recipe.mixup_partner == "uniform":
        partner = np.where(mixed, rng.choice(positions, size=count), clip)
    masks = (count, layers if recipe.time_mask_layers == "each" else 1)
    length = rng.integers(0, recipe.time_mask_frames, size=masks, endpoint=True, dtype=np.int16)
    start = rng.integers(0, frames - length, endpoint=True, dtype=np.int16)
    return Draw(clip, partner, share.astype(np.float32), start, start + length)


def balancing_weights(labels: np.ndarray) -> np.ndarray:
    """(n,) sampling weight of each clip: the sum over its labels of 1000 / (clips with that label + 0.01).

    Where no clip has a label, all weights are equal.
    """
    if not labels.any():
        return np.ones(len(labels))
    per_class = 1000 / (labels.sum(axis=0, dtype=np.int64) + 0.01)
    return labels.astype(np.float64) @ per_class


@dataclass(frozen=True, eq=False)
class Step:
    """One step of M heads: B places for each, of which those with weight 0 only fill up."""

    clip: np.ndarray  # (M, B) positions in Clips
    partner: np.ndarray  # (M, B) positions in Clips
    share: np.ndarray  # (M, B) float32
    mask_start: np.ndarray  # (M, B, L or 1)
    mask_end: np.ndarray  # (M, B, L or 1)
    weight: np.ndarray  # (M, B) float32: of a clip in its head's loss, over the parts of all processes
    active: np.ndarray  # (M,) bool: heads that take this step


def batch_bounds(count: int, size: int) -> list[tuple[int, int]]:
    """Bounds of batches of at most `size`, whose sizes differ by one at most: no clip is dropped or nearly alone."""
    batches = -(-count // size)
    sizes = [count // batches + (index < count % batches) for index in range(batches)]
    ends = np.cumsum(sizes).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def steps(draws: list[Draw | None], batch_size: int, *, rank: int = 0, world: int = 1) -> Iterator[Step]:
    """The steps of an epoch of M heads with a draw each (None for one that rests); of every batch the part of process
    `rank` of `world`."""
    bounds = [[] if draw is None else batch_bounds(len(draw), batch_size) for draw in draws]
    for number in range(max(map(len, bounds))):
        active = [number < len(of_head) for of_head in bounds]
        width = max(world, *(end - start for start, end in (of_head[number] for of_head in bounds if of_head[number:])))
        part = slice(width * rank // world, width * (rank + 1) // world)
        taken = [
            None if draw is None or number >= len(of_head) else _row(draw, *of_head[number], width)
            for draw, of_head in zip(draws, bounds, strict=True)
        ]
        filler = next(row for row in taken if row is not None)
        rows = [(*filler[:-1], np.zeros_like(filler[-1])) if row is None else row for row in taken]
        columns = (np.stack(column)[:, part] for column in zip(*rows, strict=True))
        clip, partner, share, mask_start, mask_end, weight = columns
        yield Step(clip, partner, share, mask_start, mask_end, weight, np.array(active))


def _row(draw: Draw, start: int, end: int, width: int) -> tuple[np.ndarray, ...]:
    """A head's row of a step: its batch, filled up to `width` with a clip that does not count."""
    places = np.full(width, start)
    places[: end - start] = np.arange(start, end)
    weight = np.zeros(width, dtype=np.float32)
    weight[: end - start] = 1 / (end - start)
    clip = draw.clip[places]
    if draw.partner is None:
        partner = clip.copy()
        partner[: end - start] = np.roll(clip[: end - start], -1)
    else:
        partner = draw.partner[places]
    return clip, partner, draw.share[places], draw.mask_start[places], draw.mask_end[places], weight


@dataclass(frozen=True, eq=False)
class Collected:
    """What a step needs, on its way to the device: each clip once, in the type in which it is stored."""

    features: Tensor  # (U, L, T, D), the first M x B of them the step's own clips in order
    scale: Tensor | None  # (U, L, D), with int8 features
    labels: Tensor  # (U, C)
    partner: Tensor  # (M x B,) where among the U
    share: Tensor  # (M x B,)
    mask_start: Tensor  # (M x B, L or 1)
    mask_end: Tensor  # (M x B, L or 1)
    weight: Tensor  # (M, B)

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in vars(self).values() if tensor is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> Collected:
        changed: dict[str, Any] = {
            name: None if tensor is None else function(tensor) for name, tensor in vars(self).items()
        }
        return Collected(**changed)


class Places:
    """Finds where positions lie in a step. Keeps one number for each of n clips, so that nothing is sorted."""

    def __init__(self, clips: int):
        self.place = np.zeros(clips, dtype=np.int64)

    def find(self, wanted: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each of the wanted positions lies among others, and whether it is there at all."""
        self.place[among] = np.arange(len(among))
        found = np.minimum(self.place[wanted], len(among) - 1)
        return found, among[found] == wanted

    def with_partners(self, clip: np.ndarray, partner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions that are needed besides `clip` (n,), and where each partner lies among clips and those."""
        found, there = self.find(partner, clip)
        extra = np.unique(partner[~there])
        if len(extra):
            found, _ = self.find(partner, np.concatenate([clip, extra]))
        return extra, found


def mix_and_mask(batch: Collected, recipe: Recipe, hidden_LD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Inputs (M, B, L, T, D) float32 and targets (M, B, C) float32 in 0..1 of what has arrived on the device: decoded,
    mixed, then masked in time; labels smoothed.

    Masked frames are 0, or `hidden_LD`: the mean of each layer and channel, which a standardised head makes 0.
    """
    heads, places = batch.weight.shape
    own = heads * places
    features, labels = decoded(batch.features, batch.scale), batch.labels.float()
    inputs, targets = features[:own], labels[:own]
    if recipe.mixup_rate:
        inputs = features.index_select(0, batch.partner).lerp_(inputs, batch.share[:, None, None, None])
        targets = torch.lerp(labels[batch.partner], targets, batch.share[:, None])
    if recipe.time_mask_frames:
        frame = torch.arange(inputs.shape[2], device=inputs.device)
        hidden = ((frame >= batch.mask_start[..., None]) & (frame < batch.mask_end[..., None]))[..., None]
        if hidden_LD is None:
            inputs = inputs.masked_fill_(hidden, 0)
        else:
            inputs = torch.where(hidden, hidden_LD[:, None], inputs)
    targets = smoothed(targets, batch.share if recipe.mixup_rate else torch.ones_like(batch.share), recipe)
    return inputs.unflatten(0, (heads, places)), targets.unflatten(0, (heads, places))


def smoothed(targets: Tensor, share: Tensor, recipe: Recipe) -> Tensor:
    """Targets (n, C) with their labels smoothed; share (n,) is 1 for a clip that is not mixed."""
    smoothing = recipe.label_smoothing
    found = targets * (1 - smoothing) + smoothing / targets.shape[1]
    if recipe.label_smoothing_form == "original":
        found = torch.where((share[:, None] == 1) & (targets == 1), 1 - smoothing, found)
    return found


def decoded(features: Tensor, scale: Tensor | None) -> Tensor:
    """Stored features as float32, a tensor of its own: of int8 each times its scale."""
    return features.to(torch.float32, copy=True) if scale is None else features * scale.float()[:, :, None, :]
