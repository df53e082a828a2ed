"""A cache follows its dataset after an edit, without anything being encoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from whisper_at_cli.extract.cache import FeatureCache, Status
from whisper_at_cli.extract.datasets import Dataset
from whisper_at_cli.extract.machine import cores
from whisper_at_cli.extract.pipeline.decode_pool import DecodePool
from whisper_at_cli.extract.pipeline.follow import FOLLOWS, follow
from whisper_at_cli.extract.pipeline.options import ReadOptions
from whisper_at_cli.extract.pipeline.prepare import open_clips, say_notes


@dataclass(frozen=True)
class SyncReport:
    """What a cache holds after it was made to follow its dataset."""

    cache: str
    clips: int
    pending: int  # to be extracted
    changed: str  # what was changed, in words; empty for nothing
    notes: tuple[str, ...]  # how the dataset was read


def sync(
    dataset: str | Path | Dataset, cache: str | Path, options: ReadOptions | None = None, *, update: bool = False,
    prune: bool = False, notify: Callable[[str], None] | None = None,
) -> SyncReport:  # fmt: skip
    """Have a cache follow its dataset without encoding anything; what is left to be encoded is pending then.

    Raises UsageError where there is no such cache or dataset, CacheError where `follow` does.
    """
    made_with = FeatureCache.open(cache).spec
    with DecodePool(cores()) as pool:
        opened = open_clips(dataset, pool, options or ReadOptions())
    spec = replace(made_with, class_names=opened.class_names)
    followed = follow(cache, opened, spec, update=update, prune=prune)
    now = FeatureCache.open(cache)
    said = say_notes([*opened.notes, followed.note], notify)
    note = followed.note or ""
    changed = note.removeprefix(FOLLOWS) if note.startswith(FOLLOWS) else ""
    return SyncReport(str(cache), len(now), int((now.status == Status.PENDING).sum()), changed, said)
