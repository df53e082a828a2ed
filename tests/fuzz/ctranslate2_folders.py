"""Folders of a CTranslate2 model: `model.bin`, whose layout is changed as bytes and as a list of variables."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass
from pathlib import Path

import mutate
import torch._dynamo  # noqa: F401 - else the first input would pay for it, as for the next
import whisper.model  # noqa: F401
from engine import Files, Reader

from whisper_at_cli.extract.backbones.weights import read_weights

MELS, DIM, FFN, VOCABULARY = 80, 4, 16, 30
SIZES = {0: 4, 1: 1, 2: 2, 3: 4, 4: 2, 5: 2}
NAMES = (
    "WhisperSpec", "encoder/layer_9/ffn/linear_0/weight", "encoder/num_heads", "encoder/layer_0/layer_norm/gamma", "",
    "encoder/layer_99999999999999999999/x", "decoder/projection/weight", "encoder/conv1/weight_scale", "é",
)  # fmt: skip


@dataclass
class Model:
    """What a model.bin says."""

    version: int
    specification: str
    variables: list[tuple[str, list[int], int, bytes]]
    aliases: list[tuple[str, str]]

    def packed(self) -> bytes:
        parts = [struct.pack("<I", self.version), _text(self.specification), struct.pack("<I", 3)]
        parts.append(struct.pack("<I", len(self.variables)))
        for name, shape, kind, data in self.variables:
            parts += [_text(name), struct.pack("<B", len(shape) % 256)]
            parts += [struct.pack("<I", length % 2**32) for length in shape]
            parts += [struct.pack("<BI", kind, len(data)), data]
        parts.append(struct.pack("<I", len(self.aliases)))
        return b"".join([*parts, *(_text(text) for pair in self.aliases for text in pair)])


def _text(text: str) -> bytes:
    raw = text.encode() + b"\0"
    return struct.pack("<H", len(raw) % 65536) + raw


def unpacked(data: bytes) -> Model | None:
    """The same back; None for what is not whole."""
    at = 0

    def take(form: str):
        nonlocal at
        values = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
        return values[0] if len(values) == 1 else values

    def text() -> str:
        return take(f"{take('<H')}s")[:-1].decode()

    try:
        model = Model(take("<I"), text(), [], [])
        take("<I")
        for _ in range(take("<I")):
            name = text()
            shape = [take("<I") for _ in range(take("<B"))]
            kind, size = take("<B"), take("<I")
            model.variables.append((name, shape, kind, take(f"{size}s")))
        model.aliases = [(text(), text()) for _ in range(take("<I"))]
    except (struct.error, ValueError, TypeError):
        return None
    return model


def _whisper(kind: int, rng: random.Random) -> Model:
    """A whole, tiny model with weights of a storage type."""
    variables: list[tuple[str, list[int], int, bytes]] = []

    def add(name: str, *shape: int, integers: bool = False, zeros: int = 0) -> None:
        count = 1
        for length in shape:
            count *= length
        stored = kind if integers or kind not in (1, 2) else 0
        body = rng.randbytes(count * SIZES[stored]) if stored in (1, 2) else bytes(count * SIZES[stored])
        variables.append((name, list(shape), stored, body))
        if integers and kind in (1, 2):
            rows = shape[0] if kind == 1 else 1
            variables.append((f"{name}_scale", [rows], 0, struct.pack("<f", 9.5) * rows))

    def linear(name: str, rows: int, columns: int) -> None:
        add(f"{name}/weight", rows, columns, integers=True)
        add(f"{name}/bias", rows)

    def norm(name: str) -> None:
        add(f"{name}/gamma", DIM)
        add(f"{name}/beta", DIM)

    def attention(name: str, crossed: bool) -> None:
        norm(f"{name}/layer_norm")
        for number, rows in enumerate((DIM, 2 * DIM, DIM) if crossed else (3 * DIM, DIM)):
            linear(f"{name}/linear_{number}", rows, DIM)

    for side, positions in (("encoder", 1500), ("decoder", 448)):
        add(f"{side}/position_encodings/encodings", positions, DIM)
        norm(f"{side}/layer_norm")
        layer = f"{side}/layer_0"
        attention(f"{layer}/self_attention", False)
        norm(f"{layer}/ffn/layer_norm")
        linear(f"{layer}/ffn/linear_0", FFN, DIM)
        linear(f"{layer}/ffn/linear_1", DIM, FFN)
        variables.append((f"{side}/num_heads", [], 2, struct.pack("<h", 2)))
    attention("decoder/layer_0/attention", True)
    add("encoder/conv1/weight", DIM, MELS, 3)
    add("encoder/conv1/bias", DIM)
    add("encoder/conv2/weight", DIM, DIM, 3)
    add("encoder/conv2/bias", DIM)
    add("decoder/embeddings/weight", VOCABULARY, DIM, integers=True)
    return Model(6, "WhisperSpec", variables, [("decoder/projection/weight", "decoder/embeddings/weight")])


def seeds(folder: Path) -> list[Files]:
    rng = random.Random(0)
    config = json.dumps({"alignment_heads": [[0, 1]], "lang_ids": [1]}).encode()
    return [{"model.bin": _whisper(kind, rng).packed(), "config.json": config} for kind in (0, 4, 5, 1, 2)]


def change(files: Files, rng: random.Random, other: Files) -> Files:
    act = rng.random()
    if act < 0.06:
        return files | {"config.json": mutate.change_json(files["config.json"], rng)}
    model = unpacked(files["model.bin"])
    if act < 0.4 or model is None:
        return files | {"model.bin": mutate.change_bytes(files["model.bin"], rng, other["model.bin"])}
    for _ in range(rng.choice((1, 1, 2, 3))):
        _change_model(model, rng)
    return files | {"model.bin": model.packed()}


def _change_model(model: Model, rng: random.Random) -> None:  # noqa: C901 - one kind of change a branch
    at = rng.randrange(len(model.variables)) if model.variables else 0
    name, shape, kind, data = model.variables[at] if model.variables else ("a", [], 0, b"")
    act = rng.choice(("name", "shape", "kind", "data", "number", "resize", "remove", "repeat", "alias", "head"))
    if act == "name":
        name = rng.choice((*NAMES, rng.choice(model.variables)[0] if model.variables else "", name + "x", "a" * 300))
    elif act == "shape":
        shape = rng.choice(([], shape[::-1], [*shape, 1], [1, *shape], [1] * 300, [0, *shape], [2**32 - 1] * 4, [0]))
    elif act == "kind":
        kind = rng.randrange(8)
    elif act == "data":
        data = mutate.change_bytes(data, rng)[: len(data)].ljust(len(data), b"\0")
    elif act == "number" and shape:
        shape = [*shape]
        shape[rng.randrange(len(shape))] = rng.choice((*mutate.EXTREME[:18], shape[0] + 1))
    elif act == "resize":  # shape and bytes agree, whatever the rest of the model says
        shape = [rng.choice((0, 1, 2, 3, 4, 5, 12, 1500)) for _ in range(rng.randrange(5))]
        count = 1
        for length in shape:
            count *= length
        data = bytes(min(count, 1 << 18) * SIZES.get(kind, 1))
    elif act == "remove" and model.variables:
        model.variables.pop(at)
        return
    elif act == "repeat":
        model.variables.append((rng.choice((name, name + "_scale", *NAMES)), shape, kind, data))
        return
    elif act == "alias":
        model.aliases += [(rng.choice((name, f"alias{len(model.aliases)}", *NAMES)), name)] * rng.choice((1, 1, 2))
        return
    elif act == "head":
        model.version, model.specification = rng.randrange(9), rng.choice(NAMES)
        return
    if model.variables:
        model.variables[at] = (name, shape, kind, data)


def read(folder: Path) -> str:
    weights = read_weights(folder)
    assert len(weights.encoder_sha256()) == 64
    return f"model of {len(weights.state)} tensors"


READER = Reader("ctranslate2", seeds, change, read)
