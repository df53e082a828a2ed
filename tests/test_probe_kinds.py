"""The other probes: neighbours and the original's classifier against scikit-learn, attention by what it can see."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_cli import run

from planted import planted_cache
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.probe import attentive, job, neighbours, probe_layers

N, LAYERS, FRAMES, DIM, CLASSES = 120, 2, 25, 16, 4
Y = np.random.default_rng(0).permutation(np.arange(N) % CLASSES)
FOLD = np.arange(N) // 24 + 1


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def moments(path, y=Y, **where):
    """In layer 2 one frame of 25 tells the class and is marked; all others show classes at random. Layer 1 is noise."""
    rng = np.random.default_rng(0)
    features = 0.3 * rng.normal(size=(N, LAYERS, FRAMES, DIM))
    features[:, 1, :, :CLASSES] += 2 * np.eye(CLASSES)[rng.integers(0, CLASSES, (N, FRAMES))]
    at = rng.integers(0, FRAMES, N)
    features[np.arange(N), 1, at, :CLASSES] = 2 * (np.eye(CLASSES)[Y] if y.ndim == 1 else y)
    features[np.arange(N), 1, at, CLASSES] += 3
    return planted_cache(path, features.astype(np.float32), y, **({"fold": FOLD} | where))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return moments(tmp_path_factory.mktemp("kinds") / "a.zarr")


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    """Classes that overlap, in all layers: every kind of probe gets some clips wrong."""
    rng = np.random.default_rng(3)
    features = rng.normal(size=(N, LAYERS, 3, DIM)) * 10.0 ** rng.integers(-2, 2, DIM)
    features[..., :CLASSES] += (np.eye(CLASSES)[Y] * features[..., :CLASSES].std(axis=(0, 1, 2)))[:, None, None]
    return planted_cache(tmp_path_factory.mktemp("kinds") / "b.zarr", features.astype(np.float32), Y, fold=FOLD)


def by_fold(cache, layer, model):
    X = cache.mean(layer=layer)
    return [model.fit(X[f != FOLD], Y[f != FOLD]).score(X[f == FOLD], Y[f == FOLD]) for f in range(1, 6)]


def test_one_nearest_neighbour_is_that_of_scikit_learn(weak):
    for layer in probe_layers(weak, kind="knn", neighbours=1).layers:
        theirs = make_pipeline(StandardScaler(), KNeighborsClassifier(1, metric="cosine"))
        expected = by_fold(weak, layer.layer, theirs)
        assert [fold["accuracy"] for fold in layer.folds] == pytest.approx(expected) and min(expected) < 1


def test_of_classes_with_equal_votes_the_more_similar_wins(tmp_path):
    """Two neighbours of two classes: the nearer decides. Three against two: the three decide."""
    probe = neighbours.NeighbourProbe(5)
    train = torch.nn.functional.normalize(torch.tensor([[[1, 0.1], [1, 0.2], [1, 0.9], [1, 0.95], [1, 1.0]]]), dim=2)
    test = torch.tensor([[[1.0, 0.0]]])
    labels = torch.eye(2)[[0, 0, 1, 1, 1]]
    assert probe._votes(test, train, labels, "accuracy").argmax() == 1
    probe = neighbours.NeighbourProbe(4)
    assert probe._votes(test, train, labels, "accuracy").argmax() == 0


def counted(layers):
    """Layers without bits, which come from probabilities: the order of sums moves their last digits."""
    return [replace(layer, bits=None, bits_ci95=None) for layer in layers]


@pytest.mark.parametrize("kind", ["knn", "attentive"])
@pytest.mark.parametrize("batch_bytes", [1, 1 << 40])
def test_other_probes_do_not_depend_on_how_the_work_is_divided(weak, monkeypatch, kind, batch_bytes):
    monkeypatch.setattr(attentive.AttentiveProbe.__init__, "__defaults__", (1.0, 10, 0.4, 0.1))
    expected = probe_layers(weak, kind=kind)
    monkeypatch.setattr(job, "BATCH_BYTES", batch_bytes)
    found = probe_layers(weak, kind=kind)
    assert counted(found.layers) == counted(expected.layers)
    assert replace(found, layers=[]) == replace(expected, layers=[])
    (alone,) = probe_layers(weak, kind=kind, layers=[2]).layers
    in_company = {"band95": expected.layers[1].band95, "differs_from_best": expected.layers[1].differs_from_best}
    assert counted([replace(alone, **in_company)]) == counted(expected.layers[1:2])


@pytest.mark.parametrize("standardise", [True, False])
def test_faithful_is_the_classifier_of_the_original(weak, standardise):
    result = probe_layers(weak, kind="faithful", standardise=standardise, layers=[1])
    mlp = MLPClassifier((), learning_rate="adaptive", learning_rate_init=0.001, max_iter=5000, random_state=0)
    theirs = make_pipeline(StandardScaler(), mlp) if standardise else mlp
    assert [fold["accuracy"] for fold in result.layers[0].folds] == pytest.approx(by_fold(weak, 1, theirs))
    assert result.settings["standardised"] is standardise and result.strength is None


def test_attention_finds_the_frame_that_the_mean_drowns(cache):
    mean, attended = (probe_layers(cache, kind=kind).layers for kind in ("linear", "attentive"))
    assert attended[1].accuracy > 0.9 > 0.75 > mean[1].accuracy
    assert attended[0].accuracy < 0.5


def test_attentive_training_is_the_same_every_time(cache):
    first, second = (probe_layers(cache, kind="attentive", layers=[2]) for _ in range(2))
    assert first == second and first.settings["steps"] > 0


def test_an_attentive_probe_learns_nothing_from_the_tested_clips(tmp_path, cache):
    """With labels of fold 1 permuted, predictions for its clips stay what they were."""
    y = np.where(FOLD == 1, (Y + 1) % CLASSES, Y)
    other = planted_cache(tmp_path / "a.zarr", cache.features(range(N)), y, fold=FOLD)
    before, after = (
        next(attentive.AttentiveProbe(steps=20).run(job.Job.plan(of, device="cpu", seed=0), [2])).logits
        for of in (cache, other)
    )
    np.testing.assert_array_equal(before[FOLD == 1], after[FOLD == 1])
    assert np.abs(before[FOLD == 2] - after[FOLD == 2]).max() > 0.01


def test_one_step_of_attention_is_that_of_a_model_per_fold_in_plain_torch():
    """The query, weights and standardisation of all folds in one product, against each fold on its own."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 5, 6, generator=rng, dtype=torch.float64) * 3 + 1
    train = torch.rand(9, 3, generator=rng) > 0.4
    shapes = ((2, 3, 6), (2, 3, 6, 4), (2, 3, 1, 4))
    query, weight, bias = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)
    ours = attentive._Frames.standardised(x.clone(), train).logits(query, weight, bias)
    for layer in range(2):
        for fold in range(3):
            seen = x[layer, train[:, fold]].flatten(0, 1)
            standard = (x[layer] - seen.mean(0)) / seen.std(0, correction=0)
            attention = (standard @ query[layer, fold] / 6**0.5).softmax(1)
            gathered = (attention[..., None] * standard).sum(1)
            expected = gathered @ weight[layer, fold] + bias[layer, fold]
            torch.testing.assert_close(ours[layer, fold], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["knn", "attentive", "faithful"])
