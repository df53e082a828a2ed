"""Log-mel spectrograms of a batch, each clip normalised by its own maximum."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from whisper_at_cli.extract.audio import SAMPLE_RATE

N_FFT = 400
HOP = 160
MEL_FRAMES_PER_SECOND = SAMPLE_RATE // HOP
assert SAMPLE_RATE % HOP == 0


def as_float32(waveforms: Tensor, device: torch.device) -> Tensor:
    """Waveforms on a device as float32 in [-1, 1]: int16 samples divided by 32768, which is exact; float32 as it is."""
    whole = waveforms.dtype == torch.int16
    waveforms = waveforms.to(device, non_blocking=True).to(torch.float32)
    return waveforms.div_(32768) if whole else waveforms


@lru_cache(maxsize=8)
def filters_and_window(mels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Whisper's mel filters (mels, 201) and the window (400,), float32 on a device; made once, for every stream."""
    from whisper.audio import mel_filters

    filters, window = mel_filters(device, mels), torch.hann_window(N_FFT, device=device)
    if device.type == "cuda":  # other streams do not wait for the one that made them
        torch.cuda.current_stream(device).synchronize()
    return filters, window


def log_mel(waveforms: Tensor, mels: int) -> Tensor:
    """Whisper's log-mel spectrogram, clip by clip.

    waveforms (B, samples) float32 at 16 kHz -> (B, mels, samples // 160) float32. The dynamic range is cut 80 dB below
    each clip's own maximum; `whisper.log_mel_spectrogram` takes the maximum of the whole batch, so that one clip would
    change another's features.
    """
    filters, window = filters_and_window(mels, waveforms.device)
    spectrum = torch.stft(waveforms, N_FFT, HOP, window=window, return_complex=True)
    power = spectrum[..., :-1].abs().square_()
    log = (filters @ power).clamp_(min=1e-10).log10_()
    log = torch.maximum(log, log.amax(dim=(1, 2), keepdim=True) - 8.0)
    return log.add_(4.0).div_(4.0)
