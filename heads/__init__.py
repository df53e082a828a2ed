"""Stage 2a: heads on cached features; their forms and cost, training, metrics and checkpoints."""

from whisper_at_cli.extract.lazy import lazy_names

_NAMES = {
    "train_head": "train",
    "load_head": "checkpoint",
    "build_head": "forms",
    "evaluate_head": "evaluate",
    "Tagger": "tagging",
    "transcribe": "tagging",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
