"""Training and probing where labels or numbers are missing: nothing crashes after the work, and each lack is named."""

import json
import math

import numpy as np
import pytest

from planted import planted_cache
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.extract.evaluation.metrics import mean_and_std
from whisper_at_cli.extract.evaluation.predictions import Predictions, load_predictions
from whisper_at_cli.heads import search_heads, train_head
from whisper_at_cli.heads.training import plan
from whisper_at_cli.heads.training.batches import balancing_weights
from whisper_at_cli.heads.training.recipe import Recipe
from whisper_at_cli.probe import probe_layers

N, L, T, D, C = 24, 2, 25, 8, 3
RECIPE = Recipe(epochs=2, time_mask_frames=0, average_from_epoch=1)
THIRDS, HALVES = np.arange(N) // 8 + 1, np.arange(N) // 12 + 1
UNTRAINED = "no training clip in some fold and cannot be recognised there"


def features(seed=0):
    return np.random.default_rng(seed).normal(size=(N, L, T, D)).astype(np.float32)


def labels_without(fold, number):
    """One label a clip, but none in this fold."""
    labels = np.eye(C, dtype=np.uint8)[np.arange(N) % C]
    labels[fold == number] = 0
    return labels


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_fold_without_labels_does_not_count_and_is_named(tmp_path, seeds):
    cache = planted_cache(tmp_path / "a.zarr", features(), labels_without(THIRDS, 2), fold=THIRDS)
    options = {"head": "wa-mlp", "recipe": RECIPE, "seeds": seeds, "out": tmp_path / "head", "device": "cpu"}
    result = train_head(cache, **options, predictions=tmp_path / "scores.npz")
    assert (tmp_path / "head" / "curve.png").stat().st_size > 1000 and (tmp_path / "head" / "head.json").exists()
    assert "fold 2: no validation clip has a label, so the fold does not count" in result.warnings
    values = [fold["value"] for fold in result.folds]
    assert math.isnan(values[1]) and not any(map(math.isnan, values[::2]))
    assert result.value == pytest.approx(mean_precision(load_predictions(tmp_path / "scores.npz")))
    kept = json.loads((tmp_path / "head" / "head.json").read_text())
    assert kept["fold_mean"] == pytest.approx((values[0] + values[2]) / 2)
    assert seeds > 1 or kept["value"] == pytest.approx(result.value)
    assert train_head(cache, **options).value == result.value


def mean_precision(held_out: Predictions) -> float:
    """mAP with every positive ranked among the clips of its own fold, one by one; the mean over seeds."""
    found = []
    for scores in held_out.scores:
        classes = []
        for c in range(C):
            precisions = []
            for clip in np.flatnonzero(held_out.labels[:, c]):
                above = (held_out.folds == held_out.folds[clip]) & (scores[:, c] >= scores[clip, c])
                precisions.append(held_out.labels[above, c].mean())
            classes.append(np.mean(precisions))
        found.append(np.mean(classes))
    return float(np.mean(found))


def test_a_search_ranks_by_the_folds_that_have_labels(tmp_path):
    cache = planted_cache(tmp_path / "a.zarr", features(), labels_without(THIRDS, 2), fold=THIRDS)
    found = search_heads(cache, head="wa-mlp", recipe=RECIPE, rates=[1e-3, 1e-2], device="cpu")
    assert found.search is not None and len(found.search["rows"]) == 2
    assert all(math.isfinite(row["value"]) for row in found.search["rows"]) and math.isfinite(found.value)


def test_an_undefined_value_is_left_out_of_means():
    assert mean_and_std([1.0, math.nan, 3.0]) == (2.0, 1.0)
    assert all(math.isnan(value) for value in mean_and_std([math.nan]))


@pytest.mark.parametrize("fold, unlabelled", [(THIRDS, 8), (HALVES, 12)])
def test_balanced_drawing_takes_clips_without_labels_as_they_are(tmp_path, fold, unlabelled):
    """With two folds, one training side has no label at all, and all of its clips are drawn alike."""
    cache = planted_cache(tmp_path / "a.zarr", features(), labels_without(fold, 1), fold=fold)
    recipe = RECIPE.with_changes(class_balanced=True)
    result = train_head(cache, head="wa-mlp", recipe=recipe, out=tmp_path / "head", device="cpu")
    assert math.isfinite(result.value)
    said = f"{unlabelled} training clips have no label and are never drawn"
    assert any(said in warning for warning in result.warnings) == (fold is THIRDS)
    assert balancing_weights(np.zeros((4, 3), np.uint8)).tolist() == [1, 1, 1, 1]


