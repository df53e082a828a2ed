"""Where a cache's files lie: a folder, or a bucket of an object store (`s3://`, `gs://`, `az://`; extra `cloud`).

Both stores have the same methods; a file's `name` is its path within the cache, as `status/c/0`.

write_whole(name, buffers)   the file appears whole or not at all, and is safe when this returns
write_together(files)        the same for several, {name: buffers}, with one wait for the disk; they appear in order
read(name)                   all bytes of a file, None where there is none
open(name)                   for reading parts: its `size`, and `readv` into the caller's buffers
exists(name), sizes()        whether there is such a file; bytes of every file, by name
stamps()                     of every file, by name: its bytes, and what changes when it is written again
names(folder)                of the files right in a folder, in full
remove(name)                 a file that may be gone already
sync(name)                   a file that somebody else wrote is safe when this returns
zarr()                       what zarr-python opens
map(function, items)         a list of results; a bucket is asked for many things side by side
each(function, items, size)  without results, for reads of so many bytes in all: side by side in folders too
asking(name)                 a context in which a failure of the store becomes an error that a user can read
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from whisper_at_cli.extract.cache.direct import write_direct
from whisper_at_cli.extract.cache.side_by_side import in_pool, mark_pool_thread, side_by_side
from whisper_at_cli.extract.errors import StoreError, UsageError, WhisperATError
from whisper_at_cli.extract.machine import IN_MEMORY, file_system

if TYPE_CHECKING:
    from types import ModuleType

    from zarr.storage import ObjectStore

BUFFERS = 1024  # that the system takes in one call
PIECE_BYTES = 1 << 20  # of a file that are written by one call
DIRECT_BYTES = 64 << 20  # a file of so many is written past the page cache; smaller ones are soon read again
REQUESTS = 32  # that a bucket is asked side by side
PART_BYTES = 8 << 20  # of a file that goes to a bucket in several parts
PARTS = 4  # of one file on their way at once
CONNECT_TIMEOUT, REQUEST_TIMEOUT = timedelta(seconds=5), timedelta(seconds=60)
RETRIES = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=20),
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=3), "base": 2},
}
KEYS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SKIP_SIGNATURE=true for a bucket that is open to all)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


def location(address: str | Path) -> LocalStore | BucketStore:
    """The store of a cache's address. Raises UsageError where it is neither a path nor in a kind of bucket we know."""
    text = str(address)
    if "://" in text:
        return BucketStore(text)
    if isinstance(address, Path) and (scheme := text.partition(":/")[0]) in KEYS:
        raise UsageError(
            f"{text} was an address of a bucket before it became a Path; give it as text: '{scheme}://...'"
        )
    return LocalStore(address)


