"""What the cache stores of float32 features, against a slow loop."""

import numpy as np
import pytest
import torch

from whisper_at_cli.extract.cache.storage import to_storage

B, L, T, D = 3, 2, 25, 4


def batch() -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy((rng.normal(size=(B, L, T, D)) * np.logspace(-2, 3, D)).astype(np.float32))


@pytest.mark.parametrize("dtype, kind", [("float16", torch.float16), ("float32", torch.float32)])
def test_floating_point_is_stored_as_it_is_with_its_mean(dtype, kind):
    features = batch()
    stored = to_storage(features.clone(), dtype)
    assert stored.features.dtype == stored.mean.dtype == kind and stored.scale is None
    assert torch.equal(stored.features, features.to(kind)) and stored.finite.shape == (B, L) and stored.finite.all()
    torch.testing.assert_close(stored.mean.float(), features.mean(dim=2), rtol=1e-3, atol=1e-5)


def test_int8_is_a_whole_number_of_the_scale_of_its_clip_layer_and_channel():
    features = batch()
    features[1, 0, :, 2] = 0
    stored = to_storage(features.clone(), "int8")
    assert (stored.features.dtype, stored.scale.dtype, stored.mean.dtype) == (torch.int8, torch.float16, torch.float16)
    for clip in range(B):
        for layer in range(L):
            for channel in range(D):
                values = features[clip, layer, :, channel]
                scale = float(stored.scale[clip, layer, channel])
                assert scale == pytest.approx(float(values.abs().max()) / 127, rel=1e-3, abs=1e-7)
                if scale:
                    expected = (values / scale).round().clamp(-127, 127)
                    assert torch.equal(stored.features[clip, layer, :, channel].float(), expected)
                    assert expected.abs().max() in (126, 127)
                else:
                    assert not stored.features[clip, layer, :, channel].any()
    assert stored.finite.all()


def test_int8_of_quiet_channels_comes_back():
    """Also where the scale is below float16's normal numbers, whose steps are 6e-8."""
    loudest = torch.tensor([1, 1e-2, 7e-3, 1e-3, 1e-4, 1e-5, 0])
    features = torch.linspace(-1, 1, T)[None, None, :, None] * loudest
    stored = to_storage(features.clone(), "int8")
    error = (stored.features.float() * stored.scale.float().unsqueeze(2) - features).abs().amax(dim=2)[0, 0]
    assert (error <= 0.005 * loudest + 127 * 2**-25 + 1e-9).all(), error / loudest


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_what_cannot_be_stored_is_told_by_clip_and_layer(dtype, value):
    features = batch()
    features[2, 1, 7, 3] = value
    expected = torch.ones(B, L, dtype=torch.bool)
    expected[2, 1] = dtype == "float32" and value == 1e9
    assert torch.equal(to_storage(features, dtype).finite, expected)
