"""Stage 1: audio through a frozen encoder into a feature cache."""

from typing import TYPE_CHECKING

from whisper_at_cli.extract.lazy import lazy_names

if TYPE_CHECKING:
    from whisper_at_cli.extract.backbones.load import load_backbone as load_backbone
    from whisper_at_cli.extract.backbones.load import load_whisper as load_whisper
    from whisper_at_cli.extract.cache import FeatureCache as FeatureCache
    from whisper_at_cli.extract.pipeline.local import extract as extract
    from whisper_at_cli.extract.pipeline.options import ExtractOptions as ExtractOptions
    from whisper_at_cli.extract.pipeline.several_devices import extract_on_devices as extract_on_devices

_NAMES = {
    "ExtractOptions": "pipeline.options",
    "FeatureCache": "cache",
    "extract": "pipeline.local",
    "extract_on_devices": "pipeline.several_devices",
    "load_backbone": "backbones.load",
    "load_whisper": "backbones.load",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
