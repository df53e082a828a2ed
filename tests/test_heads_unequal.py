"""5,000 clips with 50 labels of very unequal frequency: what class-balanced sampling and weight averaging are for.

One layer holds the frequent half of the classes, the other the rare half, so the learned average over layers is what
classes compete for.
"""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from planted import planted_cache
from whisper_at_cli.heads import evaluate_head, load_head, train_head
from whisper_at_cli.heads.training.recipe import named_recipe

N, D, C = 5000, 64, 50
VALID = np.arange(N) % 2 == 1


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    rng = np.random.default_rng(0)
    frequency = 0.4 * (0.004 / 0.4) ** (np.arange(C) / C)
    labels = (rng.random((N, C)) < frequency).astype(np.uint8)
    directions = 0.35 * rng.normal(size=(C, D))
    features = 0.7 * rng.normal(size=(N, 2, 2, D))
    for layer, half in enumerate((slice(0, 25), slice(25, 50))):
        features[:, layer] += (labels[:, half] @ directions[half])[:, None]
    path = tmp_path_factory.mktemp("unequal") / "a.zarr"
    return planted_cache(path, features.astype(np.float32), labels, split=np.where(VALID, "valid", "train"))


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """Metrics by sampling and averaging, each with the head."""
    recipe = named_recipe("as20k", "wa-mlp", dim=D).with_changes(lr=0.1, epochs=16, validate_every=0)
    found = {}
    for balanced, average in ((False, 9), (True, 9), (True, None)):
        out = tmp_path_factory.mktemp("heads") / "head"
        changes = {"class_balanced": balanced, "average_from_epoch": average}
        result = train_head(cache, head="wa-mlp", recipe=recipe, changes=changes, out=out, device="cpu")
        found[balanced, average] = result, evaluate_head(out, cache, rows=np.flatnonzero(VALID), device="cpu"), out
    return found


def test_balanced_sampling_raises_the_rare_half(trained):
    rare = {balanced: np.mean(list(trained[balanced, 9][1].class_ap.values())[25:]) for balanced in (False, True)}
    assert rare[True] > rare[False] + 0.05, rare


def test_averaging_weights_does_not_lower_map(trained):
    averaged, last = trained[True, 9][1].mAP, trained[True, None][1].mAP
    assert averaged >= last, (averaged, last)


def test_every_metric_of_a_run_is_scikit_learns(cache, trained):
    result, _, out = trained[True, 9]
    rows = np.flatnonzero(VALID)
    with torch.no_grad():
        logits = load_head(out)(torch.from_numpy(cache.features(rows))).numpy()
    truth, (fold,) = cache.labels[rows], result.folds
    ap, auc = average_precision_score(truth, logits, average=None), roc_auc_score(truth, logits, average=None)
    assert (result.value, fold["mAP"], fold["mAUC"]) == pytest.approx((ap.mean(), ap.mean(), auc.mean()), abs=1e-6)
    assert fold["validation_clips"] == len(rows) == N / 2 and fold["accuracy"] is None
    assert fold["classes_without_positives"] == 0
