"""Heads in the form of the original project: a `.pth` file, which is a pickled state dict.

Its names begin with `module.` (as its training saves them) or `at_model.` (as its package loads them); what follows is
the same as in our heads. Whatever a file holds, it is read without running code from it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from whisper_at_cli.extract.backbones.weights import check_records
from whisper_at_cli.extract.cache.schema import FRAMES, CacheSpec
from whisper_at_cli.extract.cache.store import LocalStore
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.heads.checkpoint import UNKNOWN, HeadDescription, load_head, save_head
from whisper_at_cli.heads.forms import build_head

PREFIXES = ("module.", "at_model.")
PARTS = ("mlp_layer", "layer_weight", "down_layer", "time_tr", "layer_tr")
OUR_NAME = re.compile(rf"(?P<prefix>(?:module\.)?(?:at_model\.)?)(?P<name>(?:{'|'.join(PARTS)})(?:\..+)?)")
WRAPPERS = ("model_state_dict", "state_dict", "model")  # keys under which people keep a state dict
AUDIOSET_CLASSES, AUDIOSET_CLIP_SECONDS = 527, 10.0
MOST_SHARED = 2  # how much larger a file's tensors may be than the file, where some are views of the same numbers
NAMED = 5  # of the tensors that a message lists

FORM_OF_PARTS = {
    frozenset({"mlp_layer"}): "last-mlp",
    frozenset({"mlp_layer", "layer_weight"}): "wa-mlp",
    frozenset({"mlp_layer", "time_tr"}): "last-tr",
    frozenset({"mlp_layer", "layer_weight", "time_tr"}): "wa-tr",
    frozenset({"mlp_layer", "time_tr", "layer_tr"}): "tl-tr",
    frozenset({"mlp_layer", "time_tr", "layer_tr", "down_layer"}): "tl-tr",
}
ORIGINAL_FORMS = tuple(dict.fromkeys(FORM_OF_PARTS.values()))


@dataclass(frozen=True)
class HeadShape:
    """What the shapes in a state dict say of a head."""

    head: str
    width: int | None
    dim: int
    classes: int
    layers: int | None  # None where no tensor's shape depends on it


@dataclass(frozen=True)
class ImportedHead:
    """What an import found and wrote."""

    checkpoint: str
    source: str
    head: str
    dim: int  # channels inside the head
    layers: int
    classes: int
    params: int
    backbone: str
    clip_seconds: float
    left_out: int  # tensors of the file that are not the head's
    notes: list[str] = field(default_factory=list)


def import_head(
    file: str | Path, folder: str | Path, *, backbone: str | None = None, class_names: tuple[str, ...] | None = None,
    clip_seconds: float | None = None, layers: int | None = None, loss: str = "bce", like: CacheSpec | None = None,
) -> ImportedHead:  # fmt: skip
    """Bring a head of the original project into our form, in `folder`. Form and sizes come from the tensors' shapes.

    `like` is a cache's spec, from which come backbone, checksum, clip length and classes where they are not given.
    Raises UsageError where something has to be said that the file does not say, WhisperATError where it holds no head.
    """
    file = Path(file)
    state, left_out = read_state(file)
    shape = head_shape(state, str(file))
    said = _Said(file, shape, like, backbone, class_names, clip_seconds, layers, loss)
    description = said.description()
    module = build_head(
        shape.head, layers=description.layers, dim=shape.dim, classes=shape.classes, width=shape.width
    )  # fmt: skip
    module.load_state_dict(state)
    save_head(module, folder, description)
    return ImportedHead(
        checkpoint=str(folder), source=str(file), head=shape.head, dim=shape.width or shape.dim,
        layers=description.layers, classes=shape.classes, params=sum(p.numel() for p in module.parameters()),
        backbone=description.backbone, clip_seconds=description.clip_seconds, left_out=left_out, notes=said.notes,
    )  # fmt: skip


def export_head(folder: str | Path, file: str | Path, *, prefix: str = "module.") -> list[str]:
    """Write a saved head as a `.pth` file that the original project loads; returns the names of its tensors.

    Raises UsageError for a prefix that the original does not use, or a head that it does not have.
    """
    if prefix not in PREFIXES:
        raise UsageError(f"prefix {prefix!r} is not one of the original project's; choose from {', '.join(PREFIXES)}")
    head = load_head(folder)
    about = head.description
    if about.standardised or about.head not in ORIGINAL_FORMS or (about.head == "wa-tr" and about.width):
        what = f"{about.name} of standardised features" if about.standardised else about.name
        raise UsageError(f"the original project has no {what}, so {folder} cannot be exported to it")
    state = OrderedDict((prefix + name, value.clone()) for name, value in head.state_dict().items())
    content = io.BytesIO()
    torch.save(state, content)
    file = Path(file)
    try:
        LocalStore(file.parent).write_whole(file.name, [content.getbuffer()])
    except OSError as error:
        raise WhisperATError(f"cannot write {file}: {error}; choose another place") from error
    return list(state)


def read_state(file: str | Path) -> tuple[dict[str, Tensor], int]:
    """A head's tensors under our names, float32, and how many other tensors the file holds. Runs no code from the file.

    Beside a head under `at_model.` there may be a whole Whisper, which is left out.
    """
    file = Path(file)
    tensors = _load_tensors(file)
    matches = {name: OUR_NAME.fullmatch(name) for name in tensors}
    prefixes = {match["prefix"] for match in matches.values() if match}
    if not prefixes:
        raise WhisperATError(
            f"{file} holds no head: none of its {len(tensors)} tensors ({_listed(list(tensors))}) is one of "
            f"{', '.join(PARTS)}, alone or after {' or '.join(PREFIXES)}"
        )
    if len(prefixes) > 1:
        raise WhisperATError(f"{file} holds heads under {_listed(sorted(prefixes))}: keep one of them in the file")
    prefix = prefixes.pop()
    state = {match["name"]: tensors[name].to(torch.float32) for name, match in matches.items() if match}
    others = [name for name in tensors if not matches[name]]
    strays = [name for name in others if name.startswith(prefix)] if prefix else others
    if strays and not all(_is_whispers(name.removeprefix("module.")) for name in strays):
        raise WhisperATError(f"{file} holds tensors beside a head that are no part of one: {_listed(strays)}")
    return state, len(others)


def head_shape(state: dict[str, Tensor], where: str) -> HeadShape:
    """The form and sizes of a head. Raises WhisperATError where its tensors make none of our forms."""
    parts = frozenset(name.split(".")[0] for name in state)
    if parts not in FORM_OF_PARTS:
        raise WhisperATError(
            f"{where} holds a head of {', '.join(sorted(parts))}, which is none of the forms that are known here "
            f"({', '.join(ORIGINAL_FORMS)})"
        )
    try:
        classes, inner = state["mlp_layer.1.weight"].shape
        width, dim = state["down_layer.1.weight"].shape if "down_layer" in parts else (None, inner)
        layers = len(state["layer_weight"]) if "layer_weight" in parts else None
        shape = HeadShape(FORM_OF_PARTS[parts], width, dim, classes, layers)
        _compare(state, shape)
    except (KeyError, ValueError, TypeError, UsageError) as error:
        raise WhisperATError(f"{where} holds a head that is not whole: {error}") from error
    return shape


def read_class_names(file: str | Path) -> tuple[str, ...]:
    """Class names from a file: a JSON list, a CSV, or one name a line.

    A CSV has a column `display_name` (as AudioSet), `category` (as ESC-50) or `name`, and its order is that of `index`
    or `target` where it has one. Raises UsageError.
    """
    file = Path(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".json":
            names = json.loads(text)
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise UsageError(f"{file} is not a JSON list of names")
        elif file.suffix.lower() == ".csv":
            names = _names_of_csv(file, text)
        else:
            names = [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"cannot read class names from {file}: {error}") from error
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{file} names the class {twice!r} twice")
    return tuple(names)


class _Said:
    """What is known of a head beyond its tensors: from options, else from a cache, else AudioSet's, with a note."""

    def __init__(
        self, file: Path, shape: HeadShape, like: CacheSpec | None, backbone: str | None,
        class_names: tuple[str, ...] | None, clip_seconds: float | None, layers: int | None, loss: str,
    ):  # fmt: skip
        self.file, self.shape, self.loss = file, shape, loss
        self.backbone, self.names, self.seconds, self.layers = backbone, class_names, clip_seconds, layers
        self.sha256 = UNKNOWN
        self.notes: list[str] = []
        if like is not None:
            self.backbone = backbone or like.backbone
            self.sha256 = like.weights_sha256 if self.backbone == like.backbone else UNKNOWN
            self.names = class_names or like.class_names
            self.seconds = clip_seconds or like.clip_seconds
            self.layers = layers or like.layers

    def description(self) -> HeadDescription:
        from whisper_at_cli.extract.backbones.sizes import WHISPER_SIZES

        shape = self.shape
        if self.loss not in ("bce", "ce"):
            raise UsageError(f"loss {self.loss!r} is not known; choose bce (several labels a clip) or ce (one)")
        if self.backbone is None:
            fitting = [name for name, size in WHISPER_SIZES.items() if size.dim == shape.dim]
            hint = f" {shape.dim} channels are those of {', '.join(fitting)}" if fitting else ""
            raise UsageError(f"{self.file} does not say on which encoder its head was trained: give --backbone.{hint}")
        layers = self._layers(self.backbone)
        names, known = self._class_names()
        if shape.head in ("last-mlp", "last-tr"):
            self.notes.append(
                f"the same tensors make a head on the mean over layers; this one was taken for {shape.head}"
            )
        return HeadDescription(
            head=shape.head, width=shape.width, layers=layers, dim=shape.dim, frames=FRAMES, class_names=names,
            class_names_known=known, backbone=self.backbone, weights_sha256=self.sha256,
            clip_seconds=self._clip_seconds(), loss=self.loss, source=self.file.name,
        )  # fmt: skip

    def _layers(self, backbone: str) -> int:
        from whisper_at_cli.extract.backbones.sizes import WHISPER_SIZES

        shape = self.shape
        size = WHISPER_SIZES.get(backbone)
        if size and size.dim != shape.dim:
            raise UsageError(f"the head reads {shape.dim} channels and {backbone} has {size.dim}")
        layers = shape.layers or self.layers or (size.layers if size else None)
        for found, what in ((self.layers, "were given"), (size and size.layers, f"has {backbone}")):
            if found and layers and found != layers:
                raise UsageError(f"the head is one for {layers} layers and {found} {what}")
        if layers is None:
            raise UsageError(f"{backbone!r} is no Whisper size, so its number of layers has to be given: --layers")
        return layers

    def _class_names(self) -> tuple[tuple[str, ...], bool]:
        classes = self.shape.classes
        if self.names:
            if len(self.names) != classes:
                raise UsageError(f"the head has {classes} classes and {len(self.names)} names were given for them")
            return tuple(self.names), True
        if classes != AUDIOSET_CLASSES:
            raise UsageError(f"{self.file} does not name its {classes} classes: give --class-names FILE")
        self.notes.append(
            f"{classes} classes were taken to be AudioSet's, but nothing names them: they are called by their numbers, "
            f"0 to {classes - 1}; give --class-names FILE"
        )
        return tuple(map(str, range(classes))), False

    def _clip_seconds(self) -> float:
        if self.seconds is None and self.shape.classes == AUDIOSET_CLASSES:
            self.notes.append(f"the head was taken to be for AudioSet's clips of {AUDIOSET_CLIP_SECONDS:g} s")
            return AUDIOSET_CLIP_SECONDS
        if self.seconds is None:
            raise UsageError(f"{self.file} does not say how long the clips were: give --clip-seconds")
        if not 0 < self.seconds < math.inf:
            raise UsageError(f"clips of {self.seconds} seconds cannot be")
        return float(self.seconds)


