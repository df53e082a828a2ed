"""Which reader a folder is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from whisper_at_cli.extract.datasets import esc50, folder
from whisper_at_cli.extract.datasets.base import Dataset
from whisper_at_cli.extract.errors import UsageError

FORMATS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], Dataset]]] = {
    "esc50": (esc50.recognise, esc50.read),
    "folder": (folder.recognise, folder.read),
}


def open_dataset(path: str | Path, *, format: str = "auto") -> Dataset:
    """The dataset at `path`, read as `format` or as the first layout that fits.

    Raises UsageError where nothing is there, nothing fits, or no clip is found.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path} does not exist; give the dataset's folder")
    if format != "auto" and format not in FORMATS:
        raise UsageError(f"dataset format {format!r} is not known; choose from {', '.join(FORMATS)}")
    candidates = FORMATS if format == "auto" else {format: FORMATS[format]}
    for name, (recognise, read) in candidates.items():
        if recognise(path):
            dataset = read(path)
            if not dataset.clips:
                raise UsageError(f"{path} was read as {name} and names no clip")
            return dataset
    looked_for = "; ".join(f"{name}: {_layout(name)}" for name in candidates)
    raise UsageError(f"{path} is no dataset that is known here. Looked for {looked_for}")


def _layout(name: str) -> str:
    return {"esc50": esc50.LAYOUT, "folder": folder.LAYOUT}[name]
