"""Datasets as people pack them: one folder deeper, as Kaggle and the hub do, with a table beside the audio or none."""

import csv
from pathlib import Path

import numpy as np
import pytest
from test_datasets_layouts import described, write

from conftest import noise, write_wav
from whisper_at_cli.extract import FeatureCache, extract
from whisper_at_cli.extract.datasets import open_dataset, windowed
from whisper_at_cli.extract.datasets.locate import located
from whisper_at_cli.extract.datasets.speech_commands import NOISE
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.probe.robustness.utterances import read_speech

ESC = "filename,fold,target,category\n1-1-A-0.wav,1,0,dog\n2-2-B-1.wav,2,1,rain\n"
ESC_FROM_0 = ESC.replace(",1,0", ",0,0").replace(",2,1", ",1,1")
US8K = """slice_file_name,fsID,start,end,salience,fold,classID,class
1-0-0-0.wav,1,0,1,1,1,0,dog
2-1-0-0.wav,2,0,1,1,10,1,rain
"""
FSD_DEV = 'fname,labels,mids,split\n1,"Dog,Animal","/m/b,/m/a",train\n2,Animal,/m/a,val\n'
FSD_FLOATS = FSD_DEV.replace("\n1,", "\n1.0,")
TRUTH, DEV = "FSD50K.ground_truth", "FSD50K.dev_audio"
WORDS = "0,Animal,/m/a\n1,Dog,/m/b\n"
LISTS = {"validation_list.txt": "no/b.wav\n", "testing_list.txt": "yes/a.wav\n"}

PACKED = {
    "esc50": [
        {"meta/esc50.csv": ESC, "audio/1-1-A-0.wav": "", "audio/2-2-B-1.wav": ""},
        {"esc50.csv": ESC, "audio/audio/1-1-A-0.wav": "", "audio/audio/2-2-B-1.wav": ""},
        {"esc50.csv": ESC, "1-1-A-0.wav": "", "2-2-B-1.wav": ""},
        {"meta/esc50.csv": ESC, "audio/1-1-A-0.ogg": "", "audio/2-2-B-1.ogg": ""},
        {"meta/esc50.csv": ESC_FROM_0, "audio/1-1-A-0.wav": "", "audio/2-2-B-1.wav": ""},
    ],
    "urbansound8k": [
        {"metadata/UrbanSound8K.csv": US8K, "audio/fold1/1-0-0-0.wav": "", "audio/fold10/2-1-0-0.wav": ""},
        {"UrbanSound8K.csv": US8K, "fold1/1-0-0-0.wav": "", "fold10/2-1-0-0.wav": ""},
        {"UrbanSound8K.csv": US8K, "audio/1-0-0-0.flac": "", "audio/2-1-0-0.flac": ""},
    ],
    "fsd50k": [
        {f"{TRUTH}/dev.csv": FSD_DEV, f"{TRUTH}/vocabulary.csv": WORDS, f"{DEV}/1.wav": "", f"{DEV}/2.wav": ""},
        {"labels/dev.csv": FSD_DEV, "labels/vocabulary.csv": WORDS, "clips/dev/1.wav": "", "clips/dev/2.wav": ""},
        {f"{TRUTH}/dev.csv": FSD_FLOATS, f"{DEV}/{DEV}/1.wav": "", f"{DEV}/{DEV}/2.wav": ""},
    ],
    "speech-commands": [
        {**LISTS, "yes/a.wav": "", "no/b.wav": "", "no/c.wav": ""},
        {**LISTS, **dict.fromkeys(["audio/yes/a.wav", "audio/no/b.wav", "audio/no/c.wav", f"audio/{NOISE}x.wav"], "")},
    ],
}  # fmt: skip
EXPECTED = {
    "esc50": [("1-1-A-0", ["dog"], 1, ""), ("2-2-B-1", ["rain"], 2, "")],
    "urbansound8k": [("1-0-0-0", ["dog"], 1, ""), ("2-1-0-0", ["rain"], 10, "")],
    "fsd50k": [("1", ["Animal", "Dog"], 0, "train"), ("2", ["Animal"], 0, "valid")],
    "speech-commands": [("b", ["no"], 0, "valid"), ("c", ["no"], 0, "train"), ("a", ["yes"], 0, "test")],
}


