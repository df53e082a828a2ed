"""A cache follows its dataset: what differs is found, named, and brought into the cache before anything is encoded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.cache.changes import Changes, changes, refuse
from whisper_at_cli.extract.cache.mend import mend_columns
from whisper_at_cli.extract.cache.rebuild import Plan, rebuild, recover
from whisper_at_cli.extract.cache.schema import METADATA, CacheSpec, ClipTable
from whisper_at_cli.extract.cache.store import location
from whisper_at_cli.extract.cache.verify import column_problems
from whisper_at_cli.extract.cache.writer import CacheWriter, refuse_settings
from whisper_at_cli.extract.datasets import Dataset
from whisper_at_cli.extract.datasets.digests import source_digests
from whisper_at_cli.extract.errors import CacheError

COPIED = (
    "the times of all audio files differ from when they were extracted, and nothing else does: taken for a copy of the "
    "same files"
)
STATUS_MENDED = "damaged status of clips was rewritten: "
NAMED = 3  # problems that a note names
FOLLOWS = "the dataset has changed; the cache now follows it: "


@dataclass(frozen=True)
class Followed:
    """A dataset in the order of its cache."""

    dataset: Dataset
    table: ClipTable
    note: str | None = None  # what was changed in the cache, or was not taken for a change


def follow(
    cache: str | Path, dataset: Dataset, spec: CacheSpec, *, slot: tuple[int, int] = (1, 1), update: bool = False,
    prune: bool = False, repair: bool = False,
) -> Followed:  # fmt: skip
    """Have a cache that exists hold the clips, labels, folds and splits of `dataset`.

    New clips are put behind the others. Clips whose audio has changed since it was extracted are marked to be extracted
    again with `update`, clips that the dataset no longer has are dropped with `prune`; else both are refused. With
    `repair`, columns of the cache that are damaged are written again first. Raises CacheError for what is refused,
    where settings differ, and where other processes are at work on the cache.
    """
    table = replace(dataset.table(sparse=True), digests=source_digests(dataset))
    store = location(cache)
    if "://" not in str(cache):
        recover(Path(cache))
    if not store.exists(METADATA):
        return Followed(dataset, table)
    old = FeatureCache.open(cache)
    refuse_settings(old, spec, classes=False)
    status = _damaged_status(old) if repair else None
    mended = _mended(cache, old, spec, table, slot) if repair else None
    old = FeatureCache.open(cache) if mended else old
    found = changes(old, spec, table)
    if (found.order == np.arange(len(dataset))).all():
        ordered, columns = dataset, table
    else:
        ordered, columns = dataset.part(found.order.tolist()), table.take(found.order)
    if not found.any:
        return Followed(ordered, columns, _joined(status, mended))
    refuse(found, old, update=update, prune=prune)
    followed = _changed(cache, old, spec, found, Followed(ordered, columns), slot)
    return replace(followed, note=_joined(status, mended, followed.note))


def _joined(*notes: str | None) -> str | None:
    return "; ".join(note for note in notes if note) or None


def _damaged_status(old: FeatureCache) -> str | None:
    """A note on what is damaged of what is known of the clips: it is written again when the process ends."""
    problems = [problem for _, problem in old.clip_status.all_problems()]
    more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
    return f"{STATUS_MENDED}{'; '.join(problems[:NAMED])}{more}" if problems else None


def _mended(
    cache: str | Path, old: FeatureCache, spec: CacheSpec, table: ClipTable, slot: tuple[int, int]
) -> str | None:
    """A note on the columns that were damaged and are written again from the dataset, if any were."""
    names = tuple(column_problems(old))
    if not names:
        return None
    listed = ", ".join(names)
    if "://" in str(cache):
        raise CacheError(f"{cache} has damaged columns ({listed}); a cache in a bucket cannot be mended: restore it")
    if slot != (1, 1):
        raise CacheError(f"{cache} has damaged columns ({listed}); run this command once without --shard to mend them")
    mend_columns(Path(cache), names, spec, table)
    return f"columns of the cache that were damaged are written again from the dataset: {listed}"


def _changed(
    cache: str | Path, old: FeatureCache, spec: CacheSpec, found: Changes, followed: Followed, slot: tuple[int, int]
) -> Followed:  # fmt: skip
    """Write the changes, if this process may."""
    said = found.described()
    copied = COPIED if found.copied else None
    if not said and old.has_digests:
        if slot == (1, 1):
            CacheWriter.join(cache).update_digests(followed.table.digests)
        return replace(followed, note=copied)
    if "://" in str(cache) or slot != (1, 1):
        if not said:  # nothing but what is known of files that are still to be extracted
            return followed
        how = (
            "a cache in a bucket cannot follow it: choose another address"
            if "://" in str(cache)
            else "run once: whisper-at-cli sync DATASET CACHE, then this command again"
        )
        raise CacheError(f"the dataset has changed since {cache} was made ({said}); {how}")
    made = {name: value for name, value in old.attributes.get("made", {}).items() if name != "limit"}
    made |= {"updated": datetime.now(UTC).isoformat(timespec="seconds")}
    rebuild(Path(cache), Plan(spec, followed.table, found.rows, found.audio), made)
    return replace(followed, note=FOLLOWS + said if said else copied)
