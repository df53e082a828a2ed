"""Stage 2b: per-layer linear probes, and the figures drawn from them."""

from whisper_at_cli.extract.lazy import lazy_names

_NAMES = {
    "LayerProbe": "estimator",
    "measure_robustness": "robustness",
    "probe_layers": "layers",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
