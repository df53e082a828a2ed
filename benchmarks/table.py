"""Write the table of every measured ratio, AudioSet-2M on paper and the fuzzers' runs into README.md from the results.

    python benchmarks/table.py

Reads every file of `results/` and what is open, in `open.json`. Each block stands between two marker lines of
README.md; nothing between them is written by hand. A result without rows is an error unless it is named
here as no ratio, with its reason.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paper import paper
from record import Bound, Figure, Number, Result, Row, number, row_from_json

FOLDER = Path(__file__).resolve().parent
RESULTS, README, OPEN = FOLDER / "results", FOLDER / "README.md", FOLDER / "open.json"
GROUPS = (
    "extraction", "host", "encoder", "precision and storage", "datasets", "cache", "chunks", "memory", "engines",
    "heads", "scenes", "probes", "metrics", "text and tags",
)  # fmt: skip
NO_RATIO = {
    "robustness-tiny.en-speech14-esc10.json": "word error rates of a recogniser in noise, which have no baseline and "
    "no limit to be a ratio to; `docs/robustness.md` shows them",
    "robustness-greedy-tiny.en-speech14-esc10.json": "the same, decoded at temperature 0 only (`--greedy`)",
    "esc10-table-tiny.en.json": "accuracies of ESC-10 with intervals, as `esc10_table.py --heads concat-linear "
    "wa-pool` made them",
    "mutation.json": "the share of planted faults that the tests notice; README.md here says it at its end",
    "engines-simulation.png": "the figure of the simulated cluster, drawn from `engines-cpu.json`",
}
NO_RATIO |= {
    path.name: "what became of each step of `make bench-gpu`, with every result"
    for path in RESULTS.glob("gpu-run.json")
}
NO_RATIO |= {
    path.name: "what a fuzzer of one reader came to, in the section on fuzzing"
    for path in sorted(RESULTS.glob("fuzz-*.json"))
}
COLUMNS = (
    "what", "measured", "baseline", "ratio", "limit in the same run", "of the limit", "asked", "hardware and date",
    "result",
)  # fmt: skip
NAMES = {"measured": "measured", "ratio": "ratio", "share": "of the limit"}


def numbers(value: Number | None) -> str:
    """One or several, in their order; nothing for None."""
    if value is None:
        return ""
    return " / ".join(map(number, value)) if isinstance(value, list) else number(value)


def figure(given: Figure | None) -> str:
    """`what it is: number unit`, as far as there is any of it; `-` for nothing at all."""
    if given is None:
        return "-"
    said = f"{numbers(given.value)} {given.unit}".strip()
    return f"{given.of}: {said}" if given.of and said else given.of or said or "-"


def holds(bound: Bound, row: Row) -> bool:
    """Whether a row keeps this bound, with all of its figures."""
    found = row.measured.value if bound.column == "measured" else getattr(row, bound.column)
    values: list[Any] = found if isinstance(found, list) else [found]
    lowest = -math.inf if bound.at_least is None else bound.at_least
    highest = math.inf if bound.at_most is None else bound.at_most
    return all(lowest <= value <= highest for value in values)


def asked(row: Row, *, judged: bool = True) -> str:
    """What was asked of a row, and whether it was reached."""

    def text(bound: Bound) -> str:
        least, most = bound.at_least, bound.at_most
        limit = f"at least {number(least)}" if least is not None else f"at most {number(most or 0)}"
        unit = f" {row.measured.unit}" if bound.column == "measured" and row.measured.unit else ""
        return f"{NAMES[bound.column]} {limit}{unit}"

    def verdict(bounds: Iterable[Bound]) -> str:
        reached = any(holds(bound, row) for bound in bounds)
        return ": reached" if reached else ": **not reached**"

    said = (" or ".join(map(text, bounds)) + (verdict(bounds) if judged else "") for bounds in row.asked)
    return "; ".join(said) or "-"


def hardware(result: Result) -> str:
    machine = result["machine"]
    threads, cores = result.get("threads", machine["cores"]), machine["cores"]
    some = f"{threads} of {cores} cores" if threads < cores else f"{cores} cores"
    name = machine.get("gpu") or f"{some}, {machine['processor']}"
    return f"{name}, {result['date']}"


def cells(values: Iterable[str]) -> str:
    return f"| {' | '.join(values)} |"


def measured_line(row: Row, result: Result, name: str) -> str:
    ratio = "-" if row.ratio is None else f"**{numbers(row.ratio)}**"
    return cells(
        (
            row.what, figure(row.measured), figure(row.baseline), ratio, figure(row.limit),
            numbers(row.share) or "-", asked(row), hardware(result),
            f"[{name.removesuffix('.json')}](results/{name})",
        )
    )  # fmt: skip


def open_line(entry: dict[str, Any], row: Row) -> str:
    """A row for a figure that is not measured, with the command that would measure it."""
    return cells(
        (
            row.what, f"**{entry['why']}**", figure(row.baseline), "-", figure(row.limit), "-",
            asked(row, judged=False), "-", f"`{entry['command']}`",
        )
    )  # fmt: skip


def read_results(folder: Path = RESULTS) -> dict[str, Result]:
    """File name -> result, without those that hold no ratio. Raises ValueError for one that has no rows."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name in NO_RATIO:
            continue
        result = json.loads(path.read_text()) if path.suffix == ".json" else {}
        if not result.get("rows"):
            raise ValueError(
                f"{path.name} holds no rows for the table; measure again, or name it in table.py's NO_RATIO"
            )
        found[path.name] = result
    return found