class LocalStore:
    """A folder. Safe between threads and processes, with one writer per file.

    With `mark`, several writers may be at one file: each writes under a name of its own, and the last to finish counts.
    """

    def __init__(self, path: str | Path, mark: str = ""):
        self.address = self.path = Path(path)
        self._ending = f"{mark and '.'}{mark}.partial"

    def __str__(self) -> str:
        return str(self.path)

    def write_whole(self, name: str, buffers: list) -> None:
        self.write_together({name: buffers})

    def write_together(self, files: dict[str, list]) -> None:
        paths = {name: self.path / name for name in files}
        partial = {name: path.with_name(f".{path.name}{self._ending}") for name, path in paths.items()}
        try:
            with contextlib.ExitStack() as opened:
                numbers = []
                for name, buffers in files.items():
                    paths[name].parent.mkdir(parents=True, exist_ok=True)
                    # what a killed run left is written over
                    file = opened.enter_context(open(partial[name], "wb", buffering=0))
                    self._write(file.fileno(), buffers)
                    numbers.append(file.fileno())
                for number in numbers:
                    os.fsync(number)
            for name, path in paths.items():
                partial[name].replace(path)
                if path.parent.name == "0":  # of shards that have a folder each
                    _remove(path.parent.glob(f".{path.name}.*.partial"))  # what a writer that was killed left
        except OSError:
            _remove(partial.values())
            raise
        for folder in dict.fromkeys(path.parent for path in paths.values()):
            _sync_folder(folder)

    def _write(self, file: int, buffers: list) -> None:
        """Write many buffers. File systems in memory take them as they are; on disks, large pieces cost a third."""
        if not self._in_memory and len(buffers) == 1 and memoryview(buffers[0]).nbytes >= DIRECT_BYTES:
            data = memoryview(buffers[0]).cast("B")
            _write_pieces(file, [data[write_direct(file, data) :]])
        elif self._in_memory:
            for first in range(0, len(buffers), BUFFERS):
                _writev(file, buffers[first : first + BUFFERS])
        else:
            _write_pieces(file, buffers)

    @cached_property
    def _in_memory(self) -> bool:
        return file_system(self.path) in IN_MEMORY

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def open(self, name: str) -> LocalFile:
        return LocalFile(self.path / name)

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def sizes(self) -> dict[str, int]:
        return {name: size for name, (size, _) in self.stamps().items()}

    def stamps(self) -> dict[str, tuple[int, str]]:
        files = [entry for entry in self.path.rglob("*") if entry.is_file()]
        found = {file.relative_to(self.path).as_posix(): file.stat() for file in files}
        return {name: (known.st_size, str(known.st_mtime_ns)) for name, known in found.items()}

    def names(self, folder: str) -> list[str]:
        try:
            return [f"{folder}/{entry.name}" for entry in os.scandir(self.path / folder) if entry.is_file()]
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def append(self, name: str, data: bytes) -> None:
        """Add to the end of a file, or begin it. All of it is safe when this returns, or nothing of it is there."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with open(path, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                _writev(file.fileno(), [data])
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(file.fileno(), size)
                raise
        if new:
            for folder in (path.parent, path.parent.parent):  # which may be new as well
                _sync_folder(folder)

    def sync(self, name: str) -> None:
        path = self.path / name
        for part in (path, path.parent):
            if part.exists():
                _sync_folder(part)

    def zarr(self) -> Path:
        return self.path

    def map(self, function: Callable, items: Iterable) -> list:
        return [function(item) for item in items]

    def each(self, function: Callable, items: Sequence, size: int) -> None:
        side_by_side(function, items, size)

    def asking(self, name: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


class LocalFile:
    """A file of a folder, open for reading parts of it. Raises FileNotFoundError where there is none."""

    run = 16  # chunks read by one call, at most: about a megabyte, which is in the CPU's cache when it is checked

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):  # the kernel's reading ahead would read other layers
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        self.size = os.fstat(self._file).st_size
        if hasattr(os, "preadv"):  # not on macOS
            self.readv = partial(os.preadv, self._file)  # type: ignore[method-assign]  # one call less a read

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def expect(self, parts: list[tuple[int, int]]) -> None:
        """Have the disk fetch several parts, (start, length), at once; each is then waited for as it is read."""
        if len(parts) > 1 and hasattr(os, "posix_fadvise"):
            for start, length in parts:
                os.posix_fadvise(self._file, start, length, os.POSIX_FADV_WILLNEED)

    def readv(self, buffers: list, start: int) -> int:
        """Fill buffers one after another from byte `start` on; returns how many bytes were read."""
        length = sum(memoryview(buffer).nbytes for buffer in buffers)
        return _scatter(os.pread(self._file, length, start), buffers)


class InMemory:
    """A file that was read whole, for reading parts of it."""

    def __init__(self, data: bytes):
        self._data, self.size = data, len(data)

    def readv(self, buffers: list, start: int) -> int:
        """Fill buffers one after another from byte `start` on; returns how many bytes were read."""
        return _scatter(memoryview(self._data)[start:], buffers)


class BucketStore:
    """A part of a bucket, through obstore. Safe between threads; refused in a process forked from one that used it.

    Objects appear whole, so readers need nothing more. There are no locks: who runs several writers gives each its own
    `--shard I/N`. Endpoint, region and keys come from the environment (AWS_ENDPOINT_URL, AWS_REGION, ...). What fails
    is tried again for some seconds, then raises StoreError, or UsageError where there is no such bucket.
    """

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        scheme, _, rest = self.address.partition("://")
        if scheme not in KEYS or not rest.partition("/")[0]:
            kinds = ", ".join(f"{scheme}://" for scheme in KEYS)
            raise UsageError(f"{address} is no address of a cache; give a path, or a bucket and a name after {kinds}")
        self._obs = _obstore()
        _refuse_fork(self.address)
        # allow_http takes effect only where the endpoint that the user names begins with http://
        options = {"connect_timeout": CONNECT_TIMEOUT, "timeout": REQUEST_TIMEOUT, "allow_http": True}
        try:
            self._store = self._obs.store.from_url(self.address, client_options=options, retry_config=RETRIES)
        except (self._obs.exceptions.BaseError, ValueError) as error:
            raise self._explained(error, "") from error

    def __str__(self) -> str:
        return self.address

    def write_whole(self, name: str, buffers: list) -> None:
        size = sum(memoryview(buffer).nbytes for buffer in buffers)
        with self.asking(name):
            if size <= PART_BYTES:
                self._obs.put(self._store, name, b"".join(buffers))
            else:  # the object appears with its last part
                self._obs.put(self._store, name, iter(buffers), chunk_size=PART_BYTES, max_concurrency=PARTS)

    def write_together(self, files: dict[str, list]) -> None:
        self.map(lambda name: self.write_whole(name, files[name]), list(files))

    def write_first(self, name: str, data: bytes) -> None:
        """Write a file unless it is there already."""
        with self.asking(name), contextlib.suppress(self._obs.exceptions.AlreadyExistsError):
            self._obs.put(self._store, name, data, mode="create")

    def read(self, name: str) -> bytes | None:
        with self.asking(name):
            try:
                return self._obs.get(self._store, name).bytes().to_bytes()
            except FileNotFoundError as error:
                if _no_bucket(error):
                    raise
                return None

    def open(self, name: str) -> BucketFile:
        return BucketFile(self, name)

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        with self.asking(name):
            try:
                return self._obs.head(self._store, name)["size"]
            except FileNotFoundError:
                return None

    def sizes(self) -> dict[str, int]:
        return {name: size for name, (size, _) in self.stamps().items()}

    def stamps(self) -> dict[str, tuple[int, str]]:
        with self.asking(""):
            entries = [entry for page in self._obs.list(self._store) for entry in page]
            return {
                entry["path"]: (entry["size"], entry.get("e_tag") or str(entry["last_modified"])) for entry in entries
            }

    def names(self, folder: str) -> list[str]:
        with self.asking(folder):
            entries = [entry["path"] for page in self._obs.list(self._store, prefix=folder) for entry in page]
            return [name for name in entries if name.rpartition("/")[0] == folder]

    def remove(self, name: str) -> None:
        with self.asking(name), contextlib.suppress(FileNotFoundError):
            self._obs.delete(self._store, name)

    def read_range(self, name: str, start: int, length: int) -> memoryview:
        """These bytes of a file, or as many of them as it has."""
        with self.asking(name):
            return memoryview(self._obs.get_range(self._store, name, start=start, length=length))

    def sync(self, name: str) -> None:
        """Nothing: what a bucket has taken is safe."""

    def zarr(self) -> ObjectStore:
        from zarr.storage import ObjectStore

        return ObjectStore(self._store)

    def map(self, function: Callable, items: Iterable) -> list:
        """Calls run side by side; those from within one of them, which could wait for themselves, one by one."""
        _refuse_fork(self.address)
        items = items if isinstance(items, Sequence) else list(items)
        if len(items) < 2 or in_pool():
            return [function(item) for item in items]
        return list(self._threads.map(function, items))

    def each(self, function: Callable, items: Sequence, size: int) -> None:
        self.map(function, items)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(REQUESTS, thread_name_prefix="bucket", initializer=mark_pool_thread)

    @contextlib.contextmanager
    def asking(self, name: str) -> Iterator[None]:
        _refuse_fork(self.address)
        try:
            yield
        except self._obs.exceptions.BaseError as error:
            raise self._explained(error, name) from error
        except FileNotFoundError as error:  # of one object, which its reader may expect, or of the whole bucket
            if not _no_bucket(error):
                raise
            raise self._explained(error, name) from error

    def _explained(self, error: Exception, name: str) -> WhisperATError:
        """What was asked, what came of it, what to do."""
        denied = (self._obs.exceptions.PermissionDeniedError, self._obs.exceptions.UnauthenticatedError)
        keys = KEYS[self.address.partition("://")[0]]
        text = str(error).partition("\n\nDebug source")[0].strip()
        what = f"cannot reach {self.address}/{name}".rstrip("/")
        if _no_bucket(error):
            bucket = self.address.split("/")[2]
            return UsageError(f"{what}: there is no bucket {bucket!r}; create it, or mend the address")
        if "169.254.169.254" in text:  # where machines in a cloud ask for their keys
            return StoreError(f"{what}: no credentials were found; set {keys}")
        reason = found[1] if (found := re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)) else text
        if isinstance(error, denied):
            return StoreError(f"{what}: access is denied ({reason}); check what these keys may do: {keys}")
        if "HTTP error" in text:
            advice = "check the network and the endpoint (AWS_ENDPOINT_URL), then run the same command again"
            return StoreError(f"{what}: the server does not answer ({reason}); {advice}")
        return StoreError(f"{what}: {reason}; what was finished is kept: mend this and run the same command again")


class BucketFile:
    """An object of a bucket, for reading parts of it by ranged requests. Raises FileNotFoundError where it is not."""

    run = 256  # chunks read by one request: several megabytes

    def __init__(self, store: BucketStore, name: str):
        self._store, self._name = store, name
        size = store.size(name)
        if size is None:
            raise FileNotFoundError(name)
        self.size = size

    def expect(self, parts: list[tuple[int, int]]) -> None:
        """Nothing: requests run at once as it is."""

    def readv(self, buffers: list, start: int) -> int:
        """Fill buffers one after another from byte `start` on; returns how many bytes were read."""
        length = sum(memoryview(buffer).nbytes for buffer in buffers)
        return _scatter(self._store.read_range(self._name, start, length), buffers)


def _obstore() -> ModuleType:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise UsageError(
            "a cache in a bucket needs obstore, which is not installed; run: pip install 'whisper-at-cli[cloud]'"
        ) from error
    return obstore


def files_of_one_reader() -> int:
    """How many files a reader may keep open of one array: opening one costs as much as reading 50 kB."""
    try:
        import resource
    except ImportError:  # on Windows
        return 128
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 8192 if allowed == resource.RLIM_INFINITY else max(32, min(8192, allowed // 4))


_used_by: list[int] = []  # the process in which obstore's threads run


def _refuse_fork(address: str) -> None:
    """A forked process has none of its parent's threads, and would wait for them for ever."""
    if not _used_by:
        _used_by.append(os.getpid())
    if _used_by[0] != os.getpid():
        raise StoreError(
            f"cannot use {address} in a process that was forked from one that used a bucket; start workers with "
            "'spawn' or 'forkserver' (of a DataLoader: multiprocessing_context='spawn')"
        )


