"""The batched solver against scikit-learn, one problem at a time, and against itself batched otherwise."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from whisper_at_cli.probe import solver
from whisper_at_cli.probe.solver import solve

CLASSES = 4


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a busy machine threads that share such small products wait for each other a hundred times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


def make_problem(layers=2, clips=90, dim=30, folds=3, seed=0, dtype=np.float32):
    """Layers whose channels have very different scales, one of them constant, one nearly; noisy labels; a fold each."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, clips)
    x = rng.normal(size=(layers, clips, dim)) + rng.normal(size=(layers, CLASSES, dim))[:, y] * 0.3
    x = x * 10.0 ** rng.integers(-3, 3, dim) + 10.0 * rng.normal(size=dim)
    x[:, :, 3] = 7.25
    x[:, :, 4] = 1000 + 0.01 * rng.normal(size=(layers, clips))
    train = rng.integers(0, folds, clips)[:, None] != np.arange(folds)
    return torch.from_numpy(x.astype(dtype)), torch.nn.functional.one_hot(torch.from_numpy(y)), torch.from_numpy(train)


def reference(x_ND, y_NC, train_N, strength):
    """scikit-learn's model of one layer and fold, and its objective."""
    scaler = StandardScaler().fit(x_ND[train_N].double().numpy())
    X, y = scaler.transform(x_ND.double().numpy()), y_NC.argmax(1).numpy()
    model = LogisticRegression(C=strength, tol=1e-10, max_iter=20_000).fit(X[train_N], y[train_N])
    of_truth = np.searchsorted(model.classes_, y[train_N])[:, None]
    loss = -np.take_along_axis(model.predict_log_proba(X[train_N]), of_truth, axis=1).sum()
    return model, X, strength * loss + (model.coef_**2).sum() / 2


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("clips, dim", [(90, 30), (60, 200)])
def test_solver_reaches_the_optimum_of_scikit_learn(clips, dim, strength):
    x, y, train = make_problem(clips=clips, dim=dim)
    solution = solve(x, y, train, strength=strength)
    assert solution.converged_GF.all()
    for layer in range(2):
        for fold in range(3):
            model, X, objective = reference(x[layer], y, train[:, fold], strength)
            assert float(solution.objective_GF[layer, fold]) == pytest.approx(objective, rel=1e-4)
            ours = solution.logits(x, fold)[layer].softmax(-1).numpy()
            difference = np.abs(ours - model.predict_proba(X))
            assert difference.max() < 0.02, f"largest {difference.max():.2g}, mean {difference.mean():.2g}"


def test_with_a_tight_tolerance_the_weights_are_those_of_scikit_learn():
    x, y, train = make_problem(dtype=np.float64)
    solution = solve(x, y, train, tolerance=1e-13)
    model, _, _ = reference(x[1], y, train[:, 2], 1.0)
    difference = np.abs(solution.weight_GDFC[1, :, 2].numpy().T - model.coef_)
    assert difference.max() < 1e-5, f"largest {difference.max():.2g}, mean {difference.mean():.2g}"


def test_two_classes_cost_what_they_cost_in_scikit_learn():
    x, y, train = make_problem(dtype=np.float64)
    y = torch.stack([y[:, 0] | y[:, 1], y[:, 2] | y[:, 3]], dim=1)
    solution = solve(x, y, train, tolerance=1e-13)
    model, X, objective = reference(x[0], y, train[:, 0], 1.0)
    assert float(solution.objective_GF[0, 0]) == pytest.approx(objective, rel=1e-7)
    np.testing.assert_allclose(solution.logits(x, 0)[0].softmax(-1), model.predict_proba(X), atol=1e-5)