@pytest.mark.parametrize("wrapper", ["", "deeper", "ESC-50-master"])
@pytest.mark.parametrize(
    "name, number", [(name, number) for name, all_ in PACKED.items() for number in range(len(all_))]
)
def test_every_packing_has_the_published_labels_folds_and_splits(tmp_path, name, number, wrapper):
    write(tmp_path / wrapper, PACKED[name][number])
    for dataset in (open_dataset(tmp_path), open_dataset(tmp_path, format=name)):
        assert dataset.name == name
        assert [(id, labels, fold, split) for id, _, labels, fold, split in described(dataset)] == EXPECTED[name]
        assert all(dataset.is_there(row) for row in range(len(dataset)))


def test_several_datasets_side_by_side_are_named(tmp_path):
    write(tmp_path / "a", PACKED["esc50"][0])
    write(tmp_path / "b", PACKED["urbansound8k"][0])
    with pytest.raises(UsageError, match=r"holds several datasets: a \(esc50\), b \(urbansound8k\); give one"):
        open_dataset(tmp_path)


def test_a_published_layout_keeps_its_paths_whatever_else_lies_there(tmp_path):
    write(tmp_path, PACKED["esc50"][0] | {"old/1-1-A-0.wav": "", "audio/16000/1-1-A-0.wav": ""})
    dataset = open_dataset(tmp_path)
    assert [clip.path for clip in dataset.clips] == ["audio/1-1-A-0.wav", "audio/2-2-B-1.wav"] and not dataset.notes


def test_two_files_that_could_be_meant_are_none(tmp_path):
    write(tmp_path, {"esc50.csv": ESC, "x/1-1-A-0.wav": "", "y/1-1-A-0.wav": "", "y/2-2-B-1.wav": ""})
    dataset = open_dataset(tmp_path)
    assert [clip.path for clip in dataset.clips] == ["audio/1-1-A-0.wav", "y/2-2-B-1.wav"]


@pytest.mark.parametrize(
    "listed, there, found",
    [
        ("a.wav", ["a.wav"], "a.wav"),
        ("./sub/a.wav", ["sub/a.wav"], "./sub/a.wav"),
        ("sub\\a.wav", ["sub/a.wav"], "sub/a.wav"),
        (" sub/a.wav ", ["sub/a.wav"], "sub/a.wav"),
        ("Sub/A.WAV", ["sub/a.wav"], "sub/a.wav"),
        ("a", ["a.wav"], "a.wav"),
        ("data/sub/a.wav", ["sub/a.wav"], "sub/a.wav"),
        ("sub/a.wav", ["more/sub/a.wav"], "more/sub/a.wav"),
        ("test/a.wav", ["train/a.wav"], "test/a.wav"),
        ("a.wav", ["x/a.wav", "y/a.wav"], "a.wav"),
        ("/abs/a.wav", ["abs/a.wav"], "/abs/a.wav"),
        ("../a.wav", ["a.wav"], "../a.wav"),
        ("a.wav", ["a.mp3"], "a.wav"),
    ],
)
def test_a_file_is_found_if_one_alone_can_be_meant(tmp_path, listed, there, found):
    write(tmp_path, dict.fromkeys(there, ""))
    assert located(tmp_path, [listed])[0] == [found]


def test_no_file_is_taken_for_two_that_a_table_lists(tmp_path):
    write(tmp_path, {"a.wav": "", "b.wav": ""})
    assert located(tmp_path, ["train/a.wav", "test/a.wav", "x/b.wav"])[0] == ["train/a.wav", "test/a.wav", "b.wav"]


def test_metadata_in_the_folders_of_splits_is_read_together(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / split, {"metadata.csv": f"file_name,label\n./1.wav,{split} dog\n", "1.wav": ""})
    assert described(open_dataset(tmp_path)) == [
        ("train/1", "train/1.wav", ["train dog"], 0, "train"),
        ("validation/1", "validation/1.wav", ["validation dog"], 0, "valid"),
    ]


