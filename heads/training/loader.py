"""An epoch's batches from any tier: collected where the clips lie, copied ahead, mixed and masked on the device.

device   collected on the accelerator itself
memory   with an accelerator: collected by a thread into pinned memory, copied while the step before is computed
stream   drawn from a shuffle buffer that a thread fills shard by shard, and copied ahead in the same way
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.extract.cache.stream import BUFFER_MB, in_thread, stream_batches
from whisper_at_cli.heads.training.batches import Collected, Draw, Places, Step, mix_and_mask, steps
from whisper_at_cli.heads.training.data import Clips, StreamedClips
from whisper_at_cli.heads.training.ranks import Ranks
from whisper_at_cli.heads.training.recipe import Recipe

AHEAD = 2  # batches that wait to be taken
STEPS_AT_ONCE = 256  # whose draws are moved together


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step of M heads computes with, on the device."""

    inputs: Tensor  # (M, B, L, T, D) float32
    targets: Tensor  # (M, B, C) float32 in 0..1
    weight: Tensor  # (M, B) float32, of a clip in its head's loss
    active: np.ndarray  # (M,) bool: heads that take this step
    waited: float = 0.0  # seconds until its clips had come; mixing and masking them is not waiting


class Epochs:
    """The epochs of one training of M heads, which share what `recipe` says of batches.

    `hidden` (L, D) is what masked frames hold, by default 0.
    Where clips are streamed, `read_ahead` has the next epoch's first ones read while this epoch is still trained. They
    serve one head then, and `seed` decides their order.
    """

    def __init__(
        self, clips: Clips, recipe: Recipe, ranks: Ranks, clock: Callable[[], float] = time.perf_counter,
        hidden: Tensor | None = None,
    ):  # fmt: skip
        self.clips, self.recipe, self.ranks, self.clock, self.hidden = clips, recipe, ranks, clock, hidden
        self._ahead: dict[tuple[int, ...], Iterator[Work]] = {}  # by seed

    def read_ahead(self, draws: list[Draw | None], seed: tuple[int, ...]) -> None:
        """Start on an epoch that will be asked for later. Of clips that are not streamed there is nothing to start."""
        if isinstance(self.clips, StreamedClips):
            self._ahead = {seed: _started(self._collected(draws, seed))}

    def batches(self, draws: list[Draw | None], seed: tuple[int, ...]) -> Iterator[Batch]:
        """This process's part of every batch of an epoch; `clock` measures the waiting."""
        clips = self.clips
        collected = self._ahead.pop(seed, None) or self._collected(draws, seed)
        if clips.device.type == "cuda" and clips.tier != "device":
            collected = _copied_ahead(in_thread(collected, AHEAD, threading.Event()), clips.device)
        asked = self.clock()
        for part, active in collected:
            waited = self.clock() - asked
            inputs, targets = mix_and_mask(part, self.recipe, self.hidden)
            yield Batch(inputs, targets, part.weight, active, waited)
            asked = self.clock()

    def _collected(self, draws: list[Draw | None], seed: tuple[int, ...]) -> Iterator[Work]:
        if isinstance(self.clips, StreamedClips):
            (draw,) = draws
            assert draw is not None, "the one head of a stream trains, else nobody asks for its batches"
            return _streamed(self.clips, draw, self.recipe, self.ranks, seed)
        planned = steps(draws, self.recipe.batch_size, rank=self.ranks.rank, world=self.ranks.world)
        return _collected(self.clips, planned, Places(len(self.clips.rows)))


Work = tuple[Collected, np.ndarray]  # and which heads take the step


