"""Extraction on several devices of one machine: a process for each, with whole shards of its own."""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from whisper_at_cli.extract.backbones.precision import AUTO
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.extract.machine import cores
from whisper_at_cli.extract.pipeline.local import extract
from whisper_at_cli.extract.pipeline.options import ExtractOptions
from whisper_at_cli.extract.pipeline.prepare import precision_of
from whisper_at_cli.extract.pipeline.report import ExtractReport
from whisper_at_cli.extract.progress import Progress

POLL_SECONDS = 0.2


def slots_of(shard: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """Divide the shards of one slot, (i, n), among `count` processes."""
    index, of = shard
    return [(index + part * of, of * count) for part in range(count)]


def extract_on_devices(
    dataset: str | Path, cache: str | Path, options: ExtractOptions | None = None, *, devices: list[str],
    progress: Progress | None = None, notify: Callable[[str], None] | None = None, **given: Any,
) -> ExtractReport:  # fmt: skip
    """`extract` with one process per device; the cache has the same bytes as from one. Options are those of `extract`.

    Raises what a process raised; what the others finished is kept, and the same command continues.
    """
    options = ExtractOptions.of(options, given)
    if not isinstance(options.model, str | Path):
        raise UsageError("several devices need the model by name or path, so that each process can load it")
    started = time.perf_counter()
    precision = options.precision
    if len({device.partition(":")[0] for device in devices}) > 1 and precision == AUTO:
        made_with = precision_of(cache, AUTO)
        precision = "float32" if made_with == AUTO else made_with  # what each kind would choose may differ
    options = replace(options, precision=precision, workers=options.workers or max(1, cores() // len(devices)))
    context = multiprocessing.get_context("spawn")
    messages: Queue = context.Queue()
    processes: list[BaseProcess] = []
    for number, (device, slot) in enumerate(zip(devices, slots_of(options.shard, len(devices)), strict=True)):
        own = replace(options, device=device, shard=slot)
        process = context.Process(
            target=_extract_in_process, args=(number, messages, dataset, cache, own), daemon=True
        )  # fmt: skip
        process.start()
        processes.append(process)
    try:
        reports = _collect(processes, devices, messages, progress, notify)
    finally:
        for started_process in processes:
            started_process.terminate()
    return _merged(reports, time.perf_counter() - started)


def _extract_in_process(
    number: int, messages: Queue, dataset: str | Path, cache: str | Path, options: ExtractOptions
) -> None:
    def progress(done: int, total: int, _message: str = "") -> None:
        messages.put((number, "progress", (done, total)))

    def notify(note: str) -> None:
        messages.put((number, "note", note))

    try:
        report = extract(dataset, cache, options, progress=progress, notify=notify if number == 0 else None)
        messages.put((number, "report", report))
    except WhisperATError as error:
        messages.put((number, "error", error))


def _collect(
    processes: list[BaseProcess], devices: list[str], messages: Queue, progress: Progress | None,
    notify: Callable[[str], None] | None,
) -> list[ExtractReport]:  # fmt: skip
    """Wait for every process's report, adding up their progress."""
    so_far: dict[int, tuple[int, int]] = {}
    reports: dict[int, ExtractReport] = {}
    while len(reports) < len(processes):
        try:
            number, kind, content = messages.get(timeout=POLL_SECONDS)
        except queue.Empty:
            for number, process in enumerate(processes):
                if not process.is_alive() and number not in reports and messages.empty():
                    raise WhisperATError(
                        f"the process on {devices[number]} ended with status {process.exitcode}; what was finished is "
                        "kept: run the same command again"
                    ) from None
            continue
        if kind == "error":
            raise content
        if kind == "note":
            if notify:
                notify(content)
            continue
        if kind == "report":
            reports[number] = content
            continue
        so_far[number] = content
        if progress and len(so_far) == len(processes):
            progress(sum(done for done, _ in so_far.values()), sum(total for _, total in so_far.values()))
    return [reports[number] for number in range(len(processes))]


def _merged(reports: list[ExtractReport], seconds: float) -> ExtractReport:
    written = sum(report.written for report in reports)
    clips, missing = (sum(getattr(report, name) for report in reports) for name in ("clips", "missing"))
    return replace(
        reports[0],
        clips=clips,
        missing=missing,
        coverage=1 - missing / max(1, clips),
        written=written,
        skipped=sum(report.skipped for report in reports),
        redone_in_float32=sum(report.redone_in_float32 for report in reports),
        notes=tuple(dict.fromkeys(note for report in reports for note in report.notes)),
        failed=sum(report.failed for report in reports),
        failures=tuple(failure for report in reports for failure in report.failures),
        clip_notes=tuple(note for report in reports for note in report.clip_notes),
        seconds=round(seconds, 3),
        clips_per_second=round(written / max(seconds, 1e-9), 2),
        encoder_busy=round(sum(report.encoder_busy for report in reports) / len(reports), 3),
        disk_wait_seconds=round(max(report.disk_wait_seconds for report in reports), 3),
    )
