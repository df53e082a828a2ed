"""Writing past the kernel's page cache, which would cost a copy of what is not read again soon."""

from __future__ import annotations

import errno
import os

import numpy as np

DIRECT_PIECE = 8 << 20  # bytes of one call
BLOCK_BYTES = 4096  # of memory and file: the largest that disks are known to ask for
NOT_DIRECT = (errno.EINVAL, errno.EFAULT, errno.EOPNOTSUPP)  # the file system, or this memory, has no direct writing


def write_direct(file: int, data: memoryview) -> int:
    """How many bytes were written; the rest has to go through the page cache.

    Direct writing takes whole blocks of memory and file alone, and not every file system has it.
    """
    at = 0
    if np.frombuffer(data, np.uint8).ctypes.data % BLOCK_BYTES == 0 and _set_direct(file, on=True):
        try:
            while at < len(data) - BLOCK_BYTES:
                whole = min(DIRECT_PIECE, len(data) - at) // BLOCK_BYTES * BLOCK_BYTES
                at += os.write(file, data[at : at + whole])
        except OSError as error:
            if error.errno not in NOT_DIRECT:
                raise
        _set_direct(file, on=False)
    return at


def _set_direct(file: int, *, on: bool) -> bool:
    """Whether writing past the page cache could be switched on or off."""
    if not hasattr(os, "O_DIRECT"):  # not on macOS and Windows
        return False
    import fcntl

    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return True