def _load_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UsageError(f"{file} is not a file; give a .pth file of the original project")
    check_records(file)
    try:
        with warnings.catch_warnings(action="ignore"):  # on old kinds of pickle, which are read all the same
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damaged bytes bring the unpickler to
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch's own message advises to load the file after all
        what = "more memory than there is" if isinstance(error, MemoryError) else asked and asked[1]
        reason = f"it asks for {what}" if what else f"it cannot be read ({type(error).__name__})"
        raise WhisperATError(
            f"{file} is not a file of tensors alone: {reason}. Nothing in it was run; get the head from a source that "
            "you trust, or download it again"
        ) from error
    for key in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise WhisperATError(f"{file} holds a {type(found).__name__}, not a state dict")
    tensors = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if unusual := next((name for name, value in tensors.items() if not _is_plain(value)), None):
        raise WhisperATError(f"{file} holds a tensor {unusual[:80]!r} that is no array of numbers")
    if sum(value.nbytes for value in tensors.values()) > MOST_SHARED * file.stat().st_size:  # views of a small storage
        raise WhisperATError(f"{file} is damaged: it declares larger tensors than it holds")
    return tensors


def _is_plain(value: Tensor) -> bool:
    return value.layout == torch.strided and not (value.is_complex() or value.is_quantized or value.is_meta)


