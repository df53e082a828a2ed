"""What every engine does before it encodes: check what was asked, open dataset and cache, find the clips to be done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from whisper_at_cli import __version__
from whisper_at_cli.extract import notes
from whisper_at_cli.extract.backbones.custom import checked_backbone
from whisper_at_cli.extract.backbones.encoder import PRECISIONS
from whisper_at_cli.extract.backbones.load import Backbone, EncoderFacts, load_backbone
from whisper_at_cli.extract.backbones.precision import AUTO
from whisper_at_cli.extract.cache.metadata import restore_metadata
from whisper_at_cli.extract.cache.schema import METADATA, CacheSpec, Status, read_attributes, spec_from_attributes
from whisper_at_cli.extract.cache.store import location
from whisper_at_cli.extract.cache.verify import verify
from whisper_at_cli.extract.cache.writer import CacheWriter
from whisper_at_cli.extract.datasets import Dataset, open_dataset, windowed
from whisper_at_cli.extract.datasets.base import as_text
from whisper_at_cli.extract.datasets.look import looked_at
from whisper_at_cli.extract.datasets.windows import Length
from whisper_at_cli.extract.errors import MISSING, UsageError
from whisper_at_cli.extract.pipeline.decode_pool import DecodePool
from whisper_at_cli.extract.pipeline.decode_worker import DONE, measure_length
from whisper_at_cli.extract.pipeline.follow import follow
from whisper_at_cli.extract.pipeline.options import ExtractOptions, ReadOptions


def open_clips(dataset: str | Path | Dataset, pool: DecodePool, options: ReadOptions, *, look: bool = True) -> Dataset:
    """The dataset that was asked for, its files cut into windows where that was asked for too; its first clips.

    With `look` some of its files are looked at, for notes on what is missing or will be cut.
    """

    def lengths(paths: Sequence[str]) -> list[Length | None]:
        return [value if kind == DONE else None for kind, value in pool.map(measure_length, paths)]

    window, hop, clip_seconds, limit = options.window, options.hop, options.clip_seconds, options.limit
    if not isinstance(dataset, Dataset):
        dataset = open_dataset(dataset, format=options.format, labels=options.labels)
    dataset = _first(dataset, limit)  # of so many files, each of which is one window at least
    if look:
        dataset = looked_at(dataset, clip_seconds or dataset.clip_seconds, lengths, windows=window is not None)
    if window is None:
        if hop is not None:
            raise UsageError("hop says how far windows lie apart; give their length too (--window)")
        return dataset
    if clip_seconds not in (None, window):
        raise UsageError(f"windows of {window:g} s are clips of that length; leave out --clip-seconds {clip_seconds:g}")
    return _first(windowed(dataset, window, hop, lengths=lengths), limit)


def seconds_of(dataset: Dataset, options: ReadOptions) -> float:
    """The length of every clip."""
    return dataset.clip_seconds if options.clip_seconds is None else options.clip_seconds


def _first(dataset: Dataset, limit: int | None) -> Dataset:
    return dataset if limit is None or limit >= len(dataset) else dataset.part(range(limit))


def compile_backbone(backbone: Backbone, batch_size: int) -> None:
    """Have a backbone compile itself for batches of this size. Raises UsageError if it cannot."""
    if not hasattr(backbone, "compile"):
        raise UsageError(f"--compile is for Whisper; {backbone.name} cannot be compiled. Leave it out")
    backbone.compile(batch_size)


def restored(cache: str | Path) -> str | None:
    """Restore damaged metadata of a cache, without which it cannot be opened; a note on those that were."""
    names = restore_metadata(location(cache))
    return f"damaged metadata of the cache was restored: {', '.join(names)}" if names else None


def precision_of(cache: str | Path, asked: str) -> str:
    """The precision to load a backbone with: for `auto`, what an existing cache was made with, so that the same command
    continues it on another device too. What is asked for otherwise stays, as does `auto` for a new cache.
    """
    store = location(cache)
    if asked != AUTO or store.read(METADATA) is None:
        return asked
    made_with = spec_from_attributes(read_attributes(store), store).precision
    return made_with if made_with in PRECISIONS else asked


def open_backbone(cache: str | Path, options: ExtractOptions) -> Backbone:
    """The backbone that was asked for, in the precision in which `cache` can be continued."""
    if isinstance(options.model, str | Path):
        precision = precision_of(cache, options.precision)
        return load_backbone(options.model, device=options.device, precision=precision)
    return checked_backbone(options.model, "model")


def open_cache(
    cache: str | Path, dataset: Dataset, backbone: EncoderFacts, batch_size: int, options: ExtractOptions,
    command: str | None,
) -> tuple[CacheWriter, Dataset, str | None]:  # fmt: skip
    """The cache of this extraction, new or continued; the dataset in its order; and a note on what was changed in it.

    `command` is what the cache says that it was made by. Raises CacheError where the dataset differs from the cache in
    what `update` or `prune` would have to allow.
    """
    spec = spec_of(dataset, backbone, options)
    followed = follow(
        cache, dataset, spec, slot=options.shard, update=options.update, prune=options.prune, repair=options.repair
    )
    provenance = _provenance(backbone, dataset, batch_size, command)
    provenance |= {} if options.limit is None else {"limit": options.limit}
    writer = CacheWriter.create(
        cache, spec, followed.table, shard_mb=options.shard_mb, slot=options.shard, provenance=provenance
    )
    return writer, followed.dataset, followed.note


def spec_of(dataset: Dataset, backbone: EncoderFacts, options: ExtractOptions) -> CacheSpec:
    """What makes the cache of this extraction."""
    return CacheSpec(
        backbone=backbone.name, weights_sha256=backbone.weights_sha256, layers=backbone.layers, dim=backbone.dim,
        clip_seconds=seconds_of(dataset, options), dtype=options.dtype, precision=backbone.precision,
        dataset=dataset.name, class_names=dataset.class_names,
    )  # fmt: skip


def _provenance(backbone: EncoderFacts, dataset: Dataset, batch_size: int, command: str | None) -> dict:
    made = {
        "tool_version": __version__,
        "torch_version": torch.__version__,
        "device": str(backbone.device),
        "batch_size": batch_size,
        "dataset_root": dataset.place,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "notes": [as_text(note) for note in dataset.notes],
    }
    return made | ({} if command is None else {"command": command, "folder": str(Path.cwd())})


def batch_size_of(made: dict, device: object, fitting: int) -> tuple[int, str | None]:
    """The batch size of a cache that exists, and a note for the user or None; `made` are the cache's records of that.

    On the kind of device that began the cache, its batch size is kept, so that the same clips share a batch. On another
    kind `fitting` is taken, what fits there: the features differ in their last bits anyway.
    """
    begun_with, size = str(made.get("device", device)), made.get("batch_size", fitting)
    kinds = [str(name).partition(":")[0] for name in (begun_with, device)]
    if kinds[0] == kinds[1] or size == fitting:
        return size, None
    return fitting, notes.OTHER_DEVICE(begun=begun_with, size=size, device=device, fitting=fitting)


def say_notes(given: Iterable[str | None], notify: Callable[[str], None] | None) -> tuple[str, ...]:
    """Tell the user these notes, those that are there, each once; and give them back."""
    said = tuple(dict.fromkeys(note for note in given if note))
    if notify:
        for note in said:
            notify(note)
    return said


def clips_to_do(writer: CacheWriter, dataset: Dataset, repair: bool) -> np.ndarray:
    """(N,) bool: clips that are pending, or whose file was missing and is there now.

    With `repair` also all others that failed, and those that are damaged in this slot's shards.
    """
    todo = writer.cache.status == Status.PENDING
    if repair:
        writer.rewrites_status = True
        damaged = {name for damage in verify(writer.path, rows=writer.mine()).damaged for name in damage.clips}
        todo |= writer.cache.status == Status.FAILED
        if damaged:
            todo |= np.fromiter((name in damaged for name in writer.cache.ids), dtype=bool, count=len(todo))
    else:
        todo |= _clips_found(writer, dataset)
    _say_where(writer, dataset, todo)
    return todo


def _clips_found(writer: CacheWriter, dataset: Dataset) -> np.ndarray:
    """(N,) bool: clips of this slot that failed because their file was missing, and it is there now."""
    found = np.zeros(len(dataset), dtype=bool)
    failed = np.flatnonzero(writer.mine() & (writer.cache.status == Status.FAILED))
    if len(failed):
        errors = writer.cache.clip_status.errors()
        missing = [row for row in failed.tolist() if str(errors[row]).startswith(MISSING)]
        found[[row for row in missing if dataset.is_there(row)]] = True
    return found


def _say_where(writer: CacheWriter, dataset: Dataset, redo: np.ndarray) -> None:
    """Paths that were not known when the cache was made: of clips whose file was missing.

    Those of all slots, so that processes that do this side by side write the same.
    """
    if not (redo & (writer.cache.status == Status.FAILED)).any():
        return
    failed = np.flatnonzero(writer.cache.status == Status.FAILED)
    paths = {row: as_text(dataset.clips[row].path) for row in failed.tolist()}
    moved = [row for row, path in paths.items() if path != writer.cache.paths[row]]
    if moved:
        writer.update_paths(np.array(moved), [paths[row] for row in moved])
