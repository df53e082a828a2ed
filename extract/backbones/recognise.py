"""What --model stands for, looked at before any weights are loaded or downloaded."""

from __future__ import annotations

from pathlib import Path

from whisper_at_cli.extract.backbones import custom
from whisper_at_cli.extract.backbones.controls import is_control
from whisper_at_cli.extract.backbones.forms import WEIGHT_FILES, check_file
from whisper_at_cli.extract.backbones.huggingface import is_hub_name
from whisper_at_cli.extract.backbones.weights import check_single_file, folder_kind, no_such_model, whisper_names
from whisper_at_cli.extract.errors import UsageError


def check_model(model: str | Path) -> None:
    """Refuse at once what `load_backbone` would refuse by name, path or kind: UsageError or WeightsError.

    Weights may still turn out to be damaged when they are loaded, and a name on the hub to be unknown.
    """
    path = Path(model)
    if path.is_dir():
        backbone_kind(path)
    elif path.is_file():
        check_single_file(path)
    elif is_control(str(model)):
        return
    elif str(model) not in whisper_names() and not custom.find_loader(str(model)) and not is_hub_name(model):
        raise no_such_model(model)


def backbone_kind(folder: Path) -> str:
    """The kind of model a folder holds: `ctranslate2`, `whisper`, or one of the wav2vec 2.0 family.

    Raises UsageError for any other, WeightsError where its files are no weights.
    """
    from whisper_at_cli.extract.backbones.speech import MODEL_CLASSES

    kind = folder_kind(folder)
    if kind not in ("whisper", "ctranslate2", *MODEL_CLASSES):
        raise UsageError(
            f"{folder} holds a {kind} model; known are whisper, {', '.join(MODEL_CLASSES)}. {custom.GUIDE} of one's own"
        )
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            check_file(folder / name)
    return kind
