"""What a trained head says of audio: tags and events, beside a transcription or alone, and the files they go into."""

from whisper_at_cli.extract.lazy import lazy_names

_NAMES = {
    "EventSettings": "events",
    "TagSettings": "tagger",
    "Tagger": "tagger",
    "FORMATS": "captions",
    "write_captions": "captions",
    "write_page": "page",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
