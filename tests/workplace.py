"""What the documents' commands take for granted: datasets, caches, heads, results and speech, small and real.

Each thing is made when a document first needs it, and then copied into the folder that the document is run in. Where a
name in a document stands for what no test can have (a large model, a hub repository), its maker says what lies there.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import av
import h5py
import numpy as np
from documents import Block, Document, commands_of, run, split
from whisper_forms import random_whisper, write_form

from conftest import write_wav
from planted import planted_cache
from whisper_at_cli.extract import load_whisper
from whisper_at_cli.extract.datasets import open_dataset

CLASSES = {"dog": "0", "rooster": "1", "rain": "10", "helicopter": "40"}  # of ESC-10, with ESC-50's numbers
MIDS = {"dog": "/m/0bt9lr", "rooster": "/m/07qn5dc", "rain": "/m/06mb1", "helicopter": "/m/09ct_"}
HUB = ("openai/whisper-small", "facebook/hubert-xlarge-ll60k")  # these lie in `store / "hub"` and are not copied
RATE = 16000
MAKERS: dict[str, Callable[[Workplace, Path], None]] = {}


def thing(*names: str):
    """The decorated function makes things of these names."""

    def register(maker):
        MAKERS.update(dict.fromkeys(names, maker))
        return maker

    return register


class Workplace:
    """Makes things once, in `store`, and lays copies of them where a document is run."""

    def __init__(self, store: Path, data: Path, tiny_en: Path):
        self.store, self.data, self.tiny_en = store, data, tiny_en

    def __getitem__(self, name: str) -> Path:
        """Where a thing lies, made on first use."""
        path = self.store / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            MAKERS[name](self, path)
        return path

    def lay_out(self, document: Document, folder: Path) -> list[str]:
        """Copy everything that the document takes for granted into `folder`; returns its names."""
        names = taken_for_granted(document)
        for name in names:
            if name in HUB:
                self[name]
                continue
            source, target = self[name], folder / name.removeprefix("~/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True)
            else:
                shutil.copy(source, target)
        return names

    def clips(self) -> list[dict[str, str]]:
        """One clip of ESC-10 for each of four classes and five folds, as its table has them."""
        with open(self.data / "esc10" / "meta" / "esc50.csv", newline="") as file:
            table = [row for row in csv.DictReader(file) if row["category"] in CLASSES]
        return list({(row["fold"], row["category"]): row for row in table}.values())

    def sound(self, index: int, seconds: float) -> np.ndarray:
        """The beginning of a clip, 16 kHz."""
        return open_dataset(self["ESC-50"]).waveform(index, round(seconds * RATE))[0]

    def speech(self) -> np.ndarray:
        """1.9 seconds: "in being comparatively modern"."""
        speech = open_dataset(self.data / "speech14")
        (row,) = (row for row, clip in enumerate(speech.clips) if clip.id == "LJ001-0002")
        return speech.waveform(row, round(1.9 * RATE))[0]

    def command(self, line: str, *, out: Path | None = None) -> str:
        """What a command prints, also written to `out`."""
        outcome = run(line)
        assert outcome.status == 0, f"{line}\n{outcome.err}"
        if out:
            out.write_text(outcome.out)
        return outcome.out


def taken_for_granted(document: Document) -> list[str]:
    """The things that a document's blocks name before they make them."""
    made: set[str] = set()
    needed: list[str] = []
    for block in document.blocks:
        made |= {block.file}
        for text in [block.text] if block.language == "python" else [one.text for one in commands_of(block.text)]:
            if block.language not in ("sh", "python") or block.file:
                continue
            makes = outputs(text, block)
            for name in MAKERS:
                if name not in (*made, *makes, *needed) and re.search(
                    rf"(?<![\w./-]){re.escape(name)}(?![\w.-])", text
                ):
                    needed.append(name)
            made |= makes
    return needed


