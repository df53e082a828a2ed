"""Datasets in a bucket: the files that list the clips are copied here once, audio is fetched clip by clip."""

from __future__ import annotations

import posixpath
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from whisper_at_cli.extract.audio.sources import ClipSource, FileClip, ObjectClip
from whisper_at_cli.extract.cache.store import BucketStore
from whisper_at_cli.extract.datasets.base import Dataset
from whisper_at_cli.extract.datasets.scan import is_audio
from whisper_at_cli.extract.errors import UsageError

LISTS = frozenset((".csv", ".json", ".jsonl", ".txt", ".tsv"))  # suffixes of what lists clips, classes and folds
MAX_LIST_BYTES = 500_000_000


@dataclass(frozen=True)
class BucketDataset(Dataset):
    """Clips whose files are objects below an address. Safe between threads; each process connects by itself."""

    address: str = ""

    of_files = False  # nothing can be told of an object's length without fetching it

    @property
    def place(self) -> str:
        return self.address

    def absolute(self) -> BucketDataset:
        return self

    def is_there(self, row: int) -> bool:
        source = self.source(row)
        return source.is_there() if isinstance(source, ObjectClip) else Path(self.clips[row].path).exists()

    def source(self, row: int) -> ClipSource:
        clip = self.clips[row]
        if Path(clip.path).is_absolute():  # a manifest may name files of this machine
            return FileClip(clip.path, clip.start, clip.end)
        return ObjectClip(self.address, clip.path, clip.start, clip.end)


def open_in_bucket(address: str, read: Callable[[Path], Dataset]) -> BucketDataset:
    """The dataset at an address, in any layout of files that `read` knows from a folder or file on disk.

    Raises UsageError where nothing is there or the layout needs more than lists and files of audio.
    """
    address = address.rstrip("/")
    folder, _, file = address.rpartition("/")
    if Path(file).suffix.lower() not in LISTS:
        folder, file = address, ""
    store = BucketStore(folder)
    sizes = store.sizes()
    if not sizes or (file and file not in sizes):
        raise UsageError(f"{address} holds no objects; give the address of a dataset's folder or list")
    if any(name.lower().endswith(".tar") for name in sizes) and not any(map(is_audio, map(posixpath.basename, sizes))):
        raise UsageError(f"{address} holds tar shards, which are read from a disk only; copy them there first")
    with tempfile.TemporaryDirectory(prefix="whisper-at-cli-") as temporary:
        shadow = Path(temporary) / (posixpath.basename(folder) or "bucket")
        for name, size in sizes.items():
            path = shadow / name
            path.parent.mkdir(parents=True, exist_ok=True)
            listed = path.suffix.lower() in LISTS and size <= MAX_LIST_BYTES
            path.write_bytes(store.read(name) or b"" if listed else b"")  # of audio the name alone
        found = read(shadow / file)
    if not found.of_files or type(found) is not Dataset:
        raise UsageError(f"{address} is a {found.name} that is read as a whole; copy it to a disk first")
    kept = {each.name: getattr(found, each.name) for each in fields(Dataset)}
    return BucketDataset(**kept | {"root": Path("/")}, address=folder)
