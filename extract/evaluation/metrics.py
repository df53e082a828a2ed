"""How good scores are: accuracy, F1, average precision, AUC, d-prime and confusion matrix, computed where scores lie.

Scores may be logits or probabilities: only their order within a class (and, for accuracy, within a clip) matters.
A metric that is undefined for a class (no positives; for AUC also no negatives) is NaN there, and such classes are left
out of the means, counted, and named in `notes`. N clips, C classes, K positives of the class that has most.

Over several folds, which different models scored:
- accuracy is the mean over folds, each fold counting the same however many clips it has (`fold_weights`);
- a class's F1 and the confusion matrix come from the predictions of all folds together;
- a class's average precision ranks every positive among the clips of its own fold, since scores of different models
  share no scale, and takes the mean over all its positives (`class_ap`). mAP is the mean over classes with positives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.extract.errors import WhisperATError

CHUNK_SCORES = 1 << 24  # scores ranked at once, so that a large evaluation takes little memory beyond its scores


@dataclass(frozen=True, eq=False)
class Metrics:
    """All metrics of one evaluation. Means are over the classes for which the metric is defined."""

    accuracy: float  # NaN unless every clip has exactly one label
    mAP: float
    mAUC: float
    d_prime: float  # of mAUC
    class_ap: np.ndarray  # (C,)
    class_auc: np.ndarray  # (C,)
    classes_without_positives: int
    classes_without_negatives: int
    confusion: np.ndarray | None  # (C, C) clips: row the label, column the highest score; None where accuracy is NaN

    @property
    def notes(self) -> list[str]:
        """What a reader of the means has to know."""
        classes, absent, everywhere = (
            len(self.class_ap), self.classes_without_positives, self.classes_without_negatives,
        )  # fmt: skip
        found = []
        if absent:
            found.append(f"{absent} of {classes} classes are in none of the clips and do not count in mAP and mAUC")
        if everywhere:
            found.append(f"{everywhere} of {classes} classes are in every clip and do not count in mAUC")
        if math.isinf(self.d_prime):
            found.append(f"mAUC is exactly {self.mAUC:g}, for which d-prime is infinite")
        if math.isnan(self.accuracy):
            found.append("accuracy is undefined: it needs exactly one label on every clip")
        return found


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and population standard deviation of the values that are defined; NaN where none is."""
    defined = [value for value in values if not math.isnan(value)]
    return (float(np.mean(defined)), float(np.std(defined))) if defined else (math.nan, math.nan)


