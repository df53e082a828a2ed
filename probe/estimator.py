"""The probe of one layer as a scikit-learn estimator, for pipelines, grid searches and features of one's own."""

from __future__ import annotations

import warnings
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from whisper_at_cli.probe.solver import MAX_ITERATIONS, TOLERANCE, solve


class LayerProbe(ClassifierMixin, BaseEstimator):
    """Standardisation and logistic regression in one: X (n, D) features of one layer, y (n,) classes.

    `strength` is scikit-learn's C. Learned: `classes_` (C,); `coef_` (C, D) and `intercept_` (C,), which take X as it
    is, one row instead of C with two classes; `n_iter_`, the iterations it took.
    """

    def __init__(self, strength: float = 1.0, tolerance: float = TOLERANCE, max_iterations: int = MAX_ITERATIONS):
        self.strength = strength
        self.tolerance = tolerance
        self.max_iterations = max_iterations

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        features, labels = validate_data(self, X, y, dtype=[np.float64, np.float32], ensure_min_samples=2)
        check_classification_targets(labels)
        if not self.strength > 0:
            raise ValueError(f"strength must be positive; it is {self.strength}")
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"a probe needs 2 classes to tell apart; y has only the class {self.classes_[0]!r}")
        solution = solve(
            torch.tensor(features)[None],
            torch.nn.functional.one_hot(torch.from_numpy(numbers)),
            torch.ones(len(features), 1, dtype=torch.bool),
            strength=self.strength,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
        )
        self.n_iter_ = int(solution.iterations_GF)
        if not solution.converged_GF:
            warnings.warn(
                f"stopped after {self.n_iter_} iterations; raise max_iterations or lower strength",
                ConvergenceWarning,
                stacklevel=2,
            )
        coef, intercept = solution.for_unstandardised(fold=0)
        if len(self.classes_) == 2:
            coef, intercept = coef[:, 1:] - coef[:, :1], intercept[1:] - intercept[:1]
        self.coef_, self.intercept_ = coef.T.numpy(), intercept.numpy()
        return self

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """Logits (n, C); with two classes (n,), positive for the second."""
        check_is_fitted(self)
        features = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        logits = features @ self.coef_.T + self.intercept_
        return logits[:, 0] if len(self.classes_) == 2 else logits

    def predict(self, X: ArrayLike) -> np.ndarray:
        logits = self.decision_function(X)
        return self.classes_[(logits > 0).astype(int) if logits.ndim == 1 else logits.argmax(axis=1)]

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """(n, C), in the order of `classes_`."""
        logits = self.decision_function(X)
        if logits.ndim == 1:
            logits = np.stack([np.zeros_like(logits), logits], axis=1)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)
