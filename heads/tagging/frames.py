"""The two ways in which a tag window gets its frames: from a transcription's encoder windows, or from its own clips.

L layers, T frames, D channels, C classes, W tag windows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.heads.tagging.windows import (
    SAMPLES_PER_POSITION,
    EncodedWindow,
    ExactPlan,
    FrameAssembler,
    TagGrid,
    clip_at,
    plan_exact,
)

LABELLED_AT_ONCE = 32  # tag windows

Window = tuple[int, int]  # its first frame, and the one after its last
Label = Callable[[list[Tensor]], np.ndarray]  # frames (L, T, D) of tag windows -> logits (W, C)


class SharedTags:
    """Takes the windows of a transcription's encoder and labels each tag window as soon as no more can come for it."""

    def __init__(self, label: Label, frame_positions: int, windows: list[Window]):
        self.label, self.frame_positions = label, frame_positions
        self.waiting = deque(windows)
        self.assembler = FrameAssembler(frame_positions)
        self.tagged: list[Window] = []
        self.logits: list[np.ndarray] = []

    def begin(self, position: int) -> None:
        self._label(lambda window: window[1] * self.frame_positions <= position)

    def add(self, window: EncodedWindow) -> None:
        self.assembler.add(window)

    def finish(self) -> tuple[list[Window], np.ndarray]:
        self._label(lambda window: True)
        return self.tagged, np.concatenate(self.logits) if self.logits else np.zeros((0, 0), np.float32)

    def _label(self, is_final: Callable[[Window], bool]) -> None:
        ready = []
        while self.waiting and is_final(self.waiting[0]):
            window = self.waiting.popleft()
            frames = self.assembler.take(*window)
            if frames is not None:
                self.tagged.append(window)
                ready.append(frames)
        if ready:
            self.logits.append(self.label(ready))
            self.assembler.drop_before(self.waiting[0][0] if self.waiting else self.tagged[-1][1])


class ExactFile:
    """One file on its way through the backbone: its clips, and the tag windows that their features fill."""

    def __init__(
        self, label: Label, path: Path | None, samples: np.ndarray, windows: list[Window], grid: TagGrid, *,
        error: str = "",
    ):  # fmt: skip
        self.label, self.path, self.error, self.windows = label, path, error, windows
        self.duration = len(samples) / SAMPLE_RATE
        self.samples, self.grid = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32)), grid
        real = len(samples) // SAMPLES_PER_POSITION // grid.frame_positions  # frames without padding
        self.plan: ExactPlan = plan_exact([(a, max(a + 1, min(b, real))) for a, b in windows], grid.clip_frames)
        self.features: dict[int, Tensor] = {}
        self.added = 0
        self.ready: list[Tensor] = []
        self.logits: list[np.ndarray] = []
        self.parts = deque(self.plan.parts)

    def clips(self) -> Iterator[Tensor]:
        for start in self.plan.starts:
            yield clip_at(self.samples, start, self.grid)

    @property
    def is_complete(self) -> bool:
        return self.added == len(self.plan.starts)

    def add(self, features_LTD: Tensor) -> None:
        self.features[self.added] = features_LTD
        self.added += 1
        while self.parts and self.parts[0][-1][0] < self.added:
            pieces = [self.features[clip][:, a:b] for clip, a, b in self.parts.popleft()]
            self.ready.append(torch.cat(pieces, dim=1))
        needed = self.parts[0][0][0] if self.parts else self.added
        for clip in [clip for clip in self.features if clip < needed]:
            del self.features[clip]
        if len(self.ready) >= LABELLED_AT_ONCE:
            self._label()

    def _label(self) -> None:
        if self.ready:
            self.logits.append(self.label(self.ready))
            self.ready = []

    def finish(self) -> np.ndarray:
        """Logits (W, C) of every window."""
        self._label()
        return np.concatenate(self.logits) if self.logits else np.zeros((0, 0), np.float32)
