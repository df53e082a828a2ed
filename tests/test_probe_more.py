"""What a probe measures beyond accuracy: few shots, description length, nested selection, another cache to test on."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_cli import run

from planted import planted_cache
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.probe import probe_layers
from whisper_at_cli.probe.description import description_length
from whisper_at_cli.probe.job import Job
from whisper_at_cli.probe.shots import DRAWS, _pools, few_shot
from whisper_at_cli.probe.strength import inner_divisions

N, CLASSES, LAYERS = 120, 3, 3
Y = np.random.default_rng(0).permutation(np.arange(N) % CLASSES)
FOLD = np.arange(N) // 30 + 1


def features(y=Y, *, seed=1, signal=0.7, dim=12, layers=LAYERS):
    found = np.random.default_rng(seed).normal(size=(len(y), layers, 2, dim)).astype(np.float32)
    found[:, :, :, :CLASSES] += signal * np.eye(CLASSES)[y][:, None, None]
    return found


def make_cache(path, y=Y, *, seed=1, signal=0.7, dim=12, **where):
    return planted_cache(path, features(y, seed=seed, signal=signal, dim=dim), y, **(where or {"fold": FOLD}))


def scikit_learn():
    return make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-8, max_iter=5000))


@pytest.mark.parametrize("dim", [12, 60])  # fewer and more channels than clips that train
def test_few_shot_accuracy_is_scikit_learns_on_the_clips_that_were_drawn(tmp_path, dim):
    cache = make_cache(tmp_path / "a.zarr", dim=dim)
    job = Job.plan(cache, device="cpu", seed=3)
    [found] = few_shot(job, [2], [8], strength=1.0)
    X, pools = cache.mean(layer=2), _pools(job)
    expected = []
    for draw in range(DRAWS):
        right = []
        for fold, tested in enumerate(job.held_out.tests.values()):
            train = np.concatenate([clips[:8] for clips in pools[fold][draw]])
            assert np.bincount(Y[train]).tolist() == [8, 8, 8] and not set(train) & set(tested)
            right.append((scikit_learn().fit(X[train], Y[train]).predict(X[tested]) == Y[tested]).mean())
        expected.append(np.mean(right))
    assert found.layers[0]["draws"] == pytest.approx(expected, abs=0.5 / 30)
    assert found.layers[0]["accuracy"] == pytest.approx(np.mean(expected), abs=2e-3)
    assert found.layers[0]["std_over_draws"] == pytest.approx(np.std(expected), abs=2e-3) and found.fewer == []
    low, high = found.layers[0]["ci95"]
    assert low < found.layers[0]["accuracy"] < high


def test_few_shots_draw_no_clip_of_a_tested_recording_and_fewer_shots_are_among_more(tmp_path, monkeypatch):
    recordings = np.array([f"r{i % 60}" for i in range(N)])  # every recording lies in two folds
    monkeypatch.setattr(Job, "sources", lambda self: recordings)
    job = Job.plan(make_cache(tmp_path / "a.zarr"), device="cpu", seed=0)
    for fold, tested in enumerate(job.held_out.tests.values()):
        for classes in _pools(job)[fold]:
            drawn = np.concatenate(classes)
            assert len(drawn) == 60 and not set(recordings[drawn]) & set(recordings[tested])
    [few] = few_shot(job, [1], [50], strength=1.0)
    assert few.fewer == ["class0", "class1", "class2"], "60 clips of three classes are not 50 of each"


def test_more_shots_recognise_more(tmp_path):
    result = probe_layers(make_cache(tmp_path / "a.zarr", signal=1.2), shots=[1, 4, 16])
    accuracy = [[row["accuracy"] for row in found.layers] for found in result.shots]
    assert [found.shots for found in result.shots] == [1, 4, 16] and (np.diff(accuracy, axis=0) > 0).all()


def test_a_description_length_is_that_of_scikit_learns_models_block_by_block(tmp_path):
    cache = make_cache(tmp_path / "a.zarr", dim=6)
    job = Job.plan(cache, device="cpu", seed=5)
    found = description_length(job, [1, 3], strength=1.0)
    assert found.clips == N and found.blocks == [1, 2, 4, 8, 15, 30, 60, 120]
    assert found.uniform_bits == pytest.approx(N * np.log2(3))
    order = np.argsort(np.random.default_rng(5).permutation(N)[np.argsort(np.argsort(cache.ids.astype(str)))])
    for row, X in zip(found.layers, (cache.mean(layer=1), cache.mean(layer=3)), strict=True):
        bits = np.log2(3)
        for begin, end in zip(found.blocks[:-1], found.blocks[1:], strict=True):
            train, block = order[:begin], order[begin:end]
            p = np.zeros((end - begin, CLASSES))
            seen = np.unique(Y[train])
            if len(seen) > 1:
                p[:, seen] = scikit_learn().fit(X[train], Y[train]).predict_proba(X[block])
            else:
                p[:, seen] = 1.0
            bits -= np.log2((begin * p[np.arange(len(block)), Y[block]] + 1) / (begin + CLASSES)).sum()
        assert row["codelength_bits"] == pytest.approx(bits, rel=0.03)
        assert row["compression"] == pytest.approx(found.uniform_bits / row["codelength_bits"])


def test_labels_that_features_tell_are_described_in_fewer_bits(tmp_path):
    clear, noise = (
        probe_layers(make_cache(tmp_path / f"{signal}.zarr", signal=signal), mdl=True).mdl for signal in (3.0, 0.0)
    )
    assert all(row["compression"] > 1.8 for row in clear.layers) and all(
        row["compression"] < 1.0 for row in noise.layers
    )


@pytest.mark.parametrize("where", ["folds", "valid"])
def test_a_nested_choice_of_the_layer_does_not_read_the_tested_clips(tmp_path, where):
    split = np.array(["test", "train", "train", "valid"])[FOLD - 1]
    place = {"fold": FOLD} if where == "folds" else {"split": split}
    X = features()
    before = probe_layers(planted_cache(tmp_path / "a.zarr", X, Y, **place), nested=True)
    y = np.where(FOLD == 1, (Y + 1) % CLASSES, Y)
    X[FOLD == 1] += 100
    after = probe_layers(planted_cache(tmp_path / "b.zarr", X, y, **place), nested=True)
    assert before.nested["layers"][0] == after.nested["layers"][0]
    assert before.nested["chosen_on"] == (
        "the dataset's valid split" if where == "valid" else after.nested["chosen_on"]
    )
    assert before.nested["value"] <= max(layer.accuracy for layer in before.layers)
    assert "tested clips" in before.best_layer_chosen_on


def test_the_valid_split_chooses_the_layer_that_is_best_there(tmp_path):
    split = np.array(["test", "train", "train", "valid"])[FOLD - 1]
    X = features(signal=0)
    X[FOLD != 4, 0, :, :CLASSES] += 3 * np.eye(CLASSES)[Y][FOLD != 4, None]  # layer 1 fails on valid
    X[:, 2, :, :CLASSES] += 2 * np.eye(CLASSES)[Y][:, None]
    result = probe_layers(planted_cache(tmp_path / "a.zarr", X, Y, split=split), nested=True, strength="auto")
    assert result.best_layer == 1 and result.nested["layers"] == [{"fold": 1, "layer": 3}]
    assert result.nested["value"] == pytest.approx(result.layers[2].accuracy) and result.warnings == []


def test_inner_scores_are_those_of_scikit_learn_and_choose_the_best_layer(tmp_path):
    cache = make_cache(tmp_path / "a.zarr")
    job = Job.plan(cache, device="cpu", seed=0)
    assert len(inner_divisions(job).checks) == 12
    chosen = []
    for outer in (1, 2, 3, 4):
        values = []
        for layer in (1, 2, 3):
            X, right = cache.mean(layer=layer), []
            for inner in set(FOLD) - {outer}:
                train, test = (outer != FOLD) & (inner != FOLD), inner == FOLD
                right.append((scikit_learn().fit(X[train], Y[train]).predict(X[test]) == Y[test]).mean())
            values.append(np.mean(right))
        chosen.append(int(np.argmax(values)) + 1)
    assert [row["layer"] for row in probe_layers(cache, nested=True).nested["layers"]] == chosen


@pytest.mark.parametrize("strength", [1.0, "auto"])
def test_on_permuted_labels_a_nested_number_is_at_chance_and_the_plain_best_is_above(tmp_path, strength):
    cache = planted_cache(tmp_path / "a.zarr", features(layers=8), Y, fold=FOLD)
    nested, plain, covered = [], [], 0
    for seed in range(10):
        result = probe_layers(cache, permute_labels=True, nested=True, strength=strength, seed=seed)
        nested.append(result.nested["value"])
        plain.append(max(layer.accuracy for layer in result.layers))
        covered += result.nested["ci95"][0] <= 1 / CLASSES <= result.nested["ci95"][1]
    assert covered >= 8 and abs(np.mean(nested) - 1 / CLASSES) < 0.05
    assert np.mean(plain) > np.mean(nested) + 0.02 and np.mean(plain) > 1 / CLASSES + 0.02


def test_training_on_one_cache_and_testing_on_another_matches_classes_by_name(tmp_path):
    train = make_cache(tmp_path / "a.zarr", class_names=["dog", "rain", "bell"], fold=FOLD)
    y = np.random.default_rng(9).integers(0, 3, 60)
    X = features(y, seed=4)
    test = planted_cache(tmp_path / "b.zarr", X, y, class_names=["rain", "siren", "dog"])
    result = probe_layers(train, test_cache=test, predictions=tmp_path / "p.npz")
    assert result.classes_matched == ["dog", "rain"] and result.classes_left_out == ["bell", "siren"]
    assert result.test_cache == str(test.path) and any(
        "left out" in note and "siren" in note for note in result.warnings
    )
    assert any("60 clips have the same id in both caches" in note for note in result.warnings)
    known, tested = np.flatnonzero(Y < 2), np.flatnonzero(y != 1)
    model = scikit_learn().fit(train.mean(layer=1)[known], Y[known])
    truth = np.array([1, -1, 0])[y[tested]]
    right = (model.predict(test.mean(layer=1)[tested]) == truth).mean()
    assert result.layers[0].accuracy == pytest.approx(right, abs=0.5 / len(tested))
    saved = np.load(tmp_path / "p.npz")
    assert saved["ids"].tolist() == test.ids[tested].tolist()


def test_caches_that_cannot_be_paired_are_refused(tmp_path):
    train = make_cache(tmp_path / "a.zarr")
    other = make_cache(tmp_path / "b.zarr", fold=FOLD, weights_sha256="1" * 64)
    with pytest.raises(UsageError, match="features of the backbone it trained on"):
        probe_layers(train, test_cache=other)
    strange = make_cache(tmp_path / "c.zarr", fold=FOLD, class_names=["x", "y", "class0"])
    with pytest.raises(UsageError, match="have 1 class names in common"):
        probe_layers(train, test_cache=strange)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--shots", "1,x"], "--shots 1,x is not a list"),
        (["--shots", "0"], "--shots must be at least 1"),
        (["--mdl", "--kind", "knn"], "--mdl is for linear probes"),
        (["--shots", "8", "--strength", "auto"], "needs a number for --strength"),
    ],
)
def test_wrong_use_is_refused_in_a_line(capsys, tmp_path, arguments, said):
    make_cache(tmp_path / "a.zarr")
    status, out, err = run(capsys, "probe", str(tmp_path / "a.zarr"), *arguments)
    assert status == 2 and said in err and out == ""


def test_clips_with_several_labels_have_neither_shots_nor_a_description_length(tmp_path):
    labels = np.random.default_rng(5).integers(0, 2, (N, CLASSES))
    cache = planted_cache(tmp_path / "a.zarr", features(), labels, fold=FOLD)
    for options in ({"shots": [8]}, {"mdl": True}):
        with pytest.raises(UsageError, match="exactly one label on every clip"):
            probe_layers(cache, **options)
    assert 0 < probe_layers(cache, nested=True).nested["value"] < 1


def test_the_command_prints_all_of_it_and_draws_the_curves(capsys, tmp_path):
    make_cache(tmp_path / "a.zarr")
    arguments = ["probe", str(tmp_path / "a.zarr"), "--nested", "--shots", "1,8", "--mdl"]
    status, out, err = run(capsys, *arguments, "--figure", str(tmp_path / "f.png"))
    assert status == 0, err
    for said in ("best layer by nested selection", "8-shot layer", "codelength of 120 labels", "chosen on inner folds"):
        assert said in out
    drawn = json.loads((tmp_path / "f.json").read_text())
    assert [curve["shots"] for curve in drawn["curves"]] == [[1, 8]] * LAYERS and (tmp_path / "f.png").exists()
    status, out, _ = run(capsys, *arguments, "--json")
    result = json.loads(out)
    assert result["shots"][1]["shots"] == 8 and result["mdl"]["layers"][0]["codelength_bits"] > 0 and result["nested"]
