"""Export and import: what goes out comes back, other tools read it, and one bad file does not stop the rest."""

import csv
import json
import zipfile

import h5py
import numpy as np
import pytest

from planted import planted_cache
from whisper_at_cli.cli import main
from whisper_at_cli.extract.cache import CacheSpec, CacheWriter, ClipTable, FeatureCache, ShardBlock, Status
from whisper_at_cli.extract.cache.export import export_hdf5, export_npz
from whisper_at_cli.extract.cache.import_npz import import_npz
from whisper_at_cli.extract.cache.verify import verify
from whisper_at_cli.extract.errors import CacheError, UsageError

N, L, T, D = 11, 3, 25, 8
FEATURES = np.random.default_rng(0).normal(size=(N, L, T, D)).astype(np.float32) * np.logspace(-3, 3, D)
LABELS = np.random.default_rng(1).integers(0, 2, size=(N, 3))
NAMES = ("rooster", "Male speech, man speaking", "a class of no clip")
SHARD_MB = 4 * L * T * D * 4 / 1e6  # four clips of float32


def source(path, **options):
    """Eleven clips with several labels, folds and splits; the last class and some clips have none."""
    labels = LABELS * [1, 1, 0]
    split = np.array(["train", "eval", ""])[np.arange(N) % 3]
    options = {"dtype": "float32", "shard_mb": SHARD_MB} | options
    return planted_cache(
        path, FEATURES, labels, fold=np.arange(N) % 5, split=split, class_names=NAMES, backbone="large-v1", **options
    )


def cache_of_ids(path, ids):
    """A cache of clips with these ids, each with features of its own."""
    spec = CacheSpec(backbone="b", weights_sha256="0", layers=1, dim=4, clip_seconds=5.0, dtype="float32")
    ids = np.array(ids)
    clips = ClipTable(ids, ids, np.zeros(len(ids), np.int16), np.array([""] * len(ids)), np.zeros((len(ids), 0)))
    with CacheWriter.create(path, spec, clips) as writer:
        block = ShardBlock.empty(len(ids), spec)
        block.features[:] = np.arange(len(ids))[:, None, None, None]
        block.status[:] = Status.DONE
        writer.write(0, block)
    return FeatureCache.open(path)


def npz_folder(path, count=6, shape=(2, T, 4), dtype="float16"):
    """Files a.npz, b.npz ... as another program wrote them: compressed, nothing beside them."""
    path.mkdir()
    rng = np.random.default_rng(2)
    for name in "abcdefghij"[:count]:
        np.savez_compressed(path / f"{name}.npz", rng.normal(size=shape).astype(dtype))
    return path


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_export_then_import_gives_the_same_cache(tmp_path, dtype):
    ours = source(tmp_path / "a.zarr", dtype=dtype)
    report = export_npz(ours.path, tmp_path / "npz")
    assert (report.clips, report.written, report.skipped) == (N, N, 0)
    report = import_npz(tmp_path / "npz", tmp_path / "b.zarr", shard_mb=SHARD_MB)
    assert (report.clips, report.written, report.failed, report.warnings) == (N, N, 0, ())
    theirs = FeatureCache.open(tmp_path / "b.zarr")
    assert theirs.spec == ours.spec and verify(theirs.path).ok
    every = np.arange(N)
    assert theirs.features(every).tobytes() == ours.features(every).tobytes()
    mean = theirs.features(every).astype(np.float32).mean(axis=2)
    np.testing.assert_allclose(theirs.mean(), mean, rtol=1e-3 if dtype == "float16" else 1e-5, atol=1e-6)
    for column in ("ids", "paths", "fold", "split", "labels", "valid_frames"):
        np.testing.assert_array_equal(getattr(theirs, column), getattr(ours, column))


def test_options_outweigh_what_an_export_says(tmp_path):
    cache = source(tmp_path / "a.zarr")
    export_npz(cache.path, tmp_path / "npz")
    import_npz(tmp_path / "npz", tmp_path / "b.zarr", backbone="other", clip_seconds=10, dtype="float16")
    spec = FeatureCache.open(tmp_path / "b.zarr").spec
    assert (spec.backbone, spec.clip_seconds, spec.dtype) == ("other", 10.0, "float16")
    assert spec.weights_sha256 == spec.precision == "unknown", "these are another backbone's"
    assert spec.class_names == NAMES
    (tmp_path / "npz" / "cache.json").write_text("{")
    with pytest.raises(UsageError, match="cache.json is damaged"):
        import_npz(tmp_path / "npz", tmp_path / "c.zarr")


