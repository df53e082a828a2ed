"""Which files of an output folder are done, so that `transcribe` continues after a kill and repeats nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from whisper_at_cli import __version__

RECORD = ".transcribed.jsonl"  # a line for each file that was written


class Finished:
    """The record in one output folder. A file counts if the same command made it from the same audio."""

    def __init__(self, folder: Path, head: Path, command: dict):
        self.path = folder / RECORD
        head_json = head / "head.json"  # holds the checksums of the head's weights
        content = head_json.read_bytes() if head_json.is_file() else b""
        made_by = [__version__, hashlib.sha256(content).hexdigest(), *sorted((k, repr(v)) for k, v in command.items())]
        self.command = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()
        self.known = self._read()

    def _read(self) -> dict[str, dict]:
        known = {}
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                known[entry["file"]] = entry
            except (ValueError, KeyError, TypeError):  # a line that a kill cut off: its file is made again
                continue
        return known

    def has(self, audio: Path, place: Path) -> bool:
        """Whether the file at `place` is there and is what this command would make of the audio."""
        return place.is_file() and self.known.get(place.name) == self._entry(audio, place)

    def add(self, audio: Path, place: Path) -> None:
        """Note that `place` was written."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" * self._cut_off() + json.dumps(self._entry(audio, place)) + "\n")

    def _cut_off(self) -> bool:
        """Whether the record ends within a line."""
        data = self.path.read_bytes()[-1:] if self.path.is_file() else b""
        return data not in (b"", b"\n")

    def _entry(self, audio: Path, place: Path) -> dict:
        found = audio.stat()
        return {
            "file": place.name, "audio": str(audio.resolve()), "bytes": found.st_size, "changed_ns": found.st_mtime_ns,
            "command": self.command,
        }  # fmt: skip
