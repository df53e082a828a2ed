"""Stage 2b: probes of each layer, recognition in noise, and the figures and the report drawn from them."""

from whisper_at_cli.extract.lazy import lazy_names

_NAMES = {
    "LayerProbe": "estimator",
    "measure_robustness": "robustness.measure",
    "probe_layers": "layers",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
