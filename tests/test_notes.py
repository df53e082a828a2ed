"""Every note that extraction can give is provoked here, and is said before encoding and by `info`."""

import contextlib
import io
import json
import sys
import tarfile
import unicodedata
from types import SimpleNamespace

import av
import h5py
import numpy as np
import pytest
import torch

from conftest import noise, write_wav
from whisper_at_cli.cli import main
from whisper_at_cli.extract import FeatureCache, commands, extract
from whisper_at_cli.extract.audio.decode import load_clip
from whisper_at_cli.extract.backbones.encoder import _kernels_problem
from whisper_at_cli.extract.backbones.precision import cost_note
from whisper_at_cli.extract.datasets import open_dataset
from whisper_at_cli.extract.datasets.look import looked_at
from whisper_at_cli.extract.devices import FittingBatches
from whisper_at_cli.extract.notes import NOTES
from whisper_at_cli.extract.pipeline.prepare import batch_size_of


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        path.touch()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def table(root, text):
    """A dataset of two files and a table of them; the notes on it."""
    for name in ("a.wav", "b.wav"):
        write(root / name, None)
    write(root / "clips.csv", text)
    return open_dataset(root / "clips.csv").notes


def sounds(root, *paths):
    for path in paths:
        write(root / path, None)
    return open_dataset(root).notes


def beside(root):
    write(root / "ESC-50" / "meta" / "esc50.csv", "filename,fold,target,category\n1-1-A-0.wav,1,0,dog\n")
    return sounds(root, "ESC-50/audio/1-1-A-0.wav", "more/a.wav")


class OnCuda:
    """What cost_note asks of a backbone, on a GPU that need not be there."""

    device = torch.device("cuda", 0)

    def __init__(self, precision, not_fused=""):
        self.precision, self.encoder = precision, SimpleNamespace(not_fused=not_fused)


def without_triton():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "whisper_at_cli.extract.backbones.kernels", None)
        return _kernels_problem(64, torch.float16, torch.device("cpu"))


def too_large_a_batch():
    fitting, backbone = FittingBatches(), SimpleNamespace(
        weights_sha256="0", precision="float16", device=torch.device("cuda", 0)
    )  # fmt: skip
    fitting.failed(backbone, 16000, 64)
    return fitting.note(backbone, 16000, 64)


