"""Published layouts and one's own manifests: the right clips, labels, folds and splits; each fault in its place."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest

from conftest import noise, write_wav
from whisper_at_cli.extract import FeatureCache, extract
from whisper_at_cli.extract.audio.decode import decode
from whisper_at_cli.extract.datasets import FORMATS, open_dataset, windowed
from whisper_at_cli.extract.errors import AudioError, UsageError

CLASSES = 'index,mid,display_name\n0,/m/a,"Dog, small"\n1,/m/b,Cat\n2,/m/c,Rain\n'


def write(root, files: dict[str, str]):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def described(dataset) -> list[tuple]:
    return [
        (clip.id, clip.path, [dataset.class_names[label] for label in clip.labels], clip.fold, clip.split)
        for clip in dataset.clips
    ]


def test_fsd50k_has_its_vocabulary_and_splits(tmp_path):
    truth = "FSD50K.ground_truth"
    write(tmp_path, {
        f"{truth}/vocabulary.csv": "0,Accordion,/m/a\n1,Bark,/m/b\n2,Dog,/m/c\n",
        f"{truth}/dev.csv": 'fname,labels,mids,split\n64760,"Dog,Bark","/m/c,/m/b",train\n16399,Accordion,/m/a,val\n',
        f"{truth}/eval.csv": "fname,labels,mids\n37199,Dog,/m/c\n",
    })  # fmt: skip
    dataset = open_dataset(tmp_path)
    assert (dataset.name, dataset.class_names) == ("fsd50k", ("Accordion", "Bark", "Dog"))
    assert described(dataset) == [
        ("64760", "FSD50K.dev_audio/64760.wav", ["Bark", "Dog"], 0, "train"),
        ("16399", "FSD50K.dev_audio/16399.wav", ["Accordion"], 0, "valid"),
        ("37199", "FSD50K.eval_audio/37199.wav", ["Dog"], 0, "eval"),
    ]
    write(tmp_path, {f"{truth}/eval.csv": "fname,labels,mids\n37199,Wolf,/m/c\n"})
    with pytest.raises(UsageError, match="line 2 of .*eval.csv: label 'Wolf'"):
        open_dataset(tmp_path)


def test_urbansound8k_has_its_ten_folds(tmp_path):
    head = "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
    rows = "100032-3-0-0.wav,100032,0.0,0.317551,1,5,3,dog_bark\n100263-2-0-117.wav,100263,58.5,62.5,1,10,2,children\n"
    dataset = open_dataset(write(tmp_path, {"metadata/UrbanSound8K.csv": head + rows}))
    assert (dataset.name, dataset.clip_seconds) == ("urbansound8k", 4.0)
    assert described(dataset) == [
        ("100032-3-0-0", "audio/fold5/100032-3-0-0.wav", ["dog_bark"], 5, ""),
        ("100263-2-0-117", "audio/fold10/100263-2-0-117.wav", ["children"], 10, ""),
    ]
    assert dataset.clips[1].start is None, "start and end are those of the recording that it was cut from"


def test_speech_commands_splits_by_its_lists(tmp_path):
    for file in ("yes/a_nohash_0.wav", "no/a_nohash_0.wav", "no/b_nohash_1.wav", "_background_noise_/tap.wav"):
        write(tmp_path, {file: ""})
    write(
        tmp_path,
        {"validation_list.txt": "no/b_nohash_1.wav\n", "testing_list.txt": "no/gone.wav\nyes/a_nohash_0.wav\n"},
    )
    dataset = open_dataset(tmp_path)
    assert (dataset.name, dataset.clip_seconds, dataset.class_names) == ("speech-commands", 1.0, ("no", "yes"))
    assert described(dataset) == [
        ("no/a_nohash_0", "no/a_nohash_0.wav", ["no"], 0, "train"),
        ("no/b_nohash_1", "no/b_nohash_1.wav", ["no"], 0, "valid"),
        ("no/gone", "no/gone.wav", ["no"], 0, "test"),
        ("yes/a_nohash_0", "yes/a_nohash_0.wav", ["yes"], 0, "test"),
    ]
    assert "1 files of _background_noise_/ were left out" in dataset.notes[0]


def test_a_csv_manifest_gives_paths_labels_folds_and_parts(tmp_path):
    text = (
        "audio,start,end,labels,fold,split,text,more\n"
        "a/one.wav,,,dog;cat,2,train,hello,x\n/abs/long.flac,0,10,rain,1,test,,\n/abs/long.flac,10,12.5,,1,test,,\n"
    )
    dataset = open_dataset(write(tmp_path, {"m.csv": text}) / "m.csv")
    assert (dataset.name, dataset.root, dataset.class_names) == ("m", tmp_path, ("cat", "dog", "rain"))
    assert described(dataset) == [
        ("one", "a/one.wav", ["cat", "dog"], 2, "train"),
        ("long_0", "/abs/long.flac", ["rain"], 1, "test"),
        ("long_10", "/abs/long.flac", [], 1, "test"),
    ]
    assert [(clip.start, clip.end) for clip in dataset.clips] == [(None, None), (0, 10), (10, 12.5)]
    assert dataset.texts == ("hello", "", "") and str(dataset.audio_path(dataset.clips[1])) == "/abs/long.flac"


def test_a_jsonl_manifest_takes_lists_of_labels_and_ids(tmp_path):
    lines = [
        {"audio": "a.wav", "labels": ["dog", "cat"], "id": "first", "start": 1.5},
        {"audio": "b.wav", "label": 7, "id": 2},
    ]  # fmt: skip
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    for path in (tmp_path, tmp_path / "manifest.jsonl"):
        dataset = open_dataset(path)
        assert described(dataset) == [("first", "a.wav", ["cat", "dog"], 0, ""), ("2", "b.wav", ["7"], 0, "")]
        assert dataset.clips[0].start == 1.5


def test_a_list_of_classes_gives_their_order_and_refuses_others(tmp_path):
    write(
        tmp_path,
        {"m.csv": "audio,label\na.wav,Rain\nb.wav,/m/a\n", "classes.csv": CLASSES, "names.txt": "Rain\n/m/a\n"},
    )
    dataset = open_dataset(tmp_path / "m.csv", labels=tmp_path / "classes.csv")
    assert dataset.class_names == ("Dog, small", "Cat", "Rain") and [clip.labels for clip in dataset.clips] == [
        (2,),
        (0,),
    ]
    assert open_dataset(tmp_path / "m.csv", labels=tmp_path / "names.txt").class_names == ("Rain", "/m/a")
    write(tmp_path, {"m.csv": "audio,label\na.wav,Wolf\n"})
    with pytest.raises(UsageError, match="line 2 of .*m.csv: label 'Wolf' is none of the 3 classes of .*classes.csv"):
        open_dataset(tmp_path / "m.csv", labels=tmp_path / "classes.csv")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("audio,start\n,1\n", "line 2 .*names no audio"),
        ("audio,start\na.wav,soon\n", "line 2 .*start is 'soon'"),
        ("audio,start\na.wav,-1\n", "line 2 .*start is '-1'"),
        ("audio,start,end\na.wav,5,5\n", "line 2 .*end is 5 and start 5"),
        ("audio,end\na.wav,0\n", "line 2 .*end is 0"),
        ("audio\na.wav\nb.wav\na.wav\n", "line 4 .*clip 'a.*' was already named by line 2"),
        ("audio,id\na.wav,x\nb.wav,x\n", "line 3 .*clip 'x' was already named by line 2"),
        ("audio,id\na.wav,x\nb.wav,\n", "line 3 .*has no id"),
        ("audio,fold\na.wav,first\n", "line 2 .*fold is 'first'"),
        ("audio,fold\na.wav,99999\n", "line 2 .*fold"),
        ("audio,label,labels\na.wav,a,b\n", "line 2 .*both label and labels"),
        ("audio,label\na.wav,b,c\n", "line 2 .*more fields"),
        ("audio\na\0.wav\n", "line 2 holds the control character"),
        ("audio,split\na.wav," + "x" * 65 + "\n", "line 2 .*split"),
        ("audio\n", "lists no clips"),
        ("audio\n" + "a" * 200_000, "field larger than field limit"),
        ("audio\n" + "a" * 2_000_000, "a line is longer than a megabyte"),
    ],
)
def test_a_bad_row_of_a_csv_is_refused_with_its_line(tmp_path, text, reason):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(UsageError, match=reason):
        open_dataset(tmp_path / "m.csv", format="manifest")


@pytest.mark.parametrize(
    "line, reason",
    [
        ("[1, 2]", "line 2 .*not a JSON object"),
        ("{", "line 2 .*not JSON"),
        ("[" * 100_000, "line 2 .*not JSON"),
        ('{"audio": 5.5e, }', "line 2 .*not JSON"),
        ('{"audio": ["a.wav"]}', "line 2 .*audio is"),
        ('{"audio": "\\ud800.wav"}', "line 2 .*not text"),
        ('{"audio": "b.wav", "start": true}', "line 2 .*start is True"),
        ('{"audio": "b.wav", "end": 1e999}', "line 2 .*end is inf"),
        ('{"audio": "b.wav", "end": {}}', "line 2 .*end is {}"),
        ('{"audio": "b.wav", "labels": [[]]}', "line 2 .*a label is \\[\\]"),
        ('{"audio": "b.wav", "labels": {"a": 1}}', "line 2 .*a label"),
        ('{"audio": "b.wav", "fold": -1}', "line 2 .*fold is -1"),
        ('{"audio": "b.wav", "fold": ' + "9" * 5000 + "}", "line 2 .*(fold|JSON)"),
        ('{"wav": "b.wav"}', "line 2 .*names no audio"),
    ],
)
def test_a_bad_line_of_jsonl_is_refused_with_its_place(tmp_path, line, reason):
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav"}\n' + line + "\n")
    with pytest.raises(UsageError, match=reason):
        open_dataset(tmp_path / "m.jsonl")


def test_free_text_as_labels_is_noticed(tmp_path):
    (tmp_path / "m.csv").write_text("audio,label\n" + "".join(f"{n}.wav,said {n}\n" for n in range(20_001)))
    with pytest.raises(UsageError, match="20001 different labels"):
        open_dataset(tmp_path / "m.csv")


def test_asts_data_files_use_the_class_list_beside_or_above_them(tmp_path):
    data = {"data": [{"wav": "/x/a.flac", "labels": "/m/c,/m/a"}, {"wav": "b.flac", "labels": "/m/b"}]}
    write(tmp_path, {"datafiles/train.json": json.dumps(data), "as_class_labels_indices.csv": CLASSES})
    dataset = open_dataset(tmp_path / "datafiles" / "train.json")
    assert described(dataset) == [
        ("a", "/x/a.flac", ["Dog, small", "Rain"], 0, ""), ("b", "b.flac", ["Cat"], 0, "")
    ]  # fmt: skip
    (tmp_path / "as_class_labels_indices.csv").rename(tmp_path / "list.txt")
    with pytest.raises(UsageError, match="no class_labels_indices.csv lies beside"):
        open_dataset(tmp_path / "datafiles" / "train.json")
    assert len(open_dataset(tmp_path / "datafiles" / "train.json", labels=tmp_path / "list.txt").clips) == 2


@pytest.mark.parametrize(
    "text", ['{"data": 5}', '{"data": [5]}', '{"data": [{"wav": 5}]}', '{"data": [{"wav": "a", "labels": 5}]}',
             '{"data"',
             '["data"]', '{"data": []}', '{"data": [{"wav": ""}]}', '{"data": ' + "[" * 100_000],
)  # fmt: skip
def test_a_broken_data_file_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "class_labels_indices.csv").write_text(CLASSES)
    with pytest.raises(UsageError):
        open_dataset(tmp_path / "a.json")


@pytest.mark.parametrize("name", FORMATS)
def test_random_bytes_under_any_format_are_a_usage_error(tmp_path, name):
    rng = np.random.default_rng(0)
    files = ["meta/esc50.csv", "metadata/UrbanSound8K.csv", "FSD50K.ground_truth/dev.csv", "eval_segments.csv",
             "x.json",
             "class_labels_indices.csv", "manifest.csv", "x.jsonl", "x.h5", "dataset_dict.json", "state.json",
             "dataset_info.json", "validation_list.txt", "testing_list.txt"]  # fmt: skip
    for round_ in range(3):
        for file in files:
            head = [b"", b"audio,label\n", b"\x89HDF\r\n\x1a\n"][round_]
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_bytes(head + rng.bytes(3000))
        for path in (tmp_path, *(tmp_path / file for file in files)):
            with pytest.raises(UsageError) as error:
                open_dataset(path, format=name)
            assert str(error.value).isprintable() or "\\x" in repr(str(error.value))


def test_what_is_no_dataset_is_told_which_layouts_there_are(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing of interest")
    with pytest.raises(
        UsageError, match="not a dataset in a known layout.*audioset: .*esc50: .*hdf5: .*manifest: .*folder"
    ):
        open_dataset(tmp_path / "notes.txt")


def test_names_that_are_not_text_are_stored_and_read(tmp_path, random_backbone):
    import os

    odd = os.fsdecode(b"sound \xff.wav")
    write_wav(tmp_path / "sounds" / "a" / odd, noise(0, 0.5))
    report = extract(tmp_path / "sounds", tmp_path / "a.zarr", model=random_backbone, clip_seconds=0.5)
    assert report.written == 1 and FeatureCache.open(tmp_path / "a.zarr").ids.tolist() == ["sound \\udcff"]


def test_folders_that_are_links_are_followed_once(tmp_path):
    write(tmp_path / "elsewhere", {"dog/1.wav": "", "cat/2.wav": ""})
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (tmp_path / "elsewhere" / "dog" / "again").symlink_to(tmp_path / "sounds")
    assert [clip.path for clip in open_dataset(tmp_path / "sounds").clips] == ["dog/1.wav"]


def make_pack(path, *, rate=32000, said=True, seconds=1.0, clips=6, dtype=np.int16, **changes):
    tone = np.sin(2 * np.pi * 440 * np.arange(round(rate * seconds)) / rate)
    values = np.stack([tone * (row + 1) / 10 for row in range(clips)])
    columns = {
        "audio_name": np.array([f"Y{row:011d}.wav".encode() for row in range(clips)]),
        "waveform": (values * 32767).astype(dtype) if dtype == np.int16 else values.astype(dtype),
        "target": np.eye(3)[np.arange(clips) % 3].astype(bool),
    } | changes  # fmt: skip
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            if values is not None:
                file.create_dataset(name, data=values)
        if said:
            file.attrs["sample_rate"] = rate
    return path


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_a_pack_of_waveforms_is_read_as_its_files_would_be(tmp_path, dtype):
    (tmp_path / "class_labels_indices.csv").write_text(CLASSES)
    dataset = open_dataset(make_pack(tmp_path / "pack.h5", dtype=dtype))
    assert (dataset.name, dataset.class_names, len(dataset)) == ("pack", ("Dog, small", "Cat", "Rain"), 6)
    assert [clip.labels for clip in dataset.clips] == [(0,), (1,), (2,)] * 2 and dataset.clips[4].id == "Y00000000004"
    with h5py.File(tmp_path / "pack.h5") as file:
        values = file["waveform"][4]
    wav = write_wav(tmp_path / "a.wav", values if dtype == np.float32 else values / 32767, 32000)
    clip, real = dataset.waveform(4, 8000)
    assert real == 8000
    np.testing.assert_allclose(clip, decode(wav)[:8000], atol=(1.01 if dtype == np.int16 else 2.01) / 32768)
    clip, real = dataset.waveform(4, 24000)
    assert real == 16000 and not clip[16000:].any()
    with ThreadPoolExecutor(8) as pool:
        many = list(pool.map(lambda row: dataset.waveform(row % 6, 8000)[0], range(48)))
    for row, found in enumerate(many):
        assert abs(found.max() - (row % 6 + 1) / 10) < 0.01
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(dataset)).waveform(4, 24000)[0], clip)


def test_a_pack_goes_into_a_cache(tmp_path, random_backbone):
    pack = make_pack(tmp_path / "pack.h5", said=False, fold=np.arange(6) % 2 + 1)
    report = extract(pack, tmp_path / "a.zarr", model=random_backbone, clip_seconds=0.5)
    assert report.written == 6 and "32000 Hz was assumed" in report.notes[0] and "named by number" in report.notes[1]
    cache = FeatureCache.open(tmp_path / "a.zarr")
    assert cache.fold.tolist() == [1, 2] * 3 and cache.spec.class_names == ("class 0", "class 1", "class 2")


def test_values_of_a_pack_that_are_not_finite_fail_their_clip(tmp_path):
    values = np.full((6, 32000), 0.1, dtype=np.float32)
    values[2, 100] = np.inf
    dataset = open_dataset(make_pack(tmp_path / "pack.h5", waveform=values))
    assert dataset.waveform(1, 8000)[1] == 8000
    with pytest.raises(AudioError, match="not finite"):
        dataset.waveform(2, 8000)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"waveform": None}, "has no 'waveform'"),
        ({"waveform": np.zeros((5, 100), np.int16)}, "waveform is \\(5, 100\\)"),
        ({"waveform": np.zeros(6, np.int16)}, "waveform is \\(6,\\)"),
        ({"waveform": np.zeros((6, 100), np.int64)}, "must be int16"),
        ({"target": np.zeros((5, 3))}, "target is"),
        ({"audio_name": np.arange(6)}, "which is no name"),
        ({"audio_name": np.array([b"a.wav"] * 6)}, "the same name twice"),
        ({"fold": np.zeros((6, 2))}, "fold is"),
        ({"target": np.zeros((6, 4))}, "has 4 classes in target, .* names 3"),
    ],
)
def test_a_broken_pack_is_refused(tmp_path, changes, reason):
    (tmp_path / "class_labels_indices.csv").write_text(CLASSES)
    with pytest.raises(UsageError, match=reason):
        open_dataset(make_pack(tmp_path / "pack.h5", **changes))


def test_a_dataset_saved_by_hugging_face_is_read(tmp_path, random_backbone):
    datasets = pytest.importorskip("datasets")
    if not hasattr(datasets, "load_from_disk"):
        pytest.skip("a folder named datasets hides the library")
    paths = [str(write_wav(tmp_path / f"{row}.wav", noise(row, 1.0, 22050), 22050)) for row in range(4)]
    audio = [{"bytes": (tmp_path / "0.wav").read_bytes(), "path": None}, {"bytes": None, "path": paths[1]},
             None]  # fmt: skip
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}  # what an Audio column is on disk
    columns = {"audio": stored, "label": datasets.ClassLabel(names=["dog", "cat"]), "fold": datasets.Value("int32")}

    def table(values, features):
        made = datasets.Dataset.from_dict(values, features=datasets.Features(features))
        return made.cast_column(next(iter(values)), datasets.Audio())

    train = table({"audio": audio, "label": [1, 0, 1], "fold": [1, 2, 3]}, columns)
    test = table({"audio": audio[:1], "label": [0], "fold": [1]}, columns)
    datasets.DatasetDict({"train": train, "validation": test}).save_to_disk(str(tmp_path / "disk"))
    dataset = open_dataset(tmp_path / "disk")
    assert described(dataset) == [
        ("train/0", "train/0", ["cat"], 1, "train"), ("train/1", "train/1", ["dog"], 2, "train"),
        ("train/2", "train/2", ["cat"], 3, "train"), ("valid/0", "validation/0", ["dog"], 1, "valid"),
    ]  # fmt: skip
    for row, file in ((0, "0.wav"), (1, "1.wav"), (3, "0.wav")):
        np.testing.assert_array_equal(dataset.waveform(row, 8000)[0], decode(tmp_path / file)[:8000])
    assert [dataset.is_there(row) for row in range(4)] == [True, True, False, True]
    report = extract(dataset, tmp_path / "a.zarr", model=random_backbone, clip_seconds=0.5)
    assert (report.written, report.missing, report.failures[0].id) == (3, 1, "train/2")
    several = {"sound": stored, "labels": datasets.Sequence(datasets.ClassLabel(names=["dog", "cat"]))}
    several = table({"sound": audio[:2], "labels": [[0, 1], []]}, several)
    several.save_to_disk(str(tmp_path / "several"))
    assert [clip.labels for clip in open_dataset(tmp_path / "several").clips] == [(0, 1), ()]


def long_file(path, seconds, rate=16000):
    return write_wav(path, noise(0, seconds, rate), rate)


def test_files_are_cut_into_windows_and_the_last_is_as_long_as_what_is_left(tmp_path, random_backbone):
    long_file(tmp_path / "s" / "dog" / "long.wav", 2.7)
    long_file(tmp_path / "s" / "cat" / "exact.wav", 2.0, 44100)
    long_file(tmp_path / "s" / "cat" / "short.wav", 0.2)
    (tmp_path / "s" / "cat" / "bad.wav").write_text("no")
    dataset = windowed(open_dataset(tmp_path / "s"), 1.0)
    assert [clip.id for clip in dataset.clips] == [
        "bad", "exact_0", "exact_1", "short_0", "long_0", "long_1", "long_2"
    ]  # fmt: skip
    overlapping = windowed(open_dataset(tmp_path / "s"), 1.0, 0.5)
    assert [clip.start for clip in overlapping.clips if clip.id.startswith("long")] == [0, 0.5, 1, 1.5, 2]
    assert [clip.start for clip in overlapping.clips if clip.id.startswith("exact")] == [0, 0.5, 1]
    report = extract(tmp_path / "s", tmp_path / "a.zarr", model=random_backbone, window=1.0)
    assert (report.written, report.failed) == (6, 1) and "cannot be decoded" in report.failures[0].error
    cache = FeatureCache.open(tmp_path / "a.zarr")
    assert cache.valid_frames.tolist() == [0, 25, 25, 5, 25, 25, 18] and cache.spec.clip_seconds == 1.0
    whole = decode(tmp_path / "s" / "dog" / "long.wav")
    clip, real = dataset.waveform(6, 16000)
    np.testing.assert_array_equal(clip[:real], whole[32000:])
    assert {cache.spec.class_names[row.argmax()] for row in cache.labels[4:]} == {"dog"}


def test_windows_stay_within_the_parts_that_a_manifest_names(tmp_path):
    long_file(tmp_path / "a.wav", 5.0)
    (tmp_path / "m.csv").write_text("audio,start,end\na.wav,0.5,2\na.wav,3,\n")
    dataset = windowed(open_dataset(tmp_path / "m.csv"), 1.0)
    assert [(clip.start, clip.end) for clip in dataset.clips] == [(0.5, 1.5), (1.5, 2), (3, None), (4, None)]
    assert [dataset.waveform(row, 16000)[1] for row in range(4)] == [16000, 8000, 16000, 16000]


@pytest.mark.parametrize(
    "window, hop", [(0, None), (-1, None), (1, 0), (1, float("nan")), (float("inf"), None), (1, 1e-9)]
)
def test_windows_of_no_length_are_refused(tmp_path, window, hop):
    long_file(tmp_path / "a" / "a.wav", 0.5)
    with pytest.raises(UsageError, match="must be at least 0.001 s"):
        windowed(open_dataset(tmp_path), window, hop)


def test_windows_that_cannot_be_are_refused_before_any_file_is_read(tmp_path, random_backbone):
    long_file(tmp_path / "s" / "a.wav", 0.5)
    for options, reason in (
        (dict(window=1.0, clip_seconds=2.0), "leave out --clip-seconds 2"), (dict(hop=1.0), "--window"),
        (dict(window=0.7), "multiple of 0.5 s"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=reason):
            extract(tmp_path / "s", tmp_path / "a.zarr", model=random_backbone, **options)
    with pytest.raises(UsageError, match="not a dataset of audio files"):
        windowed(open_dataset(make_pack(tmp_path / "p.h5")), 1.0)


def test_a_part_of_a_pack_reads_the_same_audio_as_the_whole(tmp_path):
    waveforms = np.random.default_rng(0).integers(-9000, 9000, (6, 16000), dtype=np.int16)
    with h5py.File(tmp_path / "pack.h5", "w") as pack:
        pack["audio_name"] = np.array([f"clip{i}.wav".encode() for i in range(6)])
        pack["waveform"] = waveforms
        pack.attrs["sample_rate"] = 16000
    whole = open_dataset(tmp_path / "pack.h5")
    part = pickle.loads(pickle.dumps(whole.part([5, 1, 2]))).part([2, 0])
    assert [clip.id for clip in part.clips] == ["clip2", "clip5"]
    for row, source in enumerate((2, 5)):
        np.testing.assert_array_equal(part.waveform(row, 16000)[0], whole.waveform(source, 16000)[0])
