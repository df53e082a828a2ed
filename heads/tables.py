"""Tables 1 and 2 of the paper, with what this project counts beside what is printed, and one's own runs below.

The printed values are data: `paper.json`, which names their source. Metrics are in per cent, as there.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.heads.checkpoint import read_record
from whisper_at_cli.heads.count import (
    AST_FLOPS,
    AUDIOSET_CLASSES,
    Cost,
    ast_cost,
    ast_flops,
    encoder_cost,
    end_to_end_cost,
    head_cost,
)

Row = tuple[str, ...]

FORMATS = ("text", "markdown", "latex", "csv")
AS2M_CLIPS = 200_000  # a head trained on this many clips or more stands in the column of the large set
ESC50_CLASSES = 50
PAPER_CLIP_SECONDS = 10.0
BACKBONES = {  # layers and channels behind the rows of Table 1
    "Hubert X-Large": (48, 1280),
    "wav2vec2-Large-Robust": (24, 1024),
    "Whisper-Large": (32, 1280),
}
END_TO_END = {"Whisper-Large": "large-v1", "Whisper-Small": "small"}
NO_BLOCK = " (no block)"
SEEN = ", on clips that it was trained on"
HEAD_NAMES = {
    "last-mlp": "Last-MLP", "wa-mlp": "WA-MLP", "last-tr": "Last-Tr", "wa-tr": "WA-Tr", "tl-tr": "TL-Tr",
    "wa-pool": "WA-Pool",
    "concat-linear": "Concat-linear", "concat-linear-stats": "Concat-linear (mean, std, max)",
}  # fmt: skip


@dataclass(frozen=True)
class OwnResult:
    """A run of one's own: the head, and a metric of it."""

    file: str
    record: dict  # head.json
    metric: str
    value: float | None
    value_of: str
    seen: bool = False  # measured on clips that the head was trained on


def paper() -> dict:
    """The paper's tables as printed, with their source."""
    return json.loads(files("whisper_at_cli.heads").joinpath("paper.json").read_text(encoding="utf-8"))


def paper_table(number: int, results: Iterable[str | Path] = ()) -> dict:
    """Table 1 or 2: its rows as printed and as counted here, then those of one's own results.

    A result is a checkpoint's folder, its head.json, or what `train-head --json` or `evaluate --json` printed.
    Raises UsageError for another number or for a file that is no result.
    """
    if number not in (1, 2):
        raise UsageError(f"there is no table {number} here; choose 1 or 2")
    printed = paper()
    own = [read_result(result) for result in results]
    notes = []
    try:
        ast = ast_cost()
    except UsageError as error:
        ast = None
        notes.append(f"AST is not counted: {error}")
    table = printed[f"table{number}"]
    rows = [dict(zip(table["columns"], row, strict=True)) | {"own": False} for row in table["rows"]]
    if number == 1:
        rows = [row | _counted(_printed_cost(row, ast)) for row in rows] + [_own_row_1(result) for result in own]
    else:
        rows = [row | _counted(_width_cost(row["tl_tr_dim"])) for row in rows]
        rows += [_own_row_2(result) for result in own if result.record["head"] == "tl-tr"]
        notes += [
            f"{r.file} is a {r.record['head']}, and Table 2 is of tl-tr" for r in own if r.record["head"] != "tl-tr"
        ]
    return {
        "table": number, "source": printed["source"], "rows": rows,
        "ast": {"printed_flops": AST_FLOPS, "counted_flops": ast and ast.flops, "counted_params": ast and ast.params},
        "notes": notes,
    }  # fmt: skip


def render(table: dict, form: str) -> str:
    """A table as Markdown, LaTeX (booktabs) or CSV. Raises UsageError for another form."""
    header, rows = cells(table)
    writers = {"markdown": _markdown, "latex": _latex, "csv": _csv}
    if form not in writers:
        raise UsageError(f"format {form!r} is not known; choose from {', '.join(FORMATS)}")
    return writers[form](header, rows)


