"""Fuzz the readers of files that others wrote.

    python tests/fuzz/fuzz.py cache --cpu-seconds 600 --out benchmarks/results/fuzz-cache.json
    python tests/fuzz/fuzz.py all --inputs 200
    python tests/fuzz/fuzz.py cache --again FOLDER

Exit status 1 where there was a finding; each is left in --findings as the folder of files that was read, and --again
reads such a folder without any limit. `engine.py` says what counts as one.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import platform
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "benchmarks")]

import engine  # noqa: E402
from record import machine  # noqa: E402

# module of each reader; only what is fuzzed is imported, since all that is imported is forked
READERS = {
    "manifest": "manifests",
    "ctranslate2": "ctranslate2_folders",
    "cache": "caches",
    "hdf5": "packs",
    "heads": "head_files",
    "sounds": "sounds",
}
VERSIONS = ("numpy", "torch", "zarr", "numcodecs", "h5py", "google-crc32c")


def reader_of(name: str) -> engine.Reader:
    return importlib.import_module(READERS[name]).READER


def record(reader: engine.Reader, tally: engine.Tally, seed: int) -> dict:
    """What a run came to, as JSON."""
    return {
        "reader": reader.name,
        "seed": seed,
        "cpu_seconds": round(tally.cpu_seconds, 1),
        "inputs": tally.inputs,
        "accepted": tally.kinds["accepted"],
        "refused": tally.kinds["refused"],
        "findings": sorted(tally.findings),
        "edges": len(tally.edges),
        "distinct_refusals": len(tally.refusals),
        "inputs_kept": tally.corpus,
        "peak_memory_mb": round(tally.peak_mb, 1),
        "slowest_seconds": round(tally.slowest[0], 3),
        "slowest": tally.slowest[1],
        "limits": {"cpu_seconds": engine.CPU_SECONDS, "memory_mb": engine.MEMORY_MB},
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in VERSIONS}},
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def progress(tally: engine.Tally) -> None:
    print(
        f"{tally.cpu_seconds:.0f} s: {tally.inputs} inputs, {dict(tally.kinds)}, {len(tally.edges)} edges, "
        f"{len(tally.refusals)} refusals, {tally.corpus} kept, peak {tally.peak_mb:.0f} MB, "
        f"slowest {tally.slowest[0]:.2f} s",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=[*READERS, "all"])
    parser.add_argument("--cpu-seconds", type=float, default=600)
    parser.add_argument("--inputs", type=int, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="folder for what was found")
    parser.add_argument("--out", type=Path, help="JSON record of the run")
    parser.add_argument("--again", type=Path, help="read this folder once, as the reader does")
    given = parser.parse_args()
    if given.again:
        print(reader_of(given.reader).read(given.again))
        return 0
    engine.limit_memory(2 * engine.ADDRESS_SPACE_MB)  # of the loop itself, should it grow
    records = []
    for name in READERS if given.reader == "all" else [given.reader]:
        reader = reader_of(name)
        tally = engine.fuzz(
            reader, cpu_seconds=given.cpu_seconds, inputs=given.inputs, seed=given.seed,
            findings=given.findings / reader.name, report=progress,
        )  # fmt: skip
        records.append(record(reader, tally, given.seed))
    text = json.dumps(records if given.reader == "all" else records[0], indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return 1 if any(found["findings"] for found in records) else 0


if __name__ == "__main__":
    sys.exit(main())
