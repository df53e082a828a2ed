"""Tag windows on one absolute grid of frames, and their frames from encoder windows that lie anywhere.

A position is one output of Whisper's encoder (20 ms), a frame the mean of `frame_positions` of them, a tag window a
whole number of frames. Frames are numbered from the beginning of the file. L layers, T frames, D channels, P positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.backbones.encoder import POSITIONS_PER_SECOND
from whisper_at_cli.extract.errors import UsageError

SAMPLES_PER_POSITION = SAMPLE_RATE // POSITIONS_PER_SECOND
ROUNDING = 1e-6  # of a frame: 4.4 s is 11.000000000000002 frames of 0.4 s


@dataclass(frozen=True)
class TagGrid:
    """Tag windows of `window` frames, one every `hop` frames, from the beginning of the file."""

    frame_positions: int
    clip_frames: int  # of the clips that the head was trained on
    window: int
    hop: int

    @property
    def frame_seconds(self) -> float:
        return self.frame_positions / POSITIONS_PER_SECOND

    def windows(self, positions: int) -> list[tuple[int, int]]:
        """First frame and frame after the last of each tag window of a file of so many positions.

        The last one takes what is left; less than one frame joins the window before it.
        """
        if positions <= 0:
            return []
        frames = -(-positions // self.frame_positions)
        count = 1 + max(0, -(-(frames - self.window) // self.hop))
        found = [(n * self.hop, min(n * self.hop + self.window, frames)) for n in range(count)]
        first, last = found[-1]
        if len(found) > 1 and last - first == 1 and positions % self.frame_positions:
            found[-2:] = [(found[-2][0], last)]
        return found


def tag_grid(*, clip_seconds: float, frames: int, resolution: float | None = None, hop: float | None = None) -> TagGrid:
    """The grid for a head trained on clips of `clip_seconds` in `frames` frames; by default windows of that length.

    Raises UsageError unless resolution and hop are whole frames, and hop is not longer than resolution.
    """
    frame_positions = round(clip_seconds * POSITIONS_PER_SECOND / frames)
    window = frames if resolution is None else _whole_frames("resolution", resolution, frame_positions)
    step = window if hop is None else _whole_frames("hop", hop, frame_positions)
    if step > window:
        raise UsageError(f"a hop of {hop:g} s is longer than the window and would leave seconds untagged: lower it")
    return TagGrid(frame_positions, frames, window, step)


def _whole_frames(name: str, seconds: float, frame_positions: int) -> int:
    frame_seconds = frame_positions / POSITIONS_PER_SECOND
    count = seconds / frame_seconds
    if not count > 0.5 or count == float("inf") or abs(count - round(count)) > ROUNDING * max(1, count):
        raise UsageError(f"{name} is {seconds:g} s, and this head has frames of {frame_seconds:g} s: choose a multiple")
    return round(count)


def within(windows: list[tuple[int, int]], stretches: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Windows cut to the stretches (first frame, frame after the last) that are to be tagged; none where none is."""
    cut = []
    for first, last in windows:
        shared = [(max(first, a), min(last, b)) for a, b in stretches if a < last and b > first]
        if shared:
            cut.append((min(a for a, _ in shared), max(b for _, b in shared)))
    return cut


@dataclass(frozen=True, eq=False)
class EncodedWindow:
    """What every layer holds in one encoder window: whole frames pooled, positions of cut frames as they are."""

    start: int  # position of the file at which it begins
    count: int  # positions of real audio
    before: Tensor  # (L, P, D), P < frame_positions: the end of a frame that began earlier
    frames: Tensor  # (L, T, D)
    after: Tensor  # (L, P, D): the beginning of a frame that ends later


