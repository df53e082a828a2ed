"""Stage 2a: heads on cached features; their forms and cost, training, metrics and checkpoints."""

from whisper_at_cli.extract.lazy import lazy_names

_NAMES = {
    "train_head": "train",
    "search_heads": "search",
    "load_head": "checkpoint",
    "build_head": "forms",
    "evaluate_head": "evaluate",
    "finetune": "finetune",
    "load_end_to_end": "endtoend",
    "evaluate_end_to_end": "endtoend",
    "import_head": "original",
    "export_head": "original",
    "Tagger": "tagging",
    "transcribe": "tagging",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