def _started(work: Iterator[Work]) -> Iterator[Work]:
    """The same work, the first of it asked for now, in a thread."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="next epoch")
    first = pool.submit(next, work, None)
    pool.shutdown(wait=False)

    def from_the_first() -> Iterator[Work]:
        if (one := first.result()) is not None:
            yield one
            yield from work

    return from_the_first()


def _collected(clips: Clips, planned: Iterator[Step], places: Places) -> Iterator[Work]:
    """Steps' clips and partners, where they lie. What was drawn for many steps goes to the device at once: a copy for
    each column of each step would be most of what the host does in a short step."""
    while some := list(islice(planned, STEPS_AT_ONCE)):
        found = [places.with_partners(step.clip.reshape(-1), step.partner.reshape(-1)) for step in some]
        needed = [np.concatenate([step.clip.reshape(-1), extra]) for step, (extra, _) in zip(some, found, strict=True)]
        drawn = _drawn(some, [partner for _, partner in found], clips.device)
        for step, positions, columns in zip(some, _moved(needed, clips.features.device), drawn, strict=True):
            features, scale = clips.stored(positions, pin=clips.device.type == "cuda" and clips.tier != "device")
            yield Collected(features, scale, clips.labels.index_select(0, positions), *columns), step.active


def _drawn(some: list[Step], partners: list[np.ndarray], device: torch.device) -> list[tuple[Tensor, ...]]:
    """What stands in each of these steps beside its clips, in the order of `Collected`, on a device."""
    masks = [[step.mask_start for step in some], [step.mask_end for step in some]]
    columns = [
        partners,
        [step.share.reshape(-1) for step in some],
        *([mask.reshape(-1, mask.shape[-1]) for mask in of_steps] for of_steps in masks),
        [step.weight.reshape(-1) for step in some],
    ]
    rows = zip(*(_moved(column, device) for column in columns), strict=True)
    return [(*row[:-1], row[-1].view(step.weight.shape)) for step, row in zip(some, rows, strict=True)]


def _moved(parts: list[np.ndarray], device: torch.device) -> Sequence[Tensor]:
    """Arrays of several steps on a device, by one copy."""
    whole = torch.from_numpy(np.concatenate(parts))
    if device.type == "cuda":
        whole = whole.pin_memory()
    return whole.to(device, non_blocking=True).split([len(part) for part in parts])


def _streamed(clips: StreamedClips, draw: Draw, recipe: Recipe, ranks: Ranks, seed: tuple[int, ...]) -> Iterator[Work]:
    """Steps in the order in which the stream gives clips; each place keeps what else was drawn for it.

    Every process reads the whole stream, so that together they take the batches that one would.
    """
    count = len(draw)
    size = -(-count // -(-count // recipe.batch_size))  # as few batches as there must be, equally full
    batches = stream_batches(
        clips.cache, size, rows=clips.rows[draw.clip], seed=seed, buffer_mb=BUFFER_MB, repeats=True, prefetch=AHEAD,
        reads="stored" if clips.reads == "features" else clips.reads, pin=clips.device.type == "cuda",
    )  # fmt: skip
    done, places = 0, Places(len(clips.rows))
    for rows, features, _, *scale in batches:
        here = slice(done, done + len(rows))
        done += len(rows)
        clip = clips.positions(rows)
        if draw.partner is None:
            partner = np.roll(clip, -1)
        else:
            partner = np.where(draw.share[here] < 1, draw.partner[here], clip)
        weight = np.full(len(rows), 1 / len(rows), dtype=np.float32)
        columns = (clip, partner, draw.share[here], draw.mask_start[here], draw.mask_end[here], weight)
        part = slice(len(rows) * ranks.rank // ranks.world, len(rows) * (ranks.rank + 1) // ranks.world)
        clip_part, partner, share, mask_start, mask_end, weight = (column[None, part] for column in columns)
        step = Step(clip_part, partner, share, mask_start, mask_end, weight, np.ones(1, dtype=bool))
        streamed = (features, scale[0] if scale else None)
        yield _picked(clips, step, clip, streamed, places), step.active


def _picked(
    clips: StreamedClips, step: Step, there: np.ndarray, streamed: tuple[Tensor, Tensor | None], places: Places
) -> Collected:
    """A step of what the stream gave for the positions `there`; partners that are not among them are read besides.

    Labels are the run's own, which need not be the cache's.
    """
    own, (features, scale) = step.clip[0], streamed
    extra, partner = places.with_partners(own, step.partner[0])
    needed = np.concatenate([own, extra])
    labels, (drawn,) = clips.labels[torch.from_numpy(needed)], _drawn([step], [partner], features.device)
    if len(extra) == 0 and len(own) == len(there):
        return Collected(features, scale, labels, *drawn)
    at, found = places.find(needed, there)
    absent = torch.from_numpy(needed[~found])
    read = clips.stored(absent) if len(absent) else (None, None)

    def joined(of_stream: Tensor, of_cache: Tensor | None) -> Tensor:
        out = torch.empty((len(needed), *of_stream.shape[1:]), dtype=of_stream.dtype, pin_memory=of_stream.is_pinned())
        out[torch.from_numpy(found)] = of_stream[torch.from_numpy(at[found])]
        if of_cache is not None:
            out[torch.from_numpy(~found)] = of_cache.to(of_stream.dtype)
        return out

    return Collected(joined(features, read[0]), None if scale is None else joined(scale, read[1]), labels, *drawn)


def _copied_ahead(work: Iterator[Work], device: torch.device) -> Iterator[Work]:
    """Each step's tensors copied to an accelerator in a stream of their own, one step ahead of its use."""
    stream, waiting = torch.cuda.Stream(device), None
    for part, active in work:
        with torch.cuda.stream(stream):
            moved = part.map(lambda tensor: tensor.to(device, non_blocking=True))
            arrived = stream.record_event()
        if waiting:
            yield _arrived(*waiting[:3])
        waiting = (moved, active, arrived, part)  # `part` has to live until it is copied
    if waiting:
        yield _arrived(*waiting[:3])


def _arrived(moved: Collected, active: np.ndarray, arrived: torch.Event) -> Work:
    current = torch.cuda.current_stream()
    current.wait_event(arrived)
    for tensor in moved.tensors():
        tensor.record_stream(current)
    return moved, active
