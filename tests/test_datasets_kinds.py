"""Further kinds of what people have on disk: labels in one cell, tables of other forms, wrappers, parts of datasets."""

import json
import unicodedata

import pytest
from test_datasets_layouts import described, write
from test_datasets_packed import DEV, ESC, FSD_DEV, LISTS, PACKED, TRUTH, US8K, WORDS

from whisper_at_cli.extract.datasets import open_dataset
from whisper_at_cli.extract.errors import UsageError


def of_table(root, text, name="clips.csv"):
    write(root, {name: text, **dict.fromkeys(("a.wav", "b.wav", "c.wav"), "")})
    return open_dataset(root / name)


def labels(dataset) -> list[list[str]]:
    return [clip[2] for clip in described(dataset)]


def said(dataset, *words: str) -> bool:
    return any(all(word in note for word in words) for note in dataset.notes)


@pytest.mark.parametrize(
    "text, expected, note",
    [
        ('audio,labels\na.wav,"Dog,Animal"\nb.wav,Animal\n', [["Animal", "Dog"], ["Animal"]], "were split at ','"),
        ("audio,labels\na.wav,Dog|Animal\nb.wav,Animal\n", [["Animal", "Dog"], ["Animal"]], "were split at '|'"),
        ('audio,labels\na.wav,"Dog, small"\nb.wav,Cat\n', [["Dog, small"], ["Cat"]], "hold ','"),
        ('audio,labels\na.wav,"Dog, small;Cat"\nb.wav,Cat\n', [["Cat", "Dog, small"], ["Cat"]], None),
        ("audio,label\na.wav,Dog;Animal\nb.wav,Animal\n", [["Dog;Animal"], ["Animal"]], "hold ';'"),
        ('audio,label\na.wav,"Dog, small"\nb.wav,Cat\n', [["Dog, small"], ["Cat"]], None),
        ("audio,labels\na.wav,\"['Dog,small']\"\nb.wav,[]\n", [["Dog,small"], []], None),
        ("audio,labels\na.wav,dog;nan\nb.wav,nan\n", [["dog"], []], "the label nan"),
        ("audio,label\na.wav,Dog\nb.wav,dog\n", [["Dog"], ["dog"]], "differ only in capitals, spaces or hyphens"),
        ("audio,label\na.wav,\u00e9\nb.wav,e\u0301\n", [["\u00e9"], ["\u00e9"]], None),
    ],
)
def test_labels_in_one_cell_are_split_where_the_column_says_so_and_else_named(tmp_path, text, expected, note):
    dataset = of_table(tmp_path, text)
    assert labels(dataset) == expected
    kinds = ("were split", "read as one class", "differ only", "label nan")
    assert said(dataset, note) if note else not any(said(dataset, kind) for kind in kinds)


ROWS = [{"audio": "a.wav", "dog": 1, "cat": 0}, {"audio": "b.wav", "dog": 0, "cat": 1}]


@pytest.mark.parametrize(
    "name, text",
    [
        ("clips.csv", "audio,dog,cat\n" + "x.wav,1,0\n" * 500 + "y.wav,0,1\n" * 500),
        ("clips.csv", "audio,id,dog,cat,rain\na.wav,1,1.0,0.0,0.0\nb.wav,2,0.0,1.0,0.0\n"),
        ("clips.jsonl", "\n".join(map(json.dumps, ROWS))),
        (
            "clips.jsonl",
            "\n".join(json.dumps(row | {"dog": bool(row["dog"]), "cat": bool(row["cat"])}) for row in ROWS),
        ),
    ],
)
def test_columns_of_0_and_1_are_refused_by_name_wherever_the_1_stands(tmp_path, name, text):
    with pytest.raises(UsageError, match="its columns dog, cat hold 0 and 1 only"):
        of_table(tmp_path, text, name)


def test_parts_under_other_names_are_said_to_be_unused(tmp_path):
    """NeMo's manifests have offset and duration; others start_time or onset."""
    dataset = of_table(tmp_path, "audio,onset,end_time,label\na.wav,1,2,dog\nb.wav,3,4,cat\n")
    assert said(dataset, "the columns onset, end_time of clips.csv were not used", "call them start and end")
    dataset = of_table(tmp_path, '{"audio_filepath": "a.wav", "offset": 1.5, "duration": 2, "label": "dog"}', "m.json")
    assert said(dataset, "the columns offset of m.json were not used") and labels(dataset) == [["dog"]]


