"""Tar shards give what the same files in a folder give; what is no shard is refused by name."""

import io
import json
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from conftest import noise, write_wav
from whisper_at_cli.extract import FeatureCache, extract
from whisper_at_cli.extract.datasets import open_dataset, tar
from whisper_at_cli.extract.errors import AudioError, MissingAudioError, UsageError


def write_tar(path, members: dict[str, bytes | str], mode: str = "w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def wav(folder, seed: int) -> bytes:
    return write_wav(folder / f"{seed}.wav", noise(seed, 1.0)).read_bytes()


def described(dataset) -> list[tuple]:
    return [
        (clip.id, clip.path, [dataset.class_names[label] for label in clip.labels], clip.fold, clip.split)
        for clip in dataset.clips
    ]


def test_shards_are_read_as_the_same_files_would_be(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "MEMBERS_KEPT", 1)
    audio = [wav(tmp_path / "files", seed) for seed in range(4)]
    long = "deep/" * 40  # longer than the header of a member holds
    train, test = (
        {"a.wav": audio[0], "a.json": json.dumps({"Labels": ["dog", "rain"], "fold": 2, "start": 30, "end": 40}),
         f"{long}b.wav": audio[1], f"{long}b.cls": "dog"},
        {"c.x.wav": audio[2], "c.txt": "cat\ndog", "d.wav": audio[3], "d.txt": "so it goes", "d.cls": "cat",
         "d.png": "?"},
    )  # fmt: skip
    write_tar(tmp_path / "shards" / "train-000.tar", train)
    write_tar(tmp_path / "shards" / "test-000.tar", test)
    dataset = open_dataset(tmp_path / "shards")
    assert described(dataset) == [
        ("c.x", "test-000.tar/c.x.wav", ["cat", "dog"], 0, "test"), ("d", "test-000.tar/d.wav", ["cat"], 0, "test"),
        ("a", "train-000.tar/a.wav", ["dog", "rain"], 2, "train"),
        ("b", f"train-000.tar/{long}b.wav", ["dog"], 0, "train"),
    ]  # fmt: skip
    assert dataset.texts == ("", "so it goes", "", "") and all(clip.start is None for clip in dataset.clips)
    assert dataset.notes == ("2 tar shards were read: audio from .wav, labels from .json, .cls, .txt",)
    for row, seed in enumerate((2, 3, 0, 1)):
        ours, real = pickle.loads(pickle.dumps(dataset.source(row))).read(16000)[:2]
        assert real == 16000 and np.array_equal(ours, tar.Dataset(
            "d", tmp_path / "files", (replace(dataset.clips[row], path=f"{seed}.wav"),), dataset.class_names
        ).source(0).read(16000).samples)  # fmt: skip
    part = pickle.loads(pickle.dumps(dataset.part([3, 1])))
    assert part.source(0) == dataset.source(3) and part.source(1) == dataset.source(1)


def test_a_pattern_stands_for_its_shards_and_names_those_that_are_missing(tmp_path):
    for number in range(3):
        write_tar(
            tmp_path / f"s-{number:03d}.tar",
            {f"{number}.wav": wav(tmp_path, number), f"{number}.cls": str(10 - number)},
        )
    dataset = open_dataset(str(tmp_path / "s-{000..002}.tar"))
    assert [clip.id for clip in dataset.clips] == ["0", "1", "2"] and dataset.name == "s"
    assert dataset.class_names == ("8", "9", "10"), "numbers in their order"
    assert [clip.labels for clip in dataset.clips] == [(2,), (1,), (0,)]
    (tmp_path / "names.txt").write_text("\n".join(f"class {number}" for number in range(11)))
    listed = open_dataset(tmp_path / "s-{000,002}.tar", labels=tmp_path / "names.txt")
    assert [listed.class_names[clip.labels[0]] for clip in listed.clips] == ["class 10", "class 8"]
    with pytest.raises(UsageError, match="2 of the 5 shards of .* do not exist: .*s-003.tar, .*s-004.tar"):
        open_dataset(tmp_path / "s-{000..004}.tar")
    assert tar.expanded("a{1,2}-{08..10}.tar") == [f"a{a}-{b}.tar" for a in "12" for b in ("08", "09", "10")]
    for pattern in ("{3..1}", "{0..99999999}", "{0..99999}{0..99999}"):
        with pytest.raises(UsageError, match="shards"):
            tar.expanded(pattern)


def test_shards_in_a_bucket_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="read from a disk only"):
        open_dataset("s3://bucket/a-{000..002}.tar")
    store = type("Store", (), {"__init__": lambda self, address: None, "sizes": lambda self: {"a-000.tar": 9}})
    monkeypatch.setattr("whisper_at_cli.extract.datasets.bucket.BucketStore", store)
    with pytest.raises(UsageError, match="s3://bucket/shards holds tar shards, which are read from a disk only"):
        open_dataset("s3://bucket/shards")


