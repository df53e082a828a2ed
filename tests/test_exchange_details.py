"""Export and import to the letter: names of files, columns, defaults, and what is said on the way."""

import csv
import json
import zipfile

import h5py
import numpy as np
import pytest

from planted import planted_cache
from whisper_at_cli import __version__
from whisper_at_cli.extract.cache import FeatureCache, export, import_npz
from whisper_at_cli.extract.cache.export import ExportReport, export_hdf5, export_npz
from whisper_at_cli.extract.cache.import_npz import ImportReport
from whisper_at_cli.extract.cache.npz import read_features
from whisper_at_cli.extract.errors import CacheError, UsageError

N, L, T, D = 7, 2, 25, 4
FEATURES = np.random.default_rng(0).integers(-99, 99, (N, L, T, D)).astype(np.float32)


def source(path, **options):
    given = {"labels": np.arange(2 * N).reshape(N, 2) % 3 == 0, "class_names": ["dog", "cat"]} | options
    return planted_cache(path, FEATURES, given.pop("labels"), shard_mb=3.5 * L * T * D * 4 / 1e6, **given)


def npz_folder(path, names="abc", shape=(2, T, 4)):
    path.mkdir()
    for at, name in enumerate(names):
        np.savez(path / f"{name}.npz", np.full(shape, at, np.float16))
    return path


def imported(folder, path, **options):
    return import_npz.import_npz(folder, path, **({"backbone": "b", "clip_seconds": 5} | options))


def test_an_export_reports_what_it_wrote_and_how_far_it_is(tmp_path):
    cache = source(tmp_path / "a.zarr", failed=(2, 3))
    for write, name in ((export_npz, "npz"), (export_hdf5, "a.h5")):
        said = []
        report = write(cache.path, tmp_path / name, progress=lambda *words, said=said: said.append(words))
        assert report == ExportReport(clips=7, written=5, skipped=2, out=str(tmp_path / name))
        assert said == ([(n, 5) for n in range(1, 6)] if name == "npz" else [(5, 5)])


def test_what_lies_beside_the_npz_files_says_all_that_an_import_needs(tmp_path):
    cache = source(tmp_path / "a.zarr", failed=(2,), fold=np.arange(N), split=["train", "eval"] * 3 + [""])
    export_npz(cache.path, tmp_path / "npz")
    with open(tmp_path / "npz/labels.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["id", "file", "path", "fold", "split", "valid_frames", "labels"]
    assert rows[1] == ["clip0", "clip0.npz", "audio/clip0.wav", "0", "train", "25", "dog"]
    assert rows[3] == ["clip3", "clip3.npz", "audio/clip3.wav", "3", "eval", "25", "dog"]
    assert [row[6] for row in rows[1:]] == ["dog", "cat", "dog", "cat", "", "dog"] and rows[6][4] == ""
    text = (tmp_path / "npz/cache.json").read_text()
    assert json.loads(text) == cache.attributes and text.startswith('{\n "') and text.endswith("}\n")
    both = source(tmp_path / "b.zarr", labels=np.ones((N, 2)))
    export_npz(both.path, tmp_path / "both")
    assert "dog;cat" in (tmp_path / "both/labels.csv").read_text()


def test_a_place_to_export_to_is_new_or_an_empty_folder(tmp_path, monkeypatch):
    cache = source(tmp_path / "a.zarr")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    export_npz(cache.path, tmp_path / "empty")
    for taken in ("empty", "file"):
        with pytest.raises(UsageError, match=f"{taken} exists already; remove it"):
            export_npz(cache.path, tmp_path / taken)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "left by a killed run").touch()
    export_npz(cache.path, "new")
    export_npz(cache.path, tmp_path / "deep/er/npz")
    (tmp_path / ".a.h5.partial").write_text("left by a killed run")
    export_hdf5(cache.path, "a.h5")
    assert len(list((tmp_path / "new").iterdir())) == len(list((tmp_path / "deep/er/npz").iterdir())) == N + 2
    assert h5py.is_hdf5(tmp_path / "a.h5") and not list(tmp_path.rglob("*.partial"))


def test_an_error_without_a_number_is_said_in_its_own_words(tmp_path, monkeypatch):
    cache = source(tmp_path / "a.zarr")

    def refuse(*_, **__):
        raise OSError("no such disk")

    monkeypatch.setattr(np, "savez", refuse)
    with pytest.raises(CacheError, match="cannot write .*out: no such disk; make room or choose another place"):
        export_npz(cache.path, tmp_path / "out")