OUTPUT_OPTIONS = ("--out", "--csv", "--figure", "--predictions")


def outputs(text: str, block: Block) -> set[str]:
    """The names that a command or a Python example makes."""
    if block.language == "python":
        return set(re.findall(r'out="([^"]+)"', text)) | set(re.findall(r'extract\([^\n]*?, "([^"]+)"', text))
    words, target = split(text)
    words = words or []
    found = {target} | {words[at + 1] for at, word in enumerate(words[:-1]) if word in OUTPUT_OPTIONS}
    return found | set(words[3:4] if words[1:2] and words[1] in ("extract", "import", "export", "slurm") else ())


# datasets


@thing("ESC-50", "ESC-10")
def _esc(here: Workplace, path: Path) -> None:
    (path / "meta").mkdir(parents=True)
    (path / "audio").mkdir()
    with open(path / "meta" / "esc50.csv", "w", newline="") as file:
        table = csv.DictWriter(file, here.clips()[0].keys())
        table.writeheader()
        table.writerows(here.clips())
    for clip in here.clips():
        (path / "audio" / clip["filename"]).symlink_to(here.data / "esc10" / "audio" / clip["filename"])


@thing("audioset")
def _audioset(here: Workplace, path: Path) -> None:
    """Three clips a list, of which one file is missing."""
    classes = "".join(f"{number},{mid},{name}\n" for number, (name, mid) in enumerate(MIDS.items()))
    write(path / "class_labels_indices.csv", "index,mid,display_name\n" + classes)
    for number, name in enumerate(("balanced_train", "unbalanced_train", "eval")):
        lines = ["# YTID, start_seconds, end_seconds, positive_labels"]
        for row in range(3 * number, 3 * number + 3):
            mids = list(MIDS.values())[row % 4 : row % 4 + 2]
            lines.append(f'--a{row}O5G5WEx, 30.000, 40.000, "{",".join(mids)}"')
            if row != 1:
                write_wav(path / "audio" / f"Y--a{row}O5G5WEx.wav", here.sound(row, 5))
        write(path / f"{name}_segments.csv", "\n".join(lines) + "\n")


@thing("FSD50K")
def _fsd50k(here: Workplace, path: Path) -> None:
    truth = path / "FSD50K.ground_truth"
    write(truth / "vocabulary.csv", "".join(f"{n},{name.title()},{MIDS[name]}\n" for n, name in enumerate(MIDS)))
    write(truth / "dev.csv", "fname,labels,mids,split\n64760,Dog,/m/0bt9lr,train\n16399,Rain,/m/06mb1,val\n")
    write(truth / "eval.csv", "fname,labels,mids\n37199,Rooster,/m/07qn5dc\n")
    for index, name in enumerate(("dev_audio/64760", "dev_audio/16399", "eval_audio/37199")):
        write_wav(path / f"FSD50K.{name}.wav", here.sound(index, 3))


@thing("UrbanSound8K")
def _urbansound8k(here: Workplace, path: Path) -> None:
    rows = ["slice_file_name,fsID,start,end,salience,fold,classID,class"]
    for fold in range(1, 11):
        rows.append(f"10141{fold}-3-0-2.wav,10141{fold},0.0,2.0,1,{fold},3,dog_bark")
        write_wav(path / "audio" / f"fold{fold}" / f"10141{fold}-3-0-2.wav", here.sound(fold, 2))
    write(path / "metadata" / "UrbanSound8K.csv", "\n".join(rows) + "\n")


@thing("VGGSound")
def _vggsound(here: Workplace, path: Path) -> None:
    rows = []
    for index, name in enumerate(("dog barking", "raining")):
        rows.append(f'---g-f_I2y{index},1,"{name}",{("train", "test")[index]}')
        write_wav(path / "audio" / f"---g-f_I2y{index}_000001.wav", here.sound(index, 3))
    write(path / "vggsound.csv", "\n".join(rows) + "\n")