def test_urbansound8ks_table_under_another_name_cuts_nothing_out_of_its_slices(tmp_path):
    write(tmp_path, {"metadata/train.csv": US8K.replace(",0,1,", ",58.5,62.5,"), "audio/fold1/1-0-0-0.wav": ""})
    write(tmp_path, {"audio/fold10/2-1-0-0.wav": ""})
    dataset = open_dataset(tmp_path)
    assert [clip[2:4] for clip in described(dataset)] == [(["dog"], 1), (["rain"], 10)]
    assert all(clip.start is None for clip in dataset.clips) and said(dataset, "start and end of train.csv were not")


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_of_objects_in_json_is_a_table(tmp_path, indent):
    text = json.dumps([{"file": "a.wav", "label": "dog"}, {"file": "b.wav", "label": 3}], indent=indent)
    assert labels(of_table(tmp_path, text, "clips.json")) == [["dog"], ["3"]]
    write(tmp_path / "beside", {"labels.json": text, "audio/a.wav": "", "audio/b.wav": ""})
    assert labels(open_dataset(tmp_path / "beside")) == [["dog"], ["3"]]
    with pytest.raises(UsageError, match="entry 2 of .*clips.json names no audio"):
        of_table(tmp_path, '[{"file": "a.wav"}, {"file": ""}]', "clips.json")


def test_a_key_twice_is_refused_with_its_line(tmp_path):
    with pytest.raises(UsageError, match="line 1 of .*clips.jsonl names the key 'audio' twice"):
        of_table(tmp_path, '{"Audio": "a.wav", "audio": "b.wav", "label": "x"}\n', "clips.jsonl")


@pytest.mark.parametrize(
    "name, text, reason",
    [
        ("labels.txt", "a.wav dog\nb.wav cat\n", "no column of audio files"),
        ("labels.json", '{"a.wav": "dog",\n "b.wav": "cat"}', "it has no column of audio files"),
        ("labels.csv", "a.wav,dog\nb.wav,cat\n", "no column of audio files"),
    ],
)
def test_a_list_of_any_form_that_names_the_audio_is_not_passed_over(tmp_path, name, text, reason):
    for root in (tmp_path / "one", tmp_path / "two" / "deeper"):
        write(root, {name: text, "audio/a.wav": "", "audio/b.wav": ""})
    for root in (tmp_path / "one", tmp_path / "two"):
        with pytest.raises(UsageError, match=f"{name} lists the audio of .* and was not read: .*{reason}"):
            open_dataset(root)
    write(tmp_path / "three", {"train.txt": "dog/a.wav\n", "dog/a.wav": "", "cat/b.wav": ""})
    assert said(open_dataset(tmp_path / "three"), "train.txt was not read: it has no column of audio files")


def test_a_text_about_the_audio_is_no_table(tmp_path):
    text = "A small collection.\nFor example, audio/a.wav is a dog.\nAll of it is free to use.\n"
    dataset = open_dataset(write(tmp_path, {"README.txt": text, "audio/a.wav": "", "audio/b.wav": ""}))
    assert not said(dataset, "README")


def test_a_spreadsheet_is_named_as_one(tmp_path):
    write(tmp_path, {"labels.xlsx": "PK", "dog/a.wav": "", "cat/b.wav": ""})
    assert said(open_dataset(tmp_path), "labels.xlsx was not read: it is a spreadsheet; save it as CSV")
    with pytest.raises(UsageError, match="labels.xlsx is a spreadsheet; save it as CSV"):
        open_dataset(tmp_path / "labels.xlsx")


def table_of(*numbers):
    return "filename,label\n" + "".join(f"{number}.wav,{'ab'[number % 2]}\n" for number in numbers)


FIVE = dict.fromkeys((f"audio/{number}.wav" for number in range(1, 6)), "")


@pytest.mark.parametrize("names", [("train", "val", "test"), ("esc_train", "esc_val", "esc_test")])
def test_tables_of_splits_are_read_together_however_small_they_are(tmp_path, names):
    tables = zip(names, ((1, 2, 3), (4,), (5,)), strict=True)
    dataset = open_dataset(write(tmp_path, FIVE | {f"{name}.csv": table_of(*rows) for name, rows in tables}))
    assert [clip.split for clip in dataset.clips] == ["train"] * 3 + ["valid", "test"]
    assert len(labels(dataset)) == 5 and said(dataset, "3 tables were read, each as a split")


def test_a_table_of_a_split_alone_is_read_and_the_rest_is_named(tmp_path):
    dataset = open_dataset(
        write(tmp_path, FIVE | {"train.csv": table_of(1, 2), "sample_submission.csv": "id,p\n3,0\n"})
    )
    assert len(dataset) == 2 and said(dataset, "3 audio files are not listed in train.csv")
    dataset = open_dataset(write(tmp_path, FIVE | {"all.csv": table_of(1, 2, 3, 4, 5)}))
    assert len(dataset) == 5, "a table of all comes before those of parts"


