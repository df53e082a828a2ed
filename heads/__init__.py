"""Stage 2a: heads on cached features; their forms and cost, training, metrics, checkpoints, and tagging with them."""

from whisper_at_cli.extract.lazy import lazy_names

_NAMES = {
    "train_head": "training.train",
    "search_heads": "training.search",
    "load_head": "checkpoint",
    "build_head": "forms",
    "evaluate_head": "evaluate",
    "finetune": "training.finetune",
    "load_end_to_end": "endtoend",
    "evaluate_end_to_end": "endtoend",
    "import_head": "original",
    "export_head": "original",
    "Tagger": "tagging.tagger",
    "transcribe": "tagging.tagger",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
