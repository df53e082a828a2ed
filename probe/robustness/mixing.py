"""Speech with noise at a signal-to-noise ratio: the noise is scaled and added, the speech is left as it is.

    mixture = speech + 10 ** (-snr_db / 20) * rms(speech) / rms(noise) * noise

The noise is repeated or cut to the utterance's length first. Whose rms is taken is what the two forms differ in:

exact   of the noise that is added, so that the mixture has the SNR that was asked for; samples stay float32 and are not
        clipped, however loud they become
paper   of the whole noise clip, before it is repeated or cut, as in the paper's code: where the sound of a clip is not
        spread evenly, the mixture has another SNR. `to_int16` then does what Whisper's loader did to the paper's files
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FORMS = ("exact", "paper")
SILENCE_RMS = 1e-5  # the paper's code has the same floor (power 1e-10); a 16-bit file's last bit is 3e-5


class SilenceError(ValueError):
    """Speech or noise is silent, so that no scale gives the SNR that was asked for."""


@dataclass(frozen=True)
class Mixture:
    """One utterance with noise added. samples (n,) float32."""

    samples: np.ndarray
    snr_db: float  # as measured on the mixture, before `to_int16`
    peak: float  # largest magnitude; above 1 it would not fit into a 16-bit file


def rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def mix(speech: np.ndarray, noise: np.ndarray, snr_db: float, *, form: str = "exact") -> Mixture:
    """Add noise to speech; both (samples,) float32, the noise repeated or cut to the speech's length.

    Raises SilenceError where either is silent.
    """
    added = np.resize(noise, len(speech)) if len(noise) else np.zeros_like(speech)  # resize repeats
    speech_rms, added_rms = rms(speech), rms(added)
    noise_rms = added_rms if form == "exact" or not len(noise) else rms(noise)
    if speech_rms < SILENCE_RMS:
        raise SilenceError("the speech is silent")
    if noise_rms < SILENCE_RMS:
        longer = len(noise) > len(speech) and rms(noise) >= SILENCE_RMS
        raise SilenceError(f"the noise is silent{' for as long as the utterance lasts' if longer else ''}")
    scale = 10 ** (-snr_db / 20) * speech_rms / noise_rms
    mixture = speech + np.float32(scale) * added
    return Mixture(mixture, measured_snr_db(speech, mixture), float(np.abs(mixture).max()))


def measured_snr_db(speech: np.ndarray, mixture: np.ndarray) -> float:
    """The SNR of a mixture, from the mixture and the speech in it; infinite where nothing was added."""
    added = rms(mixture.astype(np.float64) - speech)
    return float(20 * np.log10(rms(speech) / added)) if added else float("inf")


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Rounded to 16 bits and clipped at full scale, as Whisper's loader does with a float file; float32 again."""
    return np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.float32) / np.float32(32768)