def test_several_tables_that_do_not_go_together_are_named(tmp_path):
    """fatchord/WaveRNN 218."""
    write(tmp_path, {"one.csv": "audio,label\na.wav,dog\n", "two.csv": "audio,label\na.wav,cat\n", "a.wav": ""})
    with pytest.raises(UsageError, match=r"several tables of its audio \(one.csv, two.csv\); give the one"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path / "two.csv").class_names == ("cat",)
    notes = open_dataset(tmp_path, format="folder").notes
    assert [note for note in notes if "--format folder was given" in note and note.startswith(("one", "two"))] == [
        "one.csv was not read: --format folder was given", "two.csv was not read: --format folder was given"
    ]  # fmt: skip


def test_a_table_that_says_what_the_folders_say_changes_nothing(tmp_path):
    write(tmp_path, {"dog/2.wav": "", "cat/1.wav": ""})
    before = described(open_dataset(tmp_path))
    write(tmp_path, {"all.csv": "file,label\ndog/2.wav,dog\ncat/1.wav,cat\n"})
    dataset = open_dataset(tmp_path)
    assert described(dataset) == before and "its labels are the names of the folders" in dataset.notes[-1]
    write(tmp_path, {"all.csv": "file,label,fold\ndog/2.wav,dog,2\ncat/1.wav,cat,1\n"})
    again = described(open_dataset(tmp_path))
    assert [clip[:3] for clip in again] == [clip[:3] for clip in before] and [clip[3] for clip in again] == [1, 2]


def test_a_table_that_lists_the_audio_and_cannot_be_read_is_named_instead_of_taking_one_folder_for_a_class(tmp_path):
    write(tmp_path, {"list.csv": "clips/one_two_three.wav,dog\n", "clips/one_two_three.wav": ""})
    with pytest.raises(UsageError, match="list.csv lists the audio of .* was not read: it has no column of audio"):
        open_dataset(tmp_path)
    dataset = open_dataset(tmp_path, format="folder")
    assert dataset.class_names == () and "has no labels" in dataset.notes[-1]


@pytest.mark.parametrize(
    "paths, classes, folds, splits",
    [
        (["dog/1.wav", "cat/2.wav"], ["cat", "dog"], [0], [""]),
        (["audio/1.wav"], [], [0], [""]),
        (["train/1.wav", "test/2.wav"], [], [0], ["test", "train"]),
        (["data/dog/1.wav", "data/cat/2.wav"], ["cat", "dog"], [0], [""]),
        (["x/dog/1.wav", "x/cat/2.wav"], ["cat", "dog"], [0], [""]),
        (["fold_0/dog/1.wav", "fold_1/cat/2.wav"], ["cat", "dog"], [1, 2], [""]),
        (["Fold 1/dog/1.wav", "Fold 2/cat/2.wav"], ["cat", "dog"], [1, 2], [""]),
        (["dog/fold1/1.wav", "cat/fold2/2.wav"], ["cat", "dog"], [1, 2], [""]),
        (["dog/train/1.wav", "cat/test/2.wav"], ["cat", "dog"], [0], ["test", "train"]),
        (["x/Train/fold1/audio/dog/1.wav", "x/Test/fold2/audio/cat/2.wav"], ["cat", "dog"], [1, 2], ["test", "train"]),
        (["0/1.wav", "1/2.wav"], ["0", "1"], [0], [""]),
        (["dog/1.wav"], ["dog"], [0], [""]),
        (["train/dog/1.wav", "extra/dog/2.wav"], ["extra/dog", "train/dog"], [0], [""]),
    ],
)
def test_folders_are_classes_folds_splits_or_nothing(tmp_path, paths, classes, folds, splits):
    dataset = open_dataset(write(tmp_path, dict.fromkeys(paths, "")))
    assert list(dataset.class_names) == classes
    assert sorted({clip.fold for clip in dataset.clips}) == folds
    assert sorted({clip.split for clip in dataset.clips}) == splits
    if any("train/" in name for name in classes):
        assert any("look like splits, folds or containers: train/dog" in note for note in dataset.notes)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("clip,label\na.wav,dog\n", "no column of audio files: its columns are clip, label; one of them must be"),
        ("audio,dog,cat\na.wav,1,0\nb.wav,0,1\n", "its columns dog, cat hold 0 and 1 only. Write the names"),
        ("audio,dog,cat\na.wav,True,False\nb.wav,False,True\n", "its columns dog, cat hold 0 and 1 only"),
        ("audio,audio,label\na.wav,b.wav,dog\n", "names the column 'audio' twice"),
    ],
)  # fmt: skip
def test_a_table_without_what_is_wanted_is_refused_with_its_columns(tmp_path, text, reason):
    (tmp_path / "clips.csv").write_text(text)
    with pytest.raises(UsageError, match=reason):
        open_dataset(tmp_path / "clips.csv")


