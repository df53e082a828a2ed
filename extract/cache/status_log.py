"""What is known of each clip, from version 2 of the format on: a log, so that any cache is opened by a few reads.

status/log/merged              a record for each shard that was written, of all processes that have ended
status/log/I-of-N.TOKEN        those of one process at work, or of one that was killed
status, valid_frames, error    the same as arrays, for other readers of Zarr; written when a process ends

A record is MAGIC, the shard, the generation and the length of what follows (uint32 each), zstd of what is said of the
shard's clips (status, valid frames, errors as JSON), and a CRC-32C of all but MAGIC. Of two records of a shard that of
the higher generation counts: each record takes the next one after all that its process knows, and what is merged has
0, so that a run that was stopped and continued ends with the same bytes. Where a record is damaged, the arrays still
have what it said.
"""

from __future__ import annotations

import json
import secrets
import struct
import threading

import numpy as np
from numcodecs import zstd
from numcodecs.vlen import VLenUTF8

from whisper_at_cli.extract.cache.layout import Layout
from whisper_at_cli.extract.cache.schema import ROWS_PER_CHUNK, Status, rows_per_chunk
from whisper_at_cli.extract.cache.sealed import sealed, unpacked, unsealed
from whisper_at_cli.extract.cache.shards import CRC_BYTES, ZSTD_LEVEL, crc32c
from whisper_at_cli.extract.cache.status import ClipStatus, Geometry, ShardStatus
from whisper_at_cli.extract.cache.store import BucketStore, LocalStore
from whisper_at_cli.extract.errors import CacheError

LOG = "status/log"
MERGED = f"{LOG}/merged"
MAGIC = b"\x89SHARD\r\n"
HEADER = struct.Struct("<III")  # shard, generation, bytes of what follows
DERIVED = ("status", "valid_frames", "error")  # arrays that are made of the log
END = 2**32 - 1  # in place of a shard: the process that wrote this file has ended
SEGMENT_BYTES = 1 << 20  # of a log in a bucket, which is sent whole each time; then another one is begun
STATUS_MAX = max(Status)
MEANINGS = 1000  # different records that are kept in mind while a log is read
MOST_SAID = 1 << 26  # bytes that are said of one shard
MOST_GENERATION = 1 << 31  # of a record that is believed; each write takes the next one


