"""Held-out predictions: the scores that each layer or head gave to clips which it had not trained on.

Everything that is said of a result (metrics, intervals, tests, comparisons) can be computed from these alone. A file of
them is a NumPy .npz with the arrays named as the fields below.

K scored models (the layers of a probe, or heads), N clips, C classes. A head that was trained with several seeds is
there once for each seed, under one name; what is said of it is the mean over its seeds.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.cache.store import LocalStore
from whisper_at_cli.extract.errors import UsageError, WhisperATError

FORMAT_VERSION = 1
SHOWN = 8  # names in a message


@dataclass(frozen=True, eq=False)
class Predictions:
    """Scores of N clips by models that had not trained on them. Raises UsageError where the arrays do not fit."""

    ids: np.ndarray  # (N,) str, unique
    recordings: np.ndarray  # (N,) str: the recording that a clip was cut from
    labels: np.ndarray  # (N, C) uint8, 0 or 1
    class_names: tuple[str, ...]  # (C,)
    folds: np.ndarray  # (N,) int: clips with the same number were scored by the same models
    names: tuple[str, ...]  # (K,) such as layer-3 or wa-mlp
    seeds: np.ndarray  # (K,) int
    scores: np.ndarray  # (K, N, C) float32, logits or probabilities; -inf where a model does not know the class
    source: str = ""  # where they come from

    def __post_init__(self) -> None:
        N, C, K = len(self.ids), len(self.class_names), len(self.names)
        shapes = {
            "recordings": (N,), "labels": (N, C), "folds": (N,), "seeds": (K,), "scores": (K, N, C),
        }  # fmt: skip
        for name, shape in shapes.items():
            found = getattr(self, name).shape
            if found != shape:
                raise UsageError(
                    f"predictions: {name} has shape {found}; {N} ids, {K} names and {C} classes need {shape}"
                )
        if not N or not K:
            raise UsageError(f"predictions hold {N} clips and {K} models; at least one of each is needed")
        if len(set(self.ids.tolist())) < N:
            raise UsageError("predictions: an id stands there twice; every clip needs an id of its own")
        if len(set(zip(self.names, self.seeds.tolist(), strict=True))) < K:
            raise UsageError("predictions: a name stands there twice with the same seed")
        if np.isnan(self.scores).any() or np.isposinf(self.scores).any():
            raise WhisperATError("predictions: some scores are not finite; verify the cache, or train again")

    @property
    def single_label(self) -> bool:
        """Whether every clip has exactly one label, so that accuracy is defined."""
        return bool((self.labels.sum(axis=1) == 1).all())

    @property
    def metric(self) -> str:
        """accuracy where it is defined, else mAP."""
        return "accuracy" if self.single_label else "mAP"

    @property
    def systems(self) -> tuple[str, ...]:
        """The different names, in order; seeds of one head count once."""
        return tuple(dict.fromkeys(self.names))

    def runs(self, system: str) -> np.ndarray:
        """Where in `names` the seeds of a system are."""
        return np.array([at for at, name in enumerate(self.names) if name == system])

    def only(self, system: str) -> Predictions:
        """One system alone. Raises UsageError where there is none of this name."""
        if system not in self.systems:
            shown = ", ".join(self.systems[:SHOWN]) + (", ..." if len(self.systems) > SHOWN else "")
            raise UsageError(f"{self.source or 'the file'} has no {system}; it has {shown}")
        at = self.runs(system)
        return replace(self, names=tuple(self.names[i] for i in at), seeds=self.seeds[at], scores=self.scores[at])

    def clips(self, at: np.ndarray) -> Predictions:
        """These clips alone, in this order."""
        return replace(
            self, ids=self.ids[at], recordings=self.recordings[at], labels=self.labels[at], folds=self.folds[at],
            scores=self.scores[:, at],
        )  # fmt: skip

    def classes(self, names: tuple[str, ...]) -> Predictions:
        """The same classes in another order. Raises UsageError where they are not the same."""
        if names == self.class_names:
            return self
        if sorted(names) != sorted(self.class_names):
            raise UsageError(
                f"{self.source or 'one file'} has other classes than the file before it; only predictions of the same "
                "classes can be compared"
            )
        at = [self.class_names.index(name) for name in names]
        return replace(self, class_names=names, labels=self.labels[:, at], scores=self.scores[:, :, at])

    def of_chance(self) -> Predictions:
        """The same clips scored by models that do not look at them: the share of each class among the clips of the
        other folds (of all clips, where there is one fold)."""
        scores = np.empty((1, *self.labels.shape), dtype=np.float32)
        for number in np.unique(self.folds):
            here = self.folds == number
            scores[0, here] = self.labels[~here if not here.all() else here].mean(axis=0)
        return replace(self, names=("chance",), seeds=np.zeros(1, dtype=int), scores=scores, source="chance")

    def save(self, path: str | Path) -> None:
        """Write an .npz file, whole or not at all. Raises UsageError for another suffix or a place that refuses it."""
        path = checked_path(path)
        content = io.BytesIO()
        arrays = {
            "ids": self.ids.astype(str), "recordings": self.recordings.astype(str),
            "labels": self.labels.astype(np.uint8), "class_names": np.array(self.class_names, dtype=str),
            "folds": self.folds.astype(np.int64), "names": np.array(self.names, dtype=str),
            "seeds": self.seeds.astype(np.int64), "scores": self.scores.astype(np.float32),
            "source": np.array(self.source), "format_version": np.array(FORMAT_VERSION),
        }  # fmt: skip
        np.savez_compressed(content, allow_pickle=False, **arrays)
        try:
            LocalStore(path.parent).write_whole(path.name, [content.getvalue()])
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def checked_path(path: str | Path) -> Path:
    """Raises UsageError for a file that is not to be called .npz, before any work is done."""
    path = Path(path)
    if path.suffix.lower() != ".npz":
        raise UsageError(f"predictions are saved as .npz; {path.name} has another suffix")
    return path


def load_predictions(path: str | Path) -> Predictions:
    """Predictions from an .npz file. Raises UsageError where there is no such file or it holds something else."""
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UsageError(
            f"{path} does not exist; write it with --predictions of probe, train-head or evaluate"
        ) from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not an .npz file of predictions ({error})") from error
    needed = {"ids", "recordings", "labels", "class_names", "folds", "names", "seeds", "scores"}
    if missing := sorted(needed - set(found)):
        raise UsageError(f"{path} is not a file of predictions: it lacks {', '.join(missing)}")
    version = int(found.get("format_version", FORMAT_VERSION))
    if version != FORMAT_VERSION:
        raise UsageError(f"{path} has format version {version}; this version reads {FORMAT_VERSION}")
    return Predictions(
        ids=found["ids"], recordings=found["recordings"], labels=found["labels"], folds=found["folds"],
        class_names=tuple(found["class_names"].tolist()), names=tuple(found["names"].tolist()), seeds=found["seeds"],
        scores=found["scores"], source=str(path),
    )  # fmt: skip
