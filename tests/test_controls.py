"""Controls: random weights, the spectrogram alone, permuted labels and chance say what they are for."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from test_cli import run

from conftest import noise, write_wav
from planted import planted_cache
from whisper_at_cli.extract import FeatureCache, load_backbone
from whisper_at_cli.extract.backbones.controls import with_seed
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.evaluation.permutation import permuted_by_recording
from whisper_at_cli.probe import probe_layers
from whisper_at_cli.probe.figures import draw_figure_1
from whisper_at_cli.probe.figures.inputs import as_result, load_results


def test_random_weights_have_the_shape_of_the_size_and_are_decided_by_the_seed():
    first, again, other = (load_backbone(name) for name in ("random:tiny.en", "random:tiny.en:0", "random:tiny.en:1"))
    assert (first.layers, first.dim, first.name, other.name) == (4, 384, "random:tiny.en:0", "random:tiny.en:1")
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256
    sound = torch.from_numpy(np.stack([noise(0, 0.5), noise(1, 0.5)]).astype(np.float32))
    features = first.encode(sound)
    assert features.shape == (2, 4, 25, 384) and features.isfinite().all()
    torch.testing.assert_close(features[1:], first.encode(sound[1:]), rtol=1e-4, atol=1e-4)
    assert (features - other.encode(sound)).abs().mean() > 0.01 * features.abs().mean()


def test_making_random_weights_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_backbone("random:tiny.en:3")
    assert torch.equal(torch.rand(3), expected)


def test_the_spectrogram_is_pooled_by_mean_deviation_and_maximum():
    from whisper_at_cli.extract.backbones.mel import log_mel

    backbone, sound = load_backbone("log-mel"), torch.from_numpy(np.stack([noise(0, 1.0)]).astype(np.float32))
    features = backbone.encode(sound)
    mel = log_mel(sound, 80)[0].numpy()
    assert features.shape == (1, 1, 25, 240) == (1, backbone.layers, 25, backbone.dim)
    for frame in (0, 11, 24):
        part = mel[:, 4 * frame : 4 * frame + 4]
        expected = np.concatenate([part.mean(axis=1), part.std(axis=1), part.max(axis=1)])
        np.testing.assert_allclose(features[0, 0, frame].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    "model, seed, said",
    [
        ("random:huge", None, "there is no Whisper of size 'huge'; choose from tiny, base"),
        ("random:tiny.en:x", None, "the seed must be a whole number from 0"),
        ("tiny.en", 3, "--seed is for --model random:SIZE"),
        ("random:tiny.en:1", 2, "has the seed 1 and --seed is 2"),
    ],
)
def test_a_control_that_cannot_be_is_refused(capsys, tmp_path, model, seed, said):
    write_wav(tmp_path / "sounds" / "dog" / "1.wav", noise(0, 0.5))
    options = [] if seed is None else ["--seed", seed]
    status, _, err = run(capsys, "extract", tmp_path / "sounds", tmp_path / "a.zarr", "--model", model, *options)
    assert status == 2 and said in err and not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize("model, name, layers", [("log-mel", "log-mel", 1), ("random:tiny.en", "random:tiny.en:7", 4)])
def test_extract_makes_a_cache_of_a_control(capsys, tmp_path, model, name, layers):
    for index, kind in enumerate("ab"):
        write_wav(tmp_path / "sounds" / kind / "1.wav", noise(index, 0.5))
    seed = [] if model == "log-mel" else ["--seed", 7]
    line = ("extract", tmp_path / "sounds", tmp_path / "a.zarr", "--model", model, *seed, "--clip-seconds", "0.5")
    for _ in range(2):  # the second call finds everything done
        status, _, err = run(capsys, *line)
        assert status == 0, err
    spec = FeatureCache.open(tmp_path / "a.zarr").spec
    assert (spec.backbone, spec.layers) == (name, layers)
    assert with_seed("random:tiny.en", 7) == "random:tiny.en:7" == with_seed("random:tiny.en:7", 7)
    with pytest.raises(UsageError):
        with_seed("log-mel", 1)


def test_recordings_trade_their_labels_as_a_whole():
    rng = np.random.default_rng(0)
    of = np.repeat(np.arange(30), rng.integers(1, 5, 30))
    shuffled = rng.permutation(of).astype(str)
    giver = permuted_by_recording(shuffled, seed=3)
    donors = [set(shuffled[giver[shuffled == name]]) for name in np.unique(shuffled)]
    assert all(len(donor) == 1 for donor in donors) and len(set().union(*donors)) == 30
    assert [donor.pop() for donor in donors] != list(np.unique(shuffled))
    np.testing.assert_array_equal(giver, permuted_by_recording(shuffled, seed=3))


@pytest.fixture
def planted(tmp_path):
    """120 clips of four classes, plain in layer 2, as parts of sixty recordings."""
    y = np.repeat(np.arange(60) % 4, 2)
    features = np.random.default_rng(0).normal(size=(120, 2, 5, 12))
    features[:, 1, :, :4] += 6 * np.eye(4)[y][:, None, :]
    return planted_cache(tmp_path / "a.zarr", features, y, fold=np.arange(120) // 2 % 5 + 1)


def test_with_permuted_labels_a_probe_is_at_chance_within_its_interval(capsys, planted):
    plain = probe_layers(planted)
    assert plain.layers[1].accuracy > 0.95 and plain.chance == pytest.approx(0.25, abs=0.1)
    inside = 0
    for seed in range(10):
        permuted = probe_layers(planted, permute_labels=True, seed=seed)
        assert permuted.permuted_labels and "permuted" in permuted.warnings[0]
        low, high = permuted.layers[1].ci95
        inside += low <= 0.25 <= high
    assert inside >= 8
    status, out, err = run(capsys, "probe", planted.path, "--permute-labels", "--json")
    assert status == 0 and json.loads(out)["layers"][1]["accuracy"] < 0.5 and "permuted" in err


def test_chance_of_map_is_the_prevalence_of_the_classes(tmp_path):
    labels = (np.random.default_rng(0).random((90, 3)) < (0.5, 0.2, 0.1)).astype(np.uint8)
    features = np.random.default_rng(1).normal(size=(90, 1, 2, 4))
    fold = np.arange(90) % 3 + 1
    result = probe_layers(planted_cache(tmp_path / "m.zarr", features, labels, fold=fold))
    shares = np.stack([labels[fold == number].mean(axis=0) for number in (1, 2, 3)])
    assert result.chance == pytest.approx(np.mean((shares**2).sum(axis=0) / shares.sum(axis=0)))


def test_figure_1_shows_controls_as_curves_of_their_own(planted, tmp_path):
    content = json.loads(json.dumps(asdict(probe_layers(planted))))
    for name, more in (("a", {}), ("p", {"permuted_labels": True}), ("m", {"backbone": "log-mel"})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content | more))
    mel = json.loads((tmp_path / "m.json").read_text())
    mel["layers"] = mel["layers"][:1]
    (tmp_path / "m.json").write_text(json.dumps(mel))
    results = load_results([str(tmp_path / f"{name}.json") for name in "apm"], probe=None)
    lower = draw_figure_1(results, tmp_path / "1.png", chance=True)["lower"]
    assert [curve["name"] for curve in lower["curves"]] == ["planted", "planted, labels permuted", "log-mel"]
    assert [curve["layers"] for curve in lower["curves"]] == [[1, 2], [1, 2], [0]]
    assert lower["chance"] == content["chance"]
    assert draw_figure_1(results, tmp_path / "1.png")["lower"]["chance"] is None
    with pytest.raises(UsageError, match="what chance is"):
        draw_figure_1([as_result("old", content | {"chance": None})], tmp_path / "1.png", chance=True)
