"""A backbone of one's own: `module:function`, or an entry point of the group `whisper_at_cli.backbones`."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.errors import UsageError, WhisperATError

if TYPE_CHECKING:
    from torch import Tensor

    from whisper_at_cli.extract.backbones.load import Backbone

GROUP = "whisper_at_cli.backbones"
ADDRESS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
LONGEST_SECONDS = 600  # of a clip, for a backbone that says nothing of it
GUIDE = "docs/backbones.md shows a whole one"


def find_loader(model: str) -> Callable | None:
    """The function behind `module:function`, or behind the name of an entry point; None where `model` is neither.

    Raises UsageError where there is no such module or function, WhisperATError where the module itself fails.
    """
    for entry in entry_points(group=GROUP, name=model):
        return _load(entry.load, f"entry point {model} ({entry.value})")
    if not ADDRESS.fullmatch(model):
        return None
    module_name, function_name = model.split(":")

    def load() -> object:
        value: object = importlib.import_module(module_name)
        for name in function_name.split("."):
            value = getattr(value, name)
        return value

    here = str(Path.cwd())
    if here not in sys.path:  # a file beside the user is meant, also from an installed program
        sys.path.append(here)
    return _load(load, model)


def names() -> list[str]:
    """The backbones that installed packages add."""
    return sorted(entry_points(group=GROUP).names)


def _load(load: Callable[[], object], what: str) -> Callable:
    try:
        loader = load()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"backbone {what} cannot be imported: {error}") from error
    except Exception as error:  # the user's own code
        raise WhisperATError(f"backbone {what} fails when imported: {type(error).__name__}: {error}") from error
    if not callable(loader):
        raise UsageError(f"backbone {what} is a {type(loader).__name__}, not a function; {GUIDE}")
    return loader


def load_custom(loader: Callable, model: str, *, device: torch.device, precision: str) -> Backbone:
    """What the function makes, called with `device` and `precision`, once it is known to be a whole Backbone.

    Raises UsageError where it is none, and WhisperATError where the function fails.
    """
    try:
        backbone = loader(device=device, precision=precision)
    except WhisperATError:
        raise
    except Exception as error:  # the user's own code
        raise WhisperATError(
            f"backbone {model} fails when called with device={str(device)!r} and precision={precision!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return checked_backbone(backbone, model)


def checked_backbone(backbone: object, model: str) -> Backbone:
    """`backbone`, if it has all that a Backbone has. Raises UsageError that names everything it lacks."""

    def is_count(value: object) -> bool:
        return not isinstance(value, bool) and isinstance(value, Integral) and int(value) > 0

    wanted: dict[str, tuple[Callable[[object], object], str]] = {
        "name": (lambda value: isinstance(value, str) and value, "a name"),
        "weights_sha256": (
            lambda value: isinstance(value, str) and value,
            "a string that says which weights these are",
        ),
        "layers": (is_count, "the number of layers"),
        "dim": (is_count, "the number of channels"),
        "sample_rate": (lambda value: value == SAMPLE_RATE, f"{SAMPLE_RATE}, the rate that clips are decoded at"),
        "precision": (lambda value: isinstance(value, str) and value, "float32, bfloat16 or float16"),
        "device": (lambda value: isinstance(value, torch.device), "a torch.device"),
        "encode": (callable, "a function of waveforms (B, samples)"),
    }
    absent = object()
    problems = []
    for name, (is_good, meaning) in wanted.items():
        value = getattr(backbone, name, absent)
        if value is absent or not is_good(value):
            found = "is missing" if value is absent else f"is {value!r:.60}"
            problems.append(f"{name} {found} and must be {meaning}")
    if problems:
        raise UsageError(
            f"{model} gives a {type(backbone).__name__}, which is no backbone: {'; '.join(problems)}. {GUIDE}"
        )
    return cast("Backbone", backbone)


def clip_samples(backbone: Backbone, clip_seconds: float) -> int:
    """Samples of a clip, as the backbone says, or by its sample rate. Raises UsageError for a length it cannot take."""
    if callable(own := getattr(backbone, "clip_samples", None)):
        return own(clip_seconds)
    if not 0 < clip_seconds <= LONGEST_SECONDS:
        raise UsageError(f"a clip of {clip_seconds:g} s cannot be encoded; choose up to {LONGEST_SECONDS} s")
    return round(clip_seconds * backbone.sample_rate)


def checked_features(backbone: Backbone, features: object, clips: int) -> Tensor:
    """`features`, if they are what `encode` promises. Raises WhisperATError otherwise."""
    from whisper_at_cli.extract.cache.schema import FRAMES

    expected = (clips, backbone.layers, FRAMES, backbone.dim)
    if not isinstance(features, torch.Tensor) or tuple(features.shape) != expected or features.dtype != torch.float32:
        found = f"{tuple(features.shape)} {features.dtype}" if isinstance(features, torch.Tensor) else type(features)
        raise WhisperATError(f"{backbone.name} gave {found} for {clips} clips, and must give {expected} torch.float32")
    return features
