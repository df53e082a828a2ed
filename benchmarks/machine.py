"""What a benchmark ran on, and where its result goes."""

from __future__ import annotations

import json
import platform
from pathlib import Path

from whisper_at_cli.extract.devices import cores


def machine(gpu: str | None = None) -> dict:
    """Processor, cores and GPU, for the record."""
    found = {"processor": platform.processor() or platform.machine(), "cores": cores()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        found["processor"] = names[0] if names else found["processor"]
    return found | ({"gpu": gpu} if gpu else {})


def publish(result: dict, out: Path | None) -> None:
    """Print a result as JSON, and write it to `out` if that is given."""
    text = json.dumps(result, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n")
