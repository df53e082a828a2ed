"""The paper's figures 1, 2, 3 and 5, drawn from caches or results on disk; the numbers lie beside each as JSON."""

from typing import TYPE_CHECKING

from whisper_at_cli.extract.lazy import lazy_names

if TYPE_CHECKING:
    from whisper_at_cli.probe.figures.curves import draw_figure_1 as draw_figure_1
    from whisper_at_cli.probe.figures.curves import draw_layer_accuracy as draw_layer_accuracy
    from whisper_at_cli.probe.figures.curves import draw_shots as draw_shots
    from whisper_at_cli.probe.figures.heatmap import draw_similarity as draw_similarity
    from whisper_at_cli.probe.figures.histogram import draw_figure_3 as draw_figure_3
    from whisper_at_cli.probe.figures.scatter import draw_figure_2 as draw_figure_2
    from whisper_at_cli.probe.figures.sizes import draw_figure_5 as draw_figure_5

_NAMES = {
    "draw_layer_accuracy": "curves",
    "draw_shots": "curves",
    "draw_figure_1": "curves",
    "draw_similarity": "heatmap",
    "draw_figure_2": "scatter",
    "draw_figure_3": "histogram",
    "draw_figure_5": "sizes",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
