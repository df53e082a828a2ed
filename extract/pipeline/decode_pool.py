"""The decoding processes of one extraction, seen from the process that started them.

Threads that decode through FFmpeg hand the interpreter's lock back and forth 160 times a clip, and get slower with
their number; processes do not. A process that crashes, hangs or is killed is replaced. Its requests are then tried
one by one, so that the clip that caused it fails alone, with that reason.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from whisper_at_cli.extract.errors import WhisperATError
from whisper_at_cli.extract.pipeline.decode_worker import FAILED, LENGTH, RAISED, READY, Outcome, send

GROUP = 8  # requests that a process is sent at once, at most
GROUPS_EACH = 2  # one that is worked on, one that waits
CLIPS_EACH = 8  # at least, that make it worth while to start a process
LOOK_SECONDS = 1.0  # between looks for processes that hang
STILL_SECONDS = 60.0  # for a clip, after which its process counts as hanging
CRASHES, HANGS, KILLS = 2, 2, 6  # of a process alone with a clip, before that is blamed
OWN_KILLS, MOST_KILLS = 0.7, 60  # share of all kills that are the clip's fault, not somebody else's; kills beyond doubt
BROKEN_STARTS, KILLED_STARTS = 20, 400  # in a row, before the run is given up
KILLED = (-signal.SIGKILL, -signal.SIGTERM)  # exit statuses
PIPE_BYTES = 1 << 18  # room for two groups of long paths; a user may have 64 MB of such room in all
CLOSE_SECONDS = 1.0
ENVIRONMENT = {  # of the processes; freed memory is kept for the next clip, which takes WAV a third of the time
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    **dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(16 << 20)),
}
READ_BYTES = 1 << 16


@dataclass(eq=False)
class Job:
    """Requests whose answers are wanted together. `function` and each request can be pickled."""

    function: Callable[[Any], Outcome]
    requests: Sequence[Any]
    seconds: float = STILL_SECONDS  # that one request may take
    outcomes: list[Outcome] = field(default_factory=list)
    left: int = 0

    def __post_init__(self) -> None:
        self.outcomes = [(FAILED, "it was not reached")] * len(self.requests)
        self.left = len(self.requests)


@dataclass(eq=False)
class _Group:
    """Some requests of a job, which one process answers together."""

    job: Job
    places: range  # within the job
    crashes: int = 0  # of processes that had nothing but this, once it is down to one request
    hangs: int = 0
    kills: int = 0
    killed_before: int | None = None  # processes of the pool, before the first of these


@dataclass(eq=False)
class _Process:
    """A running process and the groups that it was sent, oldest first."""

    popen: subprocess.Popen
    requests: int  # file descriptors
    replies: int
    groups: deque[_Group] = field(default_factory=deque)
    unread: bytearray = field(default_factory=bytearray)
    ready: bool = False
    since: float = 0.0  # when it began what it is at


class DecodePool:
    """Processes that answer jobs. Every method is for one thread, but `wake`.

    `finished` holds jobs that are done, for the caller to take. `memory` is shared with the processes.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self.finished: deque[Job] = deque()
        self.memory: mmap.mmap | None = None
        self._file = _memory_file()
        self._processes: list[_Process] = []
        self._waiting: deque[_Group] = deque()
        self._selector = selectors.DefaultSelector()
        self._bell, self._rope = os.pipe()
        os.set_blocking(self._rope, False)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._broken_starts = self._killed = 0
        self._looked = time.monotonic()
        self._news = self._closed = False

    def start(self, clips: int) -> None:
        """Start as many processes as so many clips are worth; they get ready while the caller goes on."""
        while len(self._processes) < min(self.workers, -(-clips // CLIPS_EACH)):
            self._start_one()

    def share(self, size: int) -> mmap.mmap:
        """`size` bytes of memory that the processes see too. What was shared before is no longer used."""
        if self.memory is None or len(self.memory) < size:
            os.truncate(self._file, size)
            self.memory = mmap.mmap(self._file, size)
        return self.memory

    def submit(self, job: Job) -> None:
        if not job.left:
            self._finish(job)
            return
        self.start(job.left)
        size = max(1, min(GROUP, -(-job.left // self.workers)))
        for first in range(0, job.left, size):
            self._waiting.append(_Group(job, range(first, min(first + size, job.left))))
        self._hand_out()

    def wait(self) -> None:
        """Return once another job has finished since the last call, or `wake` was called."""
        while not self._news:
            now = time.monotonic()
            if now >= self._looked + LOOK_SECONDS:
                self._end_hanging(now)
                continue
            for key, _ in self._selector.select(self._looked + LOOK_SECONDS - now):
                if key.data is None:
                    os.read(self._bell, READ_BYTES)
                    self._news = True
                elif key.data in self._processes:  # else it was replaced since
                    self._take(key.data)
        self._news = False

    def wake(self) -> None:
        """End a `wait`, now or when it comes. From any thread."""
        with contextlib.suppress(BlockingIOError, OSError):  # it is full of calls already, or the pool is closed
            os.write(self._rope, b"!")

    def map(self, function: Callable[[Any], Outcome], requests: Sequence[Any]) -> list[Outcome]:
        """What comes of each request, in order. Not while other jobs are at work."""
        job = Job(function, requests)
        self.submit(job)
        while job not in self.finished:
            self.wait()
        self.finished.remove(job)
        return job.outcomes

    def close(self) -> None:
        """End every process."""
        if self._closed:
            return
        self._closed = True
        for process in self._processes:
            os.close(process.requests)
        end = time.monotonic() + CLOSE_SECONDS
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if not process.groups:
                    process.popen.wait(max(0.0, end - time.monotonic()))
            process.popen.kill()
            _reaped(process.popen)
            os.close(process.replies)
        self._selector.close()
        for file in (self._bell, self._rope, self._file):
            os.close(file)
        self.memory = None

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def pids(self) -> list[int]:
        """The processes that run now."""
        return [process.popen.pid for process in self._processes]

    def _start_one(self) -> None:
        requests, ours_out = os.pipe()
        ours_in, replies = os.pipe()
        _enlarge(ours_out)
        path = [str(entry) for entry in sys.path]
        program = (
            f"import sys; sys.path = {path!r}; from whisper_at_cli.extract.pipeline.decode_worker import main; "
            f"main({requests}, {replies}, {self._file}, {os.getpid()})"
        )
        try:
            popen = subprocess.Popen(
                [sys.executable, "-c", program], pass_fds=(requests, replies, self._file), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | ENVIRONMENT,
            )  # fmt: skip
        except OSError as error:
            for file in (ours_out, ours_in):
                os.close(file)
            raise WhisperATError(f"cannot start a decoding process: {error.strerror}; give fewer --workers") from error
        finally:
            os.close(requests)
            os.close(replies)
        process = _Process(popen, ours_out, ours_in, since=time.monotonic())
        self._processes.append(process)
        self._selector.register(ours_in, selectors.EVENT_READ, process)

    def _hand_out(self) -> None:
        for number in range(GROUPS_EACH):
            for process in self._processes:
                if not self._waiting:
                    return
                if len(process.groups) == number:
                    self._send(process, self._waiting.popleft())

    def _send(self, process: _Process, group: _Group) -> None:
        if not process.groups:
            process.since = time.monotonic()
        process.groups.append(group)
        requests = group.job.requests[group.places.start : group.places.stop]
        with contextlib.suppress(BrokenPipeError):  # it has died, which its other pipe will tell
            send(process.requests, pickle.dumps((group.job.function, requests), pickle.HIGHEST_PROTOCOL))

    def _take(self, process: _Process) -> None:
        """Read what a process has to say."""
        data = os.read(process.replies, READ_BYTES)
        if not data:
            self._replace(process)
            return
        process.unread += data
        while len(process.unread) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(process.unread)[0]
            if len(process.unread) < end:
                break
            message = bytes(process.unread[LENGTH.size : end])
            del process.unread[:end]
            process.since = time.monotonic()
            if message == READY:
                process.ready, self._broken_starts = True, 0
            else:
                self._settle(process.groups.popleft(), pickle.loads(message))  # noqa: S301 - of our own process
        self._hand_out()

    def _settle(self, group: _Group, outcomes: list[Outcome]) -> None:
        for kind, value in outcomes:
            if kind == RAISED:
                raise value
        job = group.job
        job.outcomes[group.places.start : group.places.stop] = outcomes
        job.left -= len(group.places)
        if not job.left:
            self._finish(job)

    def _finish(self, job: Job) -> None:
        self.finished.append(job)
        self._news = True

    def _replace(self, process: _Process, *, blame: bool = True) -> None:
        """Start another process for one that has died, and give its requests to whoever is free, one by one."""
        self._processes.remove(process)
        self._selector.unregister(process.replies)
        os.close(process.requests)
        os.close(process.replies)
        status = _reaped(process.popen)
        if not process.ready:
            self._broken_starts += 1
            if self._broken_starts > (KILLED_STARTS if status in KILLED else BROKEN_STARTS):
                raise WhisperATError(
                    f"decoding processes end as they start ({_ended(status)}); often memory is short: give fewer "
                    "--workers"
                )
        for at, group in enumerate(reversed(process.groups)):
            at_work = process.ready and at == len(process.groups) - 1
            self._try_again(group, status, blame=blame and at_work)
        self._start_one()
        self._hand_out()

    def _try_again(self, group: _Group, status: int, *, blame: bool) -> None:
        """Put a group first in the queue, its requests apart; or have its clip fail if it is to blame."""
        if len(group.places) > 1:
            self._waiting.extendleft(_Group(group.job, range(at, at + 1)) for at in reversed(group.places))
            return
        if blame and status in KILLED:
            group.killed_before = self._killed if group.killed_before is None else group.killed_before
            group.kills += 1
            self._killed += 1
        elif blame:
            group.crashes += 1
        if group.crashes >= CRASHES or self._kills_are_its_own(group):
            self._settle(group, [(FAILED, f"it cannot be decoded: {_ended(status)} whenever it was read")])
        elif group.kills:
            self._waiting.append(group)  # last, since whoever kills may be at it again
        else:
            self._waiting.appendleft(group)

    def _kills_are_its_own(self, group: _Group) -> bool:
        """Whether a clip is to blame for the kills of its processes: then hardly any others are killed meanwhile."""
        meanwhile = self._killed - (group.killed_before or 0)
        return group.kills >= KILLS and (group.kills >= OWN_KILLS * meanwhile or group.kills >= MOST_KILLS)

    def _end_hanging(self, now: float) -> None:
        """End processes that have been at one group for too long; a clip that was alone with two of them has failed."""
        self._looked = now
        for process in self._processes[:]:
            if not (process.groups and process.ready):
                continue
            group = process.groups[0]
            if now - process.since <= group.job.seconds:
                continue
            process.popen.kill()
            group.hangs += len(group.places) == 1
            if group.hangs >= HANGS:
                process.groups.popleft()
                reason = f"it cannot be decoded: decoding did not end within {group.job.seconds:.0f} s"
                self._settle(group, [(FAILED, reason)])
            self._replace(process, blame=False)


def _ended(status: int) -> str:
    """How a process ended, in words."""
    if status == -signal.SIGKILL:
        return "the decoding process was killed (often memory is short)"
    if status < 0:
        return f"the decoding process crashed ({signal.Signals(-status).name})"
    return f"the decoding process ended with status {status}"


def _reaped(popen: subprocess.Popen) -> int:
    """The exit status of a process that has ended or was killed. One that a dead disk holds is left to the system."""
    try:
        return popen.wait(CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        popen.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return popen.wait(CLOSE_SECONDS)
        return -signal.SIGKILL


def _memory_file() -> int:
    """A file that lies in memory, has no name, and goes with the last process that has it open."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("whisper-at-cli")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _enlarge(pipe: int) -> None:
    """Room in a pipe for two groups of the longest paths, so that sending never waits."""
    import fcntl

    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):  # more than this user may have
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