def _is_whispers(name: str) -> bool:
    return name.startswith(("encoder.", "decoder.", "alignment_heads"))


def _compare(state: dict[str, Tensor], shape: HeadShape) -> None:
    """Raises ValueError with the first tensor that the form would have and the state has not, or not so."""
    with torch.device("meta"):
        module = build_head(
            shape.head, layers=shape.layers or 1, dim=shape.dim, classes=shape.classes, width=shape.width
        )  # fmt: skip
    needed = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for name in needed.keys() | state.keys():
        found = tuple(state[name].shape) if name in state else None
        if found != needed.get(name):
            raise ValueError(f"{name} is {found or 'absent'} and a {shape.head} has {needed.get(name) or 'none'}")


def _names_of_csv(file: Path, text: str) -> list[str]:
    rows = list(csv.DictReader(text.splitlines()))
    columns = rows[0].keys() if rows else ()
    name = next((column for column in ("display_name", "category", "name") if column in columns), None)
    if name is None:
        raise UsageError(f"{file} has no column display_name, category or name; its first line names {list(columns)}")
    order = next((column for column in ("index", "target") if column in columns), None)
    if order:
        rows.sort(key=lambda row: int(row[order]))
    return list(dict.fromkeys(row[name] for row in rows)) if name == "category" else [row[name] for row in rows]


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:NAMED])) + (f", ... ({len(names)})" if len(names) > NAMED else "")
