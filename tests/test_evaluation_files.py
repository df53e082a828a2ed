"""Predictions that probes and heads save: scikit-learn and `compare` find in them what the commands said."""

import json

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, average_precision_score
from test_cli import run

from planted import planted_cache
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.evaluation.compare import compare, read_inputs
from whisper_at_cli.extract.evaluation.predictions import load_predictions
from whisper_at_cli.heads import evaluate_head, load_head, train_head
from whisper_at_cli.probe import probe_layers

N, L, T, D, C = 60, 2, 25, 8, 3
EPOCHS = {"epochs": 3}


@pytest.fixture(scope="module", params=["accuracy", "mAP"])
def scored(request, tmp_path_factory):
    """A cache of clips with one label, or with any number; the results of two probes and two heads; and their files."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("scored")
    if request.param == "accuracy":
        labels = np.eye(C, dtype=np.uint8)[rng.integers(0, C, N)]
    else:
        labels = (rng.random((N, C)) < 0.4).astype(np.uint8)
    features = rng.normal(size=(N, L, T, D))
    features[..., :C] += labels[:, None, None, :] * 0.4
    cache = planted_cache(folder / "a.zarr", features, labels, fold=np.arange(N) % 3 + 1)
    probed = probe_layers(cache, predictions=folder / "probe.npz")
    heads = {
        name: train_head(cache, head=name, changes=EPOCHS, seeds=seeds, predictions=folder / f"{name}.npz")
        for name, seeds in (("last-mlp", 1), ("wa-mlp", 2))
    }
    return request.param, cache, probed, heads, folder


def of_scikit_learn(metric, file, run):
    """The metric of one row of `scores`, as docs/evaluation.md defines it."""
    labels, scores, folds = file["labels"], file["scores"][run], file["folds"]
    inside = [folds == number for number in np.unique(folds)]
    if metric == "accuracy":
        return np.mean([accuracy_score(labels[here].argmax(1), scores[here].argmax(1)) for here in inside])
    ap = []
    for c in range(C):
        of_folds = [
            (average_precision_score(labels[here, c], scores[here, c]), labels[here, c].sum()) for here in inside
        ]
        ap.append(np.average([value for value, _ in of_folds], weights=[positives for _, positives in of_folds]))
    return np.mean(ap)


def test_scikit_learn_and_compare_find_what_probes_and_heads_said(scored):
    metric, cache, probed, heads, folder = scored
    said = {f"probe:layer-{layer.layer}": (getattr(layer, metric), layer.ci95) for layer in probed.layers}
    said |= {f"{name}:{name}": (result.value, result.ci95) for name, result in heads.items()}
    compared = compare(read_inputs([str(folder / f"{name}.npz") for name in ("probe", "last-mlp", "wa-mlp")]))
    assert compared.metric == metric and (compared.clips, compared.recordings, len(compared.pairs)) == (N, N, 6)
    for system in compared.systems:
        file = np.load(folder / f"{system['name'].split(':')[0]}.npz")
        runs = np.flatnonzero(file["names"] == system["name"].split(":")[1])
        expected = np.mean([of_scikit_learn(metric, file, run) for run in runs])
        value, ci95 = said[system["name"]]
        assert system["value"] == pytest.approx(expected) and value == pytest.approx(expected)
        assert system["ci95"] == pytest.approx(ci95) and ci95[0] < value < ci95[1]
    if metric == "accuracy":
        file, last = np.load(folder / "probe.npz"), load_predictions(folder / "last-mlp.npz")
        order = {name: at for at, name in enumerate(last.ids)}
        first = file["scores"][0].argmax(1) == file["labels"].argmax(1)
        second = (last.scores[0].argmax(1) == last.labels.argmax(1))[[order[name] for name in file["ids"]]]
        b, c = int((first & ~second).sum()), int((second & ~first).sum())
        (pair,) = (p for p in compared.pairs if (p["a"], p["b"]) == ("probe:layer-1", "last-mlp:last-mlp"))
        assert (pair["only_a"], pair["only_b"]) == (b, c) and pair["p"] == pytest.approx(binomtest(b, b + c).pvalue)


def test_every_row_is_the_clip_that_it_says(scored):
    """Also where folds are not in the cache's order."""
    _, cache, _, _, folder = scored
    for name in ("probe", "wa-mlp"):
        found = load_predictions(folder / f"{name}.npz")
        row = [cache.ids.tolist().index(clip) for clip in found.ids]
        assert sorted(row) == list(range(N))
        np.testing.assert_array_equal(found.labels, cache.labels[row])
        np.testing.assert_array_equal(found.folds, cache.fold[row])
    assert load_predictions(folder / "wa-mlp.npz").seeds.tolist() == [0, 1]


