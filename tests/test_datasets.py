"""Which clips a dataset has, and what is in them."""

import numpy as np
import pytest

from whisper_at_cli.extract.datasets import open_dataset
from whisper_at_cli.extract.datasets.base import unique_ids
from whisper_at_cli.extract.errors import UsageError


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def esc50_layout(root, text):
    touch(root, "meta/esc50.csv", "audio/a.wav")
    (root / "meta" / "esc50.csv").write_text(text)
    return root


def test_esc10_has_its_official_folds_and_classes(esc10):
    dataset = open_dataset(esc10)
    assert (dataset.name, len(dataset), dataset.clip_seconds) == ("esc50", 400, 5.0)
    assert dataset.class_names[:3] == ("dog", "rooster", "rain") and len(dataset.class_names) == 10
    table = dataset.table()
    assert np.bincount(table.fold).tolist() == [0, 80, 80, 80, 80, 80]
    assert (table.labels.sum(axis=1) == 1).all() and (table.labels.sum(axis=0) == 40).all()
    by_id = {clip.id: clip for clip in dataset.clips}
    assert by_id["1-100032-A-0"].path == "audio/1-100032-A-0.ogg"
    assert dataset.class_names[by_id["1-17367-A-10"].labels[0]] == "rain"
    assert dataset.audio_path(dataset.clips[0]).is_file()


def test_esc50_target_numbers_need_not_be_dense(tmp_path):
    text = "filename,fold,target,category\nb.wav,2,40,helicopter\na.wav,1,0,dog\n"
    dataset = open_dataset(esc50_layout(tmp_path, text))
    assert dataset.class_names == ("dog", "helicopter")
    assert [(clip.id, clip.labels, clip.fold) for clip in dataset.clips] == [("b", (1,), 2), ("a", (0,), 1)]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("filename,fold,category\na.wav,1,dog\n", "lacks the column 'target'"),
        ("filename,fold,target,category\na.wav,one,0,dog\n", "line 2"),
        ("filename,fold,target,category\na.wav,1\n", "line 2"),
        ("filename,fold,target,category\na.wav,1,0,dog\nb.wav,1,0,cat\n", "target 0 is 'cat' here and 'dog' above"),
        ("filename,fold,target,category\n", "lists no clips"),
        ("", "lacks the column"),
    ],
)
def test_a_broken_csv_is_refused_with_its_place(tmp_path, text, reason):
    with pytest.raises(UsageError, match=reason):
        open_dataset(esc50_layout(tmp_path, text))


def test_a_binary_csv_is_refused(tmp_path):
    root = esc50_layout(tmp_path, "")
    (root / "meta" / "esc50.csv").write_bytes(bytes(range(256)) * 9)
    with pytest.raises(UsageError, match="CSV"):
        open_dataset(root)


def test_a_folder_per_class_is_read_in_path_order(tmp_path):
    touch(tmp_path, "rooster/2.ogg", "dog/1.wav", "dog/deep/3.FLAC", "dog/notes.txt", ".hidden/4.wav", "dog/.5.wav")
    dataset = open_dataset(tmp_path)
    assert dataset.class_names == ("dog", "dog/deep", "rooster")
    assert [(clip.id, clip.path) for clip in dataset.clips] == [
        ("1", "dog/1.wav"),
        ("3", "dog/deep/3.FLAC"),
        ("2", "rooster/2.ogg"),
    ]
    assert dataset.clip_seconds == 10.0


def test_split_folders_become_splits(tmp_path):
    dataset = open_dataset(touch(tmp_path, "train/dog/1.wav", "Validation/dog/2.wav", "test/cat/3.wav"))
    assert [(clip.split, dataset.class_names[clip.labels[0]]) for clip in dataset.clips] == [
        ("valid", "dog"),
        ("test", "cat"),
        ("train", "dog"),
    ]


def test_files_without_class_folders_are_unlabelled(tmp_path):
    dataset = open_dataset(touch(tmp_path, "1.wav", "2.wav"))
    assert dataset.class_names == () and dataset.table().labels.shape == (2, 0)


def test_a_stray_file_beside_class_folders_is_named(tmp_path):
    with pytest.raises(UsageError, match="stray.wav"):
        open_dataset(touch(tmp_path, "dog/1.wav", "stray.wav"))


def test_clips_with_equal_stems_keep_apart():
    assert unique_ids(["dog/1.wav", "cat/2.wav"]) == ["1", "2"]
    assert unique_ids(["dog/1.wav", "cat/1.wav"]) == ["dog/1", "cat/1"]
    assert unique_ids(["dog/1.wav", "dog/1.ogg"]) == ["dog/1.wav", "dog/1.ogg"]


def test_missing_empty_and_unknown_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        open_dataset(tmp_path / "absent")
    with pytest.raises(UsageError, match="holds no audio files"):
        open_dataset(tmp_path)
    with pytest.raises(UsageError, match="choose from audioset, esc50"):
        open_dataset(tmp_path, format="mp3")
    with pytest.raises(UsageError, match=r"layout has meta/esc50.csv"):
        open_dataset(tmp_path, format="esc50")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="not a dataset in a known layout"):
        open_dataset(tmp_path / "file")
