"""Tables of a report: numbers behind the charts, the layers of each class, and what is taken for what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from whisper_at_cli.extract.html import escape

SHADES = 20
VALUES_SHOWN = 12  # layers up to which a cell has room for its number
CONFUSION_CLASSES = 60  # up to which the matrix is shown; beyond, only its largest entries
CONFUSIONS_LISTED = 30
ROOMY_CLASSES = 20  # up to which the matrix has large cells


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def table(header: Sequence[str], rows: Iterable[Sequence], *, kind: str = "") -> str:
    """Plain cells; numbers are right-aligned, None is a dash."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: str | int | float | None) -> str:
    if value is None:
        return '<td class="number">–</td>'
    if isinstance(value, float):
        return f'<td class="number">{value:.4g}</td>'
    if isinstance(value, int):
        return f'<td class="number">{value:,}</td>'
    number = ' class="number"' if value[:1].isdigit() or value[:1] in "–<" else ""
    return f"<td{number}>{escape(value)}</td>"


def class_table(
    classes: Sequence[str], layers: Sequence[int], values: dict[str, list[float | None]], best: dict[str, int | None],
    *, measure: str, increase: dict[str, float] | None = None,
) -> str:  # fmt: skip
    """A row per class: its value in each layer as a shade, its best layer, and its WER increase where it is known."""
    columns = ["Class", *(f"{layer}" for layer in layers), f"Best {measure}", "Best layer"]
    columns += ["WER increase"] if increase else []
    head = "".join(
        f'<th scope="col"><button type="button" title="Sort by this column">{escape(name)}</button></th>'
        for name in columns
    )
    defined = [value for row in values.values() for value in row if value is not None]
    low, high = min(defined, default=0.0), max(defined, default=1.0)
    rows = []
    for name in classes:
        top = max((value for value in values[name] if value is not None), default=None)
        cells = [f'<th scope="row">{escape(name.replace("_", " "))}</th>']
        cells += [_shaded(value, low, high, f"{name}, layer {layer}", len(layers) <= VALUES_SHOWN)
                  for layer, value in zip(layers, values[name], strict=True)]  # fmt: skip
        cells += [_sortable(top, percent(top)), _sortable(best.get(name), str(best.get(name) or "–"))]
        if increase:
            cells.append(_sortable(increase.get(name), percent(increase.get(name))))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    narrow = "" if len(layers) <= VALUES_SHOWN else " narrow"
    about = f"{measure} in percent by layer, from {percent(low)} (faintest) to {percent(high)} (strongest). "
    return (
        f'<p class="soft">{escape(about)}A heading sorts by its column.</p><div class="wide">'
        f'<table class="classes{narrow}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def shades() -> str:
    """The style of every shade: light enough for dark text, or in the dark, dark enough for light text."""
    return "\n".join(
        f".h{n} {{ background: rgba(var(--accent-rgb), calc({n / SHADES:g} * var(--heat))); }}"
        for n in range(SHADES + 1)
    )


def _shaded(value: float | None, low: float, high: float, about: str, shown: bool) -> str:
    if value is None:
        return '<td class="heat" data-v="">–</td>' if shown else '<td class="heat" data-v=""></td>'
    shade = round(SHADES * (value - low) / (high - low)) if high > low else SHADES
    text = f"{100 * value:.0f}" if shown else ""
    return (
        f'<td class="heat h{shade}" data-v="{value:.6g}" title="{escape(f"{about}: {100 * value:.1f} %")}">{text}</td>'
    )


def _sortable(value: float | None, text: str) -> str:
    return f'<td class="number" data-v="{"" if value is None else f"{value:.6g}"}">{escape(text)}</td>'


def confusion_table(confusion: dict[str, dict[str, int]], classes: Sequence[str]) -> str:
    """True classes down, predicted classes across; shades are shares of the true class. Of many classes, a list of what
    is taken for what most often."""
    tested = [name for name in classes if name in confusion]
    if len(tested) > CONFUSION_CLASSES:
        return _largest_confusions(confusion)
    compact = "" if len(tested) <= ROOMY_CLASSES else " compact"
    across = [name for name in classes if name in confusion or any(name in row for row in confusion.values())]
    head = "".join(f'<th scope="col"><span>{escape(name.replace("_", " "))}</span></th>' for name in across)
    rows = []
    for true in tested:
        total = sum(confusion[true].values())
        cells = "".join(_confused(confusion[true].get(name, 0), total, true, name) for name in across)
        rows.append(f'<tr><th scope="row">{escape(true.replace("_", " "))}</th>{cells}</tr>')
    return (
        '<p class="soft">Clips; rows are true classes, columns predicted ones.</p><div class="wide">'
        f'<table class="confusion{compact}"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _confused(count: int, total: int, true: str, predicted: str) -> str:
    share = count / total if total else 0.0
    said = f"{count} of {total} clips of {true} taken for {predicted}"
    kind = " right" if true == predicted else ""
    return f'<td class="heat h{round(SHADES * share)}{kind}" title="{escape(said)}">{count or ""}</td>'


def _largest_confusions(confusion: dict[str, dict[str, int]]) -> str:
    pairs = [
        (count, true, predicted)
        for true, row in confusion.items()
        for predicted, count in row.items()
        if predicted != true
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    return table(
        ("True class", "Taken for", "Clips"),
        [(true.replace("_", " "), predicted.replace("_", " "), count)
         for count, true, predicted in pairs[:CONFUSIONS_LISTED]],
    )  # fmt: skip