@torch.no_grad()
def evaluate_scores(scores: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> Metrics:
    """Metrics of scores (N, C) against labels (N, C) of 0 and 1; NumPy arrays or tensors, ranked on their device.

    Ties are taken as scikit-learn takes them: clips with the same score pass any threshold together.
    Raises WhisperATError where a score is not finite.
    """
    scores, labels = _checked(scores, labels)
    positives = labels.sum(dim=0, dtype=torch.int32).cpu().numpy()
    class_ap, class_auc = _ap_and_auc(scores.t(), labels.t(), positives)
    confusion = _confusion(scores, labels)
    mAUC = mean_of_defined(class_auc)
    return Metrics(
        accuracy=math.nan if confusion is None else float(confusion.trace() / len(scores)),
        mAP=mean_of_defined(class_ap), mAUC=mAUC, d_prime=d_prime(mAUC), class_ap=class_ap, class_auc=class_auc,
        classes_without_positives=int((positives == 0).sum()),
        classes_without_negatives=int(((positives == len(labels)) & (positives > 0)).sum()), confusion=confusion,
    )  # fmt: skip


def d_prime(auc: float) -> float:
    """Distance between two unit normals that an observer would tell apart with this AUC."""
    if auc in (0, 1):
        return math.copysign(math.inf, auc - 0.5)
    return math.sqrt(2) * NormalDist().inv_cdf(auc) if 0 < auc < 1 else math.nan


def fold_weights(folds: np.ndarray) -> np.ndarray:
    """(N,) weight of each clip, 1 in all: every fold counts the same."""
    _, of_clip, clips = np.unique(folds, return_inverse=True, return_counts=True)
    return 1 / (len(clips) * clips[of_clip])


def class_f1(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(C,) F1 of class numbers (n,); NaN for a class that is not among the true ones."""
    hits = np.bincount(truth[truth == predicted], minlength=classes)
    true, claimed = np.bincount(truth, minlength=classes), np.bincount(predicted, minlength=classes)
    return np.where(true > 0, 2 * hits / np.maximum(true + claimed, 1), np.nan)


def class_ap(labels: np.ndarray, scores: np.ndarray, folds: np.ndarray | None = None) -> np.ndarray:
    """(C,) average precision of scores (N, C), -inf allowed; NaN for a class with no positives.

    With `folds` (N,) a positive is ranked among the clips of its own fold.
    """
    total, positives = np.zeros(labels.shape[1]), np.zeros(labels.shape[1])
    for number in np.unique(folds) if folds is not None else (None,):
        here = slice(None) if number is None else folds == number
        of_fold = torch.from_numpy(labels[here] != 0)
        count = of_fold.sum(dim=0, dtype=torch.int32).numpy()
        ap, _ = _ap_and_auc(torch.from_numpy(np.asarray(scores[here])).t(), of_fold.t(), count)
        total += np.where(count > 0, ap * count, 0)
        positives += count
    return np.where(positives > 0, total / np.maximum(positives, 1), np.nan)


def mean_of_defined(values: np.ndarray) -> float:
    """NaN where no value is defined."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


def _checked(given_scores: np.ndarray | Tensor, given_labels: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
    """As tensors of one shape (N, C) on the scores' device: scores float32 or float64, labels bool."""
    scores, labels = torch.as_tensor(given_scores), torch.as_tensor(given_labels)
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and labels {tuple(labels.shape)} must both be (clips, classes)")
    if scores.device.type == "mps":  # which has no float64
        scores = scores.cpu()
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.to(torch.float32 if scores.is_floating_point() else torch.float64)
    finite = scores.isfinite()
    if not finite.all():
        bad = (~finite).nonzero()
        raise WhisperATError(
            f"{len(bad)} of {scores.numel()} scores are not finite, the first for clip {int(bad[0, 0])} of these: "
            "verify the cache, or train the head again"
        )
    return scores, labels.to(scores.device) != 0


def _confusion(scores: Tensor, labels: Tensor) -> np.ndarray | None:
    N, C = scores.shape
    if not N or (labels.sum(dim=1) != 1).any():
        return None
    cell = labels.to(torch.uint8).argmax(dim=1) * C + scores.argmax(dim=1)
    return torch.bincount(cell, minlength=C * C).view(C, C).cpu().numpy()


def _ap_and_auc(scores_CN: Tensor, labels_CN: Tensor, positives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average precision (precision at each positive, averaged) and AUC (how often a positive outscores a negative, a
    tie counting half) of each class, float64. `positives` counts those of each class.

    Classes with a like number of positives are ranked together, so that few places are padding.
    """
    C, N = scores_CN.shape
    ap, auc = np.full(C, np.nan), np.full(C, np.nan)
    order = np.argsort(-positives, kind="stable")[: int((positives > 0).sum())]
    for some in _alike(order, positives, most=max(1, CHUNK_SCORES // max(1, N))):
        chosen = torch.from_numpy(some).to(scores_CN.device)
        ap[some], auc[some] = _rank_positives(scores_CN[chosen], labels_CN[chosen], positives[some])
    return ap, auc


def _alike(order: np.ndarray, positives: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """These classes, which fall in their number of positives, in runs of at most `most` that at most halve it."""
    first = 0
    while first < len(order):
        within = int((positives[order[first:]] >= positives[order[first]] / 2).sum())
        last = first + min(most, within)
        yield order[first:last]
        first = last


def _rank_positives(scores_CN: Tensor, labels_CN: Tensor, positives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AP and AUC of some classes, all with positives, by each positive's place among all scores and among positives.

    All counts are whole numbers; only the final divisions round. Overwrites `scores_CN`.
    """
    C, N = scores_CN.shape
    positives_C = torch.from_numpy(positives.astype(np.int64)).to(scores_CN.device)[:, None]
    most = int(positives.max())
    real_CK = torch.arange(most, device=scores_CN.device) < positives_C
    hits_CK = _ascending(scores_CN.masked_fill(~labels_CN, torch.inf))[:, :most].contiguous()  # inf where there is none
    all_CN = _ascending(scores_CN)
    reached_all, above_all = (N - torch.searchsorted(all_CN, hits_CK, right=right) for right in (False, True))
    reached, above = (  # padding sorts behind every positive, so it is not counted before one
        positives_C - torch.searchsorted(hits_CK, hits_CK, right=right) for right in (False, True)
    )
    precision = (reached.double() / reached_all.clamp(min=1)).masked_fill(~real_CK, 0)
    ap = precision.sum(dim=1) / positives_C[:, 0]
    negatives_C = N - positives_C
    twice_beaten = 2 * negatives_C - (reached_all - reached) - (above_all - above)
    wins = twice_beaten.masked_fill(~real_CK, 0).sum(dim=1).double()
    auc = wins / (2 * positives_C * negatives_C)[:, 0]  # 0 / 0 without negatives: NaN
    return ap.cpu().numpy(), auc.cpu().numpy()


def _ascending(values: Tensor) -> Tensor:
    """Each row sorted, in place on a CPU: NumPy's sort took 26 ms for (527, 20000) float32 there, torch's 640."""
    if values.device.type != "cpu":
        return values.sort(dim=1).values
    values.numpy().sort(axis=1)
    return values
