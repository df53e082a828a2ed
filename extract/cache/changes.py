"""How a dataset differs from what a cache holds of it: clip by clip, by id."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from whisper_at_cli.extract.cache.reader import FeatureCache
from whisper_at_cli.extract.cache.schema import CacheSpec, ClipTable, Status
from whisper_at_cli.extract.errors import CacheError
from whisper_at_cli.extract.sparse import SparseLabels

NAMED = 5  # clips that a message names
ROWS_COMPARED = 1 << 15
NEW = -1  # in place of a row of the cache
TIME_BITS = 24  # of a digest, which are of a file's time


def with_time(what: int, time: int) -> int:
    """The digest of a file, not 0, from hashes of what it is and of its time."""
    bits = 64 - TIME_BITS
    return (max(1, what % (1 << bits)) << TIME_BITS) | time % (1 << TIME_BITS)


@dataclass(frozen=True)
class Changes:
    """What has to change so that a cache follows its dataset. M clips are in both, or new."""

    order: np.ndarray  # (M,) int64: rows of the dataset, in the cache's order; new clips come last
    rows: np.ndarray  # (M,) int64: their rows in the cache as it is, NEW for new clips
    audio: np.ndarray  # (M,) bool: clips that are done and whose audio file, or part of it, is another now
    gone: tuple[str, ...]  # ids that the dataset no longer has
    columns: dict[str, int]  # of how many clips which column differs: path, fold, split, labels
    classes: bool = False  # whether the list of classes differs
    digests: bool = False  # whether what is known of the clips' files differs
    copied: bool = False  # whether the times of all files differ and nothing else of them, as in a copy

    @property
    def new(self) -> int:
        return int((self.rows == NEW).sum())

    @property
    def any(self) -> bool:
        """Whether the cache has to be written anew."""
        return bool(self.gone or self.new or self.columns or self.classes or self.digests or self.audio.any())

    def described(self) -> str:
        """Such as `labels of 3 clips, 2 clips added`; empty where there is nothing that a user would care for."""
        parts = [f"{name} of {_count(count)}" for name, count in self.columns.items()]
        parts += [f"audio of {_count(int(self.audio.sum()))}"] if self.audio.any() else []
        parts += ["the list of classes"] if self.classes and "labels" not in self.columns else []
        parts += [f"{_count(self.new)} added"] if self.new else []
        parts += [f"{_count(len(self.gone))} dropped"] if self.gone else []
        return ", ".join(parts)


def changes(cache: FeatureCache, spec: CacheSpec, clips: ClipTable) -> Changes:
    """Compare a cache with the clips of a dataset, whose classes are those of `spec`."""
    found, new = _matched(cache.ids, clips.ids)
    kept = np.flatnonzero(found != NEW)
    order = np.concatenate([found[kept], new])
    rows = np.concatenate([kept, np.full(len(new), NEW, dtype=np.int64)])
    ours, known = order[: len(kept)], cache.digests
    paths_differ = cache.paths[kept] != clips.paths[ours]
    if known is None:
        audio, copied = paths_differ.copy(), False
    else:
        audio, copied = _audio_differs(known[kept], clips.digests[ours])
    done = cache.status[kept] == Status.DONE
    differ = {
        "path": paths_differ & done & ~audio,  # where other files are is found out when they are read
        "fold": cache.fold[kept] != clips.fold[ours],
        "split": cache.split[kept] != clips.split[ours],
        "labels": _labels_differ(cache, spec, kept, clips.labels, ours),
    }
    stale = known is None or bool((known[kept] != clips.digests[ours]).any())
    whole_audio = np.zeros(len(order), dtype=bool)
    whole_audio[: len(kept)] = audio & done
    return Changes(
        order=order, rows=rows, audio=whole_audio,
        gone=tuple(str(cache.ids[row]) for row in np.flatnonzero(found == NEW)),
        columns={name: int(mask.sum()) for name, mask in differ.items() if mask.any()},
        classes=cache.spec.class_names != spec.class_names, digests=stale, copied=copied,
    )  # fmt: skip


def _matched(before: np.ndarray, now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(len(before),) int64: where each id is now, NEW for one that is gone; and where ids are that were not before."""
    if len(before) == len(now) and (before == now).all():
        return np.arange(len(now)), np.zeros(0, dtype=np.int64)
    row_of = {str(name): row for row, name in enumerate(now)}
    found = np.fromiter((row_of.pop(str(name), NEW) for name in before), dtype=np.int64, count=len(before))
    return found, np.array(sorted(row_of.values()), dtype=np.int64)


def _audio_differs(before: np.ndarray, now: np.ndarray) -> tuple[np.ndarray, bool]:
    """(n,) bool: clips whose digests differ, where both are known; and whether that is because files were copied."""
    both = (before != 0) & (now != 0)
    differ = both & (before != now)
    copied = bool(differ.any() and (differ == both).all() and (before >> TIME_BITS == now >> TIME_BITS)[both].all())
    return (np.zeros_like(differ) if copied else differ), copied


def _labels_differ(
    cache: FeatureCache, spec: CacheSpec, rows: np.ndarray, labels: np.ndarray | SparseLabels, ours: np.ndarray
) -> np.ndarray:
    """(len(rows),) bool: clips whose labels, by name, are not those of the dataset, which are rows `ours` of `labels`.

    Many rows at a time, since labels may be sparse.
    """
    differ = np.zeros(len(rows), dtype=bool)
    for first in range(0, len(rows), ROWS_COMPARED):
        some = slice(first, first + ROWS_COMPARED)
        differ[some] = _rows_differ(cache.labels[rows[some]], cache.spec.class_names, labels[ours[some]], spec)
    return differ


def _rows_differ(old: np.ndarray, names: tuple[str, ...], labels: np.ndarray, spec: CacheSpec) -> np.ndarray:
    if names == spec.class_names:
        return (old != labels).any(axis=1)
    index = {name: at for at, name in enumerate(spec.class_names)}
    here = np.zeros_like(labels)
    lost = np.zeros(len(labels), dtype=bool)
    for at, name in enumerate(names):
        if name in index:
            here[:, index[name]] = old[:, at]
        else:
            lost |= old[:, at] != 0
    return lost | (here != labels).any(axis=1)


def refuse(found: Changes, cache: FeatureCache, *, update: bool, prune: bool) -> None:
    """Raise CacheError for changes that cost what is there already, unless the user asked for them."""
    if found.gone and not prune:
        raise CacheError(
            f"the dataset no longer has {_clips(found.gone)} of {cache.path}. To drop what is gone, add --prune; to "
            "keep it, restore the dataset or choose another cache"
        )
    if found.audio.any() and not update:
        names = tuple(str(cache.ids[row]) for row in found.rows[found.audio])
        raise CacheError(
            f"the audio of {_clips(names)} has changed since it was extracted to {cache.path} (another file, part, "
            "size or time). To extract it again, add --update; to keep what is there, restore the files"
        )


def _clips(names: tuple[str, ...]) -> str:
    listed = f"{', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}"
    return f"{_count(len(names))} ({listed})"


def _count(clips: int) -> str:
    return f"{clips} clip{'' if clips == 1 else 's'}"
