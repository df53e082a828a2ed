"""One audio file, opened once: its head and tail for the checks, its bytes for FFmpeg."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from whisper_at_cli.extract.audio.wav import MAGIC, Riff, read_riff
from whisper_at_cli.extract.errors import AudioError, MissingAudioError

if TYPE_CHECKING:
    from av.container import InputContainer

HEAD_BYTES = 1 << 16  # read at once, and kept
BUFFER_BYTES = 1 << 16  # that FFmpeg asks for at a time
MARK_BYTES = 1024  # in which a playlist says that it is one
WAV_PROBE_BYTES = 16384  # enough to tell what is in a WAV file; FFmpeg's own 5 MB cost more than decoding 5 s
PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<MPD")  # FFmpeg would open whatever files these name
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

Source = Path | bytes  # a file, or what one holds


class AudioFile:
    """Bytes of an open file, or of what one holds. A context manager, for one thread.

    Raises AudioError for what is no audio file, MissingAudioError (a kind of it) where there is no such file.
    """

    def __init__(self, source: Source):
        self._fd = -1
        self._bytes = source if isinstance(source, bytes) else None
        self.path = None if isinstance(source, bytes) else source
        self.modified_ns = 0
        if self._bytes is None:
            self._open(cast("Path", source))
        else:
            self.size = len(self._bytes)
        try:
            self._refuse_what_is_no_audio()
        except AudioError:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        """Without waiting for whoever writes to a FIFO."""
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            status = os.fstat(self._fd)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingAudioError(error.strerror or str(error)) from error
        except OSError as error:
            raise AudioError(f"it cannot be read: {error.strerror}") from error
        except ValueError as error:  # a NUL or half a character
            raise AudioError(f"its name cannot be that of a file ({error})") from error
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise AudioError("it is not a file")
        self.size, self.modified_ns = status.st_size, status.st_mtime_ns

    def _refuse_what_is_no_audio(self) -> None:
        if not self.size:
            raise AudioError("it is empty (0 bytes)")
        if any(mark in self.head[:MARK_BYTES] for mark in PLAYLISTS):
            raise AudioError("it is a playlist, not audio")
        if self.head.startswith(LFS_POINTER):
            raise AudioError("it is a Git LFS pointer, not the audio itself: run git lfs pull")

    def __enter__(self) -> AudioFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, at: int, length: int) -> bytes:
        """`length` bytes from `at` on, fewer at the end. Raises AudioError."""
        if self._bytes is not None:
            return self._bytes[at : at + length]
        if at + length <= len(self.head) or len(self.head) == self.size:
            return self.head[at : at + length]
        return self._pread(at, length)

    def _pread(self, at: int, length: int) -> bytes:
        try:
            return os.pread(self._fd, length, at)
        except OSError as error:
            raise AudioError(f"it cannot be read: {error.strerror}") from error

    @cached_property
    def head(self) -> bytes:
        """The first bytes."""
        return self._bytes[:HEAD_BYTES] if self._bytes is not None else self._pread(0, HEAD_BYTES)

    @cached_property
    def riff(self) -> Riff | None:
        """Where the audio of a WAV file lies; None for other files. Raises AudioError for a damaged one."""
        return read_riff(self.read, self.size) if self.head.startswith(MAGIC) else None

    @property
    def key(self) -> tuple:
        """Another one if the file was replaced."""
        return str(self.path), self.size, self.modified_ns

    @contextlib.contextmanager
    def container(self) -> Iterator[InputContainer]:
        """FFmpeg's container, at its start. FFmpeg reads through this object and can open no other file."""
        import av

        options = {"protocol_whitelist": "none"}
        if self.riff:
            options["probesize"] = str(WAV_PROBE_BYTES)
        reader = cast("BinaryIO", _Reader(self))
        with av.open(reader, "r", metadata_errors="ignore", options=options, buffer_size=BUFFER_BYTES) as container:
            yield container


class _Reader:
    """What FFmpeg reads a file through. Its name has the suffix, which some of FFmpeg's guesses rest on."""

    def __init__(self, file: AudioFile):
        self._file, self._at = file, 0
        self._size = file.riff.end if file.riff else file.size
        self.name = f"audio{file.path.suffix if file.path and file.path.suffix.isascii() else ''}"

    def read(self, length: int) -> bytes:
        data = self._file.read(self._at, max(0, min(length, self._size - self._at)))
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at