@pytest.mark.parametrize(
    "name, file",
    [
        ("plain name-1.x", "plain name-1.x"), ("a/b\\c:d", "a%2Fb%5Cc%3Ad"), ('*?"<>|', "%2A%3F%22%3C%3E%7C"),
        ("100%", "100%25"), (".hidden", "%2Ehidden"), ("a.b", "a.b"), ("tab\there\x7f", "tab%09here%7F"),
        ("x" * 240, "x" * 240), ("é" * 120, "é" * 120),
        ("x" * 241, "x" * 48 + "%sha"), ("é" * 121, "é" * 48 + "%sha"),
    ],
)  # fmt: skip
def test_a_file_is_named_after_its_id_as_far_as_that_can_be(name, file):
    found = export._file_names([name, "other"])[0]
    if "%sha" not in file:
        assert found == file
        return
    assert found[:52] == file[:52] and len(found) == 48 + 4 + 32
    assert export._file_names([name + "y", "other"])[0] != found, "the hash is of the whole id"


def test_ids_that_differ_in_case_alone_get_files_of_their_own():
    one, two, three = export._file_names(["Dog", "dog", "cat"])
    assert three == "cat" and one.startswith("Dog%sha") and two.startswith("dog%sha")
    assert one.casefold() != two.casefold()


@pytest.mark.parametrize("name", ["a;b", " dog", "dog "])
def test_class_names_that_would_not_come_back_are_refused(tmp_path, name):
    cache = source(tmp_path / "a.zarr", class_names=["fine", name])
    with pytest.raises(UsageError, match="cannot stand in labels.csv"):
        export_npz(cache.path, tmp_path / "npz")


@pytest.mark.parametrize("dtype, written", [("float16", "f2"), ("float32", "f4"), ("int8", "f4")])
def test_hdf5_is_written_in_parts_of_the_type_that_features_are_read_in(tmp_path, monkeypatch, dtype, written):
    scale = np.full((N, L, D), 0.5, np.float16) if dtype == "int8" else None
    cache = source(tmp_path / "a.zarr", dtype=dtype, scale=scale, failed=(1,))
    monkeypatch.setattr(export, "WRITE_BYTES", int(2.9 * L * T * D * np.dtype(written).itemsize))
    said = []
    export_hdf5(cache.path, tmp_path / "a.h5", progress=lambda *words: said.append(words))
    assert said == [(2, 6), (4, 6), (6, 6)]
    monkeypatch.setattr(export, "WRITE_BYTES", 1)
    export_hdf5(cache.path, tmp_path / "b.h5")
    rows = np.flatnonzero(cache.done)
    for name in ("a.h5", "b.h5"):
        with h5py.File(tmp_path / name) as file:
            assert file["features"].dtype == written and file["mean"].dtype == "f4"
            assert file["features"].chunks == (1, 1, T, D) and file["mean"].chunks == (1, L, D)
            np.testing.assert_array_equal(file["features"][:], cache.features(rows))
            np.testing.assert_array_equal(file["mean"][:], cache.mean(rows=rows))
            assert [axis.label for axis in file["mean"].dims] == ["clip", "layer", "channel"]
            assert {name: file.attrs[name] for name in ("format_version", "layers", "dtype", "clip_seconds")} == {
                "format_version": 2, "layers": L, "dtype": dtype, "clip_seconds": 5.0,
            }  # fmt: skip
            assert json.loads(file.attrs["made"]) == {} and file["class"].asstr()[:].tolist() == ["dog", "cat"]
            assert file["layer"][:].tolist() == [1, 2] and file["clip"][:].tolist() == rows.tolist()
            for scale in ("clip", "layer", "frame", "channel", "class"):
                assert file[scale].is_scale and file[scale].attrs["NAME"] == scale.encode()


