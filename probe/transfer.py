"""Training on one cache and testing on another: the two as one, with a split in place of folds.

Classes are matched by name; clips without a class that both have take no part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from whisper_at_cli.extract import notes
from whisper_at_cli.extract.cache import CacheSpec, FeatureCache
from whisper_at_cli.extract.cache.sources import source_recordings
from whisper_at_cli.extract.errors import UsageError


class TransferCaches:
    """Clips of `train`, then those of `test`, as far as a probe asks a cache for them. Rows count through both.

    N clips of both together. Raises UsageError where the caches are of different backbones or share no two classes.
    """

    def __init__(self, train: FeatureCache, test: FeatureCache):
        _check_backbones(train, test)
        self.caches, self.first_test = (train, test), len(train)
        self.path, self.dataset = f"{train.path} and {test.path}", train.dataset
        names = [cache.spec.class_names for cache in self.caches]
        self.matched = tuple(name for name in names[0] if name in names[1])
        self.left_out = tuple([name for name in of if name not in self.matched] for of in names)
        if len(self.matched) < 2:
            raise UsageError(
                f"{train.path} and {test.path} have {len(self.matched)} class names in common, and at least 2 are "
                f"needed; the first has {notes.listed(names[0])}, the second {notes.listed(names[1])}"
            )
        self.labels = np.concatenate(
            [
                cache.labels[:, [of.index(name) for name in self.matched]]
                for cache, of in zip(self.caches, names, strict=True)
            ]
        )
        self.done = np.concatenate([cache.done for cache in self.caches]) & self.labels.any(axis=1)
        self.ids, self.paths = (
            np.concatenate([getattr(cache, column) for cache in self.caches]) for column in ("ids", "paths")
        )
        self.fold = np.zeros(len(self.ids), dtype=np.int16)
        self.split = np.repeat(np.array(["train", "test"], dtype=object), [len(cache) for cache in self.caches])

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def spec(self) -> CacheSpec:
        """That of the training cache, with the classes that both have."""
        return dataclasses.replace(self.caches[0].spec, class_names=self.matched)

    def notes(self) -> list[str]:
        """What matched and what was left out, and clips that both caches have by their ids."""
        train, test = self.caches
        found = [
            f"classes matched by name: {len(self.matched)} ({notes.listed(self.matched)}); left out, as only one cache "
            f"has them: {len(self.left_out[0])} of {train.path} ({notes.listed(self.left_out[0]) or 'none'}), "
            f"{len(self.left_out[1])} of {test.path} ({notes.listed(self.left_out[1]) or 'none'})"
        ]
        if both := len(np.intersect1d(train.ids.astype(str), test.ids.astype(str))):
            found.append(
                f"{both} clips have the same id in both caches; scores are too high if they are the same sounds"
            )
        return found

    def sources(self, rows: np.ndarray) -> np.ndarray:
        """(n,) str: which recording each of these clips was cut from."""
        return self._of_each(rows, lambda cache, here: source_recordings(cache.ids, cache.paths, cache.dataset)[here])

    def mean(self, *, layer: int, rows: np.ndarray) -> np.ndarray:
        """(n, D) float32."""
        return self._of_each(rows, lambda cache, here: cache.mean(layer=layer, rows=here))

    def layer(self, layer: int, *, rows: np.ndarray) -> np.ndarray:
        """(n, T, D) float32."""
        return self._of_each(rows, lambda cache, here: cache.layer(layer, rows=here))

    def _of_each(self, rows: np.ndarray, read: Callable[[FeatureCache, np.ndarray], np.ndarray]) -> np.ndarray:
        """What `read` gives for ascending rows, those of the first cache before those of the second."""
        in_test = rows >= self.first_test
        parts = ((self.caches[0], rows[~in_test]), (self.caches[1], rows[in_test] - self.first_test))
        return np.concatenate([read(cache, here) for cache, here in parts if len(here)])


def _check_backbones(train: FeatureCache, test: FeatureCache) -> None:
    one, other = train.spec, test.spec
    if (one.backbone, one.weights_sha256) == (other.backbone, other.weights_sha256):
        return
    said = [f"{cache.path} is of {cache.spec.backbone} ({cache.spec.weights_sha256[:8]})" for cache in (train, test)]
    raise UsageError(f"{said[0]}, {said[1]}; a probe can only be tested on features of the backbone it trained on")
