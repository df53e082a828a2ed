"""What figures are drawn from: results on disk (of probe, robustness and train-head) and caches, which are probed.

An input is a path, or NAME=PATH where the curve is to be called something else than its backbone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.output import as_data

PROBE, ROBUSTNESS, HEAD = "probe", "robustness", "train-head"
COMMANDS = {
    PROBE: "whisper-at-cli probe CACHE --json",
    ROBUSTNESS: "whisper-at-cli robustness ... --json",
    HEAD: "whisper-at-cli train-head CACHE --head H --json",
}
WER_FIELDS = {"whisper": "wer", "paper": "wer_paper"}
WER_DRAWS = 2_000


@dataclass(frozen=True)
class Result:
    """One result: what kind it is of, what to call it, where it came from, its JSON."""

    kind: str
    name: str
    source: str
    content: dict


def as_result(name: str, found: object, source: str = "") -> Result:
    """A ProbeResult, or the JSON of any result. Raises UsageError for anything else."""
    kind, content = _recognised(as_data(found), source or name)
    return Result(kind, name, source or name, content)


def load_results(places: Sequence[str], probe: Callable[[Path | str], object]) -> list[Result]:
    """A result for each place, in order; `probe` makes the result of a cache. Raises UsageError with what is wrong."""
    results = [_load(str(place), probe) for place in places]
    known: dict[tuple[str, str], str] = {}
    for result in results:
        other = known.setdefault((result.kind, result.name), result.source)
        if other != result.source:
            raise UsageError(f"{other} and {result.source} are both called {result.name}; name them as NAME=PATH")
    return results


def _load(place: str, probe: Callable[[Path | str], object]) -> Result:
    name, equals, path = place.partition("=")
    if not equals or Path(place).exists():
        name, path = "", place
    if "://" in path or Path(path).is_dir():
        found = as_data(probe(path if "://" in path else Path(path)))
    else:
        found = _read_json(Path(path))
    kind, content = _recognised(found, path)
    return Result(kind, name or _name_of(kind, content, path), path, content)


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{path} does not exist; give a cache, or a JSON file that a command with --json wrote"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(
            f"{path} is not a JSON file ({' '.join(str(error).split())}); give what a command printed with --json"
        ) from error


def _recognised(content: object, source: str) -> tuple[str, dict]:
    """The kind of a result, and the result."""
    if isinstance(content, dict):
        if content.get("kind") == ROBUSTNESS or _rows(content, "results", "snr"):
            return ROBUSTNESS, content
        if _rows(content, "layers", "layer"):
            return PROBE, content
        if {"head", "value", "metric"} <= set(content):
            return HEAD, content
    found = f"its fields are {', '.join(sorted(content)[:8])}" if isinstance(content, dict) and content else "it is not"
    raise UsageError(f"{source} is not a result of {', '.join(COMMANDS)}: {found}; make one with: {COMMANDS[PROBE]}")


def _rows(content: dict, field: str, column: str) -> bool:
    rows = content.get(field)
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) and column in row for row in rows)


def _name_of(kind: str, content: dict, path: str) -> str:
    """The backbone's or model's name, and whether labels were permuted. An older result of train-head names none: then
    the file's own."""
    name = content.get("model") if kind == ROBUSTNESS else content.get("backbone") or content.get("model")
    permuted = ", labels permuted" if content.get("permuted_labels") else ""
    return f"{name}{permuted}" if name else Path(path).stem


def only(results: Sequence[Result], kind: str, figure: str) -> list[Result]:
    """Raises UsageError where one of them is of another kind."""
    for result in results:
        if result.kind != kind:
            raise UsageError(
                f"{result.source} is a result of {result.kind}, and {figure} needs one of {kind}; make it with: "
                f"{COMMANDS[kind]}"
            )
    return list(results)


def of_kind(results: Sequence[Result], *kinds: str) -> list[Result]:
    return [result for result in results if result.kind in kinds]


def wer_at(result: Result, snr: float, wer: str) -> tuple[float, dict[str, float]]:
    """WER over all noise, and for each class of noise, at one SNR. Raises UsageError where it was not measured."""
    rows = {float(row["snr"]): row for row in result.content["results"]}
    if snr not in rows:
        there = ", ".join(f"{at:g}" for at in sorted(rows))
        raise UsageError(
            f"{result.source} has results for SNR {there}, none for {snr:g} dB; measure it with --snr {snr:g}"
        )
    field = WER_FIELDS[wer]
    if field not in rows[snr]:
        raise UsageError(f"{result.source} has no {field}; choose another --wer ({', '.join(WER_FIELDS)})")
    classes = rows[snr].get(field.replace("wer", "class_wer", 1)) or {}
    return rows[snr][field], {name: value for name, value in classes.items() if value is not None}


def wer_curve(result: Result, wer: str) -> tuple[list[float], list[float]]:
    """SNRs, ascending, and the WER at each. Raises UsageError where the field is not there."""
    snrs = sorted({float(row["snr"]) for row in result.content["results"]})
    return snrs, [wer_at(result, snr, wer)[0] for snr in snrs]


def clean_wer(result: Result, wer: str) -> float:
    """Raises UsageError where the clean speech was not transcribed."""
    value = (result.content.get("clean") or {}).get(WER_FIELDS[wer])
    if value is None:
        raise UsageError(f"{result.source} has no WER of clean speech; give --snr for one at an SNR")
    return value


def increase_intervals(results: Sequence[dict], low: float, high: float, wer: str) -> dict[str, list[float]]:
    """By class of noise, the 95 % interval of the WER at one SNR minus that at another, over draws of utterances.

    Nothing for results that do not say how many errors each utterance had, and for classes with one utterance.
    """
    levels = {float(row["snr"]): row.get("class_counts") or {} for row in results}
    found = {}
    for name in levels[low].keys() & levels[high].keys():
        counts = [_by_utterance(levels[snr][name], WER_FIELDS[wer]) for snr in (low, high)]
        both = sorted(counts[0].keys() & counts[1].keys())
        if len(both) < 2:
            continue
        errors_words = np.array([[counts[side][utterance] for utterance in both] for side in (0, 1)], dtype=float)
        drawn = np.random.default_rng(0).multinomial(len(both), np.full(len(both), 1 / len(both)), size=WER_DRAWS)
        sums = drawn @ errors_words
        increase = sums[0, :, 0] / np.maximum(sums[0, :, 1], 1) - sums[1, :, 0] / np.maximum(sums[1, :, 1], 1)
        found[name] = np.quantile(increase, [0.025, 0.975]).tolist()
    return found


def _by_utterance(counts: dict, field: str) -> dict[str, list[int]]:
    """Errors and words of each utterance."""
    found: dict[str, list[int]] = {}
    columns = (counts["utterances"], counts[f"{field}_errors"], counts[f"{field}_words"])
    for utterance, errors, words in zip(*columns, strict=True):
        known = found.get(utterance, [0, 0])
        found[utterance] = [known[0] + errors, known[1] + words]
    return found
