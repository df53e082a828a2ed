"""Extraction in one process: open, find what is to be done, run the shards, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from whisper_at_cli.extract.backbones.custom import clip_samples
from whisper_at_cli.extract.backbones.precision import cost_note
from whisper_at_cli.extract.cache.schema import METADATA
from whisper_at_cli.extract.cache.store import location
from whisper_at_cli.extract.datasets import Dataset
from whisper_at_cli.extract.devices import FITTING, fitting_batch_size
from whisper_at_cli.extract.machine import cores
from whisper_at_cli.extract.pipeline.decode_pool import DecodePool
from whisper_at_cli.extract.pipeline.options import ExtractOptions
from whisper_at_cli.extract.pipeline.prepare import (
    batch_size_of,
    clips_to_do,
    compile_backbone,
    open_backbone,
    open_cache,
    open_clips,
    restored,
    say_notes,
    seconds_of,
)
from whisper_at_cli.extract.pipeline.report import ExtractReport, report_of
from whisper_at_cli.extract.pipeline.shard_run import ShardRun
from whisper_at_cli.extract.progress import Progress


def extract(
    dataset: str | Path | Dataset, cache: str | Path, options: ExtractOptions | None = None, *,
    progress: Progress | None = None, notify: Callable[[str], None] | None = None, **given: Any,
) -> ExtractReport:  # fmt: skip
    """Run a frozen encoder over a dataset once and keep every layer, pooled to 25 frames, in a cache.

    Options are an ExtractOptions, or its fields as keywords; `model` is needed. A cache that exists is continued, and
    follows the dataset: new clips are added; labels, folds and splits become those of the dataset. Clips that are gone
    are an error, or dropped with `prune`; clips whose audio has changed are an error, or done again with `update`. A
    clip that cannot be read is reported and marked failed; the others go on. One whose file was missing is done as soon
    as the file is there. With `repair`, clips that failed or that `verify` finds damaged are done again. `notify` gets
    each note on how the dataset was read before encoding begins; the report has them too.
    Raises UsageError or CacheError where nothing can be done as asked.
    """
    started = time.perf_counter()
    options = ExtractOptions.of(options, given)
    restored_files = restored(cache) if options.repair else None
    new = not location(cache).exists(METADATA)
    with DecodePool(options.workers or cores()) as pool:
        command = options.command(dataset, cache)
        dataset = open_clips(dataset, pool, options, look=new)
        if new:
            pool.start(len(dataset))  # they get ready while weights are loaded
        backbone = open_backbone(cache, options)
        samples = clip_samples(backbone, seconds_of(dataset, options))
        size = options.batch_size or fitting_batch_size(backbone, samples, options.dtype)
        notes = [*dataset.notes, cost_note(backbone)]
        writer, dataset, changed = open_cache(cache, dataset, backbone, size, options, command)
        with writer:
            notes += [restored_files, changed]
            if options.batch_size is None:
                size, note = batch_size_of(writer.cache.attributes["made"], backbone.device, size)
                notes.append(note)
            if options.compile:
                compile_backbone(backbone, size)
            redo = clips_to_do(writer, dataset, options.repair)
            said = say_notes(notes, notify)
            pool.start(int((redo & writer.mine()).sum()))
            run = ShardRun(backbone, writer, redo, samples=samples, batch_size=size, progress=progress)
            run.from_pool(pool, dataset)
            said += say_notes([FITTING.note(backbone, samples, size)], notify)
            report = report_of(
                writer, dataset, run.done, time.perf_counter() - started, run.encoder_busy, run.disk_wait_seconds
            )
            return replace(report, notes=said, redone_in_float32=run.redone)
