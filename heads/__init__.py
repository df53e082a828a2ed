"""Stage 2a: heads on cached features; their forms and cost, training, metrics, checkpoints, and tagging with them."""

from typing import TYPE_CHECKING

from whisper_at_cli.extract.lazy import lazy_names

if TYPE_CHECKING:
    from whisper_at_cli.heads.checkpoint import load_head as load_head
    from whisper_at_cli.heads.endtoend import evaluate_end_to_end as evaluate_end_to_end
    from whisper_at_cli.heads.endtoend import load_end_to_end as load_end_to_end
    from whisper_at_cli.heads.evaluate import evaluate_head as evaluate_head
    from whisper_at_cli.heads.forms import build_head as build_head
    from whisper_at_cli.heads.original import export_head as export_head
    from whisper_at_cli.heads.original import import_head as import_head
    from whisper_at_cli.heads.tagging.tagger import Tagger as Tagger
    from whisper_at_cli.heads.tagging.tagger import transcribe as transcribe
    from whisper_at_cli.heads.training.finetune import finetune as finetune
    from whisper_at_cli.heads.training.train import search_heads as search_heads
    from whisper_at_cli.heads.training.train import train_head as train_head

_NAMES = {
    "train_head": "training.train",
    "search_heads": "training.train",
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
