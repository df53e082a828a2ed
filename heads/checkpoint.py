"""A trained head on disk: `head.safetensors` with its weights and `head.json` with all that is needed to use it.

Beside them `trained_on.safetensors`, where it is known which clips the head was trained on, and `encoder.safetensors`,
where the encoder was trained with it. head.json is written last and holds the SHA-256 of each of the others.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from whisper_at_cli import __version__
from whisper_at_cli.extract.cache.store import LocalStore
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.heads.forms import Head, build_head, head_name

FORMAT = "whisper-at-cli head"
FORMAT_VERSION = 1
HEAD, TRAINED_ON, ENCODER = "head", "trained_on", "encoder"  # files NAME.safetensors; NAME_sha256 is in head.json
MOST = 1 << 20  # layers, channels or frames: more, no head has
UNKNOWN = "unknown"  # checksum of a backbone whose weights nobody recorded


@dataclass(frozen=True)
class HeadDescription:
    """What a head is, which features it takes, and how it was made. Travels with the weights."""

    head: str
    layers: int
    dim: int
    frames: int
    class_names: tuple[str, ...]
    backbone: str
    weights_sha256: str  # of the backbone; "unknown" for a head from elsewhere
    clip_seconds: float
    loss: str  # "ce": probabilities are the softmax of the logits; else the sigmoid of each
    width: int | None = None
    block: bool = True  # of wa-pool: whether it has a block over time
    standardised: bool = False
    metric: str = ""
    value: float | None = None  # of all held-out clips together
    ci95: list[float] | None = None  # of value
    value_of: str = ""  # what was measured, on what
    fold_mean: float | None = None  # mean over folds
    fold_std: float | None = None  # standard deviation over folds
    selected_on: dict[str, str] = field(default_factory=dict)  # what was chosen -> on which clips
    permuted_labels: bool = False  # a control: recordings had traded their labels
    trained_clips: int = 0
    seed: int = 0
    recipe: dict = field(default_factory=dict)
    class_names_known: bool = True  # False: nobody said what the classes are, and they are named by their numbers
    source: str = ""  # the file that the head was imported from
    encoder: dict | None = None  # mels and heads of an encoder that was trained with the head and lies beside it
    tool_version: str = __version__
    torch_version: str = torch.__version__
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))

    @property
    def name(self) -> str:
        """Of the head, in predictions and tables."""
        return head_name(self.head, self.width, self.block)

    @property
    def classes(self) -> int:
        return len(self.class_names)


def save_head(
    module: nn.Module, folder: str | Path, description: HeadDescription, *, trained_ids: Iterable[str] | None = None,
    encoder: dict[str, Tensor] | None = None,
) -> Path:  # fmt: skip
    """Write a head to `folder`, made where needed, and return the folder. Each file appears whole or not at all.

    `trained_ids` are the ids of the clips that it was trained on, so that `evaluate` can tell whether it knows a clip;
    `encoder` the weights of the encoder that was trained with it.
    """
    folder = Path(folder)
    files = {HEAD: module.state_dict()}
    if trained_ids is not None:
        files[TRAINED_ON] = {"id_hash": torch.from_numpy(np.sort(id_hashes(trained_ids)))}
    if encoder is not None:
        files[ENCODER] = encoder
    record = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(description)}
    try:
        store = LocalStore(folder)
        for name in (HEAD, TRAINED_ON, ENCODER):
            if name in files:
                content = to_safetensors(files[name])
                record[f"{name}_sha256"] = hashlib.sha256(content).hexdigest()
                store.write_whole(f"{name}.safetensors", [content])
            else:  # what an earlier head left here is not this one's
                (folder / f"{name}.safetensors").unlink(missing_ok=True)
        store.write_whole("head.json", [(json.dumps(record, indent=1) + "\n").encode()])
    except OSError as error:
        raise WhisperATError(f"cannot write the head to {folder}: {error}; choose another --out") from error
    return folder


def load_head(folder: str | Path, device: str | torch.device = "cpu") -> Head:
    """A saved head, ready to use: maps features (B, L, T, D) float32 to logits (B, C) and has a `description`.

    Raises UsageError where there is none, WhisperATError where it is damaged.
    """
    folder = Path(folder)
    record = read_record(folder)
    weights = _read_tensors(folder, HEAD, record)
    try:
        description = HeadDescription(**{name: value for name, value in record.items() if not _is_checksum(name)})
        _check_description(description)
        with torch.device("meta"):  # takes no memory, whatever sizes head.json names
            _compare(_built(description), weights)
        module = _built(description)
        module.load_state_dict(weights)
    except (TypeError, KeyError, ValueError, RuntimeError, UsageError) as error:
        problem = " ".join(str(error).split())
        raise WhisperATError(f"{folder / 'head.json'} does not fit its weights: {problem}") from error
    module.description = description
    return module.to(device).eval()


def _built(about: HeadDescription) -> Head:
    return build_head(
        about.head, layers=about.layers, dim=about.dim, classes=about.classes, width=about.width, block=about.block,
        standardised=about.standardised,
    )  # fmt: skip


def _check_description(about: HeadDescription) -> None:
    """Raise TypeError or ValueError where a field is of another type, or a size that no head has."""
    for name in ("head", "backbone", "weights_sha256", "loss"):
        if not isinstance(getattr(about, name), str):
            raise TypeError(f"{name} is {getattr(about, name)!r:.60}")
    for name in ("layers", "dim", "frames"):
        if type(getattr(about, name)) is not int or not 1 <= getattr(about, name) <= MOST:
            raise ValueError(f"{name} is {getattr(about, name)!r:.60}")
    for name in ("block", "standardised"):
        if type(getattr(about, name)) is not bool:
            raise TypeError(f"{name} is {getattr(about, name)!r:.60}")
    if about.width is not None and type(about.width) is not int:
        raise ValueError(f"width is {about.width!r:.60}")
    if type(about.clip_seconds) not in (int, float) or not 0 < about.clip_seconds < math.inf:
        raise ValueError(f"clip_seconds is {about.clip_seconds!r:.60}")
    if not all(isinstance(name, str) for name in about.class_names):
        raise ValueError("class_names holds what is no name")


def _compare(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raise ValueError with the first tensor that the head would have and the file has not, or not so."""
    needed = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for name in sorted(needed.keys() | weights.keys()):
        found = tuple(weights[name].shape) if name in weights else None
        if found != needed.get(name):
            raise ValueError(f"{name[:80]} is {found or 'absent'}, and {needed.get(name) or 'absent'} by head.json")


