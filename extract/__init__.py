"""Stage 1: audio through a frozen encoder into a feature cache."""

from whisper_at_cli.extract.lazy import lazy_names

_NAMES = {
    "FeatureCache": "cache",
    "extract": "pipeline.local",
    "extract_on_devices": "pipeline.several_devices",
    "load_backbone": "backbones.load",
    "load_whisper": "backbones.load",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