def test_a_cache_without_classes_goes_out_and_comes_back(tmp_path):
    cache = source(tmp_path / "a.zarr", labels=np.zeros((N, 0)), class_names=())
    cache = FeatureCache.open(cache.path)
    export_hdf5(cache.path, tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        assert "labels" not in file and "class" not in file and len(file["features"]) == N
    export_npz(cache.path, tmp_path / "npz")
    imported(tmp_path / "npz", tmp_path / "b.zarr", backbone=None, clip_seconds=None)
    assert FeatureCache.open(tmp_path / "b.zarr").labels.shape == (N, 0)


def test_an_import_reports_what_it_did_and_how_far_it_is(tmp_path):
    folder = npz_folder(tmp_path / "npz", "abcdef")
    (folder / "b.npz").write_text("no zip")
    (folder / ".c.npz").write_text("of another system")
    said, path = [], tmp_path / "a.zarr"
    report = imported(folder, path, shard_mb=2.5 * 2 * T * 4 * 2 / 1e6, progress=lambda *words: said.append(words))
    assert report == ImportReport(
        str(path),
        6,
        5,
        0,
        1,
        ({"id": "b", "path": "b.npz", "error": "not a whole npz file: File is not a zip file"},),
        (),
    )
    assert said == [(2, 6, "1 failed"), (4, 6, "1 failed"), (6, 6, "1 failed")]
    made = FeatureCache.open(path).attributes["made"]
    assert made["tool_version"] == __version__ and made["imported_from"] == str(folder.resolve())
    assert made["created"].endswith("+00:00") and len(made["created"]) == 25 and made["command"]
    said.clear()
    assert imported(folder, path, progress=lambda *words: said.append(words)).skipped == 5
    assert said == [(2, 6, "1 failed")]


def test_every_column_of_the_csv_is_taken_and_each_may_be_left_out(tmp_path):
    folder, table = npz_folder(tmp_path / "npz", "abcd"), tmp_path / "clips.csv"
    table.write_text(
        "id,file,path,fold,split,valid_frames,labels,label\n"
        "one,a.npz,far/a.flac,3, train ,7, dog ; cat;,bird\n"
        "b,,,32767,,25,,cat\n"
        "c,,,,,0,dog,\n"
        "d\n"
    )
    report = imported(folder, tmp_path / "a.zarr", labels_csv=table)
    (warning,) = report.warnings
    assert "1 rows of clips.csv have fewer fields than its header (first: line 5)" in warning and report.written == 4
    cache = FeatureCache.open(tmp_path / "a.zarr")
    assert cache.ids.tolist() == ["one", "b", "c", "d"] and cache.spec.class_names == ("cat", "dog")
    assert cache.paths.tolist() == ["far/a.flac", "b.npz", "c.npz", "d.npz"]
    assert cache.fold.tolist() == [3, 32767, 0, 0] and cache.split.tolist() == ["train", "", "", ""]
    assert cache.valid_frames.tolist() == [7, 25, 0, 25]
    assert cache.labels.tolist() == [[1, 1], [1, 0], [0, 1], [0, 0]]
    assert cache.features(range(4))[:, 0, 0, 0].tolist() == [0, 1, 2, 3] and cache.spec.clip_seconds == 5.0
    assert (
        cache.spec.dataset == "npz" and cache.spec.dtype == "float16" and (cache.spec.layers, cache.spec.dim) == (2, 4)
    )


@pytest.mark.parametrize(
    "row, said",
    [
        ("a,32768,1", "fold is '32768'; give a whole number from 1 to 32767, or nothing"),
        ("a,-1,1", "fold is '-1'"), ("a,1.5,1", "fold is '1.5'"),
        ("a,1,26", "valid_frames is '26'; give a whole number from 0 to 25"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_with_their_line(tmp_path, row, said):
    (tmp_path / "clips.csv").write_text(f"id,fold,valid_frames\n{row}\n")
    with pytest.raises(UsageError, match=f"line 2 of .*clips.csv: {said}"):
        imported(npz_folder(tmp_path / "npz"), tmp_path / "a.zarr", labels_csv=tmp_path / "clips.csv")


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_clips_of_no_length_are_refused(tmp_path, seconds):
    with pytest.raises(UsageError, match="seconds cannot be; give the length"):
        imported(npz_folder(tmp_path / "npz"), tmp_path / "a.zarr", clip_seconds=seconds)


def test_class_names_keep_the_order_in_which_they_are_given(tmp_path):
    folder, table = npz_folder(tmp_path / "npz", "ab"), tmp_path / "clips.csv"
    table.write_text("id,label\na,dog\nb,cat\n")
    imported(folder, tmp_path / "a.zarr", labels_csv=table, class_names=("dog", "bird", "cat"))
    cache = FeatureCache.open(tmp_path / "a.zarr")
    assert cache.spec.class_names == ("dog", "bird", "cat") and cache.labels.tolist() == [[1, 0, 0], [0, 0, 1]]
    imported(folder, tmp_path / "b.zarr", labels_csv=table)
    assert FeatureCache.open(tmp_path / "b.zarr").spec.class_names == ("cat", "dog")
    with pytest.raises(UsageError, match="no CSV says which clip of .* has which; give --labels"):
        imported(folder, tmp_path / "c.zarr", class_names=("dog",))
    with pytest.raises(UsageError, match="'a' has the label 'dog', which is none of the 1 classes"):
        imported(folder, tmp_path / "c.zarr", labels_csv=table, class_names=("cat",))


def test_what_an_export_says_holds_unless_the_backbone_is_another(tmp_path):
    source(tmp_path / "a.zarr", backbone="tiny", weights_sha256="77")
    export_npz(tmp_path / "a.zarr", tmp_path / "npz")
    for given, expected in ((None, ("tiny", "77", "float32")), ("tiny", ("tiny", "77", "float32")),
                            ("base", ("base", "unknown", "unknown"))):  # fmt: skip
        path = tmp_path / f"{given}.zarr"
        imported(tmp_path / "npz", path, backbone=given, clip_seconds=None)
        spec = FeatureCache.open(path).spec
        assert (spec.backbone, spec.weights_sha256, spec.precision) == expected
        assert (spec.clip_seconds, spec.dtype, spec.dataset, spec.class_names) == (5.0, "float32", "", ("dog", "cat"))


@pytest.mark.parametrize("text, said", [("[]", "was not written by an export"), ("{", "is damaged"), ("3", "was not")])
def test_settings_that_are_none_are_refused(tmp_path, text, said):
    folder = npz_folder(tmp_path / "npz")
    (folder / "cache.json").write_text(text)
    with pytest.raises(UsageError, match=f"cache.json {said}.*remove it and say what made the features by options"):
        imported(folder, tmp_path / "a.zarr")


def test_the_shape_that_most_files_have_decides(tmp_path):
    folder = npz_folder(tmp_path / "npz", "bcd", shape=(3, T, 4))
    for name in "ae":
        np.savez(folder / f"{name}.npz", np.zeros((2, T, 5), np.float32))
    (folder / "f.npz").write_text("no zip")
    report = imported(folder, tmp_path / "a.zarr")
    assert {failure["id"] for failure in report.failures} == {"a", "e", "f"} and report.written == 3
    assert report.failures[0]["error"] == "its shape is (2, 25, 5), most others' (3, 25, 4)"


def test_few_of_many_files_decide_which_shape_a_folder_has(tmp_path, monkeypatch):
    files = sorted(npz_folder(tmp_path / "npz", "abcdefghij").iterdir())
    read, whole = [], import_npz.features_file
    monkeypatch.setattr(import_npz, "SHAPE_SAMPLES", 4)
    monkeypatch.setattr(import_npz, "features_file", lambda path: read.append(path.stem) or whole(path))
    assert import_npz._common_shape(files) == (2, T, 4) and read == ["a", "d", "g", "j"]


def test_a_folder_of_nothing_but_bad_files_says_what_is_wrong_with_the_first(tmp_path):
    folder = npz_folder(tmp_path / "npz", "ab", shape=(2, T))
    (folder / "b.npz").write_text("no zip")
    with pytest.raises(
        UsageError, match=r"npz holds no npz file that can be imported; a.npz: arr_0 is \(2, 25\) float16"
    ):
        imported(folder, tmp_path / "a.zarr")


@pytest.mark.parametrize(
    "array, said",
    [
        (np.zeros((2, T, 4), np.int16), r"arr_0 is \(2, 25, 4\) int16, not \(layers, 25, channels\) of floating-point"),
        (np.zeros((2, T, 0)), r"arr_0 is \(2, 25, 0\) float64"), (np.zeros((0, T, 2)), r"arr_0 is \(0, 25, 2\)"),
        (np.zeros((1, 2, T, 4)), r"\(1, 2, 25, 4\)"), (np.zeros((2, T - 1, 4)), r"\(2, 24, 4\)"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_features_are_refused(tmp_path, array, said):
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(CacheError, match=said):
        read_features(tmp_path / "a.npz", (2, T, 4))


def test_an_archive_without_the_array_names_what_it_holds(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(1), y=np.zeros(1))
    with pytest.raises(CacheError, match="it holds x.npy, y.npy, not an array arr_0"):
        read_features(tmp_path / "a.npz", (2, T, 4))
    with zipfile.ZipFile(tmp_path / "b.npz", "w"):
        pass
    with pytest.raises(CacheError, match="it holds nothing, not an array arr_0"):
        read_features(tmp_path / "b.npz", (2, T, 4))


def test_a_value_that_cannot_be_stored_names_its_layer(tmp_path):
    folder = npz_folder(tmp_path / "npz", "abc", shape=(3, T, 4))
    for name, layer, value in (("a", 2, np.inf), ("b", 1, 1e6)):
        features = np.ones((3, T, 4), np.float32)
        features[layer, 4, 3] = value
        np.savez(folder / f"{name}.npz", features)
    errors = [failure["error"] for failure in imported(folder, tmp_path / "a.zarr").failures]
    assert errors == [
        "layer 3 holds a value that is not finite", "layer 2 holds a value too large for float16; use float32",
    ]  # fmt: skip


@pytest.mark.parametrize("count, ending", [(3, ": c.npz, d.npz, e.npz"), (4, ": c.npz, d.npz, e.npz, ...")])
def test_a_warning_names_three_of_what_was_left_out(tmp_path, count, ending):
    folder = npz_folder(tmp_path / "npz", "ab" + "cdef"[:count])
    (tmp_path / "clips.csv").write_text("id\nb\na\n")
    (warning,) = imported(folder, tmp_path / "a.zarr", labels_csv=tmp_path / "clips.csv").warnings
    assert warning.startswith(f"{count} files of ") and warning.endswith(f"were left out{ending}")
