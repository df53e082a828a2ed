"""Cuts of lhotse are clips; what is not served is refused with its line and by name."""

import gzip
import json

import pytest

from whisper_at_cli.extract.datasets import open_dataset
from whisper_at_cli.extract.datasets.base import Clip
from whisper_at_cli.extract.errors import UsageError

RECORDING = {
    "id": "r", "sources": [{"type": "file", "channels": [0], "source": "audio/r.flac"}], "sampling_rate": 44100,
    "num_samples": 441000, "duration": 10.0,
}  # fmt: skip


def cut(**changes) -> dict:
    whole = {
        "id": "r-0", "start": 2.5, "duration": 4.0, "channel": 0, "type": "MonoCut", "recording": RECORDING,
        "supervisions": [
            {"id": "s", "text": "so  it", "custom": {"label": "rain"}},
            {"id": "t", "text": "goes", "custom": {"label": "dog"}},
        ],
        "custom": {"Fold": 2, "split": "train"},
    }  # fmt: skip
    return {**whole, **changes}


def write(path, *cuts: object):
    text = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in cuts)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["cuts.jsonl", "train.jsonl.gz"])
def test_cuts_are_parts_of_files_with_labels_text_fold_and_split(tmp_path, name):
    whole = cut(id="r-1", start=0, duration=10.0, supervisions=[], custom={"labels": ["cat", "dog"]})
    resampled = cut(id="r-2", recording=RECORDING | {"transforms": [{"name": "Resample", "kwargs": {}}]}, custom=None)
    dataset = open_dataset(write(tmp_path / name, cut(), "", whole, resampled))
    assert dataset.class_names == ("cat", "dog", "rain") and dataset.texts == ("so it goes", "", "so it goes")
    assert dataset.clips == (
        Clip("r-0", "audio/r.flac", (1, 2), 2, "train", 2.5, 6.5), Clip("r-1", "audio/r.flac", (0, 1)),
        Clip("r-2", "audio/r.flac", (1, 2), 0, "", 2.5, 6.5),
    )  # fmt: skip
    assert dataset.notes == ("3 cuts were read, with their audio, labels, text, fold, split",)
    (tmp_path / "names.txt").write_text("rain\ndog\ncat\n")
    assert open_dataset(tmp_path / name, labels=tmp_path / "names.txt").clips[0].labels == (0, 1)


def recording(**changes) -> dict:
    return {"recording": RECORDING | changes}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"type": "MixedCut"}, "is a 'MixedCut', which is not read here; only MonoCuts are"),
        ({"type": "MultiCut"}, "is a 'MultiCut'"),
        ({"recording": None}, "has no recording, only features perhaps"),
        ({"duration": None}, "has no duration"),
        ({"duration": -1}, "duration is -1; give seconds from 0"),
        ({"channel": 1}, r"channel 1 of a file with the channels \[0\]"),
        (recording(sources=[{"type": "file", "channels": [0, 1], "source": "a.wav"}]), r"channels \[0, 1\]"),
        (recording(sources=[{"type": "command", "channels": [0], "source": "cat"}]), "its audio is a 'command'"),
        (recording(sources=[{"type": "url", "channels": [0], "source": "https://x"}]), "its audio is a 'url'"),
        (recording(sources=[]), "has 0 sources; one file is read"),
        (recording(sources=[{"type": "file", "channels": [0], "source": 3}]), "names no audio file"),
        (recording(transforms=[{"name": "Speed", "kwargs": {"factor": 1.1}}]), "is changed by 'Speed'"),
        ({"id": "r-9"}, "clip 'r-9' was already named by line 1"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_by_name(tmp_path, changes, said):
    with pytest.raises(UsageError, match=f"line 2 of .*cuts.jsonl.*{said}"):
        open_dataset(write(tmp_path / "cuts.jsonl", cut(id="r-9"), cut(**changes)))


def test_files_that_are_no_cuts_are_other_layouts_or_refused(tmp_path):
    assert open_dataset(write(tmp_path / "m.jsonl", {"audio": "a.wav", "label": "dog"})).clips[0].path == "a.wav"
    write(tmp_path / "a.jsonl.gz", cut())
    (tmp_path / "a.jsonl.gz").write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:-30])
    with pytest.raises(UsageError, match="a.jsonl.gz is not a readable cut manifest"):
        open_dataset(tmp_path / "a.jsonl.gz", format="lhotse")
    with pytest.raises(UsageError, match="line 1 of .*b.jsonl is not a JSON object"):
        open_dataset(write(tmp_path / "b.jsonl", "[1]"), format="lhotse")
    with pytest.raises(UsageError, match="line 1 of .*c.jsonl is not JSON"):
        open_dataset(write(tmp_path / "c.jsonl", "{"), format="lhotse")