@thing("speech_commands_v0.02")
def _speech_commands(here: Workplace, path: Path) -> None:
    for index in range(6):
        write_wav(
            path / ("yes", "no")[index % 2] / f"0a7c2a8{index}_nohash_0.wav", here.speech()[index * 2000 :][:RATE]
        )
    write(path / "validation_list.txt", "yes/0a7c2a82_nohash_0.wav\n")
    write(path / "testing_list.txt", "no/0a7c2a83_nohash_0.wav\n")
    write_wav(path / "_background_noise_" / "rain.wav", here.sound(2, 3))


@thing("sounds")
def _folders(here: Workplace, path: Path) -> None:
    for clip in here.clips():
        (path / clip["category"]).mkdir(parents=True, exist_ok=True)
        source = here.data / "esc10" / "audio" / clip["filename"]
        (path / clip["category"] / clip["filename"]).symlink_to(source)


@thing("datafiles", "class_labels_indices.csv")
def _json_datafiles(here: Workplace, path: Path) -> None:
    if path.suffix == ".csv":
        shutil.copy(here["audioset"] / path.name, path)
        return
    entries = []
    for index, (name, mid) in enumerate(MIDS.items()):
        write_wav(path / f"{name}.wav", here.sound(index, 3))
        entries.append({"wav": f"{name}.wav", "labels": f"{mid},/m/06mb1" if name == "dog" else mid})
    write(path / "train.json", json.dumps({"data": entries}))


@thing("shards")
def _tar_shards(here: Workplace, path: Path) -> None:
    path.mkdir()
    for shard in range(2):
        with tarfile.open(path / f"train-{shard:03d}.tar", "w") as archive:
            for row, name in enumerate(list(CLASSES)[:2]):
                audio = write_wav(here.store / "shard-audio" / f"{row}.wav", here.sound(row, 3))
                archive.add(audio, f"{shard}{row}.wav")
                label = here.store / "shard-audio" / f"{row}.cls"
                write(label, name)
                archive.add(label, f"{shard}{row}.cls")


@thing("cuts.jsonl.gz")
def _cuts(here: Workplace, path: Path) -> None:
    cuts = []
    for row, name in enumerate(list(CLASSES)[:2]):
        audio = write_wav(here.store / "cut-audio" / f"{row}.wav", here.sound(row, 3))
        source = {"type": "file", "channels": [0], "source": str(audio)}
        recording = {"id": f"{row}", "sources": [source], "sampling_rate": RATE, "duration": 3.0}
        cuts.append({
            "type": "MonoCut", "id": f"cut-{row}", "start": 0.5, "duration": 2.0, "channel": 0, "recording": recording,
            "custom": {"label": name},
        })  # fmt: skip
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, cuts)).encode()))