def test_a_class_that_no_training_side_has_is_a_warning_in_heads_as_in_probes(tmp_path):
    classes = np.where(THIRDS == 2, 2, np.arange(N) % 2)
    cache = planted_cache(tmp_path / "a.zarr", features(), classes, fold=THIRDS)
    for result in (train_head(cache, head="wa-mlp", recipe=RECIPE, device="cpu"), probe_layers(cache)):
        assert f"1 class has {UNTRAINED}" in result.warnings
    split = np.where(THIRDS == 1, "train", "test")
    cache = planted_cache(tmp_path / "b.zarr", features(), np.arange(N) // 4, split=split)
    for result in (train_head(cache, head="wa-mlp", recipe=RECIPE, device="cpu"), probe_layers(cache)):
        assert f"4 classes have {UNTRAINED}" in result.warnings
    whole = planted_cache(tmp_path / "c.zarr", features(), np.arange(N) % 2, fold=THIRDS)
    for result in (train_head(whole, head="wa-mlp", recipe=RECIPE, device="cpu"), probe_layers(whole)):
        assert not any(UNTRAINED in warning for warning in result.warnings)


@pytest.mark.parametrize("head, tier", [("wa-mlp", "memory"), ("tl-tr", "memory"), ("tl-tr", "stream")])
@pytest.mark.parametrize("row", [0, 23])
def test_features_that_are_not_finite_are_not_blamed_on_the_learning_rate(tmp_path, head, tier, row):
    damaged = features()
    damaged[row, 1, 3, 2] = np.nan
    cache = planted_cache(tmp_path / "a.zarr", damaged, np.arange(N) % C, fold=THIRDS)
    with pytest.raises(WhisperATError) as refused:
        train_head(cache, head=head, recipe=RECIPE, tier=tier, device="cpu")
    assert f"the features of clip 'clip{row}' in {cache.path} are not finite" in str(refused.value)
    assert "verify" in str(refused.value) and "lr" not in str(refused.value)


def test_weights_that_diverged_in_the_last_epoch_are_a_matter_of_the_learning_rate(tmp_path):
    """The loss of an epoch is that before its last step."""
    cache = planted_cache(tmp_path / "a.zarr", features(), np.arange(N) % C, fold=THIRDS)
    recipe = RECIPE.with_changes(lr=1e30, epochs=1)
    with pytest.raises(WhisperATError, match=r"the training diverged; lower --lr, which is 1e\+30"):
        train_head(cache, head="wa-mlp", recipe=recipe, device="cpu")


@pytest.mark.parametrize("training", [1, 2, 3])
def test_strength_auto_counts_training_clips_and_not_finished_ones(tmp_path, training):
    split = np.where(np.arange(N) < training, "train", "test")
    cache = planted_cache(tmp_path / "a.zarr", features(), np.arange(N) % C, split=split)
    if training > 1:
        assert probe_layers(cache, strength="auto").layers[0].folds[0]["strength"] > 0
        return
    with pytest.raises(UsageError, match=r"at least 2 training clips in every fold \(fold 1 has 1\)"):
        probe_layers(cache, strength="auto")


@pytest.mark.parametrize("began, goes_on", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_run_goes_on_where_auto_would_choose_another_precision(tmp_path, monkeypatch, began, goes_on):
    """As on a processor with other bfloat16 support: nothing that the user gave has changed."""
    cache = planted_cache(tmp_path / "a.zarr", features(), np.arange(N) % C, fold=THIRDS)
    options = dict(head="wa-tr", out=tmp_path / "head", device="cpu")
    monkeypatch.setattr(plan, "fastest_precision", lambda head, device: began)
    first = train_head(cache, recipe=RECIPE, **options)
    monkeypatch.setattr(plan, "fastest_precision", lambda head, device: goes_on)
    again = train_head(cache, recipe=RECIPE, **options)
    assert first.recipe["precision"] == again.recipe["precision"] == began and again.value == first.value
    with pytest.raises(UsageError, match=f"precision was {began} and is {goes_on} now"):
        train_head(cache, recipe=RECIPE.with_changes(precision=goes_on), **options)
    assert train_head(cache, recipe=RECIPE, restart=True, **options).recipe["precision"] == goes_on
