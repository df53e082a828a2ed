"""A decoding process: groups of requests come in by one pipe, answers go out by another, audio goes to shared memory.

It is started as a fresh interpreter (`decode_pool.py`), so it inherits no lock and no CUDA state, and it imports
neither torch nor zarr. It ends when the pipe of requests ends, and on Linux also when its parent dies while it works.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from whisper_at_cli.extract.audio.decode import audio_seconds
from whisper_at_cli.extract.audio.sources import ClipSource
from whisper_at_cli.extract.errors import AudioError, UsageError, WhisperATError

LENGTH = struct.Struct("<I")  # of a message, before its bytes
READY = b""  # the first message of a process: it has imported what it needs
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

DONE, FAILED, RAISED = range(3)  # what came of a request: its result, why its clip failed, an error that ends the run
Outcome = tuple[int, Any]


class Request(NamedTuple):
    """One clip to be decoded to `samples` int16 samples at byte `offset` of the shared memory."""

    source: ClipSource
    samples: int
    offset: int


class Heard(NamedTuple):
    """What is known of a decoded clip: how many of its samples are real, and what its user should know of it."""

    real: int
    note: str


def read_clip(source: ClipSource, slot: np.ndarray) -> Outcome:
    """Decode a clip into `slot`, (samples,) int16; zeros where it fails. The one way in which every engine decodes."""
    try:
        samples, real, note = source.read(len(slot))
    except AudioError as error:
        slot[:] = 0
        return FAILED, str(error)
    slot[:] = samples
    return DONE, Heard(real, note)


def read_into_memory(request: Request) -> Outcome:
    """`read_clip` into this process's view of the shared memory."""
    memory = _shared.up_to(request.offset + 2 * request.samples)
    return read_clip(request.source, np.frombuffer(memory, np.int16, request.samples, request.offset))


def measure_length(path: str) -> Outcome:
    """How long an audio file is, by its header: (seconds, whether that is exact to the sample)."""
    try:
        return DONE, audio_seconds(path)
    except AudioError as error:
        return FAILED, str(error)


class _SharedMemory:
    """The memory that this process and its parent share, mapped when it is first used."""

    def __init__(self) -> None:
        self.file = -1
        self.mapped: mmap.mmap | None = None

    def up_to(self, end: int) -> mmap.mmap:
        if self.mapped is None or len(self.mapped) < end:
            self.mapped = mmap.mmap(self.file, os.fstat(self.file).st_size)
        return self.mapped


_shared = _SharedMemory()


def answers(payload: bytes) -> list[Outcome]:
    """What comes of a group of requests: a function and its arguments, pickled."""
    try:
        function, requests = pickle.loads(payload)  # noqa: S301 - from the process that started this one
    except Exception as error:  # noqa: BLE001 - whatever importing a user's own class brings about
        reason = f"{type(error).__name__}: {error}"
        problem = UsageError(f"a clip's source cannot be loaded in a decoding process ({reason}); see docs/datasets.md")
        return [(RAISED, problem)]
    return [_outcome(function, request) for request in requests]


def _outcome(function: Callable[[Any], Outcome], request: object) -> Outcome:
    try:
        return function(request)
    except Exception as error:  # noqa: BLE001 - goes to the parent, which raises it
        return RAISED, _portable(error)


def _portable(error: Exception) -> Exception:
    """The error itself where it survives being pickled, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - made here
    except Exception:  # noqa: BLE001 - an error of any class, with whatever it holds
        return WhisperATError(f"{type(error).__name__}: {error}")
    return error


def messages(stream: BinaryIO) -> Iterator[bytes]:
    """Every message of a pipe, until its other end is closed."""
    while len(head := stream.read(LENGTH.size)) == LENGTH.size:
        yield stream.read(LENGTH.unpack(head)[0])


def send(file: int, message: bytes) -> None:
    data = memoryview(LENGTH.pack(len(message)) + message)
    while data:
        data = data[os.write(file, data) :]


def main(requests: int, replies: int, memory: int, parent: int) -> None:
    """Serve until there are no more requests. All but the last argument are file descriptors."""
    _die_with(parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the parent, which then ends this process
        signal.signal(number, signal.SIG_IGN)
    import av  # noqa: F401 - before the first clip asks for it

    _shared.file = memory
    try:
        send(replies, READY)
        with open(requests, "rb") as stream:
            for message in messages(stream):
                send(replies, pickle.dumps(answers(message), pickle.HIGHEST_PROTOCOL))
    except BrokenPipeError:
        pass  # the parent has gone


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, also in the middle of a file that never ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that
            os._exit(1)
