"""Synthetic inputs of benchmarks: Whispers with random weights, as fast as real ones, and files of noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sounds import NoiseClip, write_sound

from whisper_at_cli.extract.backbones.sizes import WHISPER_SIZES
from whisper_at_cli.extract.backbones.weights import WhisperWeights
from whisper_at_cli.extract.datasets import Dataset
from whisper_at_cli.extract.datasets.base import Clip


def random_weights(name: str) -> WhisperWeights:
    """A Whisper of this size with random weights: as fast as a real one."""
    from whisper.model import ModelDimensions, Whisper

    size = WHISPER_SIZES[name]
    dims = {
        "n_mels": size.mels, "n_audio_ctx": 1500, "n_audio_state": size.dim, "n_audio_head": size.heads,
        "n_audio_layer": size.layers, "n_vocab": 51864, "n_text_ctx": 448, "n_text_state": size.dim,
        "n_text_head": size.heads, "n_text_layer": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # drawing a large one takes a CPU many seconds
        state = Whisper(ModelDimensions(**dims)).state_dict()
    return WhisperWeights(f"random {name}", "random", dims, {key: tensor.cpu() for key, tensor in state.items()})


def write_model(folder: Path, size: str) -> Path:
    """The same as a `.pt` file, for what loads a model by its path."""
    weights = random_weights(size)
    torch.save({"dims": weights.dims, "model_state_dict": weights.state}, folder / f"{size}.pt")
    return folder / f"{size}.pt"


def synthetic_dataset(
    folder: Path, clips: int, seconds: float, *, files: str = "wav", distinct: int | None = None
) -> Dataset:
    """Files of noise in `folder/audio`, in one of the formats of `sounds.py`; WAV is 16-bit at 16 kHz.

    With `distinct`, so many files are written and the clips use them in turn.
    """
    count = min(clips, distinct or clips)
    (folder / "audio").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        write_sound(folder / "audio" / f"{index}.{files}", rng, seconds)
    names = tuple(Clip(id=str(index), path=f"audio/{index % count}.{files}") for index in range(clips))
    return Dataset("synthetic", folder, names, clip_seconds=seconds)


class InMemory(Dataset):
    """Clips whose 16-bit audio is in memory already: noise, a few waveforms of it over and over."""

    of_files = False

    def source(self, row: int) -> NoiseClip:
        return NoiseClip(self.source_row(row))

    def is_there(self, row: int) -> bool:
        return True