def _no_bucket(error: Exception) -> bool:
    return any(code in str(error) for code in ("NoSuchBucket", "ContainerNotFound", "bucket does not exist"))


def _scatter(data: bytes | memoryview, buffers: list) -> int:
    """Fill buffers one after another with data; returns how many bytes there were."""
    at = 0
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        part = data[at : at + len(view)]
        view[: len(part)] = part
        at += len(part)
    return at


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def sync_tree(path: Path) -> None:
    """Wait until a folder and all that is in it are on disk."""
    for folder, _, files in os.walk(path):
        for name in files:
            _sync_folder(Path(folder) / name)
        _sync_folder(Path(folder))


def _sync_folder(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_pieces(file: int, buffers: list) -> None:
    """Write all of these buffers, gathered into pieces that stay in the processor's cache on their way."""
    piece = np.empty(PIECE_BYTES, np.uint8)
    filled = 0
    for buffer in buffers:
        data = np.frombuffer(buffer, np.uint8) if memoryview(buffer).nbytes else np.empty(0, np.uint8)
        while len(data):
            part = data[: PIECE_BYTES - filled]
            piece[filled : filled + len(part)] = part
            filled, data = filled + len(part), data[len(part) :]
            if filled == PIECE_BYTES:
                _writev(file, [piece])
                filled = 0
    if filled:
        _writev(file, [piece[:filled]])


def _writev(file: int, buffers: list) -> None:
    """Write all of these buffers, however many calls the system takes for it."""
    written = os.writev(file, buffers)
    for buffer in buffers:
        size = memoryview(buffer).nbytes
        if written < size:
            rest = memoryview(buffer).cast("B")[written:]
            while len(rest):
                rest = rest[os.write(file, rest) :]
        written = max(0, written - size)
