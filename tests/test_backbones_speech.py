"""wav2vec 2.0, HuBERT, WavLM and data2vec-audio: every layer is what transformers gives, pooled; clip by clip."""

import shutil
import threading
import weakref

import numpy as np
import pytest
import torch
from whisper_forms import Bomb

from conftest import noise, write_wav
from whisper_at_cli.extract import FeatureCache, extract, load_backbone
from whisper_at_cli.extract.backbones.encoder import pool_frames
from whisper_at_cli.extract.errors import UsageError, WeightsError
from whisper_at_cli.extract.pipeline.encode import encode_to_host

transformers = pytest.importorskip("transformers")

SMALL = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, conv_dim=(16,) * 7,
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
)  # fmt: skip
RANDOM = dict(  # whatever draws numbers in training, turned up
    layerdrop=0.9, hidden_dropout=0.5, attention_dropout=0.5, activation_dropout=0.5, feat_proj_dropout=0.5,
    mask_time_prob=0.5, mask_time_length=2, mask_feature_prob=0.5, mask_feature_length=2, apply_spec_augment=True,
)  # fmt: skip
GROUP, LAYER = dict(feat_extract_norm="group"), dict(feat_extract_norm="layer", do_stable_layer_norm=True)
MODELS = {
    "wav2vec2": ("Wav2Vec2", GROUP),
    "wav2vec2-stable": ("Wav2Vec2", LAYER),
    "hubert": ("Hubert", GROUP),
    "hubert-stable": ("Hubert", LAYER),
    "wavlm": ("WavLM", GROUP),
    "wavlm-stable": ("WavLM", LAYER),
    "data2vec": ("Data2VecAudio", dict(num_conv_pos_embeddings=3)),
}


def make_model(name: str, **changes):
    """A random model, its norms far from the identity; the same each time."""
    family, form = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**SMALL | form | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}Model")(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += torch.randn_like(parameter) / 4
    return model


def save(model, folder, *, do_normalize: bool = True):
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=do_normalize).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    model = make_model(request.param)
    return save(model, tmp_path_factory.mktemp("models") / request.param), model


def sounds(count: int, samples: int = 16000) -> torch.Tensor:
    return torch.stack([torch.from_numpy(noise(seed, samples / 16000)).float() for seed in range(count)])


