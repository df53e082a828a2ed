"""Folders in Hugging Face's form, on disk or from the hub: config.json beside safetensors files.

A Whisper folder is brought to OpenAI's names here, without `transformers`; other models are read by `speech.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from whisper_at_cli.extract.backbones.forms import WEIGHT_FILES, check_file, foreign_folder
from whisper_at_cli.extract.errors import UsageError, WeightsError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
NOT_ON_HUB = (".pt", ".bin", ".safetensors")
JSON_FILES = ("config.json", "preprocessor_config.json", "processor_config.json", "generation_config.json")
WRAPPERS = ("module.", "_orig_mod.", "model.")
MAX_JSON_BYTES = 50_000_000
CONNECT_SECONDS = 15


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """A JSON object in a file. Raises WeightsError for anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise WeightsError(f"{path} is no description of a model: it has {path.stat().st_size} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} is damaged: it holds no JSON object")
    return content


def read_value(path: Path, key: str) -> object:
    """What a JSON file that need not be there says; None where it says nothing."""
    try:
        return read_json(path).get(key)
    except WeightsError:
        return None


def read_config(folder: Path) -> dict:
    return read_json(folder / "config.json")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by name, in its own type: safetensors, one file or several with an index, or
    pytorch_model.bin, read without running code from it. Raises WeightsError."""
    for name in WEIGHT_FILES[1:]:
        path = folder / name
        if path.is_file():
            return _read_shards(path) if name.endswith(".json") else _read_tensor_file(path)
    raise WeightsError(
        f"{folder} holds a config.json and no weights; one of {', '.join(WEIGHT_FILES[1:])} belongs there"
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} is damaged: it has no weight_map")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name:
            raise WeightsError(f"{index} is damaged: {name[:80]!r} is no file beside it")
        if not (index.parent / name).is_file():
            raise WeightsError(f"{index.parent} lacks {name}, which its {index.name} names; copy or download it again")
        tensors |= _read_tensor_file(index.parent / name)
    if missing := weight_map.keys() - tensors.keys():
        raise WeightsError(f"{index} names {len(missing)} tensors that its files lack, such as {min(missing)[:80]}")
    return tensors


def _read_tensor_file(path: Path) -> dict[str, Tensor]:
    check_file(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damaged bytes bring the unpickler to
        raise WeightsError(f"{path} is damaged or holds more than tensors: {type(error).__name__}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise WeightsError(f"{path} is damaged: it holds no tensors by name")
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * path.stat().st_size:  # tied weights are stored once
        raise WeightsError(f"{path} is damaged: it declares larger tensors than it holds")
    return tensors


def read_whisper_folder(folder: Path) -> tuple[dict[str, Tensor], int, int]:
    """State dict as in OpenAI's checkpoints of the Whisper in `folder`, and the number of attention heads of its
    encoder and of its decoder. Raises WeightsError."""
    config = read_config(folder)
    audio_heads, text_heads = (config.get(f"{side}_attention_heads") for side in ("encoder", "decoder"))
    if not (isinstance(audio_heads, int) and isinstance(text_heads, int) and min(audio_heads, text_heads) > 0):
        raise WeightsError(f"{folder / 'config.json'} does not say how many attention heads there are")
    if config.get("activation_function", "gelu") != "gelu" or config.get("scale_embedding"):
        raise WeightsError(f"{folder} is another model than OpenAI's: its activation or its embedding differs")
    if config.get("quantization_config"):
        raise WeightsError(f"{folder} is quantised, by its config.json; use the model that it was made from")
    return openai_state(read_tensors(folder), folder), audio_heads, text_heads


def openai_state(tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The state dict of a Whisper under OpenAI's names, whether it has these already, or transformers', or prefixes.

    Raises WeightsError where the output layer has weights of its own.
    """
    tensors = without_wrappers(tensors)
    if "conv1.weight" in tensors:  # an encoder saved by itself
        tensors = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
    state = {ours: tensor for name, tensor in tensors.items() if (ours := openai_name(name)) is not None}
    output = tensors.get("proj_out.weight")
    if output is not None and not torch.equal(state.setdefault("decoder.token_embedding.weight", output), output):
        raise WeightsError(f"{source} has an output layer of its own, which OpenAI's Whisper has not")
    return state


