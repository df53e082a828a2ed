"""Names beside the points of a scatter plot, so that none covers another, a point, or the edge.

Every label tries the same places around its point, near ones first. It takes the one that covers least; labels in a
crowd choose first, and all choose again until none moves. The result depends on nothing but the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DISTANCES = (0.5, 3, 6, 10, 15, 21, 28, 36, 45)  # points of 1/72 inch between the mark and the label
DIRECTIONS = tuple((np.cos(a), np.sin(a)) for a in np.arange(16) * np.pi / 8)
LEADER_FROM = 4  # distance from which a thin line leads back to the point
SWEEPS = 20
PADDING = 0.8  # free points around a label
LINE_MARKS = 60  # a line counts as so many small marks
OUTSIDE = 1e3  # what it costs to lie outside the axes, per point
COVERED = 20.0  # and to cover anything, beside 10 for each square point


def label_points(
    axes: Axes, x: Sequence[float], y: Sequence[float], names: Sequence[str], *, fontsize: float, mark: float,
    line: tuple[Sequence[float], Sequence[float]] | None = None,
) -> int:  # fmt: skip
    """Annotate points whose marks are `mark` points wide, around the ends (x, y) of a straight line if there is one.
    Returns how many pairs of labels still overlap.

    Fixes the figure's layout: draw everything else first.
    """
    from matplotlib.patheffects import withStroke

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    scale = 72 / figure.dpi  # pixels to points
    at = axes.transData.transform(np.column_stack([x, y])) * scale
    sizes = np.array([_size(axes, name, fontsize) for name in names]) * scale + 2 * PADDING
    inside = np.array(axes.bbox.extents) * scale
    places = [_places(point, size, mark) for point, size in zip(at, sizes, strict=True)]
    marks = np.hstack([at - mark / 2, at + mark / 2])
    avoided = np.empty((0, 4))
    if line is not None:
        first, last = np.transpose(line)
        along = axes.transData.transform(np.linspace(first, last, LINE_MARKS)) * scale
        avoided = np.hstack([along - 0.5, along + 0.5])
    chosen = _arrange(places, marks, avoided, sizes, inside)
    for point, size, place, name in zip(at, sizes, chosen, names, strict=True):
        gaps = np.linalg.norm(np.clip(at, place, place + size) - at, axis=1)  # between the label and every point
        own = np.linalg.norm(np.clip(point, place, place + size) - point)
        near = own - mark / 2 < LEADER_FROM and own <= gaps.min() + 1e-9
        annotation = axes.annotate(
            name, tuple(axes.transData.inverted().transform(point / scale)), xytext=tuple(place + PADDING - point),
            textcoords="offset points", fontsize=fontsize, ha="left", va="bottom", zorder=4,
            arrowprops=None if near else {
                "arrowstyle": "-", "color": "0.55", "linewidth": 0.4, "shrinkA": 0, "shrinkB": mark / 2,
                "relpos": tuple(np.clip((point - place) / size, 0, 1)),
            },
        )  # fmt: skip
        annotation.set_in_layout(False)
        annotation.set_path_effects([withStroke(linewidth=1.5, foreground="white")])  # bars pass behind it
    boxes = np.hstack([chosen, chosen + sizes])
    overlap = _shared_area(boxes[:, None], boxes[None]) > 1e-6
    return int(np.triu(overlap, 1).sum())


def _size(axes: Axes, text: str, fontsize: float) -> tuple[float, float]:
    """Width and height of a text in pixels, without keeping it."""
    drawn = axes.text(0, 0, text, fontsize=fontsize)
    box = drawn.get_window_extent()
    drawn.remove()
    return box.width, box.height


def _places(point: np.ndarray, size: np.ndarray, mark: float) -> np.ndarray:
    """(places, 2) lower left corners, the preferred ones first."""
    found = []
    for distance in DISTANCES:
        for dx, dy in DIRECTIONS:
            centre = (
                point
                + (mark / 2 + distance) * np.array([dx, dy])
                + size / 2 * [np.clip(dx * 2, -1, 1), np.clip(dy * 2, -1, 1)]
            )
            found.append(centre - size / 2)
    return np.array(found)


def _arrange(
    places: list[np.ndarray], marks: np.ndarray, avoided: np.ndarray, sizes: np.ndarray, inside: np.ndarray
) -> np.ndarray:
    """(n, 2): the corner that each label takes."""
    n = len(marks)
    own = np.eye(n, dtype=bool)
    alone = [_cost_alone(places[i], sizes[i], np.vstack([marks[~own[i]], avoided]), inside) for i in range(n)]
    crowd = [-(np.linalg.norm(marks - marks[i], axis=1) < 40).sum() for i in range(n)]
    chosen = np.full(n, -1)
    boxes = np.full((n, 4), np.nan)
    for _ in range(SWEEPS):
        before = chosen.copy()
        for i in np.argsort(crowd, kind="stable"):
            candidates = np.hstack([places[i], places[i] + sizes[i]])
            others = boxes[~own[i] & (chosen >= 0)]
            chosen[i] = np.argmin(alone[i] + _covering(candidates, others))
            boxes[i] = candidates[chosen[i]]
        if (chosen == before).all():
            break
    return boxes[:, :2]


def _cost_alone(places: np.ndarray, size: np.ndarray, marks: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(places,) of what does not depend on other labels: the order of preference, marks covered, the edge."""
    boxes = np.hstack([places, places + size])
    outside = np.maximum(inside[:2] - boxes[:, :2], 0).sum(axis=1) + np.maximum(boxes[:, 2:] - inside[2:], 0).sum(
        axis=1
    )
    preference = np.repeat(DISTANCES, len(DIRECTIONS)) + 0.1 * np.tile(np.arange(len(DIRECTIONS)), len(DISTANCES))
    return preference * 0.3 + _covering(boxes, marks) + OUTSIDE * outside


def _covering(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(boxes,) what it costs each to cover others."""
    area = _shared_area(boxes[:, None], others[None])
    return (10 * area + COVERED * (area > 0)).sum(axis=1)


def _shared_area(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of boxes (..., left bottom right top)."""
    width = np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0])
    height = np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1])
    return np.maximum(width, 0) * np.maximum(height, 0)
