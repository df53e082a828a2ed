"""What an extraction did."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from whisper_at_cli.extract.cache.schema import Status
from whisper_at_cli.extract.cache.writer import CacheWriter
from whisper_at_cli.extract.datasets import Dataset
from whisper_at_cli.extract.errors import MISSING


@dataclass(frozen=True)
class Failure:
    """A clip that could not be extracted."""

    id: str
    path: str
    error: str


@dataclass(frozen=True)
class ClipNote:
    """What a user should know of a clip that was extracted, such as how much of its file was lost."""

    id: str
    path: str
    note: str


@dataclass(frozen=True)
class ExtractReport:
    """What a run did. `written`, `skipped` and `failed` add up to `clips`, all counted in this run's share.

    Of the failed clips, `missing` are those whose file is not there; `coverage` is the share of clips whose file is.
    `missing_expected` says that the dataset is one that nobody has whole.

    `encoder_busy` is the share of the time in which the encoder had work: 1 is as fast as this encoder gets, less means
    that it waited for decoding, or for the disk, which held it back for `disk_wait_seconds`.
    """

    cache: str
    clips: int
    written: int
    skipped: int
    failed: int
    failures: tuple[Failure, ...]
    seconds: float
    clips_per_second: float
    encoder_busy: float
    disk_wait_seconds: float
    missing: int = 0
    coverage: float = 1.0
    missing_expected: bool = False
    notes: tuple[str, ...] = ()  # on how the dataset was read, and on what made the run slow
    root: str = ""  # folder or address that the paths of clips are relative to
    clip_notes: tuple[ClipNote, ...] = ()
    redone_in_float32: int = 0  # clips that were not finite in less, and were encoded again

    @property
    def ok(self) -> bool:
        """Whether all was done that could be expected: missing clips may be, but not all of them."""
        excused = self.missing if self.missing_expected and self.missing < self.clips else 0
        return self.failed <= excused


def report_of(
    writer: CacheWriter, dataset: Dataset, written: int, seconds: float, encoder_busy: float, disk_wait_seconds: float
) -> ExtractReport:
    """What a run over this slot's clips did, from what the cache says now."""
    mine, status, clips = writer.mine(), writer.cache.status, dataset.columns
    failed_rows = np.flatnonzero(mine & (status == Status.FAILED))
    errors = writer.cache.errors
    noted_rows = np.flatnonzero(mine & (status == Status.DONE) & (errors != ""))
    notes = tuple(ClipNote(clips[row].id, clips[row].path, str(errors[row])) for row in noted_rows.tolist())
    failures = tuple(Failure(clips[row].id, clips[row].path, str(errors[row])) for row in failed_rows.tolist())
    missing, clips_here = sum(failure.error.startswith(MISSING) for failure in failures), int(mine.sum())
    return ExtractReport(
        cache=str(writer.path), clips=clips_here, written=written,
        skipped=int((mine & (status == Status.DONE)).sum()) - written, failed=len(failures), failures=failures,
        missing=missing, coverage=1 - missing / max(1, clips_here), missing_expected=dataset.missing_expected,
        notes=dataset.notes, root=dataset.place, clip_notes=notes, seconds=round(seconds, 3),
        clips_per_second=round(written / max(seconds, 1e-9), 2),
        encoder_busy=round(encoder_busy, 3), disk_wait_seconds=round(disk_wait_seconds, 3),
    )  # fmt: skip