def table(results: dict[str, Result], still_open: list[dict[str, Any]]) -> str:
    """The table, what made each row, and what has none."""
    by_group: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name, result in results.items():
        for row in map(row_from_json, result["rows"]):
            by_group[row.group].append(measured_line(row, result, name))
    for entry in still_open:
        if entry["result"] not in results:
            by_group[entry["row"]["group"]].append(open_line(entry, row_from_json(entry["row"])))
    lines = [cells(COLUMNS), cells(["---"] * len(COLUMNS))]
    for group, of_group in by_group.items():
        if of_group:
            lines += [cells([f"**{group}**", *[""] * (len(COLUMNS) - 1)]), *of_group]
    lines += ["", "What made each result:", ""]
    for name, result in results.items():
        versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
        notes = "".join(f"; {note}" for note in result.get("notes", []))
        lines.append(f"* [{name.removesuffix('.json')}](results/{name}): `{result['command']}`; {versions}{notes}")
    lines += ["", "Not in the table:", ""]
    return "\n".join(lines + [f"* [{name}](results/{name}): {reason}" for name, reason in NO_RATIO.items()])


def fuzzing(folder: Path = RESULTS) -> str:
    """What the fuzzer of each reader came to."""
    header = (
        "reader",
        "inputs",
        "processor time",
        "read",
        "refused",
        "wordings",
        "most memory",
        "slowest",
        "findings",
        "date",
    )
    lines = [cells(header), cells(["---"] * len(header))]
    for path in sorted(folder.glob("fuzz-*.json")):
        run = json.loads(path.read_text())
        lines.append(
            cells([
                f"[{run['reader']}](results/{path.name})", f"{run['inputs']:,}", f"{run['cpu_seconds']:.0f} s",
                f"{run['accepted']:,}", f"{run['refused']:,}", f"{run['distinct_refusals']:,}",
                f"{run['peak_memory_mb']:.0f} MB", f"{run['slowest_seconds']:.1f} s", str(len(run["findings"])),
                run["date"],
            ])
        )  # fmt: skip
    return "\n".join(lines)


def between(text: str, name: str, block: str) -> str:
    """The text with this block between its two marker lines. Raises ValueError unless each stands there once."""
    begin, end = (f"<!-- {name}: {which}, written by table.py -->\n" for which in ("begin", "end"))
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(
            f"{README.name} needs the lines {begin.strip()} and {end.strip()}, once each and in this order"
        )
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n\n{end}{rest.split(end)[1]}"


def written(text: str, results: dict[str, Result], still_open: list[dict[str, Any]]) -> str:
    """README.md's text with its blocks as these results make them."""
    for name, block in (("table", table(results, still_open)), ("paper", paper(results)), ("fuzzing", fuzzing())):
        text = between(text, name, block)
    return text


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = read_results()
    README.write_text(written(README.read_text(), results, json.loads(OPEN.read_text())))
    print(f"{sum(len(result['rows']) for result in results.values())} rows of {len(results)} results in {README.name}")


if __name__ == "__main__":
    main()
