"""Stage 2b: probes of each layer, recognition in noise, and the figures and the report drawn from them."""

from typing import TYPE_CHECKING

from whisper_at_cli.extract.lazy import lazy_names

if TYPE_CHECKING:
    from whisper_at_cli.probe.estimator import LayerProbe as LayerProbe
    from whisper_at_cli.probe.layers import probe_layers as probe_layers
    from whisper_at_cli.probe.robustness.measure import measure_robustness as measure_robustness

_NAMES = {
    "LayerProbe": "estimator",
    "measure_robustness": "robustness.measure",
    "probe_layers": "layers",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
