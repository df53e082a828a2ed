"""A second copy of a cache's metadata, its `zarr.json` files: without them nothing else could be read.

From version 2 of the format on, `status/metadata.zst` holds them all, packed by zstd and with a CRC-32C: within an
array, where no reader of Zarr looks for other arrays.
"""

from __future__ import annotations

import json
import re
import secrets

from whisper_at_cli.extract.cache.sealed import sealed, unsealed
from whisper_at_cli.extract.cache.store import BucketStore, LocalStore
from whisper_at_cli.extract.errors import CacheError

COPY = "status/metadata.zst"
METADATA = "zarr.json"
NAME = re.compile(r"(\w+/)?zarr\.json")
MOST_BYTES = 1 << 26


def keep_copy(store: LocalStore | BucketStore, arrays: list[str]) -> None:
    """Write the copy of the metadata of a new cache and of these arrays."""
    names = [METADATA, *(f"{name}/{METADATA}" for name in sorted(arrays))]
    texts = {}
    for name in names:
        try:
            json.loads(data := store.read(name) or b"")
        except (ValueError, RecursionError) as error:
            raise CacheError(f"{store}/{name} and its copy {COPY} are damaged; restore one of them") from error
        texts[name] = data.decode()
    store.write_whole(COPY, sealed(json.dumps(texts, ensure_ascii=False).encode()))


def metadata_problems(store: LocalStore | BucketStore) -> dict[str, str]:
    """What is wrong with metadata files, by name; the copy is one of them. Nothing in a cache of version 1."""
    try:
        kept = _kept(store)
    except CacheError as error:
        return {COPY: str(error)}
    if kept is None:
        return {COPY: f"{COPY} is missing"} if _should_have_copy(store) else {}
    found = store.map(store.read, list(kept))
    return {
        name: f"{name} is {'missing' if data is None else f'not what {COPY} says'}"
        for (name, text), data in zip(kept.items(), found, strict=True)
        if data != text.encode()
    }


def restore_metadata(store: LocalStore | BucketStore) -> list[str]:
    """Write metadata that are missing or damaged as the copy says; a damaged copy, as they say. Names of the files."""
    if isinstance(store, LocalStore):  # other processes may do the same
        store = LocalStore(store.path, mark=secrets.token_hex(4))
    problems = metadata_problems(store)
    if COPY in problems:
        arrays = [name.partition("/")[0] for name in store.sizes() if name.count("/") == 1 and name.endswith(METADATA)]
        keep_copy(store, arrays)
    elif problems:
        kept = _kept(store) or {}
        for name in problems:
            store.write_whole(name, [kept[name].encode()])
    return sorted(problems)


def _kept(store: LocalStore | BucketStore) -> dict[str, str] | None:
    """The text of every metadata file by name, None where there is no copy. Raises CacheError where it is damaged."""
    data = store.read(COPY)
    if data is None:
        return None
    try:
        kept = json.loads(unsealed(data, COPY, MOST_BYTES))
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{COPY} is damaged: {error}") from error
    if not isinstance(kept, dict) or not all(
        isinstance(text, str) and NAME.fullmatch(name) for name, text in kept.items()
    ):
        raise CacheError(f"{COPY} is damaged: it holds no metadata files")
    return kept


def _should_have_copy(store: LocalStore | BucketStore) -> bool:
    """Whether a cache is of a version that has one, as far as its metadata can be read."""
    try:
        return json.loads(store.read(METADATA) or b"")["attributes"]["format_version"] != 1
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
