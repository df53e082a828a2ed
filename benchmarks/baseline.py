"""What people do today: one ffmpeg process a clip, OpenAI's blocks with a batch of one, one compressed npz a clip.

Where there is no ffmpeg program, the baseline decodes in its own process, which is faster; its row says so.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from whisper_at_cli.extract.backbones.weights import WhisperWeights
from whisper_at_cli.extract.cache.schema import FRAMES
from whisper_at_cli.extract.datasets import Dataset


def ffmpeg_in_path(folder: Path) -> str | None:
    """`ffmpeg` as Whisper's loader calls it: the system's, else the one that a test dependency carries, else None."""
    found = shutil.which("ffmpeg")
    if not found and importlib.util.find_spec("imageio_ffmpeg"):
        import imageio_ffmpeg

        found = imageio_ffmpeg.get_ffmpeg_exe()
        (folder / "bin").mkdir()
        (folder / "bin" / "ffmpeg").symlink_to(found)
        os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return found


class Baseline:
    """OpenAI's own encoder in float32, one clip of `samples` at a time."""

    def __init__(self, weights: WhisperWeights, device: torch.device, samples: int):
        from whisper.model import ModelDimensions, Whisper

        model = Whisper(ModelDimensions(**weights.dims))
        model.load_state_dict(weights.state, strict=False)
        self.encoder, self.mels = model.encoder.to(device).eval(), weights.dims["n_mels"]
        self.device, self.samples = device, samples

    @torch.no_grad()
    def features(self, waveform: np.ndarray) -> Tensor:
        """One un-padded clip through stem and blocks, each block's output pooled: (L, 25, D) float32."""
        import whisper

        x = whisper.log_mel_spectrogram(torch.from_numpy(waveform), self.mels).to(self.device)[None]
        x = F.gelu(self.encoder.conv2(F.gelu(self.encoder.conv1(x)))).permute(0, 2, 1)
        x = x + self.encoder.get_buffer("positional_embedding")[: x.shape[1]]
        pooled = []
        for block in self.encoder.blocks:
            x = block(x)
            pooled.append(x[0].unflatten(0, (FRAMES, -1)).mean(dim=1))
        return torch.stack(pooled)

    def run(self, dataset: Dataset, clips: int, out: Path) -> float:
        """Seconds per clip, from files to npz files."""
        import whisper

        def decoded(row: int) -> np.ndarray:
            if shutil.which("ffmpeg"):
                return whisper.load_audio(str(dataset.audio_path(dataset.clips[row])))
            return dataset.waveform(row, self.samples)[0]

        out.mkdir()
        started = time.perf_counter()
        count = min(clips, len(dataset))
        for row in range(count):
            audio = whisper.pad_or_trim(decoded(row), self.samples)
            np.savez_compressed(out / f"{row}.npz", self.features(audio).half().cpu().numpy())
        return (time.perf_counter() - started) / count
