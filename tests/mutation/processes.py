"""Work in a forked process that may hang, crash or take all memory, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

MEMORY, FILE = 16 << 30, 1 << 30  # bytes that it may take
NO_STATUS = 70


def in_child(work: Callable[[], int], seconds: float, log: Path) -> int | None:
    """Exit status of `work()` in a session of its own, whose words go to `log`; None if it took too long."""
    child = os.fork()
    if not child:
        _be_child(work, log)
    deadline, status = time.monotonic() + seconds, None
    while status is None and time.monotonic() < deadline:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        else:
            time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # also what it started and left behind
    if status is None:
        os.waitpid(child, 0)
    return status


def _be_child(work: Callable[[], int], log: Path) -> None:
    status = NO_STATUS
    try:
        os.setsid()
        with open(log, "wb") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
        status = int(work())
    except BaseException:  # noqa: BLE001 - a child ends here, whatever happened
        traceback.print_exc()
    finally:
        os._exit(status)
