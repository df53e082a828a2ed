"""Synthetic inputs of benchmarks: Whispers with random weights, as fast as real ones, and files of noise."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import torch

from whisper_at_cli.extract.backbones.encoder import clip_samples
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
    return WhisperWeights(f"random {name}", "random", dims, Whisper(ModelDimensions(**dims)).state_dict())


def write_model(folder: Path, size: str) -> Path:
    """The same as a `.pt` file, for what loads a model by its path."""
    weights = random_weights(size)
    torch.save({"dims": weights.dims, "model_state_dict": weights.state}, folder / f"{size}.pt")
    return folder / f"{size}.pt"


def synthetic_dataset(folder: Path, clips: int, seconds: float) -> Dataset:
    """16-bit WAV files at 16 kHz, noise of a spectrum of their own, in `folder/audio`."""
    (folder / "audio").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(clips):
        samples = np.convolve(rng.normal(size=clip_samples(seconds)), rng.normal(size=32), mode="same")
        with wave.open(str(folder / "audio" / f"{index}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes((samples / np.abs(samples).max() * 20000).astype("<i2").tobytes())
    names = tuple(Clip(id=str(index), path=f"audio/{index}.wav") for index in range(clips))
    return Dataset("synthetic", folder, names, clip_seconds=seconds)