def test_sigmoid_is_one_binary_regression_per_class():
    x, _, train = make_problem(dtype=np.float64)
    y = torch.from_numpy(np.random.default_rng(1).integers(0, 2, (90, CLASSES)))
    solution = solve(x, y, train, loss="sigmoid", tolerance=1e-13)
    total = 0
    for c in range(CLASSES):
        one_against_rest = torch.stack([1 - y[:, c], y[:, c]], dim=1)
        model, X, objective = reference(x[1], one_against_rest, train[:, 1], 1.0)
        total += objective
        np.testing.assert_allclose(solution.logits(x, 1)[1, :, c], model.decision_function(X), atol=1e-4)
    assert float(solution.objective_GF[1, 1]) == pytest.approx(total, rel=1e-7)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_problem_ends_the_same_whatever_it_is_batched_with(loss):
    x, y, train = make_problem(layers=3, dtype=np.float64)
    together = solve(x, y, train, loss=loss, tolerance=1e-12)
    for layer in (2, 0):
        for fold in (1, 2):
            alone = solve(x[layer : layer + 1], y, train[:, fold : fold + 1], loss=loss, tolerance=1e-12)
            torch.testing.assert_close(
                alone.weight_GDFC[0, :, 0], together.weight_GDFC[layer, :, fold], atol=1e-5, rtol=0
            )


def test_the_same_problem_gives_the_same_bits():
    problem = make_problem()
    assert torch.equal(solve(*problem).weight_GDFC, solve(*problem).weight_GDFC)


def test_clips_outside_a_fold_do_not_touch_its_model():
    x, y, train = make_problem()
    before = solve(x, y, train[:, :1])
    outside = ~train[:, 0]
    x[:, outside] += 100 * torch.randn(2, int(outside.sum()), 30, generator=torch.Generator().manual_seed(0))
    y[outside] = y[outside].roll(1, dims=1)
    after = solve(x, y, train[:, :1])
    torch.testing.assert_close(before.mean_GFD, after.mean_GFD, rtol=0, atol=0)
    torch.testing.assert_close(before.objective_GF, after.objective_GF, rtol=1e-4, atol=0)
    torch.testing.assert_close(before.weight_GDFC, after.weight_GDFC, rtol=0, atol=2e-3)


def test_a_class_without_training_clips_is_never_predicted_and_breaks_nothing():
    x, y, train = make_problem()
    train[y[:, 2] == 1, 1] = False
    solution = solve(x, y, train)
    logits = solution.logits(x, 1)
    assert (logits[..., 2] == -torch.inf).all() and logits[..., [0, 1, 3]].isfinite().all()
    model, X, objective = reference(x[0], y, train[:, 1], 1.0)
    assert float(solution.objective_GF[0, 1]) == pytest.approx(objective, rel=1e-4)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_fold_with_one_class_and_a_label_that_all_or_none_have_are_harmless(loss):
    x, y, train = make_problem()
    train[y[:, 0] == 0, 0] = False
    solution = solve(x, y, train, loss=loss)
    assert solution.converged_GF.all() and solution.weight_GDFC.isfinite().all()
    assert not solution.weight_GDFC[:, :, 0].any()


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_classes_far_apart_are_no_trouble(loss):
    """The first step then overshoots to where the loss and its slope are exactly zero in float32."""
    rng = np.random.default_rng(0)
    y = np.arange(200) % 10
    x = rng.normal(size=(1, 200, 150)) + 3 * rng.normal(size=(10, 150))[y]
    solution = solve(
        torch.from_numpy(x.astype(np.float32)),
        torch.nn.functional.one_hot(torch.from_numpy(y)),
        torch.ones(200, 1, dtype=torch.bool),
        loss=loss,
    )
    assert solution.converged_GF.all() and int(solution.iterations_GF) < 100


def test_a_problem_that_is_stopped_early_says_so():
    solution = solve(*make_problem(), max_iterations=3)
    assert not solution.converged_GF.any() and (solution.iterations_GF == 3).all()


def test_preconditioning_saves_iterations_and_changes_nothing_else(monkeypatch):
    problem = make_problem(clips=300, dim=100, dtype=np.float64)
    with_it = solve(*problem, tolerance=1e-12)
    monkeypatch.setattr(solver, "PRECONDITION_MAX_DIM", 0)
    without = solve(*problem, tolerance=1e-12)
    assert (with_it.iterations_GF < without.iterations_GF).all()
    torch.testing.assert_close(with_it.weight_GDFC, without.weight_GDFC, atol=1e-5, rtol=0)
