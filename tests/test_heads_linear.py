"""Concat-linear is a ridge regression whose strength is chosen on training clips, and works as other heads do."""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from test_cli import run

from planted import planted_cache
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.extract.evaluation.metrics import class_ap
from whisper_at_cli.extract.evaluation.predictions import load_predictions
from whisper_at_cli.heads import build_head, evaluate_head, export_head, load_head, train_head
from whisper_at_cli.heads.training import linear
from whisper_at_cli.heads.training.data import load_clips
from whisper_at_cli.heads.training.linear import NO_CLIP, SHARES, fit

N, L, T, D, C = 90, 2, 25, 8, 3
CLASSES = np.arange(N) % C
FOLD = np.arange(N) // C % 5 + 1
WIDE = 64  # channels, with which inputs outnumber clips


def planted(path, *, dim=D, strength=0.5, labels=CLASSES, seed=0, **columns):
    """Each layer holds a part of the class's pattern, on channels of very unequal scale."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(N, L, T, dim))
    features += strength * rng.normal(size=(C, L, 1, dim))[CLASSES]
    return planted_cache(path, features * np.exp(rng.normal(size=dim)) + 3, labels, **({"fold": FOLD} | columns))


def fitted(cache, head="concat-linear", *, train=FOLD != 1, inner=None, loss="ce"):
    clips = load_clips(cache, np.arange(len(cache)), build_head(head, **shape(cache)).reads, torch.device("cpu"))
    module = build_head(head, **shape(cache))
    rows = np.flatnonzero(train)
    inner = inner or [(np.flatnonzero(train & (k != FOLD)), np.flatnonzero(k == FOLD)) for k in (2, 3, 4, 5)]
    return module, fit(module, clips, cache.labels, rows, inner, loss)


def shape(cache):
    return {"layers": cache.spec.layers, "dim": cache.spec.dim, "classes": len(cache.spec.class_names)}


def inputs(cache, head):
    features = torch.from_numpy(cache.features(np.arange(len(cache))))
    return build_head(head, **shape(cache)).pooled(features).double().numpy()


@pytest.mark.parametrize("head", ["concat-linear", "concat-linear-stats"])
@pytest.mark.parametrize("dim", [D, WIDE])
@torch.no_grad()
def test_the_solution_is_scikit_learns_ridge_on_standardised_inputs(tmp_path, head, dim):
    cache = planted(tmp_path / "a.zarr", dim=dim)
    assert (L * WIDE > N * 0.8) and (L * D * 3 < N * 0.8)  # both ways of solving are met
    module, record = fitted(cache, head)
    x, train = inputs(cache, head), FOLD != 1
    standard = (x - x[train].mean(0)) / x[train].std(0)
    targets = 2.0 * np.eye(C)[CLASSES] - 1
    expected = Ridge(alpha=record["strength"]).fit(standard[train], targets[train]).predict(standard)
    found = module(torch.from_numpy(cache.features(np.arange(N)))).double().numpy()
    factor = (found * expected).sum() / (expected**2).sum()  # what makes logits of scores
    assert factor > 0
    np.testing.assert_allclose(found, factor * expected, atol=2e-3 * np.abs(found).max())
    np.testing.assert_allclose(module.center, x[train].mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(module.scale, x[train].std(0), rtol=1e-4)


def test_the_strength_is_the_one_under_which_inner_clips_are_most_likely(tmp_path):
    cache = planted(tmp_path / "a.zarr", strength=0.1)
    _, record = fitted(cache)
    x, train = inputs(cache, "concat-linear"), FOLD != 1
    standard = (x - x[train].mean(0)) / x[train].std(0)
    likelihood = []
    for strength in record["strengths"]:
        scores = np.full((N, C), np.nan)
        for k in (2, 3, 4, 5):
            some = train & (k != FOLD)
            model = Ridge(alpha=strength).fit(standard[some], 2.0 * np.eye(C)[CLASSES[some]] - 1)
            scores[k == FOLD] = model.predict(standard[k == FOLD])
        logits = torch.from_numpy(scores[train])[None] * torch.logspace(-3, 3, 3001).double()[:, None, None]
        at = torch.from_numpy(CLASSES[train])[None, :, None].expand(len(logits), -1, 1)
        log_p, m = logits.log_softmax(2), train.sum()
        smoothed = (m * log_p.gather(2, at).mean(dim=(1, 2)) + log_p.mean(dim=1).sum(dim=1)) / (m + C)
        likelihood.append(float(smoothed.max()))
    np.testing.assert_allclose(record["inner_log_likelihood"], likelihood, atol=1e-4)
    assert record["strength"] == record["strengths"][int(np.argmax(likelihood))]
    assert len(record["strengths"]) == len(SHARES)


@torch.no_grad()
def test_probabilities_of_several_labels_are_those_of_a_logistic_regression_on_the_scores(tmp_path):
    rng = np.random.default_rng(5)
    labels = (rng.random((N, C)) < 0.3).astype(np.uint8)
    labels[:, 0] = CLASSES == 0
    cache = planted(tmp_path / "a.zarr", labels=labels)
    clips = load_clips(cache, np.arange(N), "mean", torch.device("cpu"))
    coordinates = torch.randn(N, C, generator=torch.Generator().manual_seed(0)) + torch.from_numpy(labels)
    scores, truth = linear._inner_scores(
        coordinates, torch.from_numpy(labels), [(np.arange(60), np.arange(60, N))], [1.0]
    )
    factor, offset, likelihood = linear._calibrated(scores[0], truth, "bce")
    m = len(truth)  # each clip counts with the label it has, and one clip of each kind with both
    flat, y = np.tile(scores[0].numpy().reshape(-1, 1), (2, 1)), np.repeat([1, 0], truth.numel())
    weight = (truth.numpy().reshape(-1) * m + 1) / (m + 2)
    weight = np.concatenate([weight, 1 - weight])
    reference = LogisticRegression(C=1e8, tol=1e-10, max_iter=1000).fit(flat, y, sample_weight=weight)
    assert (factor, offset) == pytest.approx((reference.coef_[0, 0], reference.intercept_[0]), rel=1e-3, abs=1e-3)
    log_p = reference.predict_log_proba(flat)[np.arange(len(y)), y]
    assert likelihood == pytest.approx((weight * log_p).sum() / truth.numel(), abs=1e-6)
    module = build_head("concat-linear", **shape(cache))
    fit(module, clips, labels, np.arange(60), [(np.arange(40), np.arange(40, 60))], "bce")
    assert module(torch.from_numpy(cache.features(np.arange(N)))).isfinite().all()


@torch.no_grad()
def test_a_class_without_a_training_clip_has_a_probability_of_zero(tmp_path):
    cache = planted(tmp_path / "a.zarr")
    module, _ = fitted(
        cache,
        train=(FOLD != 1) & (CLASSES != 2),
        inner=[(np.flatnonzero((FOLD > 2) & (CLASSES != 2)), np.flatnonzero((FOLD == 2) & (CLASSES != 2)))],
    )
    logits = module(torch.from_numpy(cache.features(np.arange(N))))
    assert (logits[:, 2] == NO_CLIP).all() and (logits.softmax(1)[:, 2] == 0).all()


def test_no_test_clip_takes_part_in_what_is_fitted_for_its_fold(tmp_path):
    """With features and labels of fold 1 replaced, the head of fold 1 stays bit for bit what it was."""
    features = planted(tmp_path / "a.zarr").features(np.arange(N))
    cache = planted_cache(tmp_path / "c.zarr", features, CLASSES, fold=FOLD)
    train_head(cache, head="concat-linear", out=tmp_path / "one")
    features = features.copy()
    features[FOLD == 1] = np.random.default_rng(9).normal(size=features[FOLD == 1].shape)
    other = planted_cache(tmp_path / "b.zarr", features, np.where(FOLD == 1, (CLASSES + 1) % C, CLASSES), fold=FOLD)
    train_head(other, head="concat-linear", out=tmp_path / "two")
    one, two = (load_head(tmp_path / name / "fold-1").state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(load_head(tmp_path / "two" / "fold-2").linear.weight, one["linear.weight"])


def test_it_trains_evaluates_predicts_and_continues_as_other_heads_do(tmp_path, capsys):
    cache = planted(tmp_path / "a.zarr", strength=1.0)
    command = ("train-head", cache.path, "--head", "concat-linear", "--out", tmp_path / "head")
    status, out, _ = run(capsys, *command, "--predictions", tmp_path / "p.npz", "--json")
    found = json.loads(out)
    assert status == 0 and found["value"] > 0.9 and found["ci95"][0] <= found["value"] <= found["ci95"][1]
    assert found["recipe"] == {"loss": "ce", "seed": 0, "standardise": True} and found["curve"] is None
    assert found["selected_on"] == {"strength": "inner folds: the 4 other folds of each test fold"}
    record = json.loads((tmp_path / "head" / "head.json").read_text())
    assert record["value"] == found["value"] and record["ci95"] == found["ci95"]
    assert record["recipe"]["strength"] > 0 and record["selected_on"] == found["selected_on"]
    scored = load_predictions(tmp_path / "p.npz")
    assert scored.names == ("concat-linear",) and len(scored.ids) == N
    for fold in found["folds"]:
        assert evaluate_head(tmp_path / "head" / f"fold-{fold['fold']}", cache).accuracy == pytest.approx(fold["value"])
    assert json.loads(run(capsys, *command, "--json")[1])["value"] == found["value"]  # finished: nothing is done again
    status, out, _ = run(capsys, *command, "--restart", "--seeds", "2")
    assert status == 0 and "strength chosen on" in out


def test_what_it_has_no_use_for_is_refused(tmp_path, capsys, monkeypatch):
    cache = planted(tmp_path / "a.zarr")
    for options, said in ((("--epochs", "3"), "--epochs does nothing"), (("--search",), "leave out --search")):
        status, _, err = run(capsys, "train-head", cache.path, "--head", "concat-linear", *options)
        assert status == 2 and said in err
    train_head(cache, head="concat-linear", out=tmp_path / "head")
    with pytest.raises(UsageError, match="original project has no concat-linear"):
        export_head(tmp_path / "head", tmp_path / "a.pth")
    monkeypatch.setattr(linear, "free_bytes", lambda device: 1000)
    with pytest.raises(WhisperATError, match="memory are free: use fewer clips"):
        train_head(cache, head="concat-linear")


def test_with_several_labels_its_map_beats_chance_and_is_the_one_of_its_predictions(tmp_path):
    labels = np.eye(C, dtype=np.uint8)[CLASSES]
    labels[:9, 0] = 1
    cache = planted(tmp_path / "a.zarr", strength=1.0, labels=labels)
    found = train_head(cache, head="concat-linear", predictions=tmp_path / "p.npz")
    scored = load_predictions(tmp_path / "p.npz")
    assert found.metric == "mAP" and found.value > 0.8
    assert found.value == pytest.approx(np.nanmean(class_ap(scored.labels, scored.scores[0], scored.folds)), abs=1e-7)


def test_concat_linear_reaches_the_reference_on_esc10(esc10_cache):
    """0.95 was measured before, with another choice of the strength; 400 clips leave 2.5 points to either side."""
    assert train_head(esc10_cache, head="concat-linear").value >= 0.94
