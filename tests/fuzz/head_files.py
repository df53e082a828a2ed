"""Heads: a folder of our own form (head.json and safetensors), or a `.pth` file of the original project."""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import zipfile
from pathlib import Path

import mutate
import numpy as np
import torch
from engine import Files, Reader

from whisper_at_cli.heads.checkpoint import HeadDescription, load_head, save_head, trained_id_hashes
from whisper_at_cli.heads.forms import build_head
from whisper_at_cli.heads.original import head_shape, import_head, read_state

L, T, D, C = 2, 3, 8, 3
PTH = "head.pth"


def seeds(folder: Path) -> list[Files]:
    found: list[Files] = []
    for number, (form, width) in enumerate((("last-mlp", None), ("wa-mlp", None), ("wa-tr", None), ("tl-tr", 8))):
        torch.manual_seed(number)
        head = build_head(form, layers=L, dim=D, classes=C, width=width)
        description = HeadDescription(
            head=form, layers=L, dim=D, frames=T, class_names=("a", "b", "c"), backbone="fuzzed",
            weights_sha256="0" * 64, clip_seconds=5.0, loss="bce", width=width,
        )  # fmt: skip
        save_head(head, folder / form, description, trained_ids=["x", "y"])
        found.append({file.name: file.read_bytes() for file in sorted((folder / form).iterdir())})
        state = {f"module.{name}": value for name, value in head.state_dict().items()}
        for options in ({}, {"_use_new_zipfile_serialization": False})[: 1 + (number == 1)]:
            content = io.BytesIO()
            torch.save(state, content, **options)
            found.append({PTH: content.getvalue()})
    return found


def change(files: Files, rng: random.Random, other: Files) -> Files:
    if PTH in files:
        data = files[PTH]
        repacked = _change_records(data, rng) if rng.random() < 0.6 else None
        return {PTH: repacked or mutate.change_bytes(data, rng, other.get(PTH, data))}
    name = rng.choice(list(files))
    if name == "head.json":
        return files | {name: mutate.change_json(files[name], rng)}
    files = files | {name: _change_safetensors(files[name], rng)}
    return _sealed(files) if rng.random() < 0.9 else files


def _sealed(files: Files) -> Files:
    """With the checksums in head.json that these files should have."""
    try:
        record = json.loads(files["head.json"])
        for name, data in files.items():
            if name.endswith(".safetensors"):
                record[f"{name.removesuffix('.safetensors')}_sha256"] = hashlib.sha256(data).hexdigest()
    except (ValueError, TypeError, RecursionError):
        return files
    return files | {"head.json": json.dumps(record).encode()}


def _change_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header, with its length made right; or any bytes."""
    if len(data) < 8 or rng.random() < 0.3:
        return mutate.change_bytes(data, rng)
    length = struct.unpack("<Q", data[:8])[0]
    header = mutate.change_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _change_records(data: bytes, rng: random.Random) -> bytes | None:
    """One record of a zip of torch's changed, and the zip made anew around it."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # noqa: BLE001 - whatever an earlier change brings zipfile to
        return None
    pickles = [name for name in records if name.endswith("data.pkl")]
    name = rng.choice(pickles if pickles and rng.random() < 0.8 else list(records) or [""])
    records[name] = mutate.change_bytes(records.get(name, b""), rng)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", rng.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED,))) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return packed.getvalue()


def read(folder: Path) -> str:
    if (folder / PTH).exists():
        state, _ = read_state(folder / PTH)
        shape = head_shape(state, str(folder / PTH))
        names = tuple(map(str, range(min(shape.classes, 999))))
        import_head(
            folder / PTH, folder / "out", backbone="fuzzed", layers=shape.layers or L, class_names=names, clip_seconds=5
        )  # fmt: skip
        return f"{shape.head} of the original"
    head = load_head(folder)
    hashes = trained_id_hashes(folder)
    assert hashes is None or (hashes.dtype == np.int64 and hashes.ndim == 1)
    about = head.description
    if about.layers * about.dim < 1 << 16:  # of a head that does not read all layers, any number may be said
        with torch.inference_mode():
            logits = head(torch.zeros(1, about.layers, min(about.frames, 50), about.dim))
        assert logits.shape == (1, about.classes)
    return about.head


READER = Reader("heads", seeds, change, read)
