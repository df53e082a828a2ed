"""Extraction in one process: open, find what is to be done, run the shards, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from whisper_at_cli.extract.backbones.custom import clip_samples
from whisper_at_cli.extract.backbones.load import Backbone
from whisper_at_cli.extract.backbones.precision import cost_note
from whisper_at_cli.extract.backbones.recognise import check_model
from whisper_at_cli.extract.cache.schema import DEFAULT_SHARD_MB, METADATA
from whisper_at_cli.extract.cache.store import location
from whisper_at_cli.extract.datasets import Dataset
from whisper_at_cli.extract.devices import FITTING, fitting_batch_size
from whisper_at_cli.extract.machine import cores
from whisper_at_cli.extract.pipeline.decode_pool import DecodePool
from whisper_at_cli.extract.pipeline.prepare import (
    batch_size_of,
    check_numbers,
    clips_to_do,
    compile_backbone,
    open_backbone,
    open_cache,
    open_clips,
    restored,
    say_notes,
)
from whisper_at_cli.extract.pipeline.report import ExtractReport, report_of
from whisper_at_cli.extract.pipeline.shard_run import ShardRun
from whisper_at_cli.extract.progress import Progress


def extract(
    dataset: str | Path | Dataset, cache: str | Path, *, model: str | Path | Backbone, format: str = "auto",
    labels: str | Path | None = None, window: float | None = None, hop: float | None = None,
    clip_seconds: float | None = None, dtype: str = "float16", precision: str = "auto", device: str = "auto",
    batch_size: int | None = None, workers: int | None = None, shard_mb: float = DEFAULT_SHARD_MB,
    shard: tuple[int, int] = (1, 1), repair: bool = False, update: bool = False, prune: bool = False,
    compile: bool = False, limit: int | None = None,
    progress: Progress | None = None, notify: Callable[[str], None] | None = None,
) -> ExtractReport:  # fmt: skip
    """Run a frozen encoder over a dataset once and keep every layer, pooled to 25 frames, in a cache.

    A cache that exists is continued, and follows the dataset: new clips are added; labels, folds and splits become
    those of the dataset. Clips that are gone are an error, or dropped with `prune`; clips whose audio has changed are
    an error, or done again with `update`. A clip that cannot be read is reported and marked failed; the others go on.
    One whose file was missing is done as soon as the file is there. With `repair`, clips that failed or that `verify`
    finds damaged are done again. With `window`, and `hop`, in seconds, every file is cut into clips of that length.
    With `limit` the cache holds the first so many clips of the dataset. `notify` gets each note on how the dataset was
    read before encoding begins; the report has them too.
    Raises UsageError or CacheError where nothing can be done as asked.
    """
    started = time.perf_counter()
    check_numbers(batch_size=batch_size, workers=workers, shard_mb=shard_mb, limit=limit)
    if isinstance(model, str | Path):
        check_model(model)
    restored_files = restored(cache) if repair else None
    new = not location(cache).exists(METADATA)
    with DecodePool(workers or cores()) as pool:
        dataset = open_clips(
            dataset, pool, format=format, labels=labels, window=window, hop=hop, clip_seconds=clip_seconds, look=new,
            limit=limit,
        )  # fmt: skip
        if new:
            pool.start(len(dataset))  # they get ready while weights are loaded
        seconds = dataset.clip_seconds if clip_seconds is None else clip_seconds
        backbone = open_backbone(model, cache, device=device, precision=precision)
        samples = clip_samples(backbone, seconds)
        size, notes = batch_size or fitting_batch_size(backbone, samples, dtype), [*dataset.notes, cost_note(backbone)]
        writer, dataset, changed = open_cache(
            cache, dataset, backbone, seconds, dtype, size, shard_mb=shard_mb, slot=shard, limit=limit, update=update,
            prune=prune, repair=repair,
        )  # fmt: skip
        with writer:
            notes += [restored_files, changed]
            if batch_size is None:
                size, note = batch_size_of(writer.cache.attributes["made"], backbone.device, size)
                notes.append(note)
            if compile:
                compile_backbone(backbone, size)
            redo = clips_to_do(writer, dataset, repair)
            said = say_notes(notes, notify)
            pool.start(int((redo & writer.mine()).sum()))
            run = ShardRun(backbone, writer, redo, samples=samples, batch_size=size, progress=progress)
            run.from_pool(pool, dataset)
            said += say_notes([FITTING.note(backbone, samples, size)], notify)
            report = report_of(
                writer, dataset, run.done, time.perf_counter() - started, run.encoder_busy, run.disk_wait_seconds
            )
            return replace(report, notes=said, redone_in_float32=run.redone)