def without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without prefixes that wrappers put before every name: DataParallel, torch.compile, Lightning."""
    for prefix in WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return without_wrappers({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return tensors


# within a block, and outside of the blocks
_BLOCK_NAMES = {
    "self_attn.q_proj": "attn.query", "self_attn.k_proj": "attn.key", "self_attn.v_proj": "attn.value",
    "self_attn.out_proj": "attn.out", "self_attn_layer_norm": "attn_ln",
    "encoder_attn.q_proj": "cross_attn.query", "encoder_attn.k_proj": "cross_attn.key",
    "encoder_attn.v_proj": "cross_attn.value", "encoder_attn.out_proj": "cross_attn.out",
    "encoder_attn_layer_norm": "cross_attn_ln", "fc1": "mlp.0", "fc2": "mlp.2", "final_layer_norm": "mlp_ln",
}  # fmt: skip
_OTHER_NAMES = {
    "encoder.embed_positions.weight": "encoder.positional_embedding",
    "decoder.embed_positions.weight": "decoder.positional_embedding",
    "decoder.embed_tokens.weight": "decoder.token_embedding.weight",
    "encoder.layer_norm.weight": "encoder.ln_post.weight", "encoder.layer_norm.bias": "encoder.ln_post.bias",
    "decoder.layer_norm.weight": "decoder.ln.weight", "decoder.layer_norm.bias": "decoder.ln.bias",
}  # fmt: skip


def openai_name(name: str) -> str | None:
    """OpenAI's name for a tensor of transformers' Whisper; None for what is no part of the model (`proj_out`)."""
    name = name.removeprefix("model.")
    if match := re.fullmatch(r"(encoder|decoder)\.layers\.(\d{1,6})\.(.+)\.(weight|bias)", name):
        side, layer, part, kind = match.groups()
        return f"{side}.blocks.{layer}.{_BLOCK_NAMES.get(part, part)}.{kind}"
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    return name if name.startswith(("encoder.", "decoder.")) else None


def is_hub_name(model: str | Path) -> bool:
    """Whether this may be a repository on the hub: OWNER/NAME, and nothing of that name on disk."""
    text = str(model)
    return bool(HUB_NAME.fullmatch(text)) and not text.endswith(NOT_ON_HUB) and not Path(text).exists()


def download_folder(name: str) -> Path:
    """The folder of a repository on the hub, downloaded once; its weight files are held against their checksums.

    Raises UsageError where `huggingface_hub` is not installed, WeightsError where nothing can be downloaded and nothing
    was before.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UsageError(
            f"{name} is no file or folder here, and downloading it needs the extra hf: pip install 'whisper-at-cli[hf]'"
        ) from error
    with _quiet_hub():
        try:
            folder = Path(snapshot_download(name, allow_patterns=_files_of(name)))
        except Exception as error:  # of the hub, its transport or the disk; an earlier download will do
            earlier = _earlier_download(name)
            if earlier is None:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise WeightsError(
                    f"{name} is no file or folder here, and could not be downloaded from the Hugging Face hub "
                    f"({reason})"
                ) from error
            folder = earlier
    _check_downloads(folder)
    return folder


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without the hub's report of each attempt; a progress bar only on a terminal."""
    from huggingface_hub import utils

    level, bars = utils.logging.get_verbosity(), utils.are_progress_bars_disabled()
    utils.logging.set_verbosity(utils.logging.CRITICAL)
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.logging.set_verbosity(level)
        if not bars:
            utils.enable_progress_bars()


def _earlier_download(name: str) -> Path | None:
    """A repository as it was last downloaded, with weights; None where it never was."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except Exception:  # noqa: BLE001 - whatever the hub has for "there is none", or for a name that cannot be one
        return None
    return folder if any((folder / file).exists() for file in WEIGHT_FILES) else None


def _files_of(name: str) -> list[str]:
    """The files to download: the JSON files, and the weights in the best form that the repository has."""
    from huggingface_hub import HfApi

    files = {sibling.rfilename for sibling in HfApi().model_info(name, timeout=CONNECT_SECONDS).siblings or ()}
    best = next((file for file in WEIGHT_FILES if file in files), None)
    if best is None:
        what = foreign_folder({file.split("/")[0] for file in files})
        raise WeightsError(f"it holds {what}" if what else f"the repository holds none of {', '.join(WEIGHT_FILES)}")
    wanted = [file for file in JSON_FILES if file in files] + [best]
    if best.endswith(".index.json"):
        stem, suffix = best.removesuffix(".index.json").split(".")
        wanted += sorted(file for file in files if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", file))
    return wanted


def _check_downloads(folder: Path) -> None:
    """The hub keeps a large file under its SHA-256; raise WeightsError where a file is not what its name says."""
    for path in sorted(folder.iterdir()):
        published = path.resolve().name
        if re.fullmatch("[0-9a-f]{64}", published) and file_sha256(path) != published:
            raise WeightsError(
                f"{path} is damaged: its SHA-256 is not the published {published}; delete {path.resolve()}, and run "
                "the same command again"
            )
