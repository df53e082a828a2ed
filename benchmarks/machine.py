"""What a benchmark ran on, and where its result goes."""

from __future__ import annotations

import json
from pathlib import Path

from whisper_at_cli.extract.machine import cores, processor


def machine(gpu: str | None = None) -> dict:
    """Processor, cores and GPU, for the record."""
    return {"processor": processor(), "cores": cores()} | ({"gpu": gpu} if gpu else {})


def publish(result: dict, out: Path | None) -> None:
    """Print a result as JSON, and write it to `out` if that is given."""
    text = json.dumps(result, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n")
