"""Same waveform in, same features out as OpenAI's own blocks, run one clip at a time in float32."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import whisper

from whisper_at_cli.extract import load_backbone, load_whisper
from whisper_at_cli.extract.audio.decode import as_float, load_clip
from whisper_at_cli.extract.backbones.encoder import clip_samples
from whisper_at_cli.extract.cache.storage import to_storage


@torch.no_grad()
def openai_features(model, waveform: np.ndarray) -> torch.Tensor:
    """One clip, un-padded, through OpenAI's stem and blocks: (L, 25, D) float32."""
    encoder = model.encoder
    x = whisper.log_mel_spectrogram(torch.from_numpy(waveform), model.dims.n_mels)[None]
    x = F.gelu(encoder.conv1(x))
    x = F.gelu(encoder.conv2(x)).permute(0, 2, 1)
    x = x + encoder.positional_embedding[: x.shape[1]]
    pooled = []
    for block in encoder.blocks:
        x = block(x)
        pooled.append(x[0].unflatten(0, (25, -1)).mean(dim=1))
    return torch.stack(pooled)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def openai_tiny_en(tiny_en):
    return load_whisper(tiny_en, device="cpu")


@pytest.fixture(scope="module")
def tiny_backbone(tiny_en):
    return load_backbone(tiny_en, device="cpu")


@pytest.mark.parametrize("seconds", [5.0, 10.0])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_features_equal_openais_blocks(esc10, openai_tiny_en, tiny_backbone, seconds, batch_size):
    samples = clip_samples(seconds)
    paths = sorted((esc10 / "audio").iterdir())[:: 400 // 7][:7]
    waveforms = np.stack([as_float(load_clip(path, samples)[0]) for path in paths])
    if seconds == 10.0:  # real sound in all of it
        waveforms = np.concatenate([waveforms[:, : samples // 2], waveforms[::-1, : samples // 2]], axis=1)
    expected = torch.stack([openai_features(openai_tiny_en, waveform) for waveform in waveforms])
    batches = torch.from_numpy(waveforms).split(batch_size)
    found = torch.cat([tiny_backbone.encode(batch) for batch in batches])
    assert found.shape == (7, 4, 25, 384) and found.dtype == torch.float32
    for clip in range(7):
        for layer in range(4):
            stored = {dtype: to_storage(found, dtype).features[clip, layer].float() for dtype in ("float32", "float16")}
            assert relative_error(stored["float32"], expected[clip, layer]) < 1e-5
            assert relative_error(stored["float16"], expected[clip, layer]) < 1e-3


def test_a_loud_clip_does_not_change_a_quiet_one_in_its_batch(tiny_backbone):
    quiet = torch.from_numpy(np.random.default_rng(0).normal(size=80000).astype(np.float32)) * 1e-3
    loud = quiet.flip(0) * 500
    alone = tiny_backbone.encode(quiet[None])
    together = tiny_backbone.encode(torch.stack([loud, quiet]))[1:]
    assert relative_error(together, alone) < 1e-5


def test_load_whisper_transcribes_real_speech(shared, openai_tiny_en):
    path = shared / "data" / "speech14" / "audio" / "LJ001-0002.flac"
    waveform = as_float(load_clip(path, 16000 * 30)[0])
    text = whisper.transcribe(openai_tiny_en, waveform, temperature=0.0, fp16=False)["text"]
    assert "in being comparatively modern" in text.lower()


def test_silence_gives_finite_features(tiny_backbone):
    assert tiny_backbone.encode(torch.zeros(2, 80000)).isfinite().all()


@pytest.mark.slow
def test_the_compiled_encoder_is_one_graph_and_gives_the_same():
    """What --compile does on a GPU, on plain layers on the CPU."""
    from whisper_at_cli.extract.backbones.encoder import WhisperEncoder

    torch.manual_seed(0)
    encoder = WhisperEncoder(mels=80, layers=2, dim=64, heads=2).eval().requires_grad_(False)
    mel = torch.randn(3, 80, 500)
    with torch.inference_mode():
        expected = encoder(mel)
        found = torch.compile(encoder, fullgraph=True, dynamic=False)(mel)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("precision, bound", [("float32", 1e-5), ("float16", 5e-3), ("bfloat16", 1.5e-2)])
def test_every_layer_keeps_its_error_bound_in_every_precision(esc10, openai_tiny_en, tiny_en, precision, bound):
    paths = sorted((esc10 / "audio").iterdir())[::40]
    waveforms = np.stack([as_float(load_clip(path, 80000)[0]) for path in paths])
    expected = torch.stack([openai_features(openai_tiny_en, waveform) for waveform in waveforms])
    found = load_backbone(tiny_en, device="cpu", precision=precision).encode(torch.from_numpy(waveforms))
    for layer in range(4):
        assert relative_error(found[:, layer], expected[:, layer]) < bound