@dataclass(frozen=True)
class Span:
    """How an encoder window lies on the grid."""

    start: int
    count: int
    frame_positions: int

    @property
    def before(self) -> int:
        """Positions before the first whole frame."""
        return min(-self.start % self.frame_positions, self.count)

    @property
    def frames(self) -> int:
        return (self.count - self.before) // self.frame_positions

    def pool(self, x_PD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One layer's positions as (before, frames, after), float32; copies, so that `x_PD` is not kept."""
        a, b = self.before, self.before + self.frames * self.frame_positions
        whole = x_PD[a:b].float().reshape(self.frames, self.frame_positions, x_PD.shape[1]).mean(dim=1)
        return x_PD[:a].float().clone(), whole, x_PD[b : self.count].float().clone()

    def gather(self, layers: list[tuple[Tensor, Tensor, Tensor]]) -> EncodedWindow:
        before, frames, after = (torch.stack(parts) for parts in zip(*layers, strict=True))
        return EncodedWindow(self.start, self.count, before, frames, after)


class FrameAssembler:
    """Frames of a file on its absolute grid, each position counted once.

    A frame that lies wholly in several encoder windows is taken from the one whose nearer edge is furthest away, at
    equal distance from the later. A frame that lies wholly in none is the mean over its positions, each from the first
    window that has it. Holds what was added until `drop_before`. Not safe between threads.
    """

    def __init__(self, frame_positions: int):
        self.frame_positions = frame_positions
        self._whole: dict[int, tuple[int, Tensor]] = {}  # frame: distance to the nearer edge, (L, D)
        self._cut: dict[int, tuple[Tensor, Tensor]] = {}  # frame: sum (L, D), which positions are in it (P,)
        self._dropped = 0

    def add(self, window: EncodedWindow) -> None:
        n = self.frame_positions
        end = window.start + window.count
        first = (window.start + window.before.shape[1]) // n
        self._add_cut(window.start // n, window.start % n, window.before)
        for index in range(window.frames.shape[1]):
            frame = first + index
            distance = min(frame * n - window.start, end - (frame + 1) * n)
            if frame >= self._dropped and distance >= self._whole.get(frame, (-1,))[0]:
                self._whole[frame] = (distance, window.frames[:, index])
        self._add_cut(first + window.frames.shape[1], 0, window.after)

    def _add_cut(self, frame: int, offset: int, x_LPD: Tensor) -> None:
        if not x_LPD.shape[1] or frame < self._dropped:
            return
        total, there = self._cut.get(frame, (0, torch.zeros(self.frame_positions, dtype=torch.bool)))
        new = ~there[offset : offset + x_LPD.shape[1]]
        there[offset : offset + x_LPD.shape[1]] = True
        self._cut[frame] = (total + x_LPD[:, new.to(x_LPD.device)].sum(dim=1), there)

    def take(self, first: int, last: int) -> Tensor | None:
        """Frames `first` to before `last`, (L, T, D) float32; those that no window had are left out, None if all."""
        found = []
        for frame in range(first, last):
            if frame in self._whole:
                found.append(self._whole[frame][1])
            elif frame in self._cut:
                total, there = self._cut[frame]
                found.append(total / there.sum().item())
        return torch.stack(found, dim=1) if found else None

    def drop_before(self, frame: int) -> None:
        """Forget earlier frames; what is added for them from now on is ignored."""
        self._dropped = max(self._dropped, frame)
        for held in (self._whole, self._cut):
            for old in [key for key in held if key < frame]:
                del held[old]


@dataclass(frozen=True)
class ExactPlan:
    """Un-padded clips of a head's length that hold the frames of tag windows."""

    starts: list[int]  # first frame of each clip
    parts: list[list[tuple[int, int, int]]]  # of each window: clip, first and last + 1 of its frames


def plan_exact(windows: Iterable[tuple[int, int]], clip_frames: int) -> ExactPlan:
    """As few clips as hold each tag window whole, or cut into clips of `clip_frames` where it is longer than a clip.

    A window of the length of a clip is a clip of its own: exactly what the head was trained on.
    """
    starts: list[int] = []
    parts = []
    for first, last in windows:
        inside = []
        for at in range(first, last, clip_frames):
            end = min(at + clip_frames, last)
            if not starts or at < starts[-1] or end > starts[-1] + clip_frames:
                starts.append(at)
            inside.append((len(starts) - 1, at - starts[-1], end - starts[-1]))
        parts.append(inside)
    return ExactPlan(starts, parts)


def clip_at(samples: Tensor, first_frame: int, grid: TagGrid) -> Tensor:
    """The samples of the clip that begins at a frame, zero-padded behind the end of the file."""
    step = grid.frame_positions * SAMPLES_PER_POSITION
    piece = samples[first_frame * step : (first_frame + grid.clip_frames) * step]
    return torch.nn.functional.pad(piece, (0, grid.clip_frames * step - len(piece)))