def load_encoder_weights(folder: str | Path) -> dict[str, Tensor]:
    """The weights of the encoder that was trained with a head. Raises UsageError where the head came without one."""
    folder = Path(folder)
    record = read_record(folder)
    if record.get("encoder") is None:
        raise UsageError(
            f"{folder} holds a head for features of the frozen encoder {record.get('backbone')}, and no encoder of its "
            "own: give it a cache, which `whisper-at-cli extract` makes"
        )
    return _read_tensors(folder, ENCODER, record)


def trained_id_hashes(folder: str | Path) -> np.ndarray | None:
    """Ascending hashes of the ids of the clips that a saved head was trained on; None where that was not recorded."""
    folder = Path(folder)
    record = read_record(folder)
    if f"{TRAINED_ON}_sha256" not in record:
        return None
    hashes = _read_tensors(folder, TRAINED_ON, record).get("id_hash")
    if hashes is None or hashes.dtype != torch.int64 or hashes.ndim != 1:
        raise WhisperATError(f"{folder / TRAINED_ON}.safetensors is damaged: it holds no list of ids; train it again")
    return hashes.numpy()


def id_hashes(ids: Iterable[str]) -> np.ndarray:
    """(n,) int64: eight bytes of each id's SHA-256. Two million ids take 16 MB, and hardly any two of them meet."""
    digests = b"".join(hashlib.sha256(str(name).encode()).digest()[:8] for name in ids)
    return np.frombuffer(digests, dtype="<i8").copy()


def to_safetensors(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def read_record(folder: Path) -> dict:
    """The fields of head.json, of this format version."""
    path = folder / "head.json"
    if not folder.exists():
        raise UsageError(f"{folder} does not exist; give the folder that `train-head --out` wrote")
    if not path.is_file():
        raise UsageError(f"{folder} holds no head (no head.json in it); give the folder that `train-head --out` wrote")
    try:
        record = json.loads(path.read_text())
        found, version = record.pop("format"), record.pop("format_version")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WhisperATError(f"{path} is damaged ({error!r}); restore it, or train the head again") from error
    if found != FORMAT or version != FORMAT_VERSION:
        raise WhisperATError(f"{path} is a {found!r} of version {version}; this version reads {FORMAT_VERSION}")
    return record


def _is_checksum(name: str) -> bool:
    return name in {f"{file}_sha256" for file in (HEAD, TRAINED_ON, ENCODER)}


def _read_tensors(folder: Path, name: str, record: dict) -> dict[str, Tensor]:
    """The tensors of NAME.safetensors, which has to be the file that head.json describes."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / f"{name}.safetensors"
    try:
        content = path.read_bytes()
    except OSError as error:
        what = "weights" if name == HEAD else path.name
        raise WhisperATError(f"{folder} has a head.json but no {what} to read ({error}); train it again") from error
    if hashlib.sha256(content).hexdigest() != record.get(f"{name}_sha256"):
        raise WhisperATError(
            f"{path} is not the file that head.json describes: one of them is damaged, or comes from another run; "
            "restore both, or train the head again"
        )
    try:
        return load(content)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        problem = " ".join(str(error).split())
        raise WhisperATError(f"{path} is damaged: {problem}; restore it, or train the head again") from error
