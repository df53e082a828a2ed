"""One self-contained HTML page from caches and results."""

from whisper_at_cli.extract.lazy import lazy_names

_NAMES = {
    "Source": "results",
    "render_report": "page",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
