"""The fuzzing loop: inputs made from seeds, each read in a forked process under limits, the fruitful ones kept.

An input is a dictionary of file names and their bytes. A reader may take it, or refuse it with an error of the
project's own that names a file; anything else is a finding: another exception, a signal, running out of memory, a
time-out, or memory beyond what so small an input can need. What is new is told by the edges between lines of the
project's code that an input reaches, and by the wording of its refusal.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from whisper_at_cli.extract.errors import AudioError, WhisperATError

Files = dict[str, bytes]
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 30  # by the clock: the machine may be busy
CPU_SECONDS = 5  # of one input
MEMORY_MB = 500  # that one input may add
ADDRESS_SPACE_MB = 4096  # beyond what the process begins with
WORKER_INPUTS = 4000  # after which a fresh process goes on, so that what a library leaks does not add up
KEPT_BYTES = 1 << 14  # beyond twice the largest seed; a larger input is read once and not kept: all would grow slow
NO_NAME_NEEDED = (AudioError,)  # of one clip: whoever reports it names the clip


@dataclass(frozen=True)
class Reader:
    """What is fuzzed: how its inputs begin, how they are changed, and how one in a folder is read."""

    name: str
    seeds: Callable[[Path], list[Files]]  # given an empty folder to work in
    change: Callable[[Files, random.Random, Files], Files]  # an input, and another to take from
    read: Callable[[Path], str]  # reads the input in a folder; returns a word for what was read


@dataclass(frozen=True)
class Outcome:
    """What came of one input."""

    kind: str  # accepted, refused, or what is a finding: exception, signal, memory, time
    detail: str
    edges: frozenset[int] = frozenset()
    seconds: float = 0.0  # of processor time
    peak_mb: float = 0.0  # memory beyond what the process had when it began
    cpu: float = 0.0  # of the worker, so far

    @property
    def is_finding(self) -> bool:
        return self.kind not in ("accepted", "refused")


@dataclass
class Tally:
    """What a run counted."""

    inputs: int = 0
    kinds: Counter = field(default_factory=Counter)
    edges: set[int] = field(default_factory=set)
    refusals: Counter = field(default_factory=Counter)
    findings: dict[str, Path | None] = field(default_factory=dict)
    corpus: int = 0
    slowest: tuple[float, str] = (0.0, "")
    peak_mb: float = 0.0
    cpu_seconds: float = 0.0


class Worker:
    """A forked process that reads inputs, one after another."""

    def __init__(self, reader: Reader):
        self.reader, self.inputs, self.cpu = reader, 0, 0.0
        self.folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{reader.name}-"))
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(reader, theirs, self.folder), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, files: Files) -> Outcome:
        self.inputs += 1
        try:
            self.pipe.send(files)
            if not self.pipe.poll(TIMEOUT_SECONDS):
                self.process.kill()
                self.process.join()
                return Outcome("time", f"not done after {TIMEOUT_SECONDS} s", seconds=TIMEOUT_SECONDS)
            outcome = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode or 0
            return Outcome("signal", signal.Signals(-code).name if code < 0 else f"exit status {code}")
        self.cpu = outcome.cpu
        return outcome

    def close(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


def _serve(reader: Reader, pipe, folder: Path) -> None:
    """Read inputs until the parent goes. Runs in the worker."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with the parent
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_memory(ADDRESS_SPACE_MB)
    tracer, there = _Tracer(), {}
    gc.freeze()
    while True:
        try:
            files = pipe.recv()
        except EOFError:
            return
        _lay_out(folder, files, there)
        there = files
        pipe.send(_one(reader, folder, files, tracer))


def _lay_out(folder: Path, files: Files, there: Files) -> None:
    """Write what differs from the input before."""
    for name in there.keys() - files.keys():
        (folder / name).unlink()
    for name, data in files.items():
        if there.get(name) != data:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def _one(reader: Reader, folder: Path, files: Files, tracer: _Tracer) -> Outcome:
    _reset_peak()
    memory, begin = _status_mb("VmRSS"), time.process_time()
    tracer.start()
    try:
        kind, detail = "accepted", reader.read(folder)
    except WhisperATError as error:
        kind, detail = _refusal(error, folder, files)
    except BaseException as error:  # noqa: BLE001 - what must not come out of a reader
        kind, detail = "exception", _where(error)
    finally:
        edges = tracer.stop()
    seconds, peak = time.process_time() - begin, _status_mb("VmHWM") - memory
    if kind in ("accepted", "refused") and peak > MEMORY_MB:
        kind, detail = "memory", f"{peak:.0f} MB more, then {kind}: {detail}"
    elif kind in ("accepted", "refused") and seconds > CPU_SECONDS:
        kind, detail = "time", f"{seconds:.1f} s, then {kind}: {detail}"
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Outcome(kind, detail, edges, seconds, peak, time.process_time() + children.ru_utime + children.ru_stime)


def _refusal(error: WhisperATError, folder: Path, files: Files) -> tuple[str, str]:
    """A refusal is good if it names a file and memory did not run out on the way to it."""
    text = str(error)
    cause = error
    while cause is not None:
        if isinstance(cause, MemoryError) and "memory" not in text:  # of torch and FFmpeg: asked for in one piece
            return "exception", f"out of memory on the way to {_where(error)}"
        cause = cause.__cause__ or cause.__context__
    named = str(folder) in text or any(Path(name).name in text for name in files)
    if not named and not isinstance(error, NO_NAME_NEEDED):
        return "exception", f"names no file: {_where(error)}"
    if "\n" in text.strip():
        return "exception", f"of several lines: {_where(error)}"
    return "refused", wording(text.replace(str(folder), "FOLDER"))


