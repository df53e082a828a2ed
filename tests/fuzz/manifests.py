"""Every table that is read: manifests, published datasets, lists of classes, transcripts; and the JSON files of AST."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import mutate
from engine import Files, Reader

from whisper_at_cli.extract.datasets import datafile, manifest, open_dataset
from whisper_at_cli.extract.errors import AudioError
from whisper_at_cli.probe.robustness.utterances import read_speech

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
        *packed(),
        SPEECH,
    ]


TABLES = {  # of published datasets, by where they lie
    "esc50.csv": "filename,fold,target,category\n1-1-A-0.wav,1,0,dog\n2-2-A-1.wav,2.0,1.0,rain\n,,,\n",
    "UrbanSound8K.csv": "slice_file_name,fsID,start,end,salience,fold,classID,class\n1-0-0-0.wav,1,0.0,1.0,1,1,0,dog\n",
    "labels/dev.csv": 'fname,labels,mids,split\n64760,"Dog,Animal","/m/0,/m/1",train\n',
    "eval_segments.csv": '# YTID, start_seconds\n-0DdlOuIFUI, 30.000, 40.000, "/m/0,/m/1"\n',
    "vggsound.csv": '---g-f_I2yQ,1,"people marching",test\n',
    "clips.csv": "File Name;Category;Fold\na.wav;dog;0\nb.wav;nan;1\n",
    "metadata.csv": 'file_name,label,comment\na.wav,dog,"1, 2"\nsub\\\\b.wav,rain,"one\ntwo"\n',
    "meta/train.csv": "audio\tlabels\na.wav\t\"['dog', 'rain']\"\nb.wav\tdog;rain\n",
}
BESIDE = {
    "labels/dev.csv": {"labels/vocabulary.csv": b"0,Animal,/m/0\n1,Dog,/m/1\n"},
    "eval_segments.csv": {CLASSES: b"index,mid,display_name\n0,/m/0,dog\n1,/m/1,rain\n"},
}
SPEECH = {"speech/manifest.csv": b'audio,text\na.wav, "Printing, in the only sense"\nb.wav,so\n'}
ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "utf-32", "shift-jis")


def packed() -> list[Files]:
    """Tables of published datasets and tables beside audio, each with the files that it lists."""
    audio = {"a.wav": b"", "b.wav": b"", "sub/b.wav": b""}
    return [{name: text.encode(), **BESIDE.get(name, {}), **audio} for name, text in TABLES.items()]


def change(files: Files, rng: random.Random, other: Files) -> Files:
    name = rng.choice([name for name in files if not name.endswith(".wav")])
    by_suffix = {"csv": mutate.change_csv, "jsonl": mutate.change_jsonl, "json": mutate.change_json}
    if rng.random() < 0.1:
        return files | {name: mutate.change_bytes(files[name], rng, rng.choice(list(other.values())))}
    changed = by_suffix[name.rpartition(".")[2]](files[name], rng)
    return files | {name: rewritten(changed, rng) if rng.random() < 0.15 else changed}


def rewritten(data: bytes, rng: random.Random) -> bytes:
    """A table with another separator, end of line or encoding."""
    text = data.decode("utf-8", "replace")
    act = rng.random()
    if act < 0.4:
        text = text.replace(rng.choice(",;\t"), rng.choice(",;\t"))
    elif act < 0.6:
        text = text.replace("\n", rng.choice(("\r\n", "\r", "\n\n", " \n")))
    return text.encode(rng.choice(ENCODINGS) if act > 0.5 else "utf-8", "replace")[: mutate.LONGEST]


def read(folder: Path) -> str:
    given = folder / CLASSES
    if (folder / "speech").is_dir():
        return f"speech of {len(read_speech(folder / 'speech'))} utterances"
    readers = {"manifest.csv": manifest, "manifest.jsonl": manifest, "data.json": datafile}
    found = next(((name, reader) for name, reader in readers.items() if (folder / name).exists()), None)
    if found is None:
        name, dataset = "a folder", open_dataset(folder)
    else:
        name, reader = found
        reader.recognise(folder / name)
        if reader is manifest:
            manifest.recognise(folder)
        dataset = reader.read(folder / name, labels=given if given.exists() else None)
    assert all(isinstance(note, str) for note in dataset.notes) and all(clip.fold >= 0 for clip in dataset.clips)
    table = dataset.table()
    assert len(table) == len(dataset) and table.labels.shape == (len(dataset), len(dataset.class_names))
    for row in range(min(3, len(dataset))):
        dataset.is_there(row)
    if len(dataset):
        with contextlib.suppress(AudioError):  # the file is not there
            dataset.waveform(0, 160)
    return f"{name} of {'some' if len(dataset) else 'no'} clips"


READER = Reader("manifest", seeds, change, read)
