"""Mixing at an SNR, for any signals: the SNR that was asked for, whatever their levels, and silence refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from properties import examples

from whisper_at_cli.probe.robustness.mixing import SILENCE_RMS, SilenceError, mix, rms, to_int16

SAMPLES = st.floats(-1, 1, width=32).filter(lambda x: x == 0 or abs(x) > 1e-20)
SIGNALS = st.integers(1, 50).flatmap(lambda length: arrays(np.float32, length, elements=SAMPLES))
SNR_DB = st.floats(-30, 30)
ROUNDING_DB = 0.02  # of float32 samples, at 30 dB


def loud(signal: np.ndarray) -> bool:
    return rms(signal) >= 1e-3


def mixed(speech, noise, snr_db, form="exact"):
    """A mixture, or None where one of the two is silent."""
    try:
        return mix(speech, noise, snr_db, form=form)
    except SilenceError:
        return None


@examples(150)
@given(SIGNALS, SIGNALS, SNR_DB)
def test_a_mixture_has_the_snr_that_was_asked_for(speech, noise, snr_db):
    added = np.resize(noise, len(speech))
    mixture = mixed(speech, noise, snr_db)
    if mixture is None:
        assert min(rms(speech), rms(added)) < SILENCE_RMS
        return
    assert mixture.samples.shape == speech.shape and mixture.samples.dtype == np.float32
    assert mixture.peak == np.abs(mixture.samples).max()
    if loud(speech) and loud(added):
        assert mixture.snr_db == pytest.approx(snr_db, abs=ROUNDING_DB)
        scaled = 10 ** (-snr_db / 20) * rms(speech) / rms(added) * added.astype(np.float64)
        largest = np.abs(speech).max() + np.abs(scaled).max()  # the two may cancel
        np.testing.assert_allclose(mixture.samples, speech + scaled, rtol=1e-6, atol=1e-6 * largest)


@examples(80)
@given(SIGNALS, SIGNALS, SNR_DB, st.integers(-4, 4))
def test_the_level_of_the_noise_does_not_matter_and_that_of_the_speech_scales_the_mixture(speech, noise, snr_db, power):
    factor = np.float32(2.0**power)  # exact in float32
    one = mixed(speech, noise, snr_db)
    if one is None or not (loud(speech) and loud(np.resize(noise, len(speech)))):
        return
    rounding = 1e-6 * (np.abs(speech).max() + np.abs(one.samples - speech).max())
    np.testing.assert_allclose(mix(speech, noise * factor, snr_db).samples, one.samples, atol=rounding, rtol=1e-6)
    np.testing.assert_allclose(
        mix(speech * factor, noise, snr_db).samples, one.samples * factor, atol=rounding * factor, rtol=1e-6
    )
    np.testing.assert_allclose(mix(-speech, -noise, snr_db).samples, -one.samples, atol=rounding, rtol=1e-6)


@examples(60)
@given(SIGNALS, SIGNALS, SNR_DB, st.integers(1, 3))
def test_noise_that_is_repeated_beforehand_is_the_same_noise(speech, noise, snr_db, times):
    one, other = mixed(speech, noise, snr_db), mixed(speech, np.tile(noise, times), snr_db)
    assert (one is None) == (other is None)
    if one is not None:
        assert one.samples.tobytes() == other.samples.tobytes()


@examples(60)
@given(SIGNALS, SIGNALS, SNR_DB)
def test_both_forms_are_one_where_the_noise_is_as_long_as_the_speech(speech, noise, snr_db):
    noise = np.resize(noise, len(speech))
    one, other = mixed(speech, noise, snr_db), mixed(speech, noise, snr_db, form="paper")
    assert (one is None) == (other is None)
    if one is not None:
        assert one.samples.tobytes() == other.samples.tobytes()


@examples(40)
@given(SIGNALS, SNR_DB, st.sampled_from(["exact", "paper"]), st.floats(0, 2**-18, width=32), st.integers(0, 9))
def test_silence_is_refused_on_either_side(signal, snr_db, form, level, length):
    silent = np.full(length, level, dtype=np.float32)
    with pytest.raises(SilenceError):
        mix(signal, silent, snr_db, form=form)
    if length:
        with pytest.raises(SilenceError):
            mix(silent, signal, snr_db, form=form)


@examples(60)
@given(arrays(np.float32, st.integers(0, 30), elements=st.floats(-4, 4, width=32)))
def test_sixteen_bits_are_within_half_a_step_or_clipped_and_stay_as_they_are(samples):
    rounded = to_int16(samples)
    clipped = np.clip(samples, -1, 32767 / 32768)
    assert rounded.dtype == np.float32 and (np.abs(rounded - clipped) <= 0.5 / 32768).all()
    assert (to_int16(rounded) == rounded).all() and (rounded * 32768 == np.rint(rounded * 32768)).all()