def test_lists_as_pandas_writes_them_are_lists(tmp_path):
    (tmp_path / "clips.csv").write_text("audio,labels\na.wav,\"['dog', 'rain, heavy']\"\nb.wav,[]\nc.wav,[x\n")
    labels = [clip[2] for clip in described(open_dataset(tmp_path / "clips.csv"))]
    assert labels == [["dog", "rain, heavy"], [], ["[x"]]


def test_audiofolders_metadata_beside_its_files_is_read(tmp_path):
    """huggingface/datasets 5046."""
    write(tmp_path, {"metadata.csv": "file_name,duration,label\n./a_1.wav,10.7,hello\n", "a_1.wav": ""})
    assert described(open_dataset(tmp_path)) == [("a_1", "./a_1.wav", ["hello"], 0, "")]


def test_tables_with_windows_paths_are_read(tmp_path):
    """marmoi/dcase2023_task4b_baseline 4, ksasso1028/audio-reverb-removal 2."""
    write(tmp_path, {"cafe/a.wav": "", "cv/10084/mix.wav": ""})
    write(tmp_path, {"split.csv": "filename,label\ncafe\\a.wav,cafe\nD:\\dnr\\cv\\10084\\mix.wav,mix\n"})
    dataset = open_dataset(tmp_path / "split.csv")
    assert [clip.path for clip in dataset.clips] == ["cafe/a.wav", "cv/10084/mix.wav"]


def test_folders_of_folds_without_their_table_are_no_classes(tmp_path):
    """yeyupiaoling/AudioClassification-PaddlePaddle 6, aqibsaeed/Urban-Sound-Classification 26."""
    write(tmp_path, {f"fold{fold}/{fold}-1-0-0.wav": "" for fold in range(1, 11)})
    dataset = open_dataset(tmp_path)
    assert dataset.class_names == () and [clip.fold for clip in dataset.clips] == [1, 10, 2, 3, 4, 5, 6, 7, 8, 9]
    assert any("has no labels" in note for note in dataset.notes)


def test_the_table_of_dcases_acoustic_scenes_is_read(tmp_path):
    """CPJKU/cpjku_dcase22 3."""
    write(tmp_path, {"audio/airport-lyon-1-0-a.wav": "", "audio/tram-lyon-2-0-a.wav": ""})
    head = "filename\tscene_label\tidentifier\tsource_label\n"
    rows = "audio/airport-lyon-1-0-a.wav\tairport\tlyon-1\ta\naudio/tram-lyon-2-0-a.wav\ttram\tlyon-2\ta\n"
    write(tmp_path, {"meta.csv": head + rows})
    dataset = open_dataset(tmp_path)
    assert dataset.class_names == ("airport", "tram") and len(dataset) == 2
    assert "labels from column 'scene_label'" in " ".join(dataset.notes)


@pytest.mark.parametrize("separator", [",", "|"])
def test_a_table_without_a_header_is_refused_with_what_it_begins_with(tmp_path, separator):
    """NervanaSystems/deepspeech 34, voice-cloning-app/Voice-Cloning-App 16."""
    (tmp_path / "manifest.csv").write_text(f"wavs/1.wav{separator}good morning\nwavs/2.wav{separator}it means\n")
    for read in (open_dataset, read_speech):
        with pytest.raises(UsageError, match="no column of audio.* its columns are wavs/1.wav"):
            read(tmp_path / "manifest.csv")


