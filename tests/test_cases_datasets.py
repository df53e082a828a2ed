"""What people truly have on disk (../shared/cases/datasets): right labels and folds, or a line that names the fault."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from whisper_at_cli.extract.cache.folds import cache_folds
from whisper_at_cli.extract.datasets import open_dataset
from whisper_at_cli.extract.datasets.look import looked_at
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.heads.endtoend import ListedClips

THREE = ("dog", "rain", "rooster")


@pytest.fixture(scope="module")
def case(shared):
    folder = shared / "cases" / "datasets"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder.joinpath


def test_every_case_has_a_test_here(case):
    here = Path(__file__).read_text()
    assert [path.name for path in case("").iterdir() if f'"{path.name}' not in here] == []


def counts(dataset) -> dict[str, int]:
    return dict(Counter(dataset.class_names[label] for clip in dataset.clips for label in clip.labels))


def folds(dataset) -> list[int]:
    return np.bincount([clip.fold for clip in dataset.clips]).tolist()


def all_there(dataset) -> bool:
    return all(dataset.is_there(row) for row in range(len(dataset)))


def said(dataset, *words: str) -> bool:
    return any(all(word in note for word in words) for note in dataset.notes)


@pytest.mark.parametrize("name", ["us8k_kaggle", "esc50_kaggle"])
def test_kaggles_packing_has_the_official_labels_and_folds_and_no_clip_twice(case, name):
    dataset = open_dataset(case(name))
    assert dataset.name == {"us8k_kaggle": "urbansound8k", "esc50_kaggle": "esc50"}[name]
    assert dataset.class_names == THREE and counts(dataset) == dict.fromkeys(THREE, 10)
    assert folds(dataset) == [0, 6, 6, 6, 6, 6] and all_there(dataset)
    assert len({clip.path for clip in dataset.clips}) == len(dataset) == 30
    assert not any("16000/" in clip.path for clip in dataset.clips) and said(dataset, "other folders than listed")


@pytest.mark.parametrize("path", ["audiofolder", "audiofolder/metadata.csv"])
def test_audiofolders_metadata_is_read(case, path):
    dataset = open_dataset(case(path))
    assert counts(dataset) == dict.fromkeys(THREE, 10) and all_there(dataset) and said(dataset, "'file_name'")


@pytest.mark.parametrize("path", ["sub_manifest", "sub_manifest/meta/train.csv"])
def test_a_table_beside_the_audio_is_read(case, path):
    dataset = open_dataset(case(path))
    assert counts(dataset) == {"dog": 1} and all_there(dataset)


def test_fsd50k_as_on_the_hub_is_read(case):
    dataset = open_dataset(case("fsd_hf"))
    assert (dataset.name, counts(dataset), all_there(dataset)) == ("fsd50k", {"Animal": 1, "Dog": 1}, True)


def test_vggsound_is_read(case):
    dataset = open_dataset(case("vgg"))
    assert (dataset.name, counts(dataset), all_there(dataset)) == ("vggsound", {"people marching": 1}, True)
    assert [clip.split for clip in dataset.clips] == ["test"]


def test_folders_of_folds_are_folds(case):
    dataset = open_dataset(case("split_fold"))
    assert counts(dataset) == dict.fromkeys(THREE, 10) and folds(dataset) == [0, 6, 6, 6, 6, 6]
    assert said(dataset, "3 classes from folder names: dog, rain, rooster") and said(dataset, "fold fold_1")


def test_a_wrapper_folder_is_no_class_and_the_table_that_was_not_read_is_named(case):
    dataset = open_dataset(case("gtzan"))
    assert counts(dataset) == {"blues": 3, "jazz": 3} and said(dataset, "wrapper genres_original")
    assert said(dataset, "features_30_sec.csv", "1 of 6 audio files")


def test_audio_that_is_cut_is_counted(case):
    dataset = looked_at(open_dataset(case("longclips")), 10.0, windows=False)
    assert said(
        dataset, "3 of 3 clips are longer than 10 s, and 67 % of the audio is cut", "--clip-seconds", "--window"
    )
    assert not said(looked_at(open_dataset(case("longclips")), 30.0, windows=False), "is cut")
    assert not said(looked_at(open_dataset(case("longclips")), 10.0, windows=True), "is cut")


@pytest.mark.parametrize("name", ["hf_esc50", "hf_two"])
def test_the_labels_of_hugging_face_tables_are_taken_by_name(case, name):
    library = pytest.importorskip("datasets")
    if not hasattr(library, "load_from_disk"):
        pytest.skip("a folder named datasets hides the library")
    dataset = open_dataset(case(name))
    assert counts(dataset) == dict.fromkeys(THREE, 10) and folds(dataset)[1:] == [6] * 5
    assert said(dataset, {"hf_esc50": "labels from column 'category'", "hf_two": "labels from column 'label'"}[name])


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize(
    "name, note",
    [
        ("category_col", "'category'"), ("capitals", "'Audio'"), ("filename_col", "'filename'"),
        ("semicolon", "semicolons"), ("floatfold", None), ("jsonl_floatfold", None), ("trailing_blank", None),
        ("backslash", "backslashes"), ("space_path", None),
    ],
)  # fmt: skip
def test_tables_are_read_as_they_are_written(case, name, note, folder):
    path = case(name)
    if not folder:
        path = path / ("clips.jsonl" if name.startswith("jsonl") else "clips.csv")
    dataset = open_dataset(path)
    assert counts(dataset) == dict.fromkeys(THREE, 2) and folds(dataset) == [0, 3, 0, 3] and all_there(dataset)
    assert note is None or said(dataset, note)


def test_other_encodings_and_unicode_forms_are_read(case):
    dataset = open_dataset(case("latin1") / "clips.csv")
    assert dataset.class_names == ("dogé", "rainé", "roosteré") and said(dataset, "not UTF-8", "'dogé'")
    dataset = open_dataset(case("nfd") / "clips.csv")
    assert counts(dataset) == {"a": 2, "b": 1} and all_there(dataset) and said(dataset, "Unicode form")


@pytest.mark.parametrize("path", ["quote_comment/clips.csv", "quote_comment"])
def test_a_quote_that_swallows_rows_is_refused_with_its_line(case, path):
    with pytest.raises(UsageError, match="line 2 of .*clips.csv opens a quote"):
        open_dataset(case(path))


def test_folds_from_0_are_folds_from_1(case):
    dataset = open_dataset(case("zerofold") / "clips.csv")
    assert folds(dataset) == [0, 6, 6, 6, 6, 6] and said(dataset, "folds 0 to 4 were read as folds 1 to 5")


@pytest.mark.parametrize("name", ["esc_floatfold", "esc_blank", "esc_space"])
def test_esc50s_table_as_pandas_and_excel_write_it(case, name):
    dataset = open_dataset(case(name))
    assert dataset.name == "esc50" and [clip.fold for clip in dataset.clips] == list(range(1, len(dataset) + 1))
    assert len(dataset) == (1 if name == "esc_blank" else 2) and dataset.class_names[0] == "dog"


def test_a_negative_fold_is_refused_with_its_line(case):
    with pytest.raises(UsageError, match="line 2 of .*esc50.csv: fold is '-1'"):
        open_dataset(case("esc_negfold"))


def test_nan_is_an_empty_cell(case):
    dataset = open_dataset(case("nan_label") / "clips.csv")
    assert counts(dataset) == dict.fromkeys(THREE, 1) and said(dataset, "3 clips", "nan")
    dataset = open_dataset(case("nan_start") / "clips.csv")
    assert counts(dataset) == dict.fromkeys(THREE, 2) and all(clip.start is None for clip in dataset.clips)


@pytest.mark.parametrize("name", ["msp", "dates2"])
def test_a_name_that_resembles_another_datasets_is_no_reason_to_group(case, name):
    dataset = open_dataset(case(name))
    divided, (warning,) = cache_folds(ListedClips.of(dataset), seed=0)
    assert [len(fold.test) for fold in divided] == [6] * 5 and "recording" not in warning


def test_files_of_other_suffixes_are_read_or_counted(case):
    dataset = open_dataset(case("suffixes"))
    (left_out,) = [int(note.split()[0]) for note in dataset.notes if "were left out" in note] or [0]
    assert len(dataset) + left_out == 18 and set(dataset.class_names) == set(THREE)


def test_a_header_without_its_hash_is_no_segment(case):
    dataset = open_dataset(case("as_header_nohash"))
    assert (dataset.name, len(dataset), dataset.clips[0].id) == ("audioset", 5, "-0DdlOuIFUI") and dataset.is_there(0)
    assert counts(dataset) == {"Dog": 5, "Rain, drops": 5}
