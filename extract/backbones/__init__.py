"""Frozen encoders behind one interface, and their weights in every form that people have them in."""

from whisper_at_cli.extract.lazy import lazy_names

_NAMES = {
    "Backbone": "load",
    "WhisperBackbone": "load",
    "load_backbone": "load",
    "load_whisper": "load",
    "log_mel": "mel",
    "pool_frames": "encoder",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
