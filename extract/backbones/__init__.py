"""Frozen encoders behind one interface, and their weights in every form that people have them in."""

from typing import TYPE_CHECKING

from whisper_at_cli.extract.lazy import lazy_names

if TYPE_CHECKING:
    from whisper_at_cli.extract.backbones.encoder import pool_frames as pool_frames
    from whisper_at_cli.extract.backbones.load import Backbone as Backbone
    from whisper_at_cli.extract.backbones.load import WhisperBackbone as WhisperBackbone
    from whisper_at_cli.extract.backbones.load import load_backbone as load_backbone
    from whisper_at_cli.extract.backbones.load import load_whisper as load_whisper
    from whisper_at_cli.extract.backbones.mel import log_mel as log_mel

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
