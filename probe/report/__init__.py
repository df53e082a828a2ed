"""One self-contained HTML page from caches and results."""

from typing import TYPE_CHECKING

from whisper_at_cli.extract.lazy import lazy_names

if TYPE_CHECKING:
    from whisper_at_cli.probe.report.page import render_report as render_report
    from whisper_at_cli.probe.report.results import Source as Source

_NAMES = {
    "Source": "results",
    "render_report": "page",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
