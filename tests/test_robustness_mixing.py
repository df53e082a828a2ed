"""Mixing: every mixture has the SNR that was asked for, the speech is left as it is, silence is refused."""

import numpy as np
import pytest

from conftest import noise
from whisper_at_cli.extract.datasets import open_dataset
from whisper_at_cli.probe.robustness.mixing import SilenceError, mix, rms, to_int16
from whisper_at_cli.probe.robustness.utterances import read_speech


def signals(speech_seconds=2.0, noise_seconds=0.7):
    return noise(1, speech_seconds).astype(np.float32), noise(2, noise_seconds).astype(np.float32)


@pytest.mark.parametrize("snr_db", [-20, -10, -3.5, 0, 10, 20])
@pytest.mark.parametrize("noise_seconds", [0.7, 2.0, 5.0])
def test_what_was_mixed_has_the_snr_that_was_asked_for(snr_db, noise_seconds):
    speech, hum = signals(noise_seconds=noise_seconds)
    hum[: len(hum) // 3] *= 0.01  # a level that changes: what is cut away must not count
    mixture = mix(speech, hum, snr_db)
    added = mixture.samples - speech
    assert mixture.samples.dtype == np.float32 and mixture.samples.shape == speech.shape
    assert 20 * np.log10(rms(speech) / rms(added)) == pytest.approx(snr_db, abs=0.1)
    assert mixture.snr_db == pytest.approx(snr_db, abs=0.1)
    tiled = np.tile(hum, 3)[: len(speech)]
    assert np.corrcoef(added, tiled)[0, 1] > 0.9999, "what was added is not the noise, repeated or cut"
    assert mixture.peak == np.abs(mixture.samples).max()


def test_real_mixtures_have_the_snr_that_was_asked_for(shared, esc10):
    speech, noises = read_speech(shared / "data" / "speech14"), open_dataset(esc10)
    for at, snr_db in ((0, 20), (1, 10), (4, 0), (7, -10), (9, -20)):
        spoken = speech.waveform(speech.utterances[at])
        hum, real = noises.waveform(40 * at, len(spoken))
        mixture = mix(spoken, hum[:real], snr_db)
        added = mixture.samples.astype(np.float64) - spoken
        measured = 10 * np.log10(np.mean(np.square(spoken, dtype=np.float64)) / np.mean(added**2))
        assert measured == pytest.approx(snr_db, abs=0.1)


def test_the_papers_form_follows_its_formula_and_misses_the_snr_where_a_clip_is_uneven():
    speech, hum = signals(2.0, 5.0)
    hum[len(speech) :] = 0  # all of the sound lies in the part that is kept
    mixture = mix(speech, hum, 0.0, form="paper")
    scale = 10 ** (-0.0 / 20) * np.sqrt(np.mean(speech**2)) / np.sqrt(np.mean(hum**2))
    np.testing.assert_allclose(mixture.samples, speech + scale * hum[: len(speech)], rtol=1e-5, atol=1e-7)
    assert mixture.snr_db == pytest.approx(-10 * np.log10(5 / 2), abs=0.01)
    even = mix(speech, hum[: len(speech)], 0.0, form="paper")
    np.testing.assert_array_equal(even.samples, mix(speech, hum[: len(speech)], 0.0).samples)


@pytest.mark.parametrize("form", ["exact", "paper"])
def test_silence_is_refused_and_never_divided_by(form):
    speech, hum = signals()
    silent = np.zeros_like(speech)
    with np.errstate(all="raise"):
        for quiet in (silent, hum * 1e-6, hum[:0]):
            with pytest.raises(SilenceError, match="the noise is silent"):
                mix(speech, quiet, 10, form=form)
        with pytest.raises(SilenceError, match="the speech is silent"):
            mix(silent, hum, 10, form=form)


def test_noise_that_starts_too_late_is_refused_only_where_its_level_is_that_of_what_is_added():
    speech, hum = signals(1.0, 4.0)
    hum[: len(speech)] = 0
    with pytest.raises(SilenceError, match="for as long as the utterance lasts"):
        mix(speech, hum, 10)
    np.testing.assert_array_equal(mix(speech, hum, 10, form="paper").samples, speech)


def test_16_bits_round_and_clip_and_float_does_not():
    speech, hum = signals()
    loud = mix(speech * 4, hum, -20)
    assert loud.peak > 1 and np.abs(loud.samples).max() > 1
    clipped = to_int16(loud.samples)
    assert clipped.max() == 32767 / 32768 and clipped.min() == -1 and clipped.dtype == np.float32
    inside = np.abs(loud.samples) < 0.999
    assert np.abs(clipped - loud.samples)[inside].max() <= 0.5 / 32768
    np.testing.assert_array_equal(clipped * 32768, np.rint(clipped * 32768))