def pooled(hidden: np.ndarray) -> np.ndarray:
    """(P, D) -> (25, D): each frame the mean of the positions that it touches."""
    P = len(hidden)
    return np.stack([hidden[t * P // 25 : -(-(t + 1) * P // 25)].astype(np.float64).mean(0) for t in range(25)])


@torch.no_grad()
def oracle(model, waveform: torch.Tensor, do_normalize: bool = True) -> np.ndarray:
    """(L, 25, D) of one clip as transformers takes it: its own feature extractor, all hidden states kept."""
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=do_normalize)
    values = extractor(waveform.numpy(), sampling_rate=16000, return_tensors="pt").input_values
    states = model(values, output_hidden_states=True).hidden_states[1:]
    return np.stack([pooled(state[0].numpy()) for state in states])


def relative_error(found, expected) -> float:
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("positions", [25, 26, 49, 249, 250, 499, 1499])
def test_frames_are_the_means_that_numpy_takes(positions):
    x = torch.randn(2, positions, 8)
    found = pool_frames(x)
    assert found.shape == (2, 25, 8) and found.dtype == torch.float32
    for clip in range(2):
        np.testing.assert_allclose(found[clip].numpy(), pooled(x[clip].numpy()), rtol=1e-5, atol=1e-6)
    assert pool_frames(torch.full((1, positions, 2), 3000.0, dtype=torch.float16)).dtype == torch.float32


def test_fewer_positions_than_frames_are_not_stretched():
    with pytest.raises(ValueError, match="24 positions are too few for 25 frames"):
        pool_frames(torch.zeros(1, 24, 2))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("samples", [8320, 16000, 80000])
def test_features_are_transformers_hidden_states_pooled_at_any_batch_size(saved, samples, batch_size):
    folder, model = saved
    backbone = load_backbone(folder, device="cpu")
    assert (backbone.layers, backbone.dim, backbone.sample_rate, backbone.name) == (3, 32, 16000, folder.name)
    waveforms = sounds(5, samples)
    waveforms[3, samples // 2 :] = 0  # padded
    waveforms[4] *= 100  # loud, and in a batch with the others
    found = torch.cat([backbone.encode(batch) for batch in waveforms.split(batch_size)])
    assert found.shape == (5, 3, 25, 32) and found.dtype == torch.float32
    for clip in range(5):
        expected = oracle(model, waveforms[clip])
        for layer in range(3):
            assert relative_error(found[clip, layer], expected[layer]) < 1e-5


@pytest.mark.parametrize("precision, bound", [("bfloat16", 2e-2), ("float16", 3e-3)])
def test_every_precision_keeps_its_error_bound(saved, precision, bound):
    folder, model = saved
    waveforms = sounds(3)
    found = load_backbone(folder, device="cpu", precision=precision).encode(waveforms)
    assert found.dtype == torch.float32
    for clip in range(3):
        assert relative_error(found[clip], oracle(model, waveforms[clip])) < bound


def test_int16_gives_the_bits_of_float32_and_overflow_is_encoded_again(saved):
    folder, _ = saved
    backbone = load_backbone(folder, device="cpu", precision="float16")
    whole = (sounds(2) * 20000).round().to(torch.int16)
    expected = backbone.encode(whole.float() / 32768)
    assert torch.equal(backbone.encode(whole), expected)
    assert not encode_to_host(backbone, whole, "float32").redone
    backbone.model.encoder.layers[1].feed_forward.output_dense.weight *= 1e30  # in this copy of the weights alone
    assert not backbone.encode(whole).isfinite().any(dim=0).all()
    found, exact = encode_to_host(backbone, whole, "float32"), load_backbone(folder, device="cpu")
    assert found.finite.all() and found.redone.tolist() == [True, True]
    assert torch.equal(found.features, torch.cat([exact.encode(clip[None]) for clip in whole]))


def test_nothing_is_dropped_or_masked_even_where_the_folder_asks_for_it(tmp_path):
    for name in MODELS:
        folder = save(make_model(name, **RANDOM), tmp_path / name)
        backbone = load_backbone(folder, device="cpu")
        first, again = (backbone.encode(sounds(2)) for _ in range(2))
        assert torch.equal(first, again) and first.shape[1] == 3
        assert relative_error(first[0], oracle(make_model(name, **RANDOM), sounds(1)[0])) < 1e-5
        assert backbone.model.config.layerdrop == 0 and not backbone.model.training


def test_the_input_is_normalised_as_the_folder_says(tmp_path):
    model, loud = make_model("wav2vec2-stable"), sounds(1) * 3 + 0.2
    normalised = load_backbone(save(model, tmp_path / "a"), device="cpu").encode(loud)
    raw = load_backbone(save(model, tmp_path / "b", do_normalize=False), device="cpu").encode(loud)
    assert relative_error(raw[0], oracle(model, loud[0], do_normalize=False)) < 1e-5
    assert relative_error(normalised[0], oracle(model, loud[0])) < 1e-5
    assert relative_error(raw, normalised) > 0.01
    (tmp_path / "a" / "preprocessor_config.json").unlink()
    assert torch.equal(load_backbone(tmp_path / "a", device="cpu").encode(loud), normalised), "the default is to do it"
    (tmp_path / "a" / "vocab.json").write_text('{"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3, "|": 4}')
    processor = transformers.Wav2Vec2Processor(
        transformers.Wav2Vec2FeatureExtractor(do_normalize=False),
        transformers.Wav2Vec2CTCTokenizer(tmp_path / "a" / "vocab.json"),
    )
    processor.save_pretrained(tmp_path / "a")
    assert torch.equal(load_backbone(tmp_path / "a", device="cpu").encode(loud), raw), "beside a tokenizer"


def test_silence_gives_finite_features(saved):
    assert load_backbone(saved[0], device="cpu").encode(torch.zeros(2, 16000)).isfinite().all()


def test_threads_do_not_mix_their_clips(saved):
    backbone = load_backbone(saved[0], device="cpu")
    waveforms = sounds(8, 12000)
    expected = [backbone.encode(clip[None]) for clip in waveforms]
    wrong = []

    def encode(number: int) -> None:
        for _ in range(5):
            if not torch.equal(backbone.encode(waveforms[number : number + 1]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=encode, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_layers_are_let_go_as_soon_as_they_are_pooled(saved):
    backbone, outputs, alive = load_backbone(saved[0], device="cpu"), [], []

    def watch(layer, inputs, output):
        alive.append(sum(reference() is not None for reference in outputs))
        outputs.append(weakref.ref(output[0] if isinstance(output, tuple) else output))

    for layer in backbone.model.encoder.layers:
        layer.register_forward_hook(watch)
    backbone.encode(sounds(1))
    assert len(outputs) == 3 and max(alive) <= 1, "only the layer before, which is the input of this one"


def test_the_checksum_says_which_weights_and_not_which_file(tmp_path):
    model = make_model("hubert")
    first = load_backbone(save(model, tmp_path / "a"), device="cpu").weights_sha256
    state = model.state_dict()
    save(model, tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "b" / "pytorch_model.bin")
    model.save_pretrained(tmp_path / "c", max_shard_size="20KB")
    assert (tmp_path / "c" / "model.safetensors.index.json").exists()
    for folder in ("b", "c"):
        assert load_backbone(tmp_path / folder, device="cpu", precision="bfloat16").weights_sha256 == first
    raw = load_backbone(save(model, tmp_path / "e", do_normalize=False), device="cpu")
    assert raw.weights_sha256 != first, "other normalisation, other features"
    model.encoder.layers[1].final_layer_norm.bias.data[0] += 1e-3
    assert load_backbone(save(model, tmp_path / "d"), device="cpu").weights_sha256 != first


def test_a_fine_tuned_model_is_read_without_its_head(tmp_path):
    config = transformers.Wav2Vec2Config(**SMALL, vocab_size=32)
    tuned = transformers.Wav2Vec2ForCTC(config).eval()
    backbone = load_backbone(save(tuned, tmp_path / "tuned"), device="cpu")
    waveform = sounds(1)
    assert relative_error(backbone.encode(waveform)[0], oracle(tuned.wav2vec2, waveform[0])) < 1e-5


@pytest.mark.parametrize("seconds, said", [(0.5, "has 24 positions"), (0.001, "has 0 positions"), (0, "cannot be")])
def test_a_clip_too_short_for_25_frames_is_refused(saved, tmp_path, seconds, said):
    write_wav(tmp_path / "sounds" / "a.wav", noise(0, 1))
    with pytest.raises(UsageError, match=said) as refused:
        extract(tmp_path / "sounds", tmp_path / "a.zarr", model=saved[0], clip_seconds=seconds, device="cpu")
    if seconds:
        assert "choose at least 0.505 s" in str(refused.value)
    backbone = load_backbone(saved[0], device="cpu")
    assert backbone.positions(backbone.clip_samples(0.505)) == 25


@pytest.mark.parametrize("damage", ["tensor", "truncated", "config", "rate", "code", "nothing"])
def test_a_damaged_folder_is_one_clear_error(tmp_path, damage):
    folder = save(make_model("wav2vec2"), tmp_path / "model")
    weights = folder / "model.safetensors"
    if damage == "tensor":
        import safetensors.torch

        tensors = safetensors.torch.load_file(weights)
        del tensors["encoder.layers.1.attention.k_proj.weight"]
        safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "config":
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 36'))
    elif damage == "rate":
        transformers.Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(folder)
    elif damage == "code":
        weights.unlink()
        torch.save({"masked_spec_embed": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    else:
        weights.unlink()
    with pytest.raises(WeightsError) as refused:
        load_backbone(folder, device="cpu")
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_folder_is_never_run(tmp_path):
    folder = save(make_model("wav2vec2"), tmp_path / "model")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"auto_map": {"AutoModel": "code.Model"},', 1))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
    load_backbone(folder, device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Wav2Vec2", "Hubert"])
def test_x_large_at_full_width(tmp_path, family):
    """48 layers of 1280 channels, a thousand million parameters."""
    config = getattr(transformers, f"{family}Config")(
        hidden_size=1280, num_hidden_layers=48, num_attention_heads=16, intermediate_size=5120, conv_bias=True,
        num_conv_pos_embeddings=128, num_conv_pos_embedding_groups=16, **LAYER,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(config).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) > 0.9e9
    waveforms = sounds(3, 16000)
    expected = [oracle(model, waveform) for waveform in waveforms]
    save(model, tmp_path / "xlarge")
    del model
    backbone = load_backbone(tmp_path / "xlarge", device="cpu")
    shutil.rmtree(tmp_path / "xlarge")  # 4 GB, which the backbone holds in memory
    assert (backbone.layers, backbone.dim) == (48, 1280)
    found = torch.cat([backbone.encode(waveforms[:1]), backbone.encode(waveforms[1:])])
    for clip in range(3):
        for layer in range(48):
            assert relative_error(found[clip, layer], expected[clip][layer]) < 1e-5


def test_a_folder_of_sounds_becomes_a_cache(noise_folder, tmp_path):
    folder = save(make_model("wavlm"), tmp_path / "wavlm-small")
    report = extract(noise_folder, tmp_path / "a.zarr", model=folder, clip_seconds=1.0, device="cpu", dtype="float32")
    assert (report.written, report.failed) == (12, 0)
    cache = FeatureCache.open(tmp_path / "a.zarr")
    assert (cache.spec.backbone, cache.spec.layers, cache.spec.dim) == ("wavlm-small", 3, 32)
    with pytest.raises(UsageError, match="wavlm-small cannot be compiled"):
        extract(noise_folder, tmp_path / "b.zarr", model=folder, clip_seconds=1.0, device="cpu", compile=True)
