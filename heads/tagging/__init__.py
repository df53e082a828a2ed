"""What a trained head says of audio: tags and events, beside a transcription or alone, and the files they go into."""

from typing import TYPE_CHECKING

from whisper_at_cli.extract.lazy import lazy_names

if TYPE_CHECKING:
    from whisper_at_cli.heads.tagging.captions import FORMATS as FORMATS
    from whisper_at_cli.heads.tagging.captions import write_captions as write_captions
    from whisper_at_cli.heads.tagging.events import EventSettings as EventSettings
    from whisper_at_cli.heads.tagging.page import write_page as write_page
    from whisper_at_cli.heads.tagging.tagger import Tagger as Tagger
    from whisper_at_cli.heads.tagging.tagger import TagSettings as TagSettings

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
