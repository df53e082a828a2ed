"""Tagging with a trained head: beside a transcription, in the same encoder pass, or by itself over many files.

W tag windows, B of them in a batch, L layers, T frames, D channels, C classes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.extract.ahead import in_order
from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.audio.decode import decode
from whisper_at_cli.extract.backbones.encoder import clip_samples
from whisper_at_cli.extract.backbones.load import Backbone, WhisperBackbone, load_backbone, load_whisper
from whisper_at_cli.extract.backbones.weights import WhisperWeights
from whisper_at_cli.extract.datasets.scan import audio_files as audio_files_below
from whisper_at_cli.extract.devices import (
    choose_device,
    cores,
    fitting_batch_size,
    one_thread_per_operation,
    random_numbers,
    streams_of,
)
from whisper_at_cli.extract.errors import AudioError, UsageError, WhisperATError
from whisper_at_cli.extract.progress import Progress
from whisper_at_cli.heads.checkpoint import load_head
from whisper_at_cli.heads.forms import Head
from whisper_at_cli.heads.tagging.events import EventSettings, find_events
from whisper_at_cli.heads.tagging.frames import ExactFile, SharedTags, Window
from whisper_at_cli.heads.tagging.windows import SAMPLES_PER_POSITION, TagGrid, tag_grid, within

if TYPE_CHECKING:
    from whisper.model import Whisper

TAG_WINDOWS = ("shared", "exact")
FILES_AHEAD = 4  # decoded before their turn
NOT_RECORDED = ("", "unknown")  # checksums of a backbone in heads that were made elsewhere


@dataclass(frozen=True)
class TagSettings:
    """What is tagged, and what of it is told."""

    resolution: float | None = None  # seconds of a tag window; None is the length of the head's clips
    hop: float | None = None  # seconds from one window to the next; None is the resolution
    tag_window: str = "shared"  # frames of the transcription's encoder windows; "exact": un-padded clips of their own
    threshold: float = 0.25  # labels of a lower probability are not told
    top: int = 5  # at most so many labels a window
    all_labels: bool = False  # every label of every window, whatever the threshold
    events: EventSettings | None = None

    def __post_init__(self) -> None:
        if self.tag_window not in TAG_WINDOWS:
            raise UsageError(f"tag window {self.tag_window!r} is not known; choose from {', '.join(TAG_WINDOWS)}")
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"threshold is {self.threshold:g}; it is a probability: choose 0 to 1")
        if self.top < 1:
            raise UsageError(f"top is {self.top}; choose 1 or more")


class Tagger:
    """A trained head and the backbone it was trained on.

    One `transcribe` runs at a time; another thread's waits. `tag` may run beside others.
    """

    def __init__(
        self, head: Head, *, model: str | Path | Whisper | None = None, device: str = "auto", precision: str = "auto"
    ):
        """Head as `load_head` gives it; model an OpenAI name, a path, or an `openai-whisper` model that is loaded."""
        self.description = head.description
        self.device = choose_device(device) if model is None or isinstance(model, str | Path) else model.device
        self.head = head.to(self.device).eval()
        self.model: str | Path | Whisper = self.description.backbone if model is None else model
        self.precision = precision
        self._whisper = None if isinstance(self.model, str | Path) else self._fitting_whisper(self.model)
        self._backbone: Backbone | None = None
        self._loading, self._transcribing = threading.Lock(), threading.Lock()

    @classmethod
    def from_checkpoint(
        cls, folder: str | Path, *, model: str | Path | Whisper | None = None, device: str = "auto",
        precision: str = "auto",
    ) -> Tagger:  # fmt: skip
        """A tagger from the folder that `train-head --out` wrote. Without `model`, the backbone that the head names."""
        return cls(load_head(folder), model=model, device=device, precision=precision)

    @property
    def model_name(self) -> str:
        return str(self.model) if isinstance(self.model, str | Path) else self.description.backbone

    @property
    def whisper(self) -> Whisper:
        """The `openai-whisper` model, loaded when it is first asked for. Raises UsageError if it is not the head's."""
        with self._loading:
            if self._whisper is None:
                assert isinstance(self.model, str | Path), "a model that came loaded was kept"
                self._whisper = self._fitting_whisper(load_whisper(self.model, device=str(self.device)))
        return self._whisper

    @property
    def backbone(self) -> Backbone:
        """The encoder for un-padded clips, loaded when it is first asked for."""
        with self._loading:
            if self._backbone is None:
                backbone: Backbone
                if self._whisper is None:
                    assert isinstance(self.model, str | Path), "a model that came loaded was kept"
                    backbone = load_backbone(self.model, device=str(self.device), precision=self.precision)
                else:
                    weights = _weights_of(self._whisper, self.description.backbone)
                    backbone = WhisperBackbone.from_weights(weights, device=self.device, precision=self.precision)
                self._check_fits(backbone.weights_sha256, backbone.layers, backbone.dim)
                self._backbone = backbone
        return self._backbone

    def _fitting_whisper(self, model: Whisper) -> Whisper:
        weights = _weights_of(model, self.description.backbone)
        self._check_fits(weights.encoder_sha256(), weights.dims["n_audio_layer"], weights.dims["n_audio_state"])
        return model

    def _check_fits(self, sha256: str, layers: int, dim: int) -> None:
        needed = self.description
        recorded = needed.weights_sha256 not in NOT_RECORDED
        theirs = needed.weights_sha256[:12] if recorded else "unknown"
        if (layers, dim) != (needed.layers, needed.dim) or (recorded and needed.weights_sha256 != sha256):
            raise UsageError(
                f"the head was trained on {needed.backbone} ({needed.layers} layers, {needed.dim} channels, weights "
                f"{theirs}) and {self.model_name} is another model ({layers} layers, "
                f"{dim} channels, weights {sha256[:12]}): give the model that the head was trained on"
            )

    def grid(self, settings: TagSettings) -> TagGrid:
        return tag_grid(
            clip_seconds=self.description.clip_seconds, frames=self.description.frames,
            resolution=settings.resolution, hop=settings.hop,
        )  # fmt: skip

    @torch.inference_mode()
    def label(self, windows: list[Tensor]) -> np.ndarray:
        """Logits (W, C) float32 for frames (L, T, D) of tag windows, of any length each."""
        logits = torch.empty(len(windows), self.description.classes)
        by_length: dict[int, list[int]] = {}
        for place, frames in enumerate(windows):
            by_length.setdefault(frames.shape[1], []).append(place)
        for places in by_length.values():
            batch = torch.stack([windows[place] for place in places]).to(self.device, torch.float32)
            logits[places] = self.head(batch).float().cpu()
        if not logits.isfinite().all():
            raise WhisperATError("the encoder's output overflowed; compute in float32 (--no-fp16, --precision float32)")
        return logits.numpy()

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """(W, C): the softmax for a head trained with cross-entropy, else the sigmoid of each logit."""
        found = torch.from_numpy(logits)
        return (found.softmax(dim=-1) if self.description.loss == "ce" else found.sigmoid()).numpy()

    def transcribe(
        self, audio: str | Path | np.ndarray, *, seed: int | None = None, progress: Progress | None = None,
        **options: Any,
    ) -> dict:  # fmt: skip
        """What was said and what was heard, with the encoder run once: see docs/transcribe.md for the fields.

        audio is a file or samples at 16 kHz; options are those of TagSettings and of `whisper.transcribe`. Raises
        AudioError for a file that cannot be read, UsageError for options that do not go.
        """
        from whisper_at_cli.heads.tagging.transcription import stretches, transcribe_once

        settings, whisper_options = _split_options(options)
        grid, model = self.grid(settings), self.whisper
        samples = _samples_of(audio)
        duration, n = len(samples) / SAMPLE_RATE, grid.frame_positions
        parts = [  # in frames; a mel frame is half a position
            (start // 2 // n, -(-(end // 2) // n))
            for start, end in stretches(whisper_options.get("clip_timestamps", "0"), len(samples))
        ]
        windows = within(grid.windows(len(samples) // SAMPLES_PER_POSITION), parts)
        shared = SharedTags(self.label, n, windows) if settings.tag_window == "shared" else None
        with self._transcribing, random_numbers(seed, self.device):
            done = transcribe_once(
                model, samples, receiver=shared, frame_positions=n, progress=progress, **whisper_options
            )
        tagged, logits = shared.finish() if shared else self._exact(samples, windows, grid)
        return {
            "audio": str(audio) if isinstance(audio, str | Path) else None,
            "model": self.model_name,
            "language": done.result["language"],
            "duration": duration,
            "text": done.result["text"],
            "segments": done.result["segments"],
            **self._told(tagged, logits, grid, settings, duration),
            "head": self._about_head(),
            "settings": self._about_settings(settings, grid) | {
                "encoder_passes": done.encoder_passes,
                "whisper": dict(whisper_options),
            },
        }  # fmt: skip

    def tag(
        self, audio: str | Path | Iterable[str | Path], *, progress: Progress | None = None, **options: Any
    ) -> Iterator[dict]:
        """Tags of files and of all audio files in folders, without text: one dictionary a file, in order.

        Each tag window is encoded as an un-padded clip. A file that cannot be read has `error` in place of tags.
        """
        settings = TagSettings(**{"tag_window": "exact"} | options)
        if settings.tag_window != "exact":
            raise UsageError("without a transcription there is no window to share: tag windows are exact")
        paths = audio_files([audio] if isinstance(audio, str | Path) else audio)
        return self._tag(paths, settings, self.grid(settings), progress)

    def _tag(
        self, paths: list[Path], settings: TagSettings, grid: TagGrid, progress: Progress | None
    ) -> Iterator[dict]:
        done = 0
        with ThreadPoolExecutor(min(cores(), FILES_AHEAD)) as pool:
            files = in_order(pool, lambda path: self._open(path, grid), paths, FILES_AHEAD)
            for file in self._encode_files(files, grid):
                done += 1
                if progress:
                    progress(done, len(paths))
                if file.error:
                    yield {"path": str(file.path), "error": file.error}
                    continue
                told = self._told(file.windows, file.finish(), grid, settings, file.duration)
                yield {"path": str(file.path), "duration": file.duration, **told}

    def _open(self, path: Path, grid: TagGrid) -> ExactFile:
        try:
            samples = decode(path)
        except AudioError as error:
            return ExactFile(self.label, path, np.zeros(0, np.float32), [], grid, error=str(error))
        return ExactFile(self.label, path, samples, grid.windows(len(samples) // SAMPLES_PER_POSITION), grid)

    def _exact(self, samples: np.ndarray, windows: list[Window], grid: TagGrid) -> tuple[list[Window], np.ndarray]:
        """The windows and their logits, each from clips of its own."""
        file = ExactFile(self.label, None, samples, windows, grid)
        list(self._encode_files(iter([file]), grid))
        return windows, file.finish()

    def _encode_files(self, files: Iterator[ExactFile], grid: TagGrid) -> Iterator[ExactFile]:
        """Run the backbone over the clips of files, in batches that may hold clips of several; each file when done."""
        coming: deque[ExactFile] = deque()

        def clips() -> Iterator[Tensor]:
            for file in files:
                coming.append(file)
                yield from file.clips()

        for features in self._encode(clips(), clip_samples(self.description.clip_seconds)):
            while coming[0].is_complete:
                yield coming.popleft()
            coming[0].add(features)
        yield from coming

    def _encode(self, clips: Iterator[Tensor], samples: int) -> Iterator[Tensor]:
        """Features (L, T, D) of each clip, in order."""
        backbone = self.backbone
        if backbone.sample_rate != SAMPLE_RATE:
            raise UsageError(f"{backbone.name} takes audio at {backbone.sample_rate} Hz, which cannot be tagged here")
        size, side_by_side = fitting_batch_size(backbone, samples), streams_of(backbone.device)
        batches = iter(lambda: list(islice(clips, size)), [])
        on_cpu = backbone.device.type == "cpu"
        threads: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (1,)} if on_cpu else {}
        with ThreadPoolExecutor(side_by_side, **threads) as pool, one_thread_per_operation(on_cpu):
            stacked = (torch.stack(batch) for batch in batches)
            for features in in_order(pool, backbone.encode, stacked, side_by_side):
                yield from features

    def _told(
        self, windows: list[Window], logits: np.ndarray, grid: TagGrid, settings: TagSettings, duration: float
    ) -> dict:
        """`tags` and `events` of a result."""
        probabilities, names = self.probabilities(logits), self.description.class_names
        spans = np.array(windows, dtype=np.float64).reshape(-1, 2) * grid.frame_seconds
        spans = np.minimum(spans, duration).round(3)
        tags = [
            {"start": float(start), "end": float(end), "labels": labels_of(row, each, names, settings)}
            for (start, end), row, each in zip(spans, probabilities, logits, strict=True)
        ]
        events = find_events(spans, probabilities, names, settings.events) if settings.events else []
        return {"tags": tags, "events": events}

    def _about_head(self) -> dict:
        about = self.description
        names = ("head", "width", "backbone", "weights_sha256", "clip_seconds", "frames", "loss", "metric", "value")
        return {name: getattr(about, name) for name in names} | {"classes": about.classes}

    def _about_settings(self, settings: TagSettings, grid: TagGrid) -> dict:
        lengths = {"resolution": grid.window * grid.frame_seconds, "hop": grid.hop * grid.frame_seconds}
        return asdict(settings) | {name: round(value, 6) for name, value in lengths.items()} | {
            "frame_seconds": grid.frame_seconds,
            "probability": "softmax" if self.description.loss == "ce" else "sigmoid",
            "device": str(self.device),
        }  # fmt: skip


def transcribe(
    audio: str | Path | np.ndarray, *, head: str | Path, model: str | Path | Whisper | None = None,
    device: str = "auto", seed: int | None = None, progress: Progress | None = None, **options: Any,
) -> dict:  # fmt: skip
    """Text and tags of one file in one encoder pass: `Tagger.from_checkpoint(head, model=model).transcribe(audio)`."""
    tagger = Tagger.from_checkpoint(head, model=model, device=device)
    return tagger.transcribe(audio, seed=seed, progress=progress, **options)


def labels_of(probabilities: np.ndarray, logits: np.ndarray, names: Sequence[str], settings: TagSettings) -> list[dict]:
    """The labels of one window that are to be told, most probable first."""
    order = np.argsort(-probabilities, kind="stable").tolist()
    if not settings.all_labels:
        order = [index for index in order[: settings.top] if probabilities[index] >= settings.threshold]
    return [
        {"name": names[i], "probability": round(float(probabilities[i]), 6), "logit": round(float(logits[i]), 4)}
        for i in order
    ]


def audio_files(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are given, folders as the audio files below them. Raises UsageError where there is none."""
    found = []
    for path in map(Path, paths):
        if not path.is_dir():
            if not path.exists():
                raise UsageError(f"{path} does not exist; give audio files or folders of them")
            found.append(path)
            continue
        inside = [path / name for name in audio_files_below(path)]
        if not inside:
            raise UsageError(f"{path} holds no audio files; give audio files or folders of them")
        found += inside
    if not found:
        raise UsageError("no audio was given; give audio files or folders of them")
    return found


def _split_options(options: dict) -> tuple[TagSettings, dict]:
    """Options for tags, and the rest, which are Whisper's."""
    names = TagSettings.__dataclass_fields__
    settings = TagSettings(**{name: value for name, value in options.items() if name in names})
    return settings, {name: value for name, value in options.items() if name not in names}


def _samples_of(audio: str | Path | np.ndarray | Tensor) -> np.ndarray:
    if isinstance(audio, str | Path):
        try:
            return decode(audio)
        except AudioError as error:
            raise AudioError(f"{audio}: {error}") from error
    samples = np.asarray(audio, dtype=np.float32)
    if samples.ndim != 1 or not len(samples):
        raise UsageError(f"samples have shape {samples.shape}; give one channel at {SAMPLE_RATE} Hz, (samples,)")
    return samples


def _weights_of(model: Whisper, name: str) -> WhisperWeights:
    """The weights of an `openai-whisper` model that is loaded."""
    state = {key: value.cpu() for key, value in model.state_dict().items()}
    return WhisperWeights(name, "memory", asdict(model.dims), state)
