"""A probe's result as one long table, for spreadsheets and data frames: one number a row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from whisper_at_cli.extract.cache.store import LocalStore
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.probe.layers import ProbeResult
from whisper_at_cli.probe.scores import LayerPrecision

COLUMNS = ("layer", "score", "fold", "class", "predicted", "value")


def write_csv(result: ProbeResult, path: str | Path) -> None:
    """Whole or not at all. Raises UsageError where it cannot be written."""
    path = Path(path)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS, restval="")
    writer.writeheader()
    writer.writerows(tidy_rows(result))
    try:
        LocalStore(path.parent).write_whole(path.name, [table.getvalue().encode()])
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; choose another path") from error


def tidy_rows(result: ProbeResult) -> Iterator[dict]:
    """Rows with some of COLUMNS. An undefined score is left empty; a confusion that never happened has no row."""
    metric = result.metric
    for layer in result.layers:
        at: dict[str, object] = {"layer": layer.layer}
        yield at | {"score": metric, "value": getattr(layer, metric)}
        yield at | {"score": f"{metric}_std", "value": getattr(layer, f"{metric}_std")}
        for field, bounds in (("ci95", layer.ci95), ("band95", layer.band95)):
            for side, bound in zip(("low", "high"), bounds or (), strict=False):
                yield at | {"score": f"{metric}_{field}_{side}", "value": bound}
        for fold in layer.folds:
            yield at | {"score": metric, "fold": fold["fold"], "value": fold[metric]}
            if "strength" in fold:
                yield at | {"score": "strength", "fold": fold["fold"], "value": fold["strength"]}
        if isinstance(layer, LayerPrecision):
            for name, value in layer.class_ap.items():
                yield at | {"score": "ap", "class": name, "value": value}
            continue
        yield at | {"score": "macro_f1", "value": layer.macro_f1}
        for name, value in layer.class_f1.items():
            yield at | {"score": "f1", "class": name, "value": value}
        for true, predictions in layer.confusion.items():
            for predicted, clips in predictions.items():
                yield at | {"score": "confusion", "class": true, "predicted": predicted, "value": clips}
    for name, best in result.best_layer_per_class.items():
        yield {"layer": best, "score": "best_layer", "class": name, "value": best}
