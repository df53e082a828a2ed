"""Forms of weights that are not read here, named as what they are: by a file's first bytes and a folder's names."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from whisper_at_cli.extract.errors import WeightsError

# what a folder's weights are read from, the best first: one of these files, and the shards that an index names
WEIGHT_FILES = (
    "model.bin", "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
START_BYTES = 1024
_GGML = "GGML model of whisper.cpp, which cannot be converted back; use the PyTorch model that it was made from"
_HTML = "web page (HTML); download the file itself (on Hugging Face, its link has /resolve/, not /blob/)"
_STARTS = (  # in lower case
    (b"version https://git-lfs", "Git LFS pointer, not the file itself; run: git lfs pull"),
    (b"lmgg", _GGML),
    (b"tjgg", _GGML),
    (b"gguf", _GGML),
    (b"<!doctype", _HTML),
    (b"<html", _HTML),
    (b"<?xml", "message in XML, which a server sent instead of the file; download it again"),
    (b'{"error', "message in JSON, which a server sent instead of the file; download it again"),
    (b"\x89hdf", "weights file of TensorFlow (HDF5); use the PyTorch model"),
)
_PYTORCH = (b"PK", b"\x80")  # a zip archive; a pickle, before torch 1.6
_FOLDERS = (  # by a name in a folder that holds none of WEIGHT_FILES, the surest first
    ("snapshots", "downloads in the hub's cache; give one of the folders in its folder snapshots"),
    (r"zero_to_fp32\.py", "a DeepSpeed checkpoint; run its zero_to_fp32.py, which writes pytorch_model.bin"),
    (
        r"adapter_config\.json",
        "a PEFT adapter (LoRA), not a whole model; merge it into its base model with merge_and_unload() and "
        "save_pretrained()",
    ),
    (r"openvino_.*\.xml|.*_model\.xml", "an OpenVINO model; use the PyTorch model that it was exported from"),
    (r".*\.onnx", "an ONNX model; use the PyTorch model that it was exported from"),
    (r"ggml.*\.bin|.*\.gguf", f"a {_GGML}"),
    (r"weights\.(npz|safetensors)", "an MLX model; use the PyTorch model that it was converted from"),
    (r"tf_model\.h5|flax_model\.msgpack", "weights for TensorFlow or Flax only; use the PyTorch model"),
    (r".*\.(mlmodelc|mlpackage)", "a Core ML model; use the PyTorch model that it was converted from"),
    (r"vocabulary\.(txt|json)", "a CTranslate2 model without its model.bin; copy or download it again"),
    (r"checkpoint-\d+", "the checkpoints of a training, and no weights of its own; give one of them"),
    (r".*\.pt", "a .pt file; give the file, not its folder"),
)


def check_file(path: Path, *, pytorch: bool = False) -> None:
    """Raise WeightsError for a file whose first bytes say that it holds no weights; with `pytorch`, also for one that
    torch.save cannot have written."""
    with open(path, "rb") as file:
        start = file.read(START_BYTES)
    text = start.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    for beginning, what in _STARTS:
        if text.startswith(beginning):
            raise WeightsError(f"{path} is a {what}")
    if not start:
        raise WeightsError(f"{path} is empty; copy or download it again")
    if pytorch and not start.startswith(_PYTORCH):
        raise WeightsError(f"{path} is not a PyTorch checkpoint, or is damaged: it begins with {start[:16]!r}")


def foreign_folder(names: Collection[str]) -> str | None:
    """What a folder, or a repository, of these files holds instead of weights that are read here, and what to do."""
    if not set(WEIGHT_FILES).isdisjoint(names):
        return None
    for pattern, what in _FOLDERS:
        if any(re.fullmatch(pattern, name, re.IGNORECASE) for name in names):
            return what
    return None