def encoded_again(_root):
    """The line that `extract` prints when its report says so."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(out):
        report = SimpleNamespace(redone_in_float32=3, clip_notes=(), failures=(), missing=0, cache="a.zarr", written=3)
        vars(report).update(skipped=0, failed=0, seconds=1.0, clips_per_second=3.0, encoder_busy=1.0, ok=True)
        vars(report).update(missing_expected=False, root="")
        patch.setattr(commands, "_engine", lambda *a, **options: lambda *a, **k: report)
        with pytest.raises(SystemExit):
            main(["--quiet", "extract", "sounds", "a.zarr", "--model", "tiny.en"])
    return [line.removeprefix("note: ") for line in out.getvalue().splitlines()]


def several_tables(root):
    for split in ("train", "test"):
        write(root / "meta" / f"{split}.csv", f"audio,label\n{split}/a.wav,{split}s\n")
    return sounds(root, "train/a.wav", "test/a.wav")


def unlisted(root):
    write(root / "metadata.csv", "file_name,label\na.wav,dog\n")
    return sounds(root, "a.wav", "b.wav")


def unread(root):
    write(root / "costs.csv", "item,price\nmicrophone,5\n")
    return sounds(root, "dog/a.wav", "cat/b.wav")


def kaggle(root, *paths):
    write(root / "esc50.csv", "filename,fold,target,category\n1-1-A-0.wav,1,0,dog\n")
    return sounds(root, *paths)


def missing(root):
    write(root / "clips.csv", "audio,label\ngone.wav,dog\n")
    return looked_at(open_dataset(root / "clips.csv"), 10.0, windows=False).notes


def cut(root):
    write_wav(root / "dog" / "a.wav", noise(0, 3.0))
    return looked_at(open_dataset(root), 1.0, windows=False).notes


def speech_commands(root):
    write(root / "validation_list.txt", "yes/a.wav\n")
    write(root / "testing_list.txt", "no/a.wav\n")
    return sounds(root, "yes/a.wav", "no/a.wav", "_background_noise_/tap.wav")


def pack(root):
    with h5py.File(root / "pack.h5", "w") as file:
        file["audio_name"] = np.array([b"a.wav", b"b.wav"])
        file["waveform"] = np.zeros((2, 16), np.int16)
        file["target"] = np.eye(2)
    return open_dataset(root / "pack.h5").notes


def encoded(samples, suffix, codec):
    """Some noise in a container, as bytes."""
    held = io.BytesIO()
    with av.open(held, "w", format=suffix) as container:
        stream = container.add_stream(codec, rate=16000, layout="mono")
        for begin in range(0, len(samples), 1024):
            frame = av.AudioFrame.from_ndarray(samples[None, begin : begin + 1024], format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16000, begin
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return held.getvalue()


def clip_notes(data):
    return load_clip(data, 16000 * 30).note.split("; ")


SOUND = (noise(0, 5.0) * 9999).astype(np.int16)
MP3 = encoded(SOUND, "mp3", "libmp3lame")
OGG = encoded(SOUND, "ogg", "libopus")
FLAC = encoded(SOUND, "flac", "flac")
FLAC_FRAMES = FLAC[: FLAC.rfind(b"\xff\xf8", 0, len(FLAC) // 2)]  # up to a frame in its middle


def paused():
    """A Matroska file whose recorder stood still for a second: its packets say so by their times."""
    with av.open(io.BytesIO(encoded(SOUND, "matroska", "pcm_s16le"))) as source:
        held = io.BytesIO()
        with av.open(held, "w", format="matroska") as target:
            stream = target.add_stream_from_template(source.streams.audio[0])
            for packet in source.demux(source.streams.audio[0]):
                if packet.dts is not None:
                    packet.pts += 1000 if packet.pts > 2500 else 0
                    packet.dts, packet.stream = packet.pts, stream
                    target.mux(packet)
    return held.getvalue()


def cuts(root):
    recording = {"sources": [{"type": "file", "channels": [0], "source": "a.wav"}], "duration": 3}
    write(root / "cuts.jsonl", json.dumps({"type": "MonoCut", "id": "a", "duration": 1, "recording": recording}))
    return open_dataset(root / "cuts.jsonl").notes


def shard(root, *members):
    with tarfile.open(root / "a.tar", "w") as archive:
        for name in members:
            member = tarfile.TarInfo(name)
            member.size = 1
            archive.addfile(member, io.BytesIO(b"1"))
    return open_dataset(root / "a.tar").notes


NFD = unicodedata.normalize("NFD", "ä.wav")
PROVOKED = {
    "table-form": lambda root: table(root, "audio;label\na.wav;dog\n".encode("utf-16")),
    "table-encoding": lambda root: table(root, "audio,label\na.wav,Bär\n".encode("cp1252")),
    "short-rows": lambda root: table(root, "audio,label\na.wav\nb.wav,dog\n"),
    "columns-taken": lambda root: table(root, "File Name,Category\na.wav,dog\n"),
    "nan-labels": lambda root: table(root, "audio,label\na.wav,nan\nb.wav,dog\n"),
    "whole-labels": lambda root: table(root, "audio,label\na.wav,1.0\nb.wav,\n"),
    "labels-split": lambda root: table(root, "audio,labels\na.wav,dog|cat\nb.wav,dog\n"),
    "labels-whole": lambda root: table(root, "audio,label\na.wav,dog;cat\nb.wav,dog\n"),
    "spans-unused": lambda root: table(root, "audio,label,start_time\na.wav,dog,3\nb.wav,cat,5\n"),
    "slice-spans": lambda root: table(root, "slice_file_name,class,start,end\na.wav,dog,3,4\nb.wav,cat,5,9\n"),
    "table-found": unlisted,
    "tables-joined": several_tables,
    "table-unread": unread,
    "unlisted": unlisted,
    "no-label-column": lambda root: table(root, "audio,species\na.wav,dog\n"),
    "no-labels": lambda root: sounds(root, "a.wav"),
    "some-unlabelled": lambda root: table(root, "audio,label\na.wav,dog\nb.wav,\n"),
    "folder-classes": lambda root: sounds(root, "dog/a.wav", "cat/b.wav"),
    "classes-alike": lambda root: sounds(root, "Dog/a.wav", "dog/b.wav"),
    "folder-roles": lambda root: sounds(root, "train/dog/a.wav", "test/cat/b.wav"),
    "folder-doubt": lambda root: sounds(root, "train/a.wav", "birds/b.wav"),
    "folds-from-zero": lambda root: table(root, "audio,label,fold\na.wav,dog,0\nb.wav,cat,1\n"),
    "fold-zero": lambda root: table(root, "audio,label,fold\na.wav,dog,0\nb.wav,cat,2\n"),
    "relocated": lambda root: kaggle(root, "audio/audio/1-1-A-0.wav"),
    "same-name": lambda root: kaggle(root, "1-1-A-0.wav", "16000/1-1-A-0.wav"),
    "names-adapted": lambda root: (write(root / NFD, None), table(root, "audio,label\nä.wav,dog\n"))[1],
    "missing-files": missing,
    "beside-left-out": beside,
    "left-out-suffix": lambda root: sounds(root, "dog/a.wav", "dog/b.zip"),
    "cut": cut,
    "background-noise": speech_commands,
    "pack-rate": pack,
    "pack-classes": pack,
    "shards-read": lambda root: shard(root, "a.wav", "a.cls"),
    "shard-audio": lambda root: shard(root, "a.wav", "a.flac", "a.cls"),
    "shard-keys": lambda root: shard(root, "a.wav", "b.cls"),
    "cuts-read": cuts,
    "audio-lost": lambda root: clip_notes(write_wav(root / "a.wav", noise(0, 5.0)).read_bytes()[:-9999]),
    "packets-skipped": lambda root: clip_notes(MP3[:20000] + b"LYRICSBEGIN" + bytes(900) + MP3[20000:]),
    "audio-gap": lambda root: clip_notes(paused()),
    "flac-cut": lambda root: clip_notes(FLAC_FRAMES),
    "ogg-cut": lambda root: clip_notes(OGG[:-200]),
    "float32-slow": lambda root: [cost_note(OnCuda("float32"))],
    "kernels-unused": lambda root: [cost_note(OnCuda("float16", without_triton()))],
    "other-device": lambda root: [batch_size_of({"device": "cuda:0", "batch_size": 256}, torch.device("cpu"), 8)[1]],
    "batches-split": lambda root: [too_large_a_batch()],
    "again-in-float32": encoded_again,
}


@pytest.mark.parametrize("name", NOTES)
def test_every_note_is_given_where_it_is_true(tmp_path, name):
    assert name in PROVOKED, "a note that nothing provokes: add what does to PROVOKED"
    said = PROVOKED[name](tmp_path)
    assert any(NOTES[name].matches(note) for note in said), said


def test_nothing_is_provoked_that_is_no_note():
    assert PROVOKED.keys() <= NOTES.keys()


def test_a_published_layout_and_a_plain_manifest_give_no_note(tmp_path):
    assert table(tmp_path / "manifest", "audio,label,fold\na.wav,dog,1\nb.wav,cat,2\n") == ()
    write(tmp_path / "esc" / "meta" / "esc50.csv", "filename,fold,target,category\n1-1-A-0.wav,1,0,dog\n")
    write(tmp_path / "esc" / "audio" / "1-1-A-0.wav", None)
    assert open_dataset(tmp_path / "esc").notes == ()


def test_notes_are_said_before_encoding_and_stay_in_the_report_and_the_cache(tmp_path, random_backbone):
    for name in ("dog/a", "cat/b"):
        write_wav(tmp_path / "sounds" / f"{name}.wav", noise(0, 2.0))
    order = []

    class Watched:
        def __getattr__(self, name):
            return getattr(random_backbone, name)

        def encode(self, waveforms):
            order.append("encode")
            return random_backbone.encode(waveforms)

    report = extract(tmp_path / "sounds", tmp_path / "a.zarr", model=Watched(), clip_seconds=0.5, notify=order.append)
    assert order[:2] == list(report.notes) and order[2:] and set(order[2:]) == {"encode"}
    assert report.notes[0] == "2 classes from folder names: cat, dog" and "75 % of the audio is cut" in report.notes[1]
    assert FeatureCache.open(tmp_path / "a.zarr").attributes["made"]["notes"] == list(report.notes)


def test_info_shows_the_notes_and_a_missing_clip_the_path_that_was_tried(tmp_path, tiny_en, capsys):
    write_wav(tmp_path / "a.wav", noise(0, 0.5))
    (tmp_path / "clips.csv").write_text("audio,category\na.wav,dog\ngone.wav,cat\n")
    arguments = ("extract", tmp_path / "clips.csv", tmp_path / "a.zarr", "--model", tiny_en, "--clip-seconds", 0.5)
    with pytest.raises(SystemExit):
        main(["--quiet", *map(str, arguments)])
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "note: clips.csv: audio from column 'audio', labels from column 'category'"
    assert said[1] == f"note: 1 of 2 clips are missing; the first was looked for at {tmp_path / 'gone.wav'}"
    assert said[2] == f"missing: {tmp_path / 'gone.wav'}"
    with pytest.raises(SystemExit):
        main(["info", str(tmp_path / "a.zarr")])
    assert said[0] in capsys.readouterr().out.splitlines()


def test_the_list_of_notes_is_one_command(capsys):
    with pytest.raises(SystemExit):
        main(["notes", "--json"])
    listed = json.loads(capsys.readouterr().out)["notes"]
    assert [note["id"] for note in listed] == list(NOTES) and all(note["meaning"] for note in listed)
    with pytest.raises(SystemExit):
        main(["notes"])
    out = capsys.readouterr().out
    assert all(note.template in out and note.meaning in out for note in NOTES.values())