def wording(text: str) -> str:
    """A message without what differs from input to input: numbers, and what is shown of the input between quotes."""
    text = re.sub(r"0x[0-9a-f]+|[-+]?\d[\d.e+-]*", "0", text)
    before = re.split(r"['\"\[{]", text, maxsplit=1)[0]
    advice = text.rpartition("; ")[2]
    kept = before if len(before) == len(text) or re.search(r"['\"\[{]", advice) else f"{before}...; {advice}"
    return re.sub(r"[^\x20-\x7e]+", "?", kept)[:160]


def _where(error: BaseException) -> str:
    """An exception, and the innermost line of the project's code that it passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_ours(frame.filename)]
    lines = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:-4:-1])
    return f"{type(error).__name__} at {lines}: {wording(str(error))}"


def _is_ours(filename: str) -> bool:
    path = Path(filename)
    return "/tests/" not in filename and (ROOT in path.parents or "whisper_at_cli" in path.parts)


class _Tracer:
    """The edges between lines of the project's code that a call reaches."""

    def __init__(self):
        self._codes: dict[object, int | None] = {}
        self._edges: set[int] = set()
        self._before = 0

    def start(self) -> None:
        self._edges, self._before = set(), 0
        sys.settrace(self._call)

    def stop(self) -> frozenset[int]:
        sys.settrace(None)
        return frozenset(self._edges)

    def _call(self, frame, event, argument):
        code = frame.f_code
        if code not in self._codes:
            ours = _is_ours(code.co_filename)
            name = f"{Path(code.co_filename).name}:{code.co_firstlineno}:{code.co_name}"
            self._codes[code] = zlib.crc32(name.encode()) if ours else None
        return None if self._codes[code] is None else self._line

    def _line(self, frame, event, argument):
        if event == "line":
            line = self._codes[frame.f_code] + frame.f_lineno
            self._edges.add(line << 32 ^ self._before)
            self._before = line
        return self._line


def limit_memory(more_mb: float) -> None:
    """Let this process, and what it forks, take no more than this beyond what it has."""
    most = int((_status_mb("VmSize") + more_mb) * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _status_mb(name: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def made_apart(function: Callable[[Path], list[Files]]) -> list[Files]:
    """What a function returns, run in a process of its own: the libraries it uses start threads, and we fork."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def make() -> None:
        with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as folder:
            theirs.send(function(Path(folder)))

    process = context.Process(target=make)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def fuzz(
    reader: Reader, *, cpu_seconds: float, inputs: int | None, seed: int, findings: Path | None = None, report=None
) -> Tally:
    """Read so many inputs, or for so long; findings are written into a folder, one for each place of the code."""
    rng, tally, own = random.Random(f"{reader.name} {seed}"), Tally(), time.process_time()
    corpus = made_apart(reader.seeds)
    waiting, seeds, spent, told = list(corpus), len(corpus), 0.0, 0.0
    most = KEPT_BYTES + 2 * max(sum(map(len, files.values())) for files in corpus)
    worker = Worker(reader)
    try:
        while tally.cpu_seconds < cpu_seconds and (inputs is None or tally.inputs < inputs):
            files = waiting.pop(0) if waiting else _changed(reader, corpus, seeds, rng)
            outcome = worker.run(files)
            new = _count(tally, outcome, files, findings)
            if new and tally.inputs > seeds and sum(map(len, files.values())) < most:
                corpus.append(files)
            tally.cpu_seconds, tally.corpus = spent + worker.cpu + time.process_time() - own, len(corpus)
            if worker.inputs >= WORKER_INPUTS or not worker.process.is_alive():
                spent += worker.cpu
                worker.close()
                worker = Worker(reader)
            if report and tally.cpu_seconds - told > 30:
                told = tally.cpu_seconds
                report(tally)
    finally:
        worker.close()
    return tally


def _changed(reader: Reader, corpus: list[Files], seeds: int, rng: random.Random) -> Files:
    """One of the seeds, of all inputs that were kept or of the latest of them, changed once or several times."""
    first, last = rng.choice(((0, seeds), (0, len(corpus)), (max(0, len(corpus) - 30), len(corpus))))
    files = corpus[rng.randrange(first, last)]
    for _ in range(rng.choice((1, 1, 1, 1, 2, 4))):
        files = reader.change(files, rng, rng.choice(corpus))
    return files


def _count(tally: Tally, outcome: Outcome, files: Files, findings: Path | None) -> bool:
    """Add an outcome to what was counted; True where it shows something new."""
    tally.inputs += 1
    tally.kinds[outcome.kind] += 1
    if outcome.seconds > tally.slowest[0]:
        tally.slowest = (outcome.seconds, f"{outcome.kind}: {outcome.detail}")
    tally.peak_mb = max(tally.peak_mb, outcome.peak_mb)
    if outcome.is_finding:
        name = f"{outcome.kind}: {outcome.detail}"
        place = re.sub(r": [^:]*$", "", name) if outcome.kind == "exception" else re.sub(r"[\d.]+", "0", name)
        if place not in tally.findings:
            tally.findings[place] = _save(files, name, findings) if findings else None
            print(f"FINDING {name}\n  {tally.findings[place]}", file=sys.stderr, flush=True)
        return False
    new = not outcome.edges <= tally.edges
    tally.edges |= outcome.edges
    if outcome.kind == "refused":
        tally.refusals[outcome.detail] += 1
        new |= tally.refusals[outcome.detail] == 1 and len(tally.refusals) < 2000
    return new


def _save(files: Files, name: str, findings: Path) -> Path:
    """The input, as the folder that it was read from."""
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:12]
    folder = findings / digest
    for file, data in files.items():
        (folder / "input" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "input" / file).write_bytes(data)
    (folder / "finding.json").write_text(json.dumps({"finding": name}, indent=1) + "\n")
    return folder