@pytest.mark.parametrize(
    "members, said",
    [
        ({"a.wav": b"x", "a.json": "[1]"}, r"clip 1 of .*a.tar: a.json is not a JSON object"),
        ({"a.wav": b"x", "a.json": "{"}, r"clip 1 of .*a.tar: a.json is not JSON"),
        ({"a.wav": b"x", "a.json": '{"fold": "x"}'}, "clip 1 of .*a.tar: fold is 'x'"),
        ({"a.wav": b"x", "a.txt": b"\xff"}, "a.txt is not UTF-8"),
        ({"a.wav": b"x", "a.json": b" " * (tar.TEXT_BYTES + 1)}, "a.json has 1048577 bytes"),
        ({"a.json": "{}", "b.png": b""}, "lists no clips"),
        ({"a.wav": b"x", "b.wav": b"x", "a.mp3": b"y"}, "the members of a do not stand one after another"),
    ],
)  # fmt: skip
def test_what_a_shard_cannot_mean_is_refused(tmp_path, members, said):
    with pytest.raises(UsageError, match=said):
        open_dataset(write_tar(tmp_path / "a.tar", members), format="tar")


def test_damaged_and_compressed_shards_are_refused(tmp_path):
    whole = write_tar(tmp_path / "a.tar", {"a.wav": bytes(5000), "b.wav": bytes(5000)}).read_bytes()
    packed = write_tar(tmp_path / "b.tar", {"a.wav": b"x"}, "w:gz").read_bytes()
    flipped = bytearray(whole)
    flipped[5120 + 512 + 100] ^= 1
    for data in (whole[:7000], packed, b"", b"no tar" * 200, bytes(flipped)):
        (tmp_path / "c.tar").write_bytes(data)
        with pytest.raises(UsageError, match=r"c.tar is not a readable tar file|lists no clips"):
            if len(open_dataset(tmp_path / "c.tar")) == 1:  # tarfile takes damage behind a member for the end
                raise UsageError("c.tar is not a readable tar file")


def test_a_shard_that_is_gone_or_cut_off_fails_its_clips(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.wav": wav(tmp_path, 0), "a.cls": "dog"})
    dataset = open_dataset(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(AudioError, match="a.tar ends within it: 1488 of 32044 bytes are there"):
        dataset.source(0).read(16000)
    path.unlink()
    assert not dataset.is_there(0)
    tar_clip = replace(dataset.source(0), path=str(tmp_path / "gone.tar"))
    with pytest.raises(MissingAudioError, match="no shard gone.tar"):
        tar_clip.read(16000)


def test_a_folder_of_audio_with_an_archive_in_it_is_a_folder(tmp_path):
    for name in ("dog/a.wav", "cat/b.wav"):
        write_wav(tmp_path / name, noise(0, 0.1))
    write_tar(tmp_path / "backup.tar", {"a.wav": b"x"})
    assert open_dataset(tmp_path).class_names == ("cat", "dog")


def test_shards_go_into_a_cache(tmp_path, random_backbone):
    members = {}
    for number in range(4):
        members |= {f"{number}.wav": wav(tmp_path / "files", number), f"{number}.cls": f"c{number % 2}"}
    (tmp_path / "files" / "labels").mkdir()
    write_tar(tmp_path / "a.tar", members | {"bad.wav": b"no audio"})
    report = extract(tmp_path / "a.tar", tmp_path / "a.zarr", model=random_backbone, clip_seconds=1.0)
    assert (report.written, report.failed) == (4, 1) and report.failures[0].path == "a.tar/bad.wav"
    extract(tmp_path / "files", tmp_path / "b.zarr", model=random_backbone, clip_seconds=1.0)
    ours, theirs = FeatureCache.open(tmp_path / "a.zarr"), FeatureCache.open(tmp_path / "b.zarr")
    assert np.array_equal(ours.features(range(4)), theirs.features(range(4))) and ours.spec.class_names == ("c0", "c1")