def cells(table: dict) -> tuple[Row, list[Row]]:
    """Header and rows as text. What the paper prints and what is counted here stand side by side."""
    number = table["table"]
    header: Row = {
        1: ("system", "training", "head", "AS-20K mAP", "AS-2M mAP", "ESC-50 acc."),
        2: ("TL-Tr channels", "AS-20K mAP", "ESC-50 acc."),
    }[number]
    names = {
        1: ("system", "training", "head", "as20k_mAP", "as2m_mAP", "esc50_accuracy"),
        2: ("tl_tr_dim", "as20k_mAP", "esc50_accuracy"),
    }[number]
    params, work = ("at_params_M", "at_speedup_vs_ast") if number == 1 else ("params_M", "gflops")
    header += ("params (M)", "counted", "speed-up" if number == 1 else "GFLOPs", "counted", "own result")
    rows = []
    for row in table["rows"]:
        counted = row["counted_speedup_vs_ast"] if number == 1 else row["counted_gflops"]
        digits = 2 if number == 2 else 1
        rows.append(
            (
                *(_text(row.get(name)) for name in names), _text(row.get(params)), _text(row["counted_params_M"], 2),
                _text(row.get(work), digits), _text(counted, digits), row.get("result", ""),
            )
        )  # fmt: skip
    return header, rows


def read_result(path: str | Path) -> OwnResult:
    """A run of one's own from a checkpoint's folder, its head.json, or the JSON that train-head or evaluate printed."""
    path = Path(path)
    if path.is_dir() or path.name == "head.json":
        record = read_record(path if path.is_dir() else path.parent)
        return OwnResult(str(path), record, record["metric"], record["value"], record["value_of"])
    try:
        found = json.loads(path.read_text())
        checkpoint = found["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no result ({error!r}): give a folder that train-head --out wrote, or what train-head --json or "
            "evaluate --json printed"
        ) from error
    if not checkpoint:
        raise UsageError(f"{path} is of a head that was not saved, so its sizes are not known: train it with --out")
    record = _record_of(Path(checkpoint), path)
    if "mAP" in found:
        metric = "mAP" if found["accuracy"] is None else "accuracy"
        where = f"on {found['clips']} clips ({found['chosen']})"
        return OwnResult(str(path), record, metric, found[metric], where, seen=bool(found["clips_trained_on"]))
    return OwnResult(str(path), record, found["metric"], found["value"], f"over {len(found['folds'])} folds")


def _record_of(checkpoint: Path, result: Path) -> dict:
    """head.json of a checkpoint whose path may be relative to where the command ran, or to the result."""
    for folder in (checkpoint, result.parent / checkpoint):
        if (folder / "head.json").is_file():
            return read_record(folder)
    raise WhisperATError(f"{result} is of the head in {checkpoint}, which is not there: restore it, or give its folder")


def _printed_cost(row: dict, ast: Cost | None) -> Cost | None:
    """What a row of Table 1 costs, None where its form is not one of ours."""
    system, head = row["system"], row["head"]
    if system == "AST":
        return ast
    if head == "end-to-end":
        return end_to_end_cost(END_TO_END[system]) if system in END_TO_END else None
    if system not in BACKBONES:
        return None
    layers, dim = BACKBONES[system]
    name, _, width = head.lower().partition("-tr-")
    if name != "tl":
        return head_cost(head.lower(), layers=layers, dim=dim)
    return head_cost("tl-tr", layers=layers, dim=dim, width=None if int(width) == dim else int(width))


def _width_cost(width: int) -> Cost:
    layers, dim = BACKBONES["Whisper-Large"]
    return head_cost("tl-tr", layers=layers, dim=dim, width=None if width == dim else width)


