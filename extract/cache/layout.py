"""Names of a cache's files, by the version of its format.

Version 1 has a folder for each dimension of a chunk, `features/c/3/0/0/0`; from version 2 on all chunks of an array lie
in its folder, `features/c.3.0.0.0`. Both are Zarr's default encoding of chunk keys, with another separator.
"""

from __future__ import annotations

from dataclasses import dataclass

VERSIONS = (1, 2)  # that this version of the tool reads and writes
NEWEST = VERSIONS[-1]
SHARDED = ("features", "mean", "scale")  # arrays with a file for each shard
FURTHER_DIMENSIONS = {"features": 3, "mean": 2, "scale": 2, "labels": 1}  # beside the clips; they are never divided


@dataclass(frozen=True)
class Layout:
    """Where the files of a cache are, relative to it."""

    version: int = NEWEST

    @property
    def separator(self) -> str:
        """What stands between the numbers of a chunk's key."""
        return "/" if self.version == 1 else "."

    def file(self, name: str, chunk: int) -> str:
        """Name of the file with a chunk, or a shard, of an array: the chunk counts from 0 along the clips."""
        key = ("c", str(chunk), *["0"] * FURTHER_DIMENSIONS.get(name, 0))
        return f"{name}/{self.separator.join(key)}"