@thing("pack.h5")
def _pack(here: Workplace, path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["audio_name"] = [f"Y{index}.wav".encode() for index in range(4)]
        file["waveform"] = np.stack([(here.sound(index, 3) * 32767).astype(np.int16) for index in range(4)])
        file["target"] = np.eye(4, dtype=bool)
        file["waveform"].attrs["sample_rate"] = RATE


@thing("saved")
def _hugging_face_dataset(here: Workplace, path: Path) -> None:
    import datasets

    paths = [str(write_wav(here.store / "saved-audio" / f"{row}.wav", here.sound(row, 3))) for row in range(4)]
    names = datasets.ClassLabel(names=list(CLASSES))
    audio = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    made = datasets.Dataset.from_dict(
        {"audio": [{"bytes": None, "path": each} for each in paths], "label": [0, 1, 2, 3]},
        features=datasets.Features({"audio": audio, "label": names}),
    ).cast_column("audio", datasets.Audio())
    datasets.DatasetDict({"train": made, "validation": made}).save_to_disk(str(path))


@thing("recordings")
def _recordings(here: Workplace, path: Path) -> None:
    """25 s of FLAC and 40 s of MP3."""
    write_audio(path / "monday.flac", np.concatenate([here.sound(index, 5) for index in range(5)]), "flac")
    write_audio(path / "tuesday.mp3", np.concatenate([here.sound(index, 5) for index in range(8)]), "libmp3lame")


@thing("classes.txt")
def _classes(here: Workplace, path: Path) -> None:
    write(path, "".join(f"{name}\n" for name in CLASSES))


# speech


@thing("talk.wav", "speech.wav", "meeting.m4a")
def _talk(here: Workplace, path: Path) -> None:
    """ "In being comparatively modern", and a dog."""
    samples = np.concatenate([here.speech(), here.sound(0, 5)])
    write_audio(path, samples, "aac") if path.suffix == ".m4a" else write_wav(path, samples)


@thing("speech")
def _speech(here: Workplace, path: Path) -> None:
    """One short utterance."""
    write(path / "manifest.csv", "audio,text\naudio/LJ001-0008.flac,has never been surpassed.\n")
    (path / "audio").mkdir()
    (path / "audio" / "LJ001-0008.flac").symlink_to(here.data / "speech14" / "audio" / "LJ001-0008.flac")


@thing("LibriSpeech")
def _librispeech(here: Workplace, path: Path) -> None:
    """The same utterance in LibriSpeech's layout."""
    chapter = path / "test-clean" / "61" / "70968"
    write(chapter / "61-70968.trans.txt", "61-70968-0000 HAS NEVER BEEN SURPASSED\n")
    (chapter / "61-70968-0000.flac").symlink_to(here.data / "speech14" / "audio" / "LJ001-0008.flac")


# programs and weights


@thing("~/whisper/.venv/bin/activate")
def _environment(here: Workplace, path: Path) -> None:
    """Of an installation in the home folder, which shells here have in the folder that they work in."""
    write(path, "activated=yes\n")


@thing("large-v2.pt")
def _checkpoint(here: Workplace, path: Path) -> None:
    """tiny.en as OpenAI's own code would save it."""
    import torch

    model = load_whisper(here.tiny_en)
    torch.save({"dims": vars(model.dims), "model_state_dict": model.state_dict()}, path)


@thing("models/whisper-small")
def _whisper_folder(here: Workplace, path: Path) -> None:
    """A small Whisper of random weights, saved by transformers."""
    write_form(random_whisper("multilingual"), "hf-float32", path.parent).rename(path)


@thing("models/faster-whisper-small")
def _ctranslate2_folder(here: Workplace, path: Path) -> None:
    """tiny.en."""
    path.symlink_to(here.tiny_en)


@thing("models/wavlm-base-plus")
def _wavlm_folder(here: Workplace, path: Path) -> None:
    """A small WavLM of random weights, saved by transformers."""
    from test_backbones_speech import make_model, save

    save(make_model("wavlm"), path)


@thing(*HUB)
def _hub(here: Workplace, path: Path) -> None:
    """An earlier download from the hub: a small model of random weights."""
    from test_backbones_speech import make_model, save

    owner, name = path.parts[-2:]
    repository = here.store / "hub" / f"models--{owner}--{name}"
    write(repository / "refs" / "main", "0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    if name.startswith("hubert"):
        save(make_model("hubert-stable"), snapshot)
    else:
        shutil.copytree(here["models/whisper-small"], snapshot)
    write(path, "")


# caches, heads and results


@thing("esc50.zarr", "esc10.zarr", "tiny.zarr", "base.zarr")
def _cache(here: Workplace, path: Path) -> None:
    here.command(f"whisper-at-cli extract {here['ESC-10']} {path} --model tiny.en")


@thing("my-part.zarr", "their-part.zarr")
def _part_of_cache(here: Workplace, path: Path) -> None:
    name = "dog" if path.name.startswith("my") else "rooster"
    here.command(f"whisper-at-cli select {here['esc50.zarr']} {path} --class {name}")


@thing("hubert.zarr")
def _hubert_cache(here: Workplace, path: Path) -> None:
    here["facebook/hubert-xlarge-ll60k"]
    here.command(f"whisper-at-cli extract {here['ESC-10']} {path} --model facebook/hubert-xlarge-ll60k")


@thing("as20k.zarr", "as2m.zarr")
def _large_cache(here: Workplace, path: Path) -> None:
    """Planted features of large-v1's width, several labels a clip, split as AudioSet is."""
    numbers = np.random.default_rng(0)
    labels = (numbers.random((8, 6)) < 0.3).astype(np.uint8)
    labels[:, 0] = np.arange(8) % 2
    planted_cache(
        path, numbers.normal(size=(8, 4, 25, 1280)), labels, split=["train"] * 6 + ["eval"] * 2, dtype="float16",
        backbone="large-v1", clip_seconds=10.0,
    )  # fmt: skip


@thing("tagger")
def _tagger(here: Workplace, path: Path) -> None:
    line = f"whisper-at-cli train-head {here['esc10.zarr']} --head tl-tr --dim 128 --epochs 4 --out {path} --json"
    here.command(line, out=here.store / "tiny-head.json")


@thing("talk.json")
def _transcription(here: Workplace, path: Path) -> None:
    here.command(f"whisper-at-cli transcribe {here['talk.wav']} --head {here['tagger']} --events --json", out=path)


@thing("report.json")
def _report(here: Workplace, path: Path) -> None:
    """What `report --json` prints of a page with everything on it."""
    results = f"{here['base-probe.json']} --robustness {here['base.json']} --head {here['tiny-head.json']}"
    results += f" --predictions {here['layers.npz']}"
    here.command(f"whisper-at-cli report {results} --out {here.store / 'report.html'} --json", out=path)


@thing("layers.npz")
def _predictions(here: Workplace, path: Path) -> None:
    here.command(f"whisper-at-cli probe {here['esc10.zarr']} --predictions {path}")


@thing("evaluated.json")
def _evaluated(here: Workplace, path: Path) -> None:
    here.command(f"whisper-at-cli evaluate {here['tagger']}/fold-1 {here['esc10.zarr']} --json", out=path)


@thing("tiny-head.json", "base-head.json", "hubert-head.json")
def _head_result(here: Workplace, path: Path) -> None:
    """Of a head on tiny.en; the others say another backbone."""
    here["tagger"]
    if path.name != "tiny-head.json":
        name = {"base-head.json": "base", "hubert-head.json": "facebook/hubert-xlarge-ll60k"}[path.name]
        renamed(here["tiny-head.json"], path, backbone=name)


@thing("tiny.json", "base.json")
def _robustness_result(here: Workplace, path: Path) -> None:
    """Of tiny.en; the other says that it is of base."""
    if path.name == "base.json":
        renamed(here["tiny.json"], path, model="base", parameters=71825920)
        return
    line = (
        f"--speech {here['speech']} --noise {here['ESC-50']} --model tiny.en --out {here.store / 'robustness'} --json"
    )
    snrs = "--snr 20 --snr 15 --snr -5 --snr -10"
    here.command(f"whisper-at-cli robustness {line} {snrs}", out=path)


@thing("base-probe.json")
def _probe_result(here: Workplace, path: Path) -> None:
    """A probe of tiny.en that says it is of base."""
    here.command(f"whisper-at-cli probe {here['esc10.zarr']} --json", out=path)
    renamed(path, path, backbone="base")


def renamed(source: Path, path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(source.read_text()) | changes))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_audio(path: Path, samples: np.ndarray, codec: str) -> None:
    """A compressed file, one channel at 16 kHz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4" if codec == "aac" else None) as container:
        stream = container.add_stream(codec, rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = RATE
        resampler = av.AudioResampler(format=stream.format.name, layout="mono", rate=RATE)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
