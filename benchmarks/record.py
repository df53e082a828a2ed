"""What every benchmark writes down: machine, versions, command, settings, what it measured, and its rows of the table.

A program measures, `describe` adds the rest, `publish` prints it and writes it. The rows are made from what was
measured and from nothing else (`tests/test_benchmarks.py`), so that `table.py` can read them without the program.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

Number = float | list[float]
Result = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A measured number, or several in the order that the row names, with its unit and what it was measured of."""

    value: Number | None
    unit: str = ""
    of: str = ""


@dataclass(frozen=True)
class Bound:
    """What was asked of one column of a row: `measured`, `ratio` or `share`. One of the two limits is given."""

    column: str
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table. `ratio` is to the baseline, `share` to the limit; `asked` holds if any bound of each does.

    Several figures of one row are a list in the same order everywhere, and a bound then holds for all of them.
    """

    group: str
    what: str
    measured: Figure
    baseline: Figure | None = None
    ratio: Number | None = None
    limit: Figure | None = None
    share: Number | None = None
    asked: tuple[tuple[Bound, ...], ...] = ()


def row_from_json(data: Mapping[str, Any]) -> Row:
    """A row as it stands in a result file."""
    figures = {name: Figure(**data[name]) for name in ("measured", "baseline", "limit") if name in data}
    asked = tuple(tuple(Bound(**bound) for bound in bounds) for bounds in data.get("asked", ()))
    return Row(**{**data, **figures, "asked": asked})


def row_to_json(row: Row) -> dict[str, Any]:
    """The same row as a result file holds it: what is empty is left out, but for a measured value that is open."""
    return json.loads(json.dumps(asdict(row, dict_factory=_without_empty)))


def _without_empty(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in items if name == "value" or value not in (None, "", ())}


def at_least(column: str, value: float) -> tuple[Bound, ...]:
    return (Bound(column, at_least=value),)


def at_most(column: str, value: float) -> tuple[Bound, ...]:
    return (Bound(column, at_most=value),)


def machine(gpu: str | None = None) -> dict[str, Any]:
    """Processor, cores and GPU, for the record."""
    from whisper_at_cli.extract.machine import cores, processor

    found: dict[str, Any] = {"processor": processor(), "cores": cores()}
    if family := processor_family():
        found["family"] = family  # 26 is AMD's Zen 5
    return found | ({"gpu": gpu} if gpu else {})


def processor_family() -> int | None:
    """The number by which the maker tells generations of one name apart."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((int(line.split(":")[1]) for line in lines if line.startswith("cpu family")), None)


def in_memory(folder: Path) -> bool:
    """Whether a folder lies in memory (tmpfs) and not on a disk; Linux only."""
    mounts, best, kind = Path("/proc/mounts"), "", ""
    for line in mounts.read_text().splitlines() if mounts.exists() else []:
        _, place, its_kind, *_ = line.split()
        if folder.resolve().is_relative_to(place) and len(place) >= len(best):  # a later mount hides an earlier one
            best, kind = place, its_kind
    return kind == "tmpfs"


def gpu_name(device: Any = None) -> str | None:
    """The GPU that a torch device is, or that there is; None for a CPU."""
    import torch

    if not torch.cuda.is_available() or (device is not None and torch.device(device).type != "cuda"):
        return None
    return torch.cuda.get_device_name(device)


def command() -> str:
    """How this program was called, from the project's folder: paths as their last part, without where it wrote."""
    words, arguments = ["python", f"benchmarks/{Path(sys.argv[0]).name}"], iter(sys.argv[1:])
    for word in arguments:
        if word in ("--out", "--folder"):
            next(arguments, None)
        else:
            words.append(Path(word).name if os.sep in word else word)
    threads = os.environ.get("OMP_NUM_THREADS")
    return (f"OMP_NUM_THREADS={threads} " if threads else "") + shlex.join(words)


def settings(options: argparse.Namespace, *left_out: str) -> dict[str, Any]:
    """The options that a result depends on; never where it reads from and writes to."""
    kept = {name: value for name, value in vars(options).items() if name not in ("out", "folder", *left_out)}
    return {name: value for name, value in kept.items() if not isinstance(value, Path)}


def describe(
    benchmark: str,
    found: Result,
    rows: Callable[[Result], list[Row]],
    *,
    packages: Iterable[str],
    gpu: str | None = None,
) -> Result:
    """The whole result: what was `found`, with what it was found on and its rows. Versions are of these packages."""
    import torch

    from whisper_at_cli import __version__

    versions = {"whisper-at-cli": __version__, "python": platform.python_version()}
    result = {
        "benchmark": benchmark,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": command(),
        "machine": machine(gpu),
        "threads": torch.get_num_threads(),
        "versions": versions | {name: version(name) for name in packages},
        **found,
    }
    result = json.loads(json.dumps(result))  # as it will be read: keys are strings, tuples are lists
    return result | {"rows": [row_to_json(row) for row in rows(result)]}


def publish(result: Result, out: Path | None) -> None:
    """Print a result as JSON, and write it to `out` if that is given."""
    text = json.dumps(result, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n")


def arguments(description: str | None, **numbers: int) -> argparse.ArgumentParser:
    """A parser with these whole numbers and their defaults, and with where the result goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser


def in_folder(measure: Callable[[argparse.Namespace, Path], Result], options: argparse.Namespace) -> Result:
    """What `measure` finds in a temporary folder, in `--folder` where the program has that option."""
    with tempfile.TemporaryDirectory(dir=getattr(options, "folder", None)) as folder:
        return measure(options, Path(folder))


@dataclass(frozen=True)
class Timing:
    """The best round of a piece of work: seconds a call, processor seconds a call, and what the call returned."""

    seconds: float
    processor_seconds: float
    result: Any


def best_of(rounds: int, work: Mapping[Any, Callable[[], Any]], repeats: Mapping[Any, int] | None = None) -> dict:
    """Name -> the best round of its work. Each round does all in turn: other work on the machine slows any of them."""
    best: dict[Any, Timing] = {}
    result: Any = None  # of the last call
    for _ in range(rounds):
        for name, do in work.items():
            calls = (repeats or {}).get(name, 1)
            started, used = time.perf_counter(), time.process_time()
            for _ in range(calls):
                result = do()
            seconds, processor = time.perf_counter() - started, time.process_time() - used
            if name not in best or seconds / calls < best[name].seconds:
                best[name] = Timing(seconds / calls, processor / calls, result)
    return best


def rounded(value: float, digits: int = 4) -> float:
    """To so many significant digits."""
    return float(f"{value:.{digits}g}")


def number(value: float) -> str:
    """About three digits, or all of a whole number's: what the tables show."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 0.1:
        return f"{value:.3g}"
    text = f"{value:.{3 if abs(value) < 1 else 2 if abs(value) < 10 else 1}f}"
    return text.rstrip("0").rstrip(".")