@pytest.mark.parametrize("wrapper", ["data", "dataset-main", "archive/set"])
def test_audiofolder_below_wrappers_is_read(tmp_path, wrapper):
    table = "file_name,label\nx.wav,dog\ny.wav,cat\n"
    write(tmp_path / wrapper, {"metadata.csv": table, "x.wav": "", "y.wav": ""})
    for dataset in (open_dataset(tmp_path), open_dataset(tmp_path, format="manifest")):
        assert labels(dataset) == [["dog"], ["cat"]] and dataset.is_there(0)
    for split in ("train", "test"):
        write(tmp_path / "2" / wrapper / split, {"metadata.csv": table, "x.wav": "", "y.wav": ""})
    write(tmp_path / "2", {"README.md": "a data set"})
    assert [clip.split for clip in open_dataset(tmp_path / "2").clips] == ["test", "test", "train", "train"]


@pytest.mark.parametrize("name", PACKED)
def test_published_datasets_are_found_below_several_wrappers_and_what_lies_beside_is_named(tmp_path, name):
    write(tmp_path / "a" / "b" / "set", PACKED[name][0])
    write(tmp_path, {"README.txt": "hello"})
    dataset = open_dataset(tmp_path)
    assert dataset.name == name and all(dataset.is_there(row) for row in range(len(dataset)))
    assert not said(dataset, "were left out")
    write(tmp_path / "a" / "b", {"more/x.wav": "", "more/y.wav": ""})
    assert said(open_dataset(tmp_path), "found in a/b/set; 2 audio files beside it were left out: a/b/more/x.wav")


def test_the_test_folder_of_kaggles_speech_commands_is_not_lost_without_a_word(tmp_path):
    packed = {f"train/{path}": text for path, text in PACKED["speech-commands"][1].items()}
    dataset = open_dataset(write(tmp_path, packed | {"test/audio/clip_1.wav": "", "test/audio/clip_2.wav": ""}))
    assert len(dataset) == 3 and said(dataset, "the dataset was found in train; 2 audio files beside it were left out")


def test_speech_commands_without_its_lists_says_that_its_noise_became_a_class(tmp_path):
    dataset = open_dataset(write(tmp_path, dict.fromkeys(("yes/a.wav", "no/b.wav", "_background_noise_/x.wav"), "")))
    assert said(dataset, "look like splits, folds or containers: _background_noise_")
    write(tmp_path, {name: f"./{text}" for name, text in LISTS.items()})
    assert open_dataset(tmp_path).class_names == ("no", "yes")


@pytest.mark.parametrize("place", ["ESC50.csv", "metadata/esc50.csv", "meta/ESC-50.csv"])
@pytest.mark.parametrize("given", ["folder", "table"])
def test_esc50s_table_is_known_under_its_other_names(tmp_path, place, given):
    write(tmp_path, {place: ESC, "audio/1-1-A-0.wav": "", "audio/2-2-B-1.wav": ""})
    dataset = open_dataset(tmp_path / place if given == "table" else tmp_path)
    assert dataset.name == "esc50" and all(dataset.is_there(row) for row in range(2))


@pytest.mark.parametrize("place", ["urbansound8k.csv", "meta/UrbanSound8k.csv"])
def test_urbansound8ks_table_is_known_under_its_other_names(tmp_path, place):
    dataset = open_dataset(write(tmp_path, {place: US8K, "fold1/1-0-0-0.wav": "", "fold10/2-1-0-0.wav": ""}))
    assert dataset.name == "urbansound8k" and all(dataset.is_there(row) for row in range(2))


def test_one_table_of_fsd50k_is_read_as_fsd50k(tmp_path):
    write(tmp_path, {f"{TRUTH}/dev.csv": FSD_DEV, f"{TRUTH}/vocabulary.csv": WORDS})
    write(tmp_path, {f"{DEV}/1.wav": "", f"{DEV}/2.wav": "", f"{TRUTH}/eval.csv": "fname,labels,mids\n3,Dog,/m/b\n"})
    dataset = open_dataset(tmp_path / TRUTH / "dev.csv")
    assert (dataset.name, labels(dataset)) == ("fsd50k", [["Animal", "Dog"], ["Animal"]]) and dataset.is_there(1)


def test_classes_in_two_unicode_forms_are_one(tmp_path):
    decomposed = unicodedata.normalize("NFD", "\u00e9")
    dataset = open_dataset(
        write(tmp_path, {"train/\u00e9/a.wav": "", f"test/{decomposed}/b.wav": "", "train/x/c.wav": ""})
    )
    assert dataset.class_names == ("x", "\u00e9")
