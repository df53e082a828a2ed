"""LayerProbe is a scikit-learn classifier, and the same one as StandardScaler and LogisticRegression in a row."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from whisper_at_cli.probe import LayerProbe


@parametrize_with_checks([LayerProbe()])
def test_layer_probe_keeps_every_rule_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_layer_probe_equals_scaler_and_logistic_regression(classes):
    rng = np.random.default_rng(classes)
    X, y = rng.normal(size=(150, 20)) * 10.0 ** rng.integers(-3, 3, 20) + 5, rng.integers(0, classes, 150)
    ours = LayerProbe(strength=0.3, tolerance=1e-13).fit(X, y)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, tol=1e-9, max_iter=5000)).fit(X, y)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-5)
    np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(X), atol=1e-4)
    assert ours.coef_.shape == theirs[-1].coef_.shape and ours.intercept_.shape == theirs[-1].intercept_.shape


def test_a_probe_that_stops_early_says_so():
    rng = np.random.default_rng(0)
    with pytest.warns(UserWarning, match="stopped after 2 iterations"):
        LayerProbe(max_iterations=2).fit(rng.normal(size=(50, 5)), rng.integers(0, 3, 50))
