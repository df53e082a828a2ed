"""CKA between layers as a heat map: how alike the representations of any two layers are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from whisper_at_cli.probe.figures import canvas
from whisper_at_cli.probe.figures.curves import layer_ticks

if TYPE_CHECKING:
    from whisper_at_cli.probe.similarity import Similarity

NUMBERS_UP_TO = 8  # layers: beyond, cells have no room for a number
SHADES = "cividis"  # as dark in grey as in colour, and the same to the colour-blind


def draw_similarity(found: Similarity, path: str | Path) -> dict:
    """A cell for each pair of layers, dark where they are unlike. Returns the numbers, which lie beside `path` too."""
    path = canvas.checked_path(path)
    cka = np.array(found.cka, dtype=float)
    rows, columns = cka.shape
    figure = canvas.new_figure(0.16 + 0.74 * max(0.5, min(1.2, rows / columns)))
    axes = figure.add_subplot()
    image = axes.imshow(cka, vmin=0, vmax=1, cmap=SHADES, origin="lower", aspect="auto")
    if max(rows, columns) <= NUMBERS_UP_TO:
        for (row, column), value in np.ndenumerate(cka):
            if not np.isnan(value):
                colour = "black" if value > 0.5 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=canvas.TICKS, color=colour)
    canvas.tidy_axes(axes, f"Layer of {found.second}", f"Layer of {found.first}")
    axes.grid(visible=False)
    for axis, count in ((axes.xaxis, columns), (axes.yaxis, rows)):
        ticks = layer_ticks(count)
        axis.set_ticks([tick - 1 for tick in ticks], [str(tick) for tick in ticks])
    bar = figure.colorbar(image, ax=axes)
    bar.ax.tick_params(labelsize=canvas.TICKS, length=3)
    bar.set_label("CKA", fontsize=canvas.TEXT)
    numbers = {"figure": "cka", "first": found.first, "second": found.second, "clips": found.clips, "cka": found.cka}
    return canvas.save(figure, numbers, path)
