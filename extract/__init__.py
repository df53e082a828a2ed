"""Stage 1: audio through a frozen encoder into a feature cache."""

from whisper_at_cli.extract.lazy import lazy_names

_NAMES = {
    "FeatureCache": "cache",
    "extract": "pipeline",
    "extract_on_devices": "parallel",
    "load_backbone": "backbones",
    "load_whisper": "backbones",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