def test_other_probes_score_several_labels_with_average_precision(tmp_path, kind):
    labels = np.random.default_rng(1).integers(0, 2, (N, CLASSES))
    features = np.random.default_rng(0).normal(size=(N, 2, 3, DIM))
    features[:, 1, :, :CLASSES] += 2 * labels[:, None]
    result = probe_layers(planted_cache(tmp_path / "a.zarr", features, labels, fold=FOLD), kind=kind)
    assert result.metric == "mAP" and result.layers[1].mAP > 0.85 > result.layers[0].mAP
    assert f"of {N} clips" in result.warnings[0] and "have several" in result.warnings[0]


@pytest.mark.parametrize("kind", ["knn", "attentive", "faithful"])
def test_other_probes_can_tell_a_single_label_from_none(tmp_path, kind):
    labels = (np.arange(N) % 2)[:, None]
    features = np.random.default_rng(0).normal(size=(N, 1, 3, DIM))
    features[:, 0, :, :1] += 4 * labels[:, None]
    assert probe_layers(planted_cache(tmp_path / "a.zarr", features, labels, fold=FOLD), kind=kind).layers[0].mAP > 0.95


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "tree"}, "no probe of kind 'tree'; choose from linear, knn, attentive, faithful"),
        ({"kind": "knn", "neighbours": 0}, "neighbours is 0"),
        ({"kind": "knn", "neighbours": 97}, "97 neighbours were asked for, and a fold trains on 96 clips"),
        ({"kind": "attentive", "strength": "auto"}, "must be a positive number; it is auto"),
        ({"kind": "attentive", "strength": -1.0}, "must be a positive number"),
    ],
)
def test_settings_out_of_range_are_refused(cache, settings, message):
    with pytest.raises(UsageError, match=message):
        probe_layers(cache, **settings)


def test_frames_that_no_memory_holds_are_refused_with_advice(cache, monkeypatch):
    monkeypatch.setattr(attentive, "COPIES", 10**9)
    with pytest.raises(WhisperATError, match="use --kind linear"):
        probe_layers(cache, kind="attentive")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--kind", "tree"], "no probe of kind 'tree'"),
        (["--faithful", "--kind", "knn"], "leave out --kind knn"),
        (["--neighbours", "3"], "--neighbours is for --kind knn"),
        (["--kind", "knn", "--strength", "2"], "--strength is for --kind linear or --kind attentive"),
        (["--unstandardised"], "--unstandardised is for --faithful"),
        (["--strength", "strong"], "neither a number nor 'auto'"),
        (["--csv", "{cache}"], "cannot write"),
    ],
)
def test_options_of_another_kind_are_refused(capsys, cache, arguments, said):
    arguments = [argument.format(cache=cache.path) for argument in arguments]
    status, out, err = run(capsys, "--quiet", "probe", cache.path, "--layer", "1", *arguments)
    assert status == 2 and said in err and out == ""