def test_speechbrains_table_is_read(tmp_path):
    """speechbrain/speechbrain 854."""
    text = "ID, duration, wav, wav_format, wav_opts\n1, 60.0, noise/long_0.wav, wav,\n2, 60.0, noise/long_1.wav, wav,\n"
    (tmp_path / "noise.csv").write_text(text)
    dataset = open_dataset(tmp_path / "noise.csv")
    assert [(clip.id, clip.path) for clip in dataset.clips] == [("1", "noise/long_0.wav"), ("2", "noise/long_1.wav")]
    assert any("has none of the label columns" in note for note in dataset.notes)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_folds_count_from_1_wherever_they_began(tmp_path, start):
    rows = "".join(f"{row}.wav,dog,{row % 4 + start}\n" for row in range(8))
    (tmp_path / "clips.csv").write_text("audio,label,fold\n" + rows)
    dataset = open_dataset(tmp_path / "clips.csv")
    assert [clip.fold for clip in dataset.clips] == [row % 4 + max(start, 1) for row in range(8)]


def test_an_unreadable_file_does_not_stop_windows_and_ids_stay_unique(tmp_path, random_backbone):
    write_wav(tmp_path / "s" / "a.wav", noise(0, 2.0))
    for name in ("a_0.wav", "a_1.wav"):
        (tmp_path / "s" / name).write_text("no audio")
    dataset = windowed(open_dataset(tmp_path / "s"), 1.0)
    ids = [clip.id for clip in dataset.clips]
    assert ids == ["a_0", "a_1", "a_0~2", "a_1~2"] and len(set(ids)) == len(ids)
    report = extract(tmp_path / "s", tmp_path / "a.zarr", model=random_backbone, window=1.0)
    assert (report.written, report.failed) == (2, 2)
    assert FeatureCache.open(tmp_path / "a.zarr").ids.tolist() == ids


def test_parquet_files_of_the_hub_are_read(tmp_path, monkeypatch):
    library = pytest.importorskip("datasets")
    if not hasattr(library, "load_from_disk"):
        pytest.skip("a folder named datasets hides the library")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for row in range(3):
        write_wav(tmp_path / f"{row}.wav", noise(row, 0.5))
    columns = {
        "filename": ["0", "1", "2"], "fold": [0, 1, 2], "target": [0, 1, 0], "category": ["dog", "cat", "dog"],
        "audio": [{"bytes": (tmp_path / f"{row}.wav").read_bytes(), "path": None} for row in range(3)],
    }  # fmt: skip
    table = library.Dataset.from_dict(columns).cast_column("audio", library.Audio())
    (tmp_path / "hub" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001-abc.parquet")
    dataset = open_dataset(tmp_path / "hub")
    assert [clip[2:] for clip in described(dataset)] == [
        (["dog"], 1, "test"),
        (["cat"], 2, "test"),
        (["dog"], 3, "test"),
    ]
    assert dataset.waveform(1, 8000)[1] == 8000 and any("folds 0 to 2" in note for note in dataset.notes)
    one = open_dataset(tmp_path / "hub" / "data" / "test-00000-of-00001-abc.parquet")
    assert described(one) == described(dataset) and one.waveform(1, 8000)[1] == 8000
    (tmp_path / "converted" / "default" / "train").mkdir(parents=True)  # as the hub converts what others uploaded
    table.to_parquet(tmp_path / "converted" / "default" / "train" / "0000.parquet")
    for path in (tmp_path / "converted", tmp_path / "converted" / "default"):
        found = open_dataset(path)
        assert found.name in ("converted", "default") and [clip.split for clip in found.clips] == ["train"] * 3
    (tmp_path / "converted" / "small" / "train").mkdir(parents=True)
    table.to_parquet(tmp_path / "converted" / "small" / "train" / "0000.parquet")
    with pytest.raises(UsageError, match="holds several datasets: default, small; give one of these folders"):
        open_dataset(tmp_path / "converted")


def test_the_order_and_ids_of_what_was_read_before_are_as_they_were(esc10):
    with open(esc10 / "meta" / "esc50.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    dataset = open_dataset(esc10)
    assert [clip.id for clip in dataset.clips] == [Path(row["filename"]).stem for row in rows]
    assert [clip.path for clip in dataset.clips] == [f"audio/{row['filename']}" for row in rows]
    assert [clip.fold for clip in dataset.clips] == [int(row["fold"]) for row in rows] and dataset.notes == ()
    assert np.array_equal(dataset.table().labels.sum(axis=1), np.ones(400))
