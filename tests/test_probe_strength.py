"""Strength chosen inside the training folds: what is chosen is best there, and the tested fold has no say in it."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from planted import planted_cache
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.probe import probe_layers
from whisper_at_cli.probe.job import Job
from whisper_at_cli.probe.solver import solve
from whisper_at_cli.probe.strength import GRID, inner_divisions

N, DIM, CLASSES = 120, 20, 3
Y = np.random.default_rng(0).permutation(np.arange(N) % CLASSES)
FOLD = np.arange(N) // 30 + 1


def make_cache(path, *, seed=1, signal=0.7, **where):
    features = np.random.default_rng(seed).normal(size=(N, 2, 2, DIM)).astype(np.float32)
    features[:, :, :, :CLASSES] += signal * np.eye(CLASSES)[Y][:, None, None]
    return planted_cache(path, features, Y, **where)


def chosen(result):
    return [[fold["strength"] for fold in layer.folds] for layer in result.layers]


def test_the_chosen_strength_is_the_best_on_the_inner_folds_by_scikit_learn(tmp_path):
    cache = make_cache(tmp_path / "a.zarr", fold=FOLD)
    X = cache.mean(layer=2)
    for outer, strength in enumerate(chosen(probe_layers(cache, strength="auto"))[1], start=1):
        loss = []
        for C in GRID:
            total = 0
            for inner in set(FOLD) - {outer}:
                train = (outer != FOLD) & (inner != FOLD)
                model = make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=1e-6, max_iter=2000))
                seen = model.fit(X[train], Y[train]).predict_proba(X[inner == FOLD])
                total += log_loss(Y[inner == FOLD], seen, labels=range(CLASSES))
            loss.append(total)
        assert strength == GRID[int(np.argmin(loss))]


@pytest.mark.parametrize("where", ["folds", "split"])
def test_labels_of_tested_clips_do_not_change_what_is_chosen_for_them(tmp_path, where):
    split = np.where(FOLD == 1, "test", "train")
    place = {"fold": FOLD} if where == "folds" else {"split": split}
    before = chosen(probe_layers(make_cache(tmp_path / "a.zarr", **place), strength="auto"))
    features = np.random.default_rng(1).normal(size=(N, 2, 2, DIM)).astype(np.float32)
    features[:, :, :, :CLASSES] += 0.7 * np.eye(CLASSES)[Y][:, None, None]
    features[FOLD == 1] += 100
    y = np.where(FOLD == 1, (Y + 1) % CLASSES, Y)
    after = chosen(probe_layers(planted_cache(tmp_path / "b.zarr", features, y, **place), strength="auto"))
    assert [layer[0] for layer in before] == [layer[0] for layer in after]


def test_pure_noise_gets_the_strongest_penalty_and_a_clear_signal_a_weaker_one(tmp_path):
    noise = chosen(probe_layers(make_cache(tmp_path / "a.zarr", signal=0, fold=FOLD), strength="auto"))
    signal = chosen(probe_layers(make_cache(tmp_path / "b.zarr", signal=3, fold=FOLD), strength="auto"))
    assert max(noise[0]) < min(signal[0])


def test_clips_with_several_labels_have_a_strength_chosen_too(tmp_path):
    labels = np.random.default_rng(5).integers(0, 2, (N, CLASSES))
    features = np.random.default_rng(0).normal(size=(N, 1, 2, DIM)).astype(np.float32)
    features[:, 0, :, :CLASSES] += labels[:, None]
    result = probe_layers(planted_cache(tmp_path / "a.zarr", features, labels, fold=FOLD), strength="auto")
    assert result.metric == "mAP" and result.strength == "auto" and set(chosen(result)[0]) <= set(GRID)


@pytest.mark.parametrize("folds", [2, 4])
def test_no_inner_division_trains_or_tests_on_a_clip_of_the_tested_fold(tmp_path, folds):
    cache = make_cache(tmp_path / "a.zarr", fold=np.arange(N) % folds + 1)
    job = Job.plan(cache, device="cpu", seed=0)
    inner, tests = inner_divisions(job), list(job.held_out.tests.values())
    for division, outer, clips in inner.checks:
        assert not inner.train[tests[outer], division].any() and not set(clips) & set(tests[outer])
        assert not inner.train[clips, division].any()
    for outer in range(folds):
        tested = np.concatenate([clips for _, of, clips in inner.checks if of == outer])
        assert sorted(tested) == sorted(np.flatnonzero(job.train[:, outer]))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_strengths_solved_together_are_those_solved_alone(loss):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(2, N, DIM)))
    y = torch.nn.functional.one_hot(torch.from_numpy(Y))
    train = torch.from_numpy(FOLD[:, None] != np.arange(1, 3))
    strengths = torch.tensor([0.01, 1.0, 3.0], dtype=torch.float64)
    side_by_side = solve(x, y, train, loss=loss, strength=strengths, tolerance=1e-12)
    per_problem = solve(x, y, train, loss=loss, strength=strengths[torch.tensor([[0, 2], [1, 0]])], tolerance=1e-12)
    for at, strength in enumerate(strengths.tolist()):
        alone = solve(x, y, train, loss=loss, strength=strength, tolerance=1e-12)
        for layer in range(2):
            torch.testing.assert_close(
                side_by_side.weight_GDFC[3 * layer + at], alone.weight_GDFC[layer], atol=1e-5, rtol=0
            )
            torch.testing.assert_close(
                side_by_side.logits(x.repeat_interleave(3, 0), 1)[3 * layer + at], alone.logits(x, 1)[layer],
                atol=1e-4, rtol=0,
            )  # fmt: skip
    alone = solve(x, y, train, loss=loss, strength=3.0, tolerance=1e-12)
    torch.testing.assert_close(per_problem.weight_GDFC[0, :, 1], alone.weight_GDFC[0, :, 1], atol=1e-5, rtol=0)


def test_a_strength_that_is_a_word_is_refused(tmp_path):
    with pytest.raises(UsageError, match="positive number or 'auto'; it is strong"):
        probe_layers(make_cache(tmp_path / "a.zarr", fold=FOLD), strength="strong")
