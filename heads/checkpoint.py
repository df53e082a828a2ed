"""A trained head on disk: `head.safetensors` with its weights and `head.json` with all that is needed to use it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from whisper_at_cli import __version__
from whisper_at_cli.extract.cache.store import LocalStore
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.heads.forms import build_head

FORMAT = "whisper-at-cli head"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class HeadDescription:
    """What a head is, which features it takes, and how it was made. Travels with the weights."""

    head: str
    layers: int
    dim: int
    frames: int
    class_names: tuple[str, ...]
    backbone: str
    weights_sha256: str  # of the backbone
    clip_seconds: float
    loss: str  # "ce": probabilities are the softmax of the logits; "bce": the sigmoid of each
    width: int | None = None
    metric: str = ""
    value: float | None = None
    value_of: str = ""  # what was measured, on what
    trained_clips: int = 0
    seed: int = 0
    recipe: dict = field(default_factory=dict)
    tool_version: str = __version__
    torch_version: str = torch.__version__
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self):
        object.__setattr__(self, "class_names", tuple(self.class_names))

    @property
    def classes(self) -> int:
        return len(self.class_names)


def save_head(module: nn.Module, folder: str | Path, description: HeadDescription) -> Path:
    """Write a head to `folder`, made where needed, and return the folder. Each file appears whole or not at all."""
    from safetensors.torch import save

    folder = Path(folder)
    weights = save({name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()})
    record = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(description)}
    record["head_sha256"] = hashlib.sha256(weights).hexdigest()
    try:
        store = LocalStore(folder)
        store.write_whole("head.safetensors", [weights])
        store.write_whole("head.json", [(json.dumps(record, indent=1) + "\n").encode()])
    except OSError as error:
        raise WhisperATError(f"cannot write the head to {folder}: {error}; choose another --out") from error
    return folder


def load_head(folder: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """A saved head, ready to use: maps features (B, L, T, D) float32 to logits (B, C) and has a `description`.

    Raises UsageError where there is none, WhisperATError where it is damaged.
    """
    from safetensors.torch import load

    folder = Path(folder)
    record = _read_record(folder)
    try:
        weights = (folder / "head.safetensors").read_bytes()
    except OSError as error:
        raise WhisperATError(f"{folder} has a head.json but no weights to read ({error}); train it again") from error
    if hashlib.sha256(weights).hexdigest() != record.pop("head_sha256", None):
        raise WhisperATError(
            f"{folder / 'head.safetensors'} is not the file that head.json describes: one of them is damaged, or comes "
            "from another run; restore both, or train the head again"
        )
    try:
        description = HeadDescription(**record)
        module = build_head(
            description.head, layers=description.layers, dim=description.dim, classes=description.classes,
            width=description.width,
        )  # fmt: skip
        module.load_state_dict(load(weights))
    except (TypeError, KeyError, RuntimeError, UsageError) as error:
        raise WhisperATError(f"{folder / 'head.json'} does not fit its weights: {error}") from error
    module.description = description
    return module.to(device).eval()


def _read_record(folder: Path) -> dict:
    """The fields of head.json, of this format version."""
    path = folder / "head.json"
    if not path.is_file():
        raise UsageError(f"{folder} holds no head (no head.json in it); give the folder that `train-head --out` wrote")
    try:
        record = json.loads(path.read_text())
        found, version = record.pop("format"), record.pop("format_version")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WhisperATError(f"{path} is damaged ({error!r}); restore it, or train the head again") from error
    if found != FORMAT or version != FORMAT_VERSION:
        raise WhisperATError(f"{path} is a {found!r} of version {version}; this version reads {FORMAT_VERSION}")
    return record
