"""Manifests (CSV and JSON lines) and the JSON data files of AST."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import mutate
from engine import Files, Reader

from whisper_at_cli.extract.datasets import datafile, manifest
from whisper_at_cli.extract.errors import AudioError

CLASSES = "class_labels_indices.csv"


def seeds(folder: Path) -> list[Files]:
    rows = [
        {
            "audio": "a.wav",
            "start": 0,
            "end": 1.5,
            "label": "dog",
            "fold": 1,
            "split": "train",
            "id": "a",
            "text": "so",
        },
        {"audio": "b/ä.flac", "start": "0.5", "labels": ["dog", "rain"], "fold": "2", "id": 7},
        {"audio": "a.wav", "start": 2, "labels": "rain;wind", "id": "c"},
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    plain = "audio,label\na.wav,dog\nb.wav,\n"
    table = "audio,start,end,labels,fold,split,text\na.wav,0,1,dog;rain,1,train,so\na.wav,1,2,,2,test,\n"
    named = 'id,audio,label\n1,"a, b.wav",dog\n2,"c ""d"".wav",rain\n'
    classes = "index,mid,display_name\n0,/m/0,dog\n1,/m/1,rain\n"
    data = {"data": [{"wav": "a.wav", "labels": "/m/0,/m/1"}, {"wav": "b.wav", "labels": "", "video_id": "b"}]}
    return [
        *({"manifest.csv": text.encode()} for text in (plain, table, named)),
        {"manifest.jsonl": lines.encode()},
        {"manifest.jsonl": b'{"audio": "a.wav"}\n{"audio": "b.wav"}\n'},
        {"manifest.csv": plain.encode(), CLASSES: classes.encode()},
        {"data.json": json.dumps(data).encode(), CLASSES: classes.encode()},
        {"data.json": json.dumps(data).encode(), CLASSES: b"/m/0\n/m/1\n"},
    ]


def change(files: Files, rng: random.Random, other: Files) -> Files:
    name = rng.choice(list(files))
    by_suffix = {"csv": mutate.change_csv, "jsonl": mutate.change_jsonl, "json": mutate.change_json}
    if rng.random() < 0.1:
        return files | {name: mutate.change_bytes(files[name], rng, rng.choice(list(other.values())))}
    return files | {name: by_suffix[name.rpartition(".")[2]](files[name], rng)}


def read(folder: Path) -> str:
    given = folder / CLASSES
    readers = {"manifest.csv": manifest, "manifest.jsonl": manifest, "data.json": datafile}
    name, reader = next((name, reader) for name, reader in readers.items() if (folder / name).exists())
    reader.recognise(folder / name)
    if reader is manifest:
        manifest.recognise(folder)
    dataset = reader.read(folder / name, labels=given if given.exists() else None)
    table = dataset.table()
    assert len(table) == len(dataset) and table.labels.shape == (len(dataset), len(dataset.class_names))
    for row in range(min(3, len(dataset))):
        dataset.is_there(row)
    if len(dataset):
        with contextlib.suppress(AudioError):  # the file is not there
            dataset.waveform(0, 160)
    return f"{name} of {'some' if len(dataset) else 'no'} clips"


READER = Reader("manifest", seeds, change, read)