class StatusLog(ClipStatus):
    """The log of a cache, and the arrays that are made of it."""

    layout = Layout(2)

    def __init__(self, store: LocalStore | BucketStore, geometry: Geometry):
        super().__init__(store, geometry)
        self._guard = threading.Lock()
        self._log, self._sent = "", b""  # the file that this process appends to, and what it holds
        self.reload()

    def reload(self) -> None:
        """Take in what was merged and all logs. Logs are read first: what is merged is written before they go."""
        self.problems = []
        self._records: dict[int, tuple[int, bytes]] = {}  # by shard: generation, record
        self._logs: dict[str, bool] = {}  # by name: whether its process has ended
        self._generations: dict[str, int] = {}  # by name of a log
        self._meanings: dict[tuple[bytes, int], ShardStatus] = {}
        names = sorted(name for name in self.store.names(LOG) if name != MERGED)
        logs = self.store.map(self.store.read, names)
        merged = self.store.read(MERGED)
        for name, data in zip([MERGED, *names], [merged, *logs], strict=True):
            if data is not None:
                self._take_log(name, data)
        if self.problems or merged is None:
            self._take_arrays(merged is None)
        self._status = np.zeros(self.geometry.clips, dtype=np.uint8)
        self._valid_frames = np.zeros(self.geometry.clips, dtype=np.uint8)
        self._errors: dict[int, str] = {}  # by row
        for shard, (_, record) in self._records.items():
            self._show(shard, self._meaning(record, len(self.geometry.rows(shard))))
        self._meanings = {}
        self.generation = 1 + max((generation for generation, _ in self._records.values()), default=0)

    @property
    def status(self) -> np.ndarray:
        return self._status

    @property
    def valid_frames(self) -> np.ndarray:
        return self._valid_frames

    def errors(self, rows: range | None = None) -> np.ndarray:
        first, count = (0, self.geometry.clips) if rows is None else (rows.start, len(rows))
        out = np.full(count, "", dtype=object)
        for row, text in self._errors.items():
            if 0 <= row - first < count:
                out[row - first] = text
        return out

    def _show(self, shard: int, said: ShardStatus) -> None:
        rows = self.geometry.rows(shard)
        self._status[rows.start : rows.stop] = said.status
        self._valid_frames[rows.start : rows.stop] = said.valid_frames
        if said.errors:
            self._errors |= {rows.start + slot: text for slot, text in said.errors.items()}

    def _take_log(self, name: str, data: bytes) -> None:
        """Take the records of one file. Of a log that grows, the last record may be cut off."""
        at, ended = 0, False
        while at < len(data):
            size = self._record_size(data, at)
            if size:
                shard, generation, _ = HEADER.unpack_from(data, at + len(MAGIC))
                self._generations[name] = max(generation, self._generations.get(name, 0))
                if shard == END:
                    ended = True
                elif shard not in self._records or self._records[shard][0] <= generation:
                    self._records[shard] = generation, data[at : at + size]
                at += size
            else:
                following = data.find(MAGIC, at + 1)
                if following >= 0 or name == MERGED or not _is_cut_off(data[at:]):
                    self.problems.append((-1, f"{name} is damaged at byte {at}: its CRC-32C does not match"))
                at = following if following >= 0 else len(data)
        if name != MERGED:
            self._logs[name] = ended

    def _record_size(self, data: bytes, at: int) -> int:
        """Bytes of the record at `at`, 0 where there is none that is whole and of this cache."""
        body = at + len(MAGIC)
        if not data.startswith(MAGIC, at) or body + HEADER.size > len(data):
            return 0
        shard, generation, length = HEADER.unpack_from(data, body)
        end = body + HEADER.size + length
        if generation > MOST_GENERATION or data[end : end + CRC_BYTES] != crc32c(data[body:end]):
            return 0
        if shard != END:
            try:
                self._meaning(data[at : end + CRC_BYTES], len(self.geometry.rows(shard)))
            except ValueError:
                return 0
        return end + CRC_BYTES - at

    def _meaning(self, record: bytes, clips: int) -> ShardStatus:
        """What a record says of so many clips; most say the same. Raises ValueError where it means nothing here."""
        key = record[len(MAGIC) + HEADER.size : -CRC_BYTES], clips
        said = self._meanings.get(key)
        if said is None:
            said = _said(record, clips)
            if said.status.max() > STATUS_MAX or said.valid_frames.max() > self.geometry.frames:
                raise ValueError("a status or a number of frames that there is not")
            if len(self._meanings) < MEANINGS:
                self._meanings[key] = said
        return said

    def _take_arrays(self, merged_is_missing: bool) -> None:
        """Where there is no record, take what the arrays say, which were made of records that are lost."""
        try:
            status, valid_frames = (self._array(name) for name in DERIVED[:2])
            errors = self._array_errors() if status.any() else {}
        except (CacheError, ValueError) as error:
            self.problems.append((-1, str(error)))
            return
        if merged_is_missing and status.any():  # they are written after it
            self.problems.append((-1, f"{MERGED} is missing"))
        for shard in np.unique(np.flatnonzero(status) // self.geometry.clips_per_shard).tolist():
            if shard not in self._records:
                rows = self.geometry.rows(shard)
                said = ShardStatus(
                    status[rows.start : rows.stop], valid_frames[rows.start : rows.stop],
                    {row - rows.start: text for row, text in errors.items() if row in rows},
                )  # fmt: skip
                self._records[shard] = 0, _record(shard, 0, said)

    def write(self, shard: int, said: ShardStatus) -> None:
        with self._guard:
            record = _record(shard, self.generation, said)
            self._append(record)
            self._records[shard] = self.generation, record
            self.generation += 1
            for row in self.geometry.rows(shard) if self._errors else ():
                self._errors.pop(row, None)
            self._show(shard, said)

    def _append(self, record: bytes) -> None:
        log = self._log or f"{LOG}/{self._own_slot}.{secrets.token_hex(4)}"
        if isinstance(self.store, LocalStore):
            self.store.append(log, record)
            self._log = log
            return
        sent = self._sent + record
        self.store.write_whole(log, [sent])
        self._log, self._sent = (log, sent) if len(sent) <= SEGMENT_BYTES else ("", b"")

    def finish(self, *, rewrite: bool = False) -> None:
        with self._guard:
            if self._log or any(_slot_of(name) == self._own_slot for name, ended in self._logs.items() if not ended):
                self._append(_record(END, self.generation, None))  # for those of this slot that were killed, too
            self._log, self._sent = "", b""
            self.reload()
            if self._others_at_work() or not (self._logs or self.problems or rewrite):
                return
            self._records = {shard: (0, _of_generation(0, record)) for shard, (_, record) in self._records.items()}
            self.store.write_whole(MERGED, [b"".join(record for _, (_, record) in sorted(self._records.items()))])
            self._write_arrays()
            for name in sorted(self._logs, key=lambda name: self._generations.get(name, 0)):  # newest last
                self.store.remove(name)
            self._logs, self.problems, self.generation = {}, [], 1

    @property
    def _own_slot(self) -> str:
        return f"{self.slot[0]}-of-{self.slot[1]}"

    def _others_at_work(self) -> bool:
        """Whether a log may be that of a process at work. None of a slot is whose shards overlap with this one's, and
        none that is older than the end of a process of the same slot."""
        end: dict[str, int] = {}
        for name, ended in self._logs.items():
            if ended:
                end[_slot_of(name)] = max(self._generations[name], end.get(_slot_of(name), 0))
        return any(
            not ended
            and _slot_of(name).endswith(f"-of-{self.slot[1]}")
            and _slot_of(name) != self._own_slot
            and self._generations.get(name, 0) >= end.get(_slot_of(name), 0)
            for name, ended in self._logs.items()
        )

    def array_problems(self) -> list[str]:
        """What is damaged in the arrays, or is not what the log says although no process is at work."""
        found, wrong = [], {}
        for name in DERIVED:
            try:
                if name == "error":
                    wrong[name] = self._array_errors() != self._errors
                else:
                    wrong[name] = not np.array_equal(self._array(name), getattr(self, name))
            except (CacheError, ValueError) as error:
                found.append(str(error))
        if not self._logs:
            found += [f"{name} is not what {MERGED} says" for name, differs in wrong.items() if differs]
        return found

    def _array(self, name: str) -> np.ndarray:
        """(N,) uint8 of `status` or `valid_frames`. Raises CacheError where it is damaged, ValueError where crafted."""
        clips, file = self.geometry.clips, self.layout.file(name, 0)
        data = self.store.read(file)
        values = np.zeros(clips, np.uint8) if data is None else np.frombuffer(unsealed(data, file, clips), np.uint8)
        most = STATUS_MAX if name == "status" else self.geometry.frames
        if len(values) != clips or values.max(initial=0) > most:
            raise CacheError(f"{file} is damaged: it holds {len(values)} values, of at most {values.max(initial=0)}")
        return values

    def _array_errors(self) -> dict[int, str]:
        """By row: what the array `error` says. Raises CacheError where it is damaged."""
        found: dict[int, str] = {}
        for number in range(-(-self.geometry.clips // ROWS_PER_CHUNK)):
            file = self.layout.file("error", number)
            if (data := self.store.read(file)) is not None:
                texts = VLenUTF8().decode(unsealed(data, file, MOST_SAID))
                found |= {number * ROWS_PER_CHUNK + at: text for at, text in enumerate(texts) if text}
        return found

    def _write_arrays(self) -> None:
        """Make the arrays that other readers of Zarr see."""
        for name in DERIVED[:2]:
            self.store.write_whole(self.layout.file(name, 0), sealed(getattr(self, name).tobytes()))
        texts: dict[int, dict[int, str]] = {}
        for row, text in self._errors.items():
            texts.setdefault(row // ROWS_PER_CHUNK, {})[row % ROWS_PER_CHUNK] = text
        names = {self.layout.file("error", number): some for number, some in texts.items()}
        for name in self.store.names("error"):
            if name not in names and name != "error/zarr.json":
                self.store.remove(name)
        rows = rows_per_chunk(self.geometry.clips)
        for name, some in names.items():
            column = np.array([some.get(row, "") for row in range(rows)], dtype=object)
            self.store.write_whole(name, sealed(VLenUTF8().encode(column)))


def _slot_of(name: str) -> str:
    """The slot of the process that wrote a log, such as `2-of-8`."""
    return name.rpartition("/")[2].rpartition(".")[0]


def _record(shard: int, generation: int, said: ShardStatus | None) -> bytes:
    packed = b""
    if said is not None:
        errors = json.dumps(said.errors, ensure_ascii=False).encode("utf-8", "backslashreplace") if said.errors else b""
        packed = zstd.compress(said.status.tobytes() + said.valid_frames.tobytes() + errors, ZSTD_LEVEL)
    body = HEADER.pack(shard, generation, len(packed)) + packed
    return MAGIC + body + crc32c(body)


def _of_generation(generation: int, record: bytes) -> bytes:
    """The same record of another generation."""
    shard, _, length = HEADER.unpack_from(record, len(MAGIC))
    body = HEADER.pack(shard, generation, length) + record[len(MAGIC) + HEADER.size : -CRC_BYTES]
    return MAGIC + body + crc32c(body)


def _said(record: bytes, clips: int) -> ShardStatus:
    """What a record says of so many clips. Raises ValueError where it means nothing."""
    try:
        data = unpacked(record[len(MAGIC) + HEADER.size : -CRC_BYTES], MOST_SAID)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if clips < 1 or len(data) < 2 * clips:
        raise ValueError(f"it says {len(data)} bytes of {clips} clips")
    status, valid_frames = np.frombuffer(data, np.uint8, 2 * clips).reshape(2, clips)
    try:
        texts = json.loads(data[2 * clips :].decode()) if len(data) > 2 * clips else {}
    except RecursionError as error:
        raise ValueError(str(error)) from error
    errors = {int(slot): text for slot, text in texts.items()} if isinstance(texts, dict) else {-1: ""}
    if not all(0 <= slot < clips and isinstance(text, str) for slot, text in errors.items()):
        raise ValueError("its errors are of other clips")
    return ShardStatus(status, valid_frames, errors)


def _is_cut_off(end: bytes) -> bool:
    """Whether these last bytes of a log begin a record whose end is missing."""
    if len(end) < len(MAGIC) + HEADER.size:
        return MAGIC.startswith(end[: len(MAGIC)]) or end.startswith(MAGIC)
    length = HEADER.unpack_from(end, len(MAGIC))[2]
    return end.startswith(MAGIC) and len(MAGIC) + HEADER.size + length + CRC_BYTES > len(end)
