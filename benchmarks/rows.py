"""Opening a dataset of many rows: CPU time and peak memory for a manifest of 2,000,000 clips, as CSV and as JSON lines.

    python benchmarks/rows.py
    python benchmarks/rows.py --rows 200000

The manifests name files that are not there, with one to three of 527 classes, a split and a fold each. Everything is
measured in a process of its own, which prints its CPU time without starting and importing, and its highest resident
set with these.

open_dataset   the manifest as a dataset, ids checked and labels numbered
objects        the baseline: csv.DictReader, or json.loads of each line, into a list
parsing        the limit: csv.reader or json.loads alone, of which nothing is kept

Prints JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from record import Figure, Result, Row, arguments, at_most, describe, publish, rounded, settings

CLASSES = 527
FORMS = ("csv", "jsonl")
MOST_SECONDS, MOST_GB = 15.0, 0.8  # asked, of 2,000,000 rows
ASKED_ROWS = 2_000_000


def clips(count: int) -> Iterator[dict]:
    """Rows of a manifest, the same each time."""
    rng, names = np.random.default_rng(0), [f"class {number}" for number in range(CLASSES)]
    for row in range(count):
        labels = [names[number] for number in rng.integers(CLASSES, size=1 + row % 3).tolist()]
        yield {
            "audio": f"audio/{row % 1000:03d}/clip_{row:08d}.flac", "labels": labels,
            "split": "valid" if row % 20 == 0 else "train", "fold": row % 10 + 1,
        }  # fmt: skip


def write(path: Path, count: int) -> None:
    with open(path, "w", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, ("audio", "labels", "split", "fold"))
            table.writeheader()
            table.writerows(clip | {"labels": ";".join(clip["labels"])} for clip in clips(count))
        else:
            file.writelines(f"{json.dumps(clip)}\n" for clip in clips(count))


def read(what: str, path: Path) -> object:
    """One way of reading a manifest; what it returns is held until memory is measured."""
    if what == "open_dataset":
        from whisper_at_cli.extract.datasets import open_dataset

        dataset = open_dataset(path)
        assert len(dataset.class_names) <= CLASSES, dataset
        return dataset
    with open(path, newline="") as file:
        if what == "objects":
            return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]
        deque(csv.reader(file) if path.suffix == ".csv" else map(json.loads, file), maxlen=0)
        return None


def measure_here(what: str, path: Path) -> dict[str, float]:
    """Seconds and gigabytes of this process, which does nothing else."""
    import whisper_at_cli.extract.datasets  # noqa: F401 - its time is not counted

    started = time.process_time()
    held = read(what, path)
    seconds = time.process_time() - started
    unit = 1 if platform.system() == "Darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    del held
    return {"cpu_seconds": round(seconds, 3), "peak_gb": round(peak / 1e9, 4)}


def measure(options: argparse.Namespace) -> Result:
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for form in FORMS:
            path = Path(folder) / f"manifest.{form}"
            write(path, options.rows)
            found[form] = {"bytes": path.stat().st_size}
            for what in ("open_dataset", "objects", "parsing"):
                words = [sys.executable, __file__, "--child", what, "--manifest", str(path)]
                found[form][what] = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
            path.unlink()
    return {"settings": settings(options, "child", "manifest") | {"classes": CLASSES}, "forms": found}


def rows(result: Result) -> list[Row]:
    count, lines = result["settings"]["rows"], []
    asked = (at_most("measured", MOST_SECONDS),), (at_most("measured", MOST_GB),)
    for form, name in zip(FORMS, ("CSV", "JSON lines"), strict=True):
        ours, objects, parsing = (result["forms"][form][what] for what in ("open_dataset", "objects", "parsing"))
        seconds, gb = ours["cpu_seconds"], ours["peak_gb"]
        of = "a dict a row, of which nothing is checked"
        lines += [
            Row(
                "datasets", f"CPU time of `open_dataset`, {count} rows, {name}", Figure(seconds, "s"),
                Figure(objects["cpu_seconds"], "s", of), rounded(seconds / objects["cpu_seconds"]),
                Figure(parsing["cpu_seconds"], "s", "parsing alone"), rounded(seconds / parsing["cpu_seconds"]),
                asked=asked[0] if count == ASKED_ROWS else (),
            ),
            Row(
                "datasets", f"peak memory of `open_dataset`, {count} rows, {name}", Figure(gb, "GB"),
                Figure(objects["peak_gb"], "GB", of), rounded(gb / objects["peak_gb"]),
                Figure(parsing["peak_gb"], "GB", "parsing alone, of which nothing is kept"),
                rounded(gb / parsing["peak_gb"]), asked=asked[1] if count == ASKED_ROWS else (),
            ),
        ]  # fmt: skip
    return lines


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=ASKED_ROWS)
    parser.add_argument("--folder", help="where to write the manifests; a temporary folder without it")
    parser.add_argument("--child", choices=("open_dataset", "objects", "parsing"), help=argparse.SUPPRESS)
    parser.add_argument("--manifest", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure_here(options.child, options.manifest)))
        return
    publish(describe("rows", measure(options), rows, packages=["numpy"]), options.out)


if __name__ == "__main__":
    main()
