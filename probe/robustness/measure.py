"""Noise robustness: the word error rate of a frozen recogniser against the SNR, for each class of noise.

Utterance i is mixed with clip i of every class at every SNR, both in the order of their paths (paper, section 2).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from whisper_at_cli import __version__
from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.datasets import Dataset, open_dataset
from whisper_at_cli.extract.devices import one_thread_per_operation
from whisper_at_cli.extract.errors import AudioError, UsageError
from whisper_at_cli.extract.progress import Progress
from whisper_at_cli.probe.robustness.mixing import FORMS, SILENCE_RMS, SilenceError, mix, rms, to_int16
from whisper_at_cli.probe.robustness.recognisers import Recogniser, load_recogniser
from whisper_at_cli.probe.robustness.transcripts import Key, Transcript, TranscriptFolder
from whisper_at_cli.probe.robustness.utterances import Speech, Utterance, listing_digest, read_speech
from whisper_at_cli.probe.robustness.wer import Errors, count_errors, paper_normaliser, whisper_normaliser

PAPER_SNRS = (20.0, 15.0, 10.0, 5.0, 0.0, -5.0, -10.0, -15.0, -20.0)
PAPER_UTTERANCES = 40
NOISES_KEPT = 256  # decoded clips in memory; each serves every SNR


@dataclass(frozen=True, slots=True)
class Job:
    """One transcript to be made."""

    key: Key
    utterance: Utterance
    row: int | None = None  # of the noise clip in its dataset; None for clean speech


@dataclass(frozen=True, slots=True)
class Skip:
    """What could not be mixed or read, and why. `failed` where a file is to blame, not silence."""

    what: str
    reason: str
    failed: bool = False


@dataclass(frozen=True)
class Clean:
    """Word error rate without noise."""

    wer: float | None
    wer_paper: float | None
    utterances: int


@dataclass(frozen=True)
class Level:
    """Word error rates at one SNR: over all classes and for each. None where no reference word was left."""

    snr: float
    wer: float | None
    wer_paper: float | None
    class_wer: dict[str, float | None]
    class_wer_paper: dict[str, float | None]
    utterances: int  # different ones
    mixtures: int
    skipped: int
    over_full_scale: int  # mixtures whose peak lies above 1
    snr_measured: dict[str, float | None]  # lowest and highest
    class_counts: dict[str, dict[str, list]]  # utterances and, for both scorings, errors and words of every mixture


@dataclass(frozen=True)
class RobustnessReport:
    """The result of one run, as printed and as kept in `results.json`."""

    model: str
    kind: str
    weights_sha256: str
    parameters: int
    normaliser: str
    clean: Clean
    results: tuple[Level, ...]  # from the highest SNR to the lowest
    skipped: tuple[Skip, ...]
    settings: dict
    run: dict
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        return any(skip.failed for skip in self.skipped)


def measure_robustness(
    speech: str | Path, noise: str | Path, *, model: str | Path | Recogniser, snrs: Iterable[float] = PAPER_SNRS,
    out: str | Path | None = None, utterances: int = PAPER_UTTERANCES, clips_per_class: int | None = None,
    mixing: str = "exact", language: str = "en", greedy: bool = False, batch_size: int | None = None,
    device: str = "auto", format: str = "auto", progress: Progress | None = None,
) -> RobustnessReport:  # fmt: skip
    """Mix, transcribe, score; continues what is in `out` already (default: robustness/MODEL).

    Raises UsageError for what cannot be done as asked, WhisperATError where `out` was made with other settings.
    """
    snrs = _check(snrs, utterances, clips_per_class, mixing, batch_size)
    found = read_speech(speech)
    spoken, notes = _first_utterances(found, utterances)
    noises = open_dataset(noise, format=format)
    notes += noises.notes
    jobs = plan(spoken, noises, snrs, clips_per_class or min(len(spoken), PAPER_UTTERANCES))
    if isinstance(model, str | Path):
        model = load_recogniser(model, device=device, language=language, greedy=greedy)
    fixed = _fixed_settings(model, mixing, found, noises)
    out = Path(out) if out is not None else Path("robustness") / model.name.replace("/", "--")
    size = batch_size or model.batch_size
    started = time.perf_counter()
    with TranscriptFolder(out, fixed) as folder:
        done = {job.key: folder.found[job.key] for job in jobs if job.key in folder.found}
        pending = [job for job in jobs if job.key not in done]
        worker = _Worker(model, spoken, noises, mixing)
        made, skips = worker.run(pending, size, folder, progress, done=len(done))
        run = _run_record(time.perf_counter() - started, len(made), len(done))
        report = RobustnessReport(
            model=model.name, kind="robustness", weights_sha256=model.weights_sha256, parameters=model.parameters,
            normaliser=whisper_normaliser(model.settings["language"])[0],
            **score(jobs, done | made, noises.class_names, snrs, model.settings["language"]),
            skipped=skips, settings=fixed | _free_settings(spoken, noises, snrs, jobs, size, model),
            run=run, notes=notes,
        )  # fmt: skip
        folder.write_results(asdict(report))
    return report


def _check(
    asked: Iterable[float], utterances: int, clips_per_class: int | None, mixing: str, batch_size: int | None
) -> tuple[float, ...]:
    """The SNRs from high to low, each once. Raises UsageError for values out of range."""
    snrs = tuple(sorted({float(snr) + 0.0 for snr in asked}, reverse=True))
    if not snrs:
        raise UsageError("no SNR was asked for; give --snr DB, as often as you like")
    if wrong := [snr for snr in snrs if not (math.isfinite(snr) and abs(snr) <= 100)]:
        raise UsageError(f"--snr {wrong[0]:g} is out of range; give decibels between -100 and 100")
    for name, value in (("utterances", utterances), ("clips-per-class", clips_per_class), ("batch-size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; give at least 1")
    if mixing not in FORMS:
        raise UsageError(f"mixing {mixing!r} is not known; choose from {', '.join(FORMS)}")
    return snrs


def _first_utterances(speech: Speech, count: int) -> tuple[Speech, tuple[str, ...]]:
    """The first `count` that have words, and notes on what was left out."""
    worded = [utterance for utterance in speech.utterances if utterance.text]
    notes = list(speech.notes)
    if empty := len(speech) - len(worded):
        notes.append(f"{empty} utterances have an empty transcript; they were left out")
    if not worded:
        raise UsageError(f"{speech.root} holds {len(speech)} recordings, and every transcript is empty")
    return Speech(speech.root, tuple(worded[:count])), tuple(notes)


def plan(speech: Speech, noises: Dataset, snrs: tuple[float, ...], clips_per_class: int) -> list[Job]:
    """Every transcript to be made; pair i of a class is utterance i with clip i, each starting over where it ends.

    Sorted by the length of the transcript, utterance by utterance: what is decoded together ends at about the same
    time and is equally long. A pair that would come twice comes once.
    """
    if not noises.class_names:
        raise UsageError(f"{noises.root} has no labels; give noise in classes: a folder per class, or ESC-50's layout")
    U = len(speech)
    partners: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for label, name in enumerate(noises.class_names):
        rows = [row for row, clip in enumerate(noises.clips) if label in clip.labels]
        rows.sort(key=lambda row: noises.clips[row].path)
        if rows:
            for at, row in dict.fromkeys((i % U, rows[i % len(rows)]) for i in range(clips_per_class)):
                partners[at].append((name, row))
    jobs = []
    for at, utterance in sorted(enumerate(speech.utterances), key=lambda item: (-len(item[1].text), item[0])):
        jobs.append(Job(Key(utterance.id), utterance))
        jobs += [
            Job(Key(utterance.id, name, noises.clips[row].id, snr), utterance, row)
            for snr in snrs
            for name, row in partners[at]
        ]
    return jobs


class _UnreadableError(Exception):
    """An audio file cannot be read: which, and why."""

    def __init__(self, path: str, reason: AudioError):
        super().__init__(path, str(reason))
        self.skip = Skip(path, str(reason), failed=True)


class _Worker:
    """Makes transcripts in batches, several side by side where the recogniser allows that."""

    def __init__(self, recogniser: Recogniser, speech: Speech, noises: Dataset, mixing: str):
        self.recogniser, self.speech, self.noises, self.mixing = recogniser, speech, noises, mixing
        self.as_int16 = mixing == "paper" and recogniser.reads_int16
        self.whole_clip = round(noises.clip_seconds * SAMPLE_RATE)
        self._spoken = lru_cache(maxsize=8)(speech.waveform)
        self._noise = lru_cache(maxsize=NOISES_KEPT)(self._read_noise)

    def run(
        self, jobs: list[Job], batch_size: int, folder: TranscriptFolder, progress: Progress | None, *, done: int
    ) -> tuple[dict[Key, Transcript], tuple[Skip, ...]]:
        """Every transcript is on disk when it counts as done."""
        batches = [jobs[first : first + batch_size] for first in range(0, len(jobs), batch_size)]
        total = len(jobs) + done
        made: dict[Key, Transcript] = {}
        skips: dict[Skip, None] = {}
        if progress:
            progress(done, total)
        for batch, transcripts, skipped in self._results(batches):
            folder.append(transcripts)
            made |= {transcript.key: transcript for transcript in transcripts}
            skips |= dict.fromkeys(skipped)  # the same file may be met many times
            done += len(batch)
            if progress:
                progress(done, total)
        return made, tuple(sorted(skips, key=lambda skip: (skip.what, skip.reason)))

    def _results(self, batches: list[list[Job]]) -> Iterator[tuple[list[Job], list[Transcript], list[Skip]]]:
        streams = min(self.recogniser.streams, max(1, len(batches)))
        one_thread = self.recogniser.device.type == "cpu" and streams > 1
        waiting, running = iter(batches), set()
        with one_thread_per_operation(one_thread), ThreadPoolExecutor(streams) as pool:
            try:
                while True:
                    for batch in waiting:
                        running.add(pool.submit(self.transcribe, batch))
                        if len(running) > streams:
                            break
                    if not running:
                        return
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        yield future.result()
            finally:
                for future in running:
                    future.cancel()

    def transcribe(self, jobs: list[Job]) -> tuple[list[Job], list[Transcript], list[Skip]]:
        ready, skips = [], []
        for job in jobs:
            try:
                ready.append((job, *self.sound(job)))
            except _UnreadableError as error:
                skips.append(error.skip)
            except SilenceError as error:
                with_clip = f" with {job.key.noise_class} {job.key.clip}" if job.key.clip else ""
                skips.append(Skip(f"{job.utterance.path}{with_clip}", str(error)))
        texts = self.recogniser.transcribe([samples for _, samples, _, _ in ready]) if ready else []
        transcripts = [
            Transcript(job.key, text, job.utterance.text, snr, peak)
            for (job, _, snr, peak), text in zip(ready, texts, strict=True)
        ]
        return jobs, transcripts, skips

    def sound(self, job: Job) -> tuple[np.ndarray, float | None, float]:
        """What the recogniser hears, its measured SNR and its peak."""
        try:
            speech = self._spoken(job.utterance)
        except AudioError as error:
            raise _UnreadableError(job.utterance.path, error) from error
        if job.row is None:
            if rms(speech) < SILENCE_RMS:
                raise SilenceError("the speech is silent")
            samples, snr, peak = speech, None, float(np.abs(speech).max())
        else:
            assert job.key.snr is not None, "a job with noise has an SNR"
            mixture = mix(speech, self._noise(job.row, len(speech)), job.key.snr, form=self.mixing)
            samples, peak = mixture.samples, mixture.peak
            snr = round(mixture.snr_db, 4) if math.isfinite(mixture.snr_db) else None
        return to_int16(samples) if self.as_int16 else samples, snr, round(peak, 4)

    def _read_noise(self, row: int, samples: int) -> np.ndarray:
        """The whole clip, or as much of a longer one as the utterance needs."""
        try:
            noise, real = self.noises.waveform(row, max(samples, self.whole_clip))
        except AudioError as error:
            raise _UnreadableError(self.noises.clips[row].path, error) from error
        return noise[:real]


def score(
    jobs: list[Job], transcripts: dict[Key, Transcript], class_names: Sequence[str], snrs: Sequence[float],
    language: str,
) -> dict:  # fmt: skip
    """Word error rates over the transcripts that are there: `clean` and `results` of a report."""
    normalisers = [lru_cache(maxsize=4096)(each) for each in (whisper_normaliser(language)[1], paper_normaliser())]
    counted = {}  # both scorings of every transcript; they add up
    for job in jobs:
        if job.key in transcripts:
            text = transcripts[job.key].text
            counted[job.key] = [count_errors([job.utterance.text], [text], each) for each in normalisers]

    def rates(keys: list[Key]) -> tuple[float | None, float | None]:
        plain, paper = (sum((counted[key][scoring] for key in keys), Errors()).rate for scoring in (0, 1))
        return plain, paper

    clean = [key for key in counted if key.snr is None]
    planned = [job.key for job in jobs if job.row is not None]
    heard = sorted({key.noise_class for key in planned if key.noise_class is not None}, key=list(class_names).index)
    levels = []
    for snr in snrs:
        keys = [key for key in counted if key.snr == snr]
        by_class = {name: rates([key for key in keys if key.noise_class == name]) for name in heard}
        measured = [value for key in keys if (value := transcripts[key].snr_measured) is not None]
        wer, wer_paper = rates(keys)
        levels.append(
            Level(
                snr=snr, wer=wer, wer_paper=wer_paper,
                class_wer={name: rate for name, (rate, _) in by_class.items()},
                class_wer_paper={name: rate for name, (_, rate) in by_class.items()},
                utterances=len({key.utterance for key in keys}), mixtures=len(keys),
                skipped=sum(key.snr == snr for key in planned) - len(keys),
                over_full_scale=sum((transcripts[key].peak or 0) > 1 for key in keys),
                snr_measured={"lowest": min(measured, default=None), "highest": max(measured, default=None)},
                class_counts={
                    name: _counts([key for key in keys if key.noise_class == name], counted) for name in heard
                },
            )
        )  # fmt: skip
    wer, wer_paper = rates(clean)
    return {"clean": Clean(wer=wer, wer_paper=wer_paper, utterances=len(clean)), "results": tuple(levels)}


def _counts(keys: list[Key], counted: dict[Key, list[Errors]]) -> dict[str, list]:
    """What intervals of a word error rate are made from: errors and words of each mixture, and of which utterance."""
    found: dict[str, list] = {"utterances": [key.utterance for key in keys]}
    for scoring, name in enumerate(("wer", "wer_paper")):
        found[f"{name}_errors"] = [counted[key][scoring].errors for key in keys]
        found[f"{name}_words"] = [counted[key][scoring].words for key in keys]
    return found


def _fixed_settings(recogniser: Recogniser, mixing: str, speech: Speech, noises: Dataset) -> dict:
    """What a transcript depends on beside its key: a run goes on only where all of it is as before."""
    listed = ((f"{clip.path}\0{clip.labels}", noises.audio_path(clip)) for clip in noises.clips)
    return {
        "model": recogniser.name,
        "weights_sha256": recogniser.weights_sha256,
        **recogniser.settings,
        "mixing": mixing,
        "speech": f"{len(speech)} utterances, listing {speech.digest()}",
        "noise": f"{len(noises)} clips of {len(noises.class_names)} classes, listing {listing_digest(listed)}",
    }


def _free_settings(
    speech: Speech, noises: Dataset, snrs: Sequence[float], jobs: list[Job], batch_size: int, recogniser: Recogniser
) -> dict:
    """What a later run may change: it then takes the transcripts that are there and makes the others."""
    per_class = defaultdict(set)
    for job in jobs:
        if job.row is not None:
            per_class[job.key.noise_class].add((job.key.utterance, job.key.clip))
    return {
        "snr": list(snrs),
        "utterances": len(speech),
        "clips_per_class": max(map(len, per_class.values()), default=0),
        "speech_folder": speech.root.resolve().name,
        "noise_folder": noises.root.resolve().name,
        "batch_size": batch_size,
        "device": str(recogniser.device),
        "tool_version": __version__,
        "torch_version": torch.__version__,
        "whisper_version": version("openai-whisper"),
        "jiwer_version": version("jiwer"),
    }


def _run_record(seconds: float, made: int, resumed: int) -> dict:
    return {
        "seconds": round(seconds, 2),
        "transcribed": made,
        "resumed": resumed,
        "utterances_per_second": round(made / seconds, 3) if made else None,
    }
