"""Probing a cache: planted answers, official folds, nothing leaks, and the same result however the work is divided."""

import csv
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from planted import planted_cache
from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.errors import CacheError, UsageError
from whisper_at_cli.probe import job, linear, probe_layers
from whisper_at_cli.probe.tidy import COLUMNS, write_csv

LAYERS, DIM, CLASSES = 3, 12, 4


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a busy machine threads that share such small products wait for each other a hundred times longer."""
    with threadpool_limits(1):
        yield


def features_with_label_in(layer, y, *, strength=2.0):
    """(N, L, T, D) noise; only the 1-based `layer` knows the class."""
    features = np.random.default_rng(0).normal(size=(len(y), LAYERS, 5, DIM)).astype(np.float32)
    features[:, layer - 1, :, :CLASSES] += strength * np.eye(CLASSES)[y][:, None]
    return features


Y = np.random.default_rng(0).permutation(np.arange(100) % CLASSES)
FOLD = np.arange(100) // 20 + 1


@pytest.fixture
def planted(tmp_path):
    """100 clips whose label is in layer 2, in five folds."""
    return planted_cache(tmp_path / "a.zarr", features_with_label_in(2, Y), Y, fold=FOLD)


def test_probe_finds_the_layer_that_holds_the_label(planted):
    result = probe_layers(planted)
    accuracy = {layer.layer: layer.accuracy for layer in result.layers}
    assert accuracy[2] > 0.95 and accuracy[1] < 0.5 and accuracy[3] < 0.5
    assert result.best_layer == 2 and set(result.best_layer_per_class.values()) == {2}
    assert result.clips == 100 and result.warnings == [] and result.metric == "accuracy"


def test_the_result_is_json_with_every_field_of_the_command(planted):
    (layer,) = json.loads(json.dumps(asdict(probe_layers(planted, layers=[2]))))["layers"]
    assert set(layer) == {
        "layer", "accuracy", "accuracy_std", "folds", "macro_f1", "class_f1", "confusion", "ci95", "band95",
        "differs_from_best", "class_ci95", "bits", "bits_ci95",
    }  # fmt: skip
    assert [set(fold) for fold in layer["folds"]] == [{"fold", "accuracy", "clips"}] * 5
    assert list(layer["class_f1"]) == ["class0", "class1", "class2", "class3"]


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_accuracy_is_that_of_scikit_learn_fold_by_fold(tmp_path, strength):
    weak = features_with_label_in(2, Y, strength=0.5)
    cache = planted_cache(tmp_path / "weak.zarr", weak, Y, fold=FOLD)
    for layer in probe_layers(cache, strength=strength).layers:
        X, expected = cache.mean(layer=layer.layer), []
        for fold in layer.folds:
            test = fold["fold"] == FOLD
            model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, tol=1e-8, max_iter=5000))
            expected.append(model.fit(X[~test], Y[~test]).score(X[test], Y[test]))
            assert fold["clips"] == 20
        assert [fold["accuracy"] for fold in layer.folds] == pytest.approx(expected, abs=0.051)  # a clip may tip over
        assert layer.accuracy == pytest.approx(np.mean(expected), abs=0.01)


def test_a_label_that_only_the_tested_clips_carry_is_not_learnt(tmp_path):
    """Each fold marks its classes in channels of its own: a model sees them only if test clips leak into training."""
    features = np.random.default_rng(0).normal(size=(100, 1, 2, 60)).astype(np.float32)
    for clip in range(100):
        features[clip, 0, :, (FOLD[clip] - 1) * CLASSES + Y[clip]] += 20
    cache = planted_cache(tmp_path / "a.zarr", features, Y, fold=FOLD)
    assert probe_layers(cache).layers[0].accuracy < 0.5


def apart(layers):
    """Layers without what is said of them in company."""
    return [replace(layer, band95=None, differs_from_best=None) for layer in layers]


def assert_same(layers, others):
    """Bits come from probabilities, which the order of sums moves in their last digits; all else is counted."""
    for one, other in zip(layers, others, strict=True):
        assert replace(one, bits=None, bits_ci95=None) == replace(other, bits=None, bits_ci95=None)
        assert [one.bits, *one.bits_ci95] == pytest.approx([other.bits, *other.bits_ci95], abs=1e-3)


def test_layers_are_the_same_in_any_order_and_company(planted):
    everything = {layer.layer: layer for layer in probe_layers(planted).layers}
    some = probe_layers(planted, layers=[3, 1, 3])
    assert_same(apart(some.layers), apart([everything[1], everything[3]]))


@pytest.mark.parametrize("batch_bytes", [1, 1 << 40])
def test_the_result_does_not_depend_on_how_the_work_is_divided(planted, monkeypatch, batch_bytes):
    expected = probe_layers(planted)
    monkeypatch.setattr(job, "BATCH_BYTES", batch_bytes)
    found = probe_layers(planted)
    assert_same(found.layers, expected.layers)
    assert replace(found, layers=[]) == replace(expected, layers=[])
    monkeypatch.setattr(linear.LinearProbe, "batch_size", lambda probe, job: (LAYERS, 2))  # as on an accelerator
    assert_same(probe_layers(planted).layers, expected.layers)


def test_torch_keeps_its_number_of_threads(planted):
    before = torch.get_num_threads()
    probe_layers(planted)
    assert torch.get_num_threads() == before


def test_of_equally_good_layers_the_lowest_is_the_best(tmp_path):
    features = features_with_label_in(3, Y)
    features[:, 0] = features[:, 1] = features[:, 2]
    cache = planted_cache(tmp_path / "a.zarr", features, Y, fold=FOLD)
    result = probe_layers(cache)
    assert result.best_layer == 1 and set(result.best_layer_per_class.values()) == {1}
    assert result.best_layer_ties == [1, 2, 3]
    assert result.best_layer_per_class_ties == {f"class{c}": [1, 2, 3] for c in range(4)}


def test_a_split_is_trained_and_tested_as_it_says(tmp_path):
    split = np.where(np.arange(100) < 70, "train", "eval")
    cache = planted_cache(tmp_path / "a.zarr", features_with_label_in(2, Y), Y, split=split)
    layer = probe_layers(cache, layers=[2]).layers[0]
    assert layer.folds == [{"fold": 1, "accuracy": layer.accuracy, "clips": 30}] and layer.accuracy_std == 0


def test_without_folds_or_split_random_folds_are_used_and_said(tmp_path):
    cache = planted_cache(tmp_path / "a.zarr", features_with_label_in(2, Y), Y)
    result = probe_layers(cache, layers=[2], seed=3)
    assert len(result.layers[0].folds) == 5 and result.layers[0].accuracy > 0.95
    assert "random" in result.warnings[0] and "seed 3" in result.warnings[0]


def test_failed_clips_are_left_out(tmp_path):
    features = features_with_label_in(2, Y)
    features[::10] = 1e6
    cache = planted_cache(tmp_path / "a.zarr", features, Y, fold=FOLD, failed=set(range(0, 100, 10)))
    result = probe_layers(cache, layers=[2])
    assert result.clips == 90 and result.layers[0].accuracy > 0.95
    assert [fold["clips"] for fold in result.layers[0].folds] == [18] * 5


def test_a_class_in_one_fold_only_cannot_be_recognised_there_and_is_said(tmp_path):
    y = np.where(Y == 3, 0, Y)
    y[:10] = 3
    cache = planted_cache(tmp_path / "a.zarr", features_with_label_in(2, y), y, fold=FOLD)
    result = probe_layers(cache, layers=[2])
    assert result.layers[0].class_f1["class3"] == 0
    assert result.warnings == ["1 class has no training clip in some fold and cannot be recognised there"]


def test_a_class_name_without_clips_has_no_score_and_is_said(tmp_path):
    labels = np.eye(CLASSES + 1, dtype=np.uint8)[Y]
    cache = planted_cache(tmp_path / "a.zarr", features_with_label_in(2, Y), labels, fold=FOLD)
    result = probe_layers(cache, layers=[2])
    assert result.layers[0].class_f1["class4"] is None and result.best_layer_per_class["class4"] is None
    assert result.layers[0].macro_f1 > 0.95 and "1 of 5 classes have no clip" in result.warnings[0]


def test_clips_with_several_labels_are_scored_with_average_precision(tmp_path):
    labels = np.random.default_rng(5).integers(0, 2, (100, CLASSES))
    features = np.random.default_rng(0).normal(size=(100, LAYERS, 5, DIM)).astype(np.float32)
    features[:, 1, :, :CLASSES] += labels[:, None]
    cache = planted_cache(tmp_path / "a.zarr", features, labels, fold=FOLD)
    result = probe_layers(cache)
    assert result.metric == "mAP" and result.best_layer == 2
    assert result.layers[1].mAP > 0.85 and result.layers[0].mAP < 0.7

    X, expected = cache.mean(layer=2), []
    for fold in range(1, 6):
        test = fold == FOLD
        model = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-8, max_iter=5000))
        scores = [model.fit(X[~test], labels[~test, c]).decision_function(X[test]) for c in range(CLASSES)]
        expected.append(np.mean([average_precision_score(labels[test, c], scores[c]) for c in range(CLASSES)]))
    assert result.layers[1].mAP == pytest.approx(np.mean(expected), abs=0.01)


def test_clips_without_a_label_among_others_with_one_are_said(tmp_path):
    labels = np.eye(CLASSES, dtype=np.uint8)[Y]
    labels[:7] = 0
    cache = planted_cache(tmp_path / "a.zarr", features_with_label_in(2, Y), labels, fold=FOLD)
    result = probe_layers(cache, layers=[2])
    assert result.metric == "mAP" and "of 100 clips 7 clips have no label, so" in result.warnings[0]


def test_how_many_clips_have_several_labels_is_said(tmp_path):
    labels = np.eye(CLASSES, dtype=np.uint8)[Y]
    labels[:3] = 1
    labels[3] = 0
    cache = planted_cache(tmp_path / "a.zarr", features_with_label_in(2, Y), labels, fold=FOLD)
    (note,) = probe_layers(cache, layers=[2]).warnings
    assert "1 clips have no label and 3 have several" in note


def test_the_csv_holds_every_number_once(tmp_path):
    weak = planted_cache(tmp_path / "a.zarr", features_with_label_in(2, Y, strength=0.5), Y, fold=FOLD)
    result = probe_layers(weak)
    write_csv(result, tmp_path / "new" / "a.csv")
    with open(tmp_path / "new" / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    values = {tuple(row[column] for column in COLUMNS[:-1]): float(row["value"]) for row in rows}
    assert len(values) == len(rows) and list(tmp_path.glob("new/.*")) == []
    for layer in result.layers:
        at = str(layer.layer)
        assert values[at, "accuracy", "", "", ""] == layer.accuracy
        assert values[at, "accuracy", "3", "", ""] == layer.folds[2]["accuracy"]
        assert values[at, "f1", "", "class1", ""] == layer.class_f1["class1"]
        counts = [value for key, value in values.items() if key[:2] == (at, "confusion")]
        assert (
            sum(counts) == 100
            and values[at, "confusion", "", "class2", "class2"] == layer.confusion["class2"]["class2"]
        )
    best = {row["class"]: int(row["value"]) for row in rows if row["score"] == "best_layer"}
    assert best == result.best_layer_per_class


def test_esc_10_is_as_accurate_as_scikit_learn_at_its_optimum(esc10_cache):
    truth = esc10_cache.labels.argmax(1)
    for layer in probe_layers(esc10_cache, layers=[1, 4]).layers:
        X, accuracy = esc10_cache.mean(layer=layer.layer), []
        for fold in range(1, 6):
            test = esc10_cache.fold == fold
            model = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-6, max_iter=5000))
            accuracy.append(model.fit(X[~test], truth[~test]).score(X[test], truth[test]))
        assert layer.accuracy == pytest.approx(np.mean(accuracy), abs=0.01)


def test_progress_is_told_of_every_layer(planted):
    seen = []
    probe_layers(planted, progress=lambda done, total, message="": seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_problem_without_convergence_is_said(planted, monkeypatch):
    solve = linear.solve
    monkeypatch.setattr(linear, "solve", lambda *args, **settings: solve(*args, **settings, max_iterations=2))
    (warning,) = probe_layers(planted, layers=[2]).warnings
    assert "layer 2 fold 1, layer 2 fold 2" in warning and "lower the strength" in warning


@pytest.mark.parametrize(
    "layers, message",
    [
        ([9], r"a\.zarr \(planted\) has layers 1 to 3; layer 9 was asked for"),
        ([0], "layer 0 was asked for"),
        ([], "no layer was asked for"),
        ("first", "'first' was asked for"),
    ],
)
def test_layers_that_are_not_there_are_refused(planted, layers, message):
    with pytest.raises(UsageError, match=message):
        probe_layers(planted, layers=layers)


@pytest.mark.parametrize("strength", [0, -1.0, float("nan")])
def test_a_strength_that_is_not_positive_is_refused(planted, strength):
    with pytest.raises(UsageError, match="strength must be a positive number"):
        probe_layers(planted, strength=strength)


def test_labels_that_do_not_differ_are_refused(tmp_path):
    cache = planted_cache(tmp_path / "a.zarr", features_with_label_in(2, Y), np.zeros(100, dtype=int), fold=FOLD)
    with pytest.raises(UsageError, match="100 finished clips .* have 1 of 1 classes"):
        probe_layers(cache)


def test_features_that_are_not_finite_are_an_error_and_not_an_accuracy(planted, monkeypatch):
    mean = FeatureCache.mean

    def broken(self, layer=None, rows=None):
        features = mean(self, layer=layer, rows=rows)
        features[7, 3] = np.inf
        return features

    monkeypatch.setattr(FeatureCache, "mean", broken)
    with pytest.raises(CacheError, match="layer 1 of clip 'clip7' .* is not finite"):
        probe_layers(planted)