def test_a_run_that_is_continued_has_the_predictions_of_its_finished_folds(scored, tmp_path):
    _, cache, _, heads, folder = scored
    once = train_head(cache, head="last-mlp", changes=EPOCHS, out=tmp_path / "run", predictions=tmp_path / "a.npz")
    again = train_head(cache, head="last-mlp", changes=EPOCHS, out=tmp_path / "run", predictions=tmp_path / "b.npz")
    assert again.ci95 == once.ci95 == pytest.approx(heads["last-mlp"].ci95)
    np.testing.assert_array_equal(
        load_predictions(tmp_path / "b.npz").scores, load_predictions(tmp_path / "a.npz").scores
    )
    (tmp_path / "run" / ".training" / "scores" / "fold-2.npy").unlink()
    older = train_head(cache, head="last-mlp", changes=EPOCHS, out=tmp_path / "run")
    assert older.ci95 is None and "no interval is given" in older.warnings[-1]
    assert older.value == pytest.approx(np.mean([fold["value"] for fold in older.folds]))
    with pytest.raises(UsageError, match="kept no scores"):
        train_head(cache, head="last-mlp", changes=EPOCHS, out=tmp_path / "run", predictions=tmp_path / "c.npz")


def test_evaluate_says_the_interval_of_what_it_measures(scored, tmp_path):
    metric, cache, _, _, _ = scored
    train_head(cache, head="last-mlp", changes=EPOCHS, out=tmp_path / "run")
    found = evaluate_head(tmp_path / "run" / "fold-2", cache, predictions=tmp_path / "e.npz")
    bounds = getattr(found, f"{metric}_ci95")
    assert bounds[0] < getattr(found, metric) < bounds[1]
    read = load_predictions(tmp_path / "e.npz")
    assert len(read.ids) == found.clips == N // 3 and read.names == ("last-mlp",)
    assert (found.accuracy_ci95 is None) is (metric == "mAP") and found.intervals["recordings"] == N // 3


def test_the_commands_save_predictions_and_print_intervals(capsys, scored, tmp_path):
    metric, cache, _, _, _ = scored
    status, out, _ = run(capsys, "probe", cache.path, "--predictions", tmp_path / "p.npz")
    assert status == 0 and "95 % interval" in out and "draws (BCa)" in out
    line = ("train-head", cache.path, "--head", "last-mlp", "--epochs", "2", "--predictions", tmp_path / "h.npz")
    status, out, _ = run(capsys, *line)
    assert status == 0 and "95 % interval" in out
    status, out, _ = run(capsys, "compare", tmp_path / "p.npz", tmp_path / "h.npz", "--json")
    assert status == 0 and len(json.loads(out)["systems"]) == 3 and json.loads(out)["metric"] == metric
    for command in (("probe", cache.path), line[:-2]):
        status, _, err = run(capsys, *command, "--predictions", tmp_path / "p.csv")
        assert status == 2 and "saved as .npz" in err


def test_heads_that_average_layers_say_what_each_layer_counts(capsys, scored, tmp_path):
    _, cache, _, heads, _ = scored
    assert heads["last-mlp"].layer_weights is None
    result = train_head(cache, head="wa-mlp", changes={"epochs": 3}, out=tmp_path / "wa")
    saved = [load_head(tmp_path / "wa" / f"fold-{number}").layer_weight.detach() for number in (1, 2, 3)]
    expected = np.mean([weight / weight.sum() for weight in saved], axis=0)
    assert result.layer_weights == pytest.approx(expected.tolist(), abs=1e-6) and sum(expected) == pytest.approx(1)
    assert result.layer_weights[0] != result.layer_weights[1]
    status, out, _ = run(capsys, "train-head", cache.path, "--head", "wa-mlp", "--epochs", "2")
    assert status == 0 and "layer weights" in out