def _counted(cost: Cost | None, clip_seconds: float = PAPER_CLIP_SECONDS) -> dict:
    """What this project counts; the speed-up is against AST on a clip of this length, at the paper's as printed."""
    if cost is None:
        return {"counted_params_M": None, "counted_gflops": None, "counted_speedup_vs_ast": None}
    return {
        "counted_params_M": cost.params / 1e6,
        "counted_gflops": cost.flops / 1e9,
        "counted_speedup_vs_ast": ast_flops(clip_seconds) / cost.flops,
    }


def _own_cost(record: dict) -> Cost:
    classes = len(record["class_names"])
    cost = head_cost(
        record["head"], layers=record["layers"], dim=record["dim"], classes=classes, frames=record["frames"],
        width=record.get("width"), block=record.get("block", True),
    )  # fmt: skip
    if record.get("encoder"):
        cost += encoder_cost(
            mels=record["encoder"]["mels"], layers=record["layers"], dim=record["dim"],
            clip_seconds=record["clip_seconds"],
        )  # fmt: skip
    return cost


def _own_row_1(result: OwnResult) -> dict:
    record = result.record
    row = {
        "system": record["backbone"],
        "training": "fine-tuned" if record.get("encoder") else "frozen",
        "head": _own_name(record),
        "own": True,
    }
    return row | _own_values(result) | _counted(_own_cost(record), record["clip_seconds"])


def _own_name(record: dict) -> str:
    """As the paper writes it: with the channels inside where it has a projection, and TL-Tr always."""
    inner = record.get("width") or (record["dim"] if record["head"] == "tl-tr" else None)
    return HEAD_NAMES[record["head"]] + (f"-{inner}" if inner else "") + NO_BLOCK * (not record.get("block", True))


def _own_row_2(result: OwnResult) -> dict:
    record = result.record
    row = {"tl_tr_dim": record.get("width") or record["dim"], "backbone": record["backbone"], "own": True}
    return row | _own_values(result) | _counted(_own_cost(record), record["clip_seconds"])


def _own_values(result: OwnResult) -> dict:
    """The metric in per cent; in a column of the paper's too, unless it is training error or of another task."""
    record, metric = result.record, result.metric
    classes = len(record["class_names"])
    value = None if result.value is None else 100 * result.value
    columns: dict[str, float | None] = {"as20k_mAP": None, "as2m_mAP": None, "esc50_accuracy": None}
    audioset = "as2m_mAP" if record["trained_clips"] >= AS2M_CLIPS else "as20k_mAP"
    column = {(AUDIOSET_CLASSES, "mAP"): audioset, (ESC50_CLASSES, "accuracy"): "esc50_accuracy"}.get((classes, metric))
    if column and not result.seen:
        columns[column] = value
    said = "not measured" if value is None else f"{metric} {value:.1f} ({classes} classes{SEEN * result.seen})"
    return columns | {
        "at_params_M": None, "at_speedup_vs_ast": None, "params_M": None, "gflops": None, "file": result.file,
        "metric": metric, "value": value, "classes": classes, "training_error": result.seen,
        "value_of": result.value_of,
        "result": said if metric else "not measured",
    }  # fmt: skip


def _text(value: str | float | None, digits: int = 1) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}f}" if value >= 0.1 else f"{value:.2g}"


def _markdown(header: Row, rows: list[Row]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _latex(header: Row, rows: list[Row]) -> str:
    special = str.maketrans({character: f"\\{character}" for character in "&%$#_{}"})
    special |= {ord("\\"): r"\textbackslash{}", ord("~"): r"\textasciitilde{}", ord("^"): r"\textasciicircum{}"}
    lines = [" & ".join(cell.translate(special) for cell in line) + r" \\" for line in (header, *rows)]
    body = [lines[0], r"\midrule", *lines[1:]]
    return "\n".join(
        [rf"\begin{{tabular}}{{{'l' * len(header)}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]
    )


def _csv(header: Row, rows: list[Row]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue().rstrip("\n")
