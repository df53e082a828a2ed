"""Folders that results go into: made before the work begins, and held by one process."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import IO

from whisper_at_cli.extract.errors import UsageError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)  # of a file system that knows none


def writable_folder(path: str | Path) -> Path:
    """The folder, made now: hours of work should not end at a name that cannot be written. Raises UsageError."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error}; choose another --out") from error
    return folder


def take_lock(file: IO | int, *, wait: bool = False) -> bool:
    """Lock an open file (or its descriptor) for as long as it is open.

    False if another process has it. True also where the file system knows no locks, since then nobody can tell.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True
