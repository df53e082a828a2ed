"""The paper's figures 1, 2, 3 and 5, drawn from caches or results on disk; the numbers lie beside each as JSON."""

from whisper_at_cli.extract.lazy import lazy_names

_NAMES = {
    "draw_layer_accuracy": "curves",
    "draw_figure_1": "curves",
    "draw_figure_2": "scatter",
    "draw_figure_3": "histogram",
    "draw_figure_5": "sizes",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