def test_an_npz_is_as_the_original_project_has_it(tmp_path):
    cache = source(tmp_path / "a.zarr", dtype="float16", failed=(2, 10))
    report = export_npz(cache.path, tmp_path / "npz")
    assert (report.clips, report.written, report.skipped) == (N, N - 2, 2)
    assert len(list((tmp_path / "npz").glob("*.npz"))) == N - 2
    with np.load(tmp_path / "npz" / "clip7.npz") as file:
        assert file.files == ["arr_0"] and file["arr_0"].dtype == "float16" and file["arr_0"].shape == (L, T, D)
        np.testing.assert_array_equal(file["arr_0"], FEATURES[7].astype(np.float16))
    with open(tmp_path / "npz" / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [f"clip{i}" for i in range(N) if i not in (2, 10)]
    assert rows[6]["path"] == "audio/clip7.wav" and rows[6]["fold"] == "2" and rows[6]["split"] == "eval"
    for row in rows:
        labels = LABELS[int(row["id"].removeprefix("clip"))]
        assert row["labels"] == ";".join(NAMES[c] for c in (0, 1) if labels[c])


def test_ids_that_no_file_can_be_named_after_come_back(tmp_path):
    ids = ["a/b", "a%2Fb", "../up", ".hidden", "Dog", "dog", "naïve 犬", "x" * 300, "x" * 299 + "y", 'q"u,o\nte', "-1"]
    cache = cache_of_ids(tmp_path / "a.zarr", ids)
    export_npz(cache.path, tmp_path / "npz")
    names = [path.name for path in (tmp_path / "npz").rglob("*.npz")]
    assert len({name.casefold() for name in names}) == len(ids) and {"naïve 犬.npz", "-1.npz"} <= set(names)
    import_npz(tmp_path / "npz", tmp_path / "b.zarr")
    theirs = FeatureCache.open(tmp_path / "b.zarr")
    assert theirs.ids.tolist() == ids
    np.testing.assert_array_equal(theirs.features(np.arange(len(ids))), cache.features(np.arange(len(ids))))


def test_int8_goes_out_decoded_and_comes_back_quantised_as_extraction_does(tmp_path):
    import torch

    from whisper_at_cli.extract.cache.storage import to_storage

    folder = npz_folder(tmp_path / "npz", dtype="float32")
    import_npz(folder, tmp_path / "a.zarr", backbone="b", clip_seconds=10, dtype="int8")
    cache = FeatureCache.open(tmp_path / "a.zarr")
    features = np.stack([np.load(folder / f"{name}.npz")["arr_0"] for name in "abcdef"])
    stored = to_storage(torch.from_numpy(features), "int8")
    np.testing.assert_array_equal(cache.stored_features(range(6)), stored.features.numpy())
    np.testing.assert_array_equal(cache.scale(), stored.scale.float().numpy())
    np.testing.assert_array_equal(cache.mean(), stored.mean.float().numpy())
    export_npz(cache.path, tmp_path / "out")
    with np.load(tmp_path / "out" / "b.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], cache.features([1])[0])


def test_bad_files_fail_with_a_reason_and_the_others_go_on(tmp_path):
    folder = npz_folder(tmp_path / "npz", count=10, dtype="float32")
    whole = (folder / "a.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (folder / "a.npz").write_bytes(flipped)
    (folder / "b.npz").write_bytes(whole[:200])
    (folder / "c.npz").write_bytes(b"")
    np.savez(folder / "d.npz", np.zeros((3, T, 4), np.float32))
    bad = np.ones((2, T, 4), np.float32)
    bad[1, 3, 2] = np.nan
    np.savez(folder / "e.npz", bad)
    np.savez(folder / "f.npz", np.full((2, T, 4), 1e5, np.float32))
    np.savez(folder / "g.npz", other=bad)
    np.savez(folder / "h.npz", np.array([{"a": 1}], dtype=object))
    report = import_npz(folder, tmp_path / "a.zarr", backbone="b", clip_seconds=5)
    assert (report.clips, report.written, report.failed) == (10, 2, 8)
    errors = {failure["id"]: failure["error"] for failure in report.failures}
    for name in "abc":
        assert "not a whole npz file" in errors[name]
    assert errors["h"].startswith("arr_0 is (1,) object, not (layers, 25, channels)")
    assert errors["d"] == "its shape is (3, 25, 4), most others' (2, 25, 4)"
    assert errors["e"] == "layer 2 holds a value that is not finite"
    assert errors["f"] == "layer 1 holds a value too large for float16; use float32"
    assert "it holds other.npy, not an array arr_0" in errors["g"]
    cache = FeatureCache.open(tmp_path / "a.zarr")
    assert np.flatnonzero(cache.done).tolist() == [8, 9] and cache.errors[3] == errors["d"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_in_the_features_is_never_imported(tmp_path, save):
    values = np.random.default_rng(0).normal(size=(2, T, 4)).astype(np.float32)
    (tmp_path / "npz").mkdir()
    for name in "abc":
        save(tmp_path / "npz" / f"{name}.npz", values)
    whole = (tmp_path / "npz" / "a.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "npz" / "a.npz") as archive:
        size = archive.getinfo("arr_0.npy").compress_size
    for at in np.random.default_rng(1).integers(60, size, 40).tolist():
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        (tmp_path / "npz" / "a.npz").write_bytes(data)
        path = tmp_path / f"{at}.zarr"
        import_npz(tmp_path / "npz", path, backbone="b", clip_seconds=5, dtype="float32")
        cache = FeatureCache.open(path)
        assert not cache.done[0] or (cache.features([0])[0] == values).all()


def test_an_import_that_was_stopped_continues_and_tries_failed_clips_again(tmp_path, monkeypatch):
    folder = npz_folder(tmp_path / "npz", count=10)
    whole = (folder / "c.npz").read_bytes()
    (folder / "c.npz").write_bytes(b"")
    options = {"backbone": "b", "clip_seconds": 5, "shard_mb": 4 * 2 * T * 4 * 2 / 1e6}
    write, written = CacheWriter.write, []

    def stop_at_the_second(writer, shard, block):
        if written:
            raise KeyboardInterrupt
        written.append(shard)
        write(writer, shard, block)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            import_npz(folder, tmp_path / "a.zarr", **options)
    report = import_npz(folder, tmp_path / "a.zarr", **options)
    assert (report.written, report.skipped, report.failed) == (6, 3, 1)
    (folder / "c.npz").write_bytes(whole)
    report = import_npz(folder, tmp_path / "a.zarr", **options)
    assert (report.written, report.skipped, report.failed) == (1, 9, 0)
    cache = FeatureCache.open(tmp_path / "a.zarr")
    assert cache.complete and (cache.errors == "").all() and verify(cache.path).ok


def test_rows_without_a_file_and_files_without_a_row_are_named(tmp_path):
    folder = npz_folder(tmp_path / "npz")
    table = tmp_path / "clips.csv"
    table.write_text("\ufeffid, label ,fold\nb,dog,2\nzebra,cat,1\na,cat;dog,\n", encoding="utf-8")
    report = import_npz(folder, tmp_path / "a.zarr", labels_csv=table, backbone="b", clip_seconds=10)
    assert (report.clips, report.failed) == (2, 0) and len(report.warnings) == 2
    assert "1 rows of" in report.warnings[0] and report.warnings[0].endswith(": zebra.npz")
    assert "4 files of" in report.warnings[1] and report.warnings[1].endswith(": c.npz, d.npz, e.npz, ...")
    cache = FeatureCache.open(tmp_path / "a.zarr")
    assert cache.ids.tolist() == ["b", "a"] and cache.fold.tolist() == [2, 0]
    assert cache.spec.class_names == ("cat", "dog") and cache.labels.tolist() == [[0, 1], [1, 1]]
    assert (cache.spec.weights_sha256, cache.spec.precision) == ("unknown", "unknown")


def test_without_a_csv_clips_are_named_after_their_files(tmp_path):
    folder = npz_folder(tmp_path / "npz", count=2)
    (folder / "sub").mkdir()
    (folder / "b.npz").rename(folder / "sub" / "b.npz")
    import_npz(folder, tmp_path / "a.zarr", backbone="b", clip_seconds=10)
    cache = FeatureCache.open(tmp_path / "a.zarr")
    assert cache.ids.tolist() == ["a", "sub/b"] and cache.labels.shape == (2, 0)
    assert cache.paths.tolist() == ["a.npz", "sub/b.npz"] and cache.split.tolist() == ["", ""]
    assert cache.fold.tolist() == [0, 0] and cache.valid_frames.tolist() == [T, T]


@pytest.mark.parametrize(
    "table, options, said",
    [
        ("id\na\n", {"backbone": None}, "give --backbone"),
        ("id\na\n", {"clip_seconds": None}, "give --clip-seconds"),
        ("id\na\n", {"clip_seconds": 0}, "clips of 0 seconds cannot be"),
        ("id\na\n", {"dtype": "float8"}, "choose from float16"),
        ("id\na\n", {"class_names": ("dog",)}, "neither a column 'labels' nor 'label'"),
        ("id,label\na,dog\n", {"class_names": ("cat",)}, "'a' has the label 'dog'"),
        ("name,label\na,dog\n", {}, "no column 'id': its columns are name, label"),
        ("", {}, "no column 'id': its columns are none"),
        ("id\n", {}, "it has no rows"),
        ("id\na.wav\n", {}, "its first row asks for 'a.wav.npz', and the first file there is 'a.npz'"),
        ("id,fold\na,1\nb,first\n", {}, "line 3 of .*: fold is 'first'"),
        ("id,fold\na,1\n,2\n", {}, "line 3 of .*: the id is empty"),
        ("id\na\na\n", {}, "two clips 'a'"),
        ("id\n\x81\n", {}, "neither UTF-8 nor Windows-1252"),
    ],
)
def test_a_wrong_csv_or_option_is_refused_before_anything_is_made(tmp_path, table, options, said):
    folder = npz_folder(tmp_path / "npz")
    (tmp_path / "clips.csv").write_text(table, encoding="latin-1")
    with pytest.raises(UsageError, match=said):
        import_npz(
            folder, tmp_path / "a.zarr", labels_csv=tmp_path / "clips.csv",
            **({"backbone": "b", "clip_seconds": 5} | options),
        )  # fmt: skip
    assert not (tmp_path / "a.zarr").exists()


def test_folders_that_hold_nothing_to_import_are_refused(tmp_path):
    with pytest.raises(UsageError, match="is not a folder"):
        import_npz(tmp_path / "absent", tmp_path / "a.zarr", backbone="b", clip_seconds=5)
    with pytest.raises(UsageError, match="holds no .npz files"):
        import_npz(tmp_path, tmp_path / "a.zarr", backbone="b", clip_seconds=5)
    np.savez(tmp_path / "a.npz", np.zeros((T, 2, 4), np.float32))
    with pytest.raises(UsageError, match=r"\(25, 2, 4\) float32, not \(layers, 25, channels\)"):
        import_npz(tmp_path, tmp_path / "a.zarr", backbone="b", clip_seconds=5)


def test_hdf5_holds_everything_with_dimension_scales(tmp_path):
    cache = source(tmp_path / "a.zarr", dtype="float16", failed=(2,))
    report = export_hdf5(cache.path, tmp_path / "a.h5")
    assert (report.clips, report.written, report.skipped) == (N, N - 1, 1)
    done = np.flatnonzero(cache.done)
    with h5py.File(tmp_path / "a.h5") as file:
        features = file["features"]
        assert features.dtype == "float16" and features.chunks == (1, 1, T, D)
        np.testing.assert_array_equal(features[:], cache.features(done))
        np.testing.assert_array_equal(file["mean"][:], cache.mean())
        np.testing.assert_array_equal(file["labels"][:], cache.labels[done])
        np.testing.assert_array_equal(file["fold"][:], cache.fold[done])
        np.testing.assert_array_equal(file["valid_frames"][:], cache.valid_frames[done])
        for name, values in (("id", cache.ids), ("path", cache.paths), ("split", cache.split)):
            assert file[name].asstr()[:].tolist() == values[done].tolist()
        assert [axis.label for axis in features.dims] == ["clip", "layer", "frame", "channel"]
        assert [axis.label for axis in file["labels"].dims] == ["clip", "class"]
        scales = [axis[0][:].tolist() for axis in features.dims]
        assert scales == [done.tolist(), [1, 2, 3], list(range(T)), list(range(D))]
        assert [name.decode() for name in file["labels"].dims[1][0][:]] == list(NAMES)
        for name in ("mean", "id", "path", "split", "fold", "valid_frames"):
            assert file[name].dims[0][0] == file["clip"]
        assert file.attrs["backbone"] == "large-v1" and file.attrs["clip_seconds"] == 5.0
        assert json.loads(file.attrs["class_names"]) == list(NAMES)


def test_hdf5_takes_as_many_class_names_as_there_are(tmp_path):
    """An attribute of the first HDF5 formats ends at 64 kB."""
    names = [f"class number {c} of very many" for c in range(4000)]
    cache = planted_cache(tmp_path / "a.zarr", FEATURES[:2], np.eye(2, 4000, dtype=np.uint8), class_names=names)
    export_hdf5(cache.path, tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        assert json.loads(file.attrs["class_names"]) == names


@pytest.mark.parametrize("export, name", [(export_npz, "npz"), (export_hdf5, "a.h5")])
def test_an_export_appears_whole_or_not_at_all(tmp_path, export, name):
    cache = source(tmp_path / "a.zarr")
    shard = cache.path / "features/c.1.0.0.0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(CacheError, match="truncated"):
        export(cache.path, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]
    shard.write_bytes(whole)
    export(cache.path, tmp_path / name)
    with pytest.raises(UsageError, match="exists already"):
        export(cache.path, tmp_path / name)
    with pytest.raises(UsageError, match="does not exist"):
        export(tmp_path / "absent.zarr", tmp_path / "other")


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch):
    cache = source(tmp_path / "a.zarr")

    def full(*arguments, **options):
        raise OSError(28, "a long story of the library's own")

    monkeypatch.setattr(np, "savez", full)
    monkeypatch.setattr(h5py.Group, "create_dataset", full)
    for export in (export_npz, export_hdf5):
        with pytest.raises(CacheError, match="out: No space left on device; make room"):
            export(cache.path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


def test_a_cache_without_finished_clips_is_not_exported(tmp_path):
    cache = source(tmp_path / "a.zarr", failed=range(N))
    for export in (export_npz, export_hdf5):
        with pytest.raises(CacheError, match="none of the 11 clips"):
            export(cache.path, tmp_path / "out")


def test_class_names_that_a_csv_cannot_hold_are_refused_for_npz(tmp_path):
    cache = planted_cache(tmp_path / "a.zarr", FEATURES[:2], [0, 1], class_names=["a;b", "c"])
    with pytest.raises(UsageError, match="'a;b'.*--format hdf5"):
        export_npz(cache.path, tmp_path / "npz")
    export_hdf5(cache.path, tmp_path / "a.h5")


def test_commands_export_and_import(capsys, tmp_path):
    cache = source(tmp_path / "a.zarr", failed=(4,))
    status, out, err = run(capsys, "export", cache.path, tmp_path / "npz")
    assert status == 1 and out.endswith("10 of 11 clips written\n") and "1 clips are not finished" in err
    status, out, _ = run(capsys, "import", tmp_path / "npz", tmp_path / "b.zarr", "--json")
    report = json.loads(out)
    assert status == 0 and (report["clips"], report["written"], report["failed"]) == (10, 10, 0)
    status, out, err = run(capsys, "export", tmp_path / "b.zarr", tmp_path / "b.hdf5", "--json")
    assert status == 0 and json.loads(out)["written"] == 10 and "export: 10/10 clips" in err
    assert h5py.is_hdf5(tmp_path / "b.hdf5")
    status, _, _ = run(capsys, "export", tmp_path / "b.zarr", tmp_path / "c.h5", "--format", "npz")
    assert status == 0 and (tmp_path / "c.h5" / "clip0.npz").exists()
    status, _, err = run(capsys, "export", tmp_path / "b.zarr", tmp_path / "d", "--format", "csv")
    assert status == 2 and "choose from npz, hdf5" in err


def test_command_import_reports_failures_and_warnings(capsys, tmp_path):
    folder = npz_folder(tmp_path / "npz", count=3)
    (folder / "b.npz").write_text("no zip")
    (tmp_path / "clips.csv").write_text("id,labels\na,dog\nb,cat\n")
    arguments = ("import", folder, tmp_path / "a.zarr", "--labels", tmp_path / "clips.csv", "--backbone", "tiny.en")
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == "" and "give --clip-seconds" in err
    status, out, err = run(capsys, *arguments, "--clip-seconds", "10", "--dtype", "float32")
    assert status == 1 and out.endswith("1 clips written, 0 were there, 1 failed\n")
    assert "failed: b.npz: not a whole npz file" in err and "note: 1 files of" in err
    spec = FeatureCache.open(tmp_path / "a.zarr").spec
    assert (spec.backbone, spec.clip_seconds, spec.dtype, spec.layers, spec.dim) == ("tiny.en", 10.0, "float32", 2, 4)
