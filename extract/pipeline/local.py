"""Extraction in one process: open, find what is to be done, run the shards, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from whisper_at_cli.extract.backbones.custom import checked_backbone, clip_samples
from whisper_at_cli.extract.backbones.load import Backbone, load_backbone
from whisper_at_cli.extract.cache.schema import DEFAULT_SHARD_MB
from whisper_at_cli.extract.datasets import Dataset
from whisper_at_cli.extract.devices import cores, fitting_batch_size
from whisper_at_cli.extract.pipeline.prepare import (
    batch_size_of,
    check_numbers,
    clips_to_do,
    compile_backbone,
    open_cache,
    open_clips,
    say_notes,
)
from whisper_at_cli.extract.pipeline.report import ExtractReport, report_of
from whisper_at_cli.extract.pipeline.shard_run import ShardRun
from whisper_at_cli.extract.progress import Progress


def extract(
    dataset: str | Path | Dataset, cache: str | Path, *, model: str | Path | Backbone, format: str = "auto",
    labels: str | Path | None = None, window: float | None = None, hop: float | None = None,
    clip_seconds: float | None = None, dtype: str = "float16", precision: str = "float32", device: str = "auto",
    batch_size: int | None = None, workers: int | None = None, shard_mb: float = DEFAULT_SHARD_MB,
    shard: tuple[int, int] = (1, 1), repair: bool = False, compile: bool = False,
    progress: Progress | None = None, notify: Callable[[str], None] | None = None,
) -> ExtractReport:  # fmt: skip
    """Run a frozen encoder over a dataset once and keep every layer, pooled to 25 frames, in a cache.

    A cache that exists is continued. A clip that cannot be read is reported and marked failed; the others go on. One
    whose file was missing is done as soon as the file is there. With `repair`, clips that failed or that `verify` finds
    damaged are done again. With `window`, and `hop`, in seconds, every file is cut into clips of that length. `notify`
    gets each note on how the dataset was read before encoding begins; the report has them too.
    Raises UsageError or CacheError where nothing can be done as asked.
    """
    started = time.perf_counter()
    check_numbers(batch_size=batch_size, workers=workers, shard_mb=shard_mb)
    dataset = open_clips(
        dataset, format=format, labels=labels, window=window, hop=hop, clip_seconds=clip_seconds, workers=workers
    )
    seconds = dataset.clip_seconds if clip_seconds is None else clip_seconds
    if isinstance(model, str | Path):
        backbone = load_backbone(model, device=device, precision=precision)
    else:
        backbone = checked_backbone(model, "model")
    samples = clip_samples(backbone, seconds)
    if compile:
        compile_backbone(backbone)
    size = batch_size or fitting_batch_size(backbone, samples)
    with open_cache(cache, dataset, backbone, seconds, dtype, size, shard_mb=shard_mb, slot=shard) as writer:
        if batch_size is None:
            size = batch_size_of(writer, size)
        redo = clips_to_do(writer, dataset, repair)
        say_notes(dataset, notify)
        run = ShardRun(dataset, backbone, writer, redo, samples, size, workers or cores(), progress)
        run.all_shards()
        return report_of(
            writer, dataset, run.done, time.perf_counter() - started, run.encoder_busy, run.disk_wait_seconds
        )
