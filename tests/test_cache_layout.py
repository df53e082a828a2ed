"""A cache's arrays and attributes are laid out as the schema says, and what contradicts it is named."""

import json

import numpy as np
import pytest
import zarr

from planted import planted_cache
from whisper_at_cli import extract
from whisper_at_cli.extract.cache import CacheSpec, CacheWriter, ClipTable, FeatureCache, Status, schema
from whisper_at_cli.extract.cache.layout import Layout
from whisper_at_cli.extract.cache.store import LocalStore
from whisper_at_cli.extract.errors import CacheError, UsageError


def spec(**changes):
    return CacheSpec(
        **(dict(backbone="b", weights_sha256="0", layers=3, dim=4, clip_seconds=5.0, class_names=("x", "y")) | changes)
    )


def table(count: int, **columns):
    """A table of clips without labels, folds or splits; columns replace them."""
    ids = np.array([f"clip{i}" for i in range(count)], dtype=str)
    given = dict(
        ids=ids, paths=np.char.add(ids, ".wav"), fold=np.zeros(count, np.int16), split=np.full(count, ""),
        labels=np.zeros((count, 2), np.uint8),
    )  # fmt: skip
    return ClipTable(**(given | columns))


def laid_out(path, count=7, clips_per_shard=3, provenance=None, **changes):
    clips = table(count, fold=np.arange(count), split=np.array(["train", "eval"] * count)[:count],
                  labels=np.arange(2 * count).reshape(count, 2) % 3 == 0)  # fmt: skip
    schema.create_arrays(
        path, spec(**changes), clips, clips_per_shard=clips_per_shard, provenance=provenance or {"by": "test"}
    )
    return zarr.open_group(path, mode="r"), clips


@pytest.mark.parametrize("dtype, mean", [("float16", "float16"), ("float32", "float32"), ("int8", "float16")])
def test_every_array_has_the_shape_type_chunks_and_names_of_the_schema(tmp_path, dtype, mean):
    group, clips = laid_out(tmp_path / "a.zarr", dtype=dtype)
    per_layer = ((7, 3, 4), (3, 1, 4), (3, 3, 4), ("clip", "layer", "channel"))
    expected = {
        "features": (dtype, (7, 3, 25, 4), (1, 1, 25, 4), (3, 3, 25, 4), ("clip", "layer", "frame", "channel")),
        "mean": (mean, *per_layer),
        "valid_frames": ("uint8", (7,), (7,), None, ("clip",)),
        "status": ("uint8", (7,), (7,), None, ("clip",)),
        "fold": ("int16", (7,), (7,), None, ("clip",)),
        "digest": ("uint64", (7,), (7,), None, ("clip",)),
        "labels": ("uint8", (7, 2), (7, 2), None, ("clip", "class")),
        "layer": ("uint16", (3,), (3,), None, ("layer",)),
    } | ({"scale": ("float16", *per_layer)} if dtype == "int8" else {})
    strings = dict.fromkeys(("id", "path", "split", "error"), ((7,), (7,))) | {"class": ((2,), (2,))}
    assert set(group.array_keys()) == set(expected) | set(strings)
    for name, (kind, *layout) in expected.items():
        array = group[name]
        assert array.dtype == kind
        assert [array.shape, array.chunks, array.shards, array.metadata.dimension_names] == layout, name
    for name, layout in strings.items():
        assert (group[name].shape, group[name].chunks) == layout, name
        assert group[name].metadata.dimension_names == (("class",) if name == "class" else ("clip",))
    for name, array in group.arrays():
        assert array.metadata.chunk_key_encoding.separator == ".", name
    assert group["fold"][:].tolist() == list(range(7)) and group["split"][:].tolist() == clips.split.tolist()
    assert group["id"][:].tolist() == clips.ids.tolist() and group["path"][:].tolist() == clips.paths.tolist()
    np.testing.assert_array_equal(group["labels"][:], clips.labels)
    assert group["layer"][:].tolist() == [1, 2, 3] and group["class"][:].tolist() == ["x", "y"]
    shapes = schema.array_shapes(spec(dtype=dtype), 7)
    assert {name: (array.shape, str(array.dtype)) for name, array in group.arrays() if name not in strings} == {
        name: shape for name, shape in shapes.items() if name not in strings
    }
    assert {name: shapes[name] for name in strings} == {name: (shape, "") for name, (shape, _) in strings.items()}
    assert set(shapes) == set(group.array_keys())


def test_what_is_not_written_reads_as_nothing_real(tmp_path):
    group, _ = laid_out(tmp_path / "a.zarr")
    assert np.isnan(group["features"][:]).all() and np.isnan(group["mean"][:]).all()
    assert not group["status"][:].any() and not group["valid_frames"][:].any() and set(group["error"][:]) == {""}
    group, _ = laid_out(tmp_path / "b.zarr", dtype="int8")
    assert not group["features"][:].any() and np.isnan(group["scale"][:]).all()


def test_scales_and_status_alone_are_compressed_and_everything_that_is_written_later_is_checksummed(
    tmp_path,
):
    laid_out(tmp_path / "a.zarr", dtype="int8")

    def codecs(name):
        listed = json.loads((tmp_path / "a.zarr" / name / "zarr.json").read_text())["codecs"]
        inner = listed[0]["configuration"].get("codecs", listed) if listed[0]["name"] == "sharding_indexed" else listed
        return [codec["name"] for codec in inner if codec["name"] != "bytes"]

    packed, plain = ("scale", "status", "valid_frames"), ("features", "mean", "fold")
    assert [codecs(name) for name in packed] == [["zstd", "crc32c"]] * 3
    assert [codecs(name) for name in plain] == [["crc32c"]] * 3
    level = json.loads((tmp_path / "a.zarr/scale/zarr.json").read_text())["codecs"][0]["configuration"]["codecs"][1]
    assert level["configuration"]["level"] == 1


def test_the_attributes_say_what_made_the_cache(tmp_path):
    laid_out(tmp_path / "a.zarr", dataset="sounds", precision="bfloat16")
    attributes = schema.read_attributes(LocalStore(tmp_path / "a.zarr"))
    assert attributes == {
        "format": "whisper-at-cli feature cache", "format_version": 2, "backbone": "b", "weights_sha256": "0",
        "layers": 3, "dim": 4, "clip_seconds": 5.0, "dtype": "float16", "precision": "bfloat16", "dataset": "sounds",
        "class_names": ["x", "y"], "frames": 25, "layer_numbers": [], "made": {"by": "test"},
        "coordinates": "id path split fold digest status valid_frames error",
    }  # fmt: skip
    found = schema.spec_from_attributes(attributes, LocalStore(tmp_path / "a.zarr"))
    assert found == spec(dataset="sounds", precision="bfloat16") and found.class_names == ("x", "y")


def test_a_cache_without_labels_or_without_clips_can_be_laid_out(tmp_path):
    group, _ = laid_out(tmp_path / "a.zarr", class_names=())
    assert "labels" not in group and "labels" not in schema.array_shapes(spec(class_names=()), 7)
    group, _ = laid_out(tmp_path / "b.zarr", count=0)
    assert group["id"].shape == (0,) and group["id"].chunks == (1,) and group["fold"].chunks == (1,)


def test_columns_of_many_clips_are_cut_into_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "ROWS_PER_CHUNK", 5000)
    count = 5003
    clips = table(count, labels=np.ones((count, 2), np.uint8))
    schema.create_arrays(tmp_path / "a.zarr", spec(), clips, clips_per_shard=256, provenance={})
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    assert group["labels"].chunks == (5000, 2) and group["labels"][:].all()
    monkeypatch.setattr(schema, "LABEL_BYTES", 4000)
    assert [schema.label_rows(rows, 2) for rows in (0, 7, 5003)] == [1, 7, 2000]
    assert group["id"].chunks == group["path"].chunks == group["split"].chunks == group["fold"].chunks == (5000,)
    assert group["id"][5002] == "clip5002" and group["error"].chunks == (5000,)
    assert group["status"].chunks == group["valid_frames"].chunks == (5003,), "one request in a bucket"


def test_what_a_spec_holds_when_nothing_is_said():
    plain = CacheSpec(backbone="b", weights_sha256="0", layers=1, dim=1, clip_seconds=0.5)
    assert (plain.dtype, plain.precision, plain.dataset, plain.class_names, plain.frames) == (
        "float16", "float32", "", (), 25,
    )  # fmt: skip
    assert plain.clip_bytes == 50 and spec(dtype="int8").clip_bytes == 300 and spec(dtype="float32").clip_bytes == 1200


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"dim": 0}, {"frames": 0}, {"clip_seconds": 0}, {"clip_seconds": -1}])
def test_a_spec_needs_one_of_each_at_least(wrong):
    assert spec(layers=1, dim=1, frames=1, clip_seconds=0.5).clip_bytes == 2
    with pytest.raises(ValueError, match="at least one layer, channel, frame and sample"):
        spec(**wrong)


def test_shards_are_as_many_as_the_size_asks_and_equally_full():
    ours = spec()  # of 600 bytes a clip
    assert [ours.clips_per_shard(0.0018, clips) for clips in (0, 1, 2, 3, 4, 5, 6, 7)] == [3, 1, 2, 3, 2, 3, 3, 3]
    assert ours.clips_per_shard(0.00179, 100) == 2 and ours.clips_per_shard(0.0006, 100) == 1
    assert ours.clips_per_shard(0.0011999992, 100) == 1, "a megabyte is a million bytes"
    assert ours.clips_per_shard(1e-9, 100) == 1, "a clip is in one shard, however small that should be"
    assert ours.clips_per_shard(1000, 256) == 256 and ours.clips_per_shard(1000, 257) == 129


def test_rows_and_files_of_shards():
    new, old = Layout(), Layout(1)
    assert new.version == 2 and new.file("features", 3) == "features/c.3.0.0.0"
    assert new.file("mean", 0) == "mean/c.0.0.0" and new.file("scale", 12) == "scale/c.12.0.0"
    assert new.file("status", 0) == "status/c.0" and new.file("labels", 2) == "labels/c.2.0"
    assert old.file("features", 3) == "features/c/3/0/0/0" and old.file("labels", 2) == "labels/c/2/0"
    assert old.file("mean", 0) == "mean/c/0/0/0" and old.file("scale", 12) == "scale/c/12/0/0"
    assert old.file("status", 2) == "status/c/2" and old.file("valid_frames", 0) == "valid_frames/c/0"
    assert [schema.shard_rows(shard, 4, 10) for shard in range(3)] == [range(4), range(4, 8), range(8, 10)]
    assert [schema.shard_count(clips, 4) for clips in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_two_specs_differ_by_name_and_long_values_are_cut_short():
    many = tuple("abcdefg")
    assert spec(dataset="here").differences(spec(dataset="there")) == []
    assert spec().differences(spec(layers=4, dim=5)) == ["layers: 3, not 4", "dim: 4, not 5"]
    assert spec(class_names=many).differences(spec(class_names=many[:3])) == [
        "class_names: 7 classes (a, b, c, ...), not 3 classes (a, b, c)"
    ]
    assert spec(class_names=many[:4]).differences(spec()) == [
        "class_names: 4 classes (a, b, c, ...), not 2 classes (x, y)"
    ]
    assert spec(weights_sha256="0123456789abcdef" * 4).differences(spec(weights_sha256="7" * 41)) == [
        "weights_sha256: 0123456789ab..., not 777777777777..."
    ]
    assert spec(backbone="b" * 40).differences(spec(backbone="c")) == [f"backbone: {'b' * 40}, not c"]


def test_a_table_of_clips_checks_itself():
    assert len(table(4)) == 4
    for column in ("paths", "fold", "split", "labels"):
        with pytest.raises(ValueError, match=r"columns differ in length: \[4, 5\]"):
            table(4, **{column: getattr(table(5), column)})
    with pytest.raises(UsageError, match="names two clips 'b'; ids must be unique"):
        table(5, ids=np.array(["a", "b", "c", "b", "d"]))


def change_metadata(path, **attributes):
    file = path / "zarr.json"
    whole = json.loads(file.read_text())
    whole["attributes"] |= attributes
    whole["attributes"] = {name: value for name, value in whole["attributes"].items() if value is not None}
    file.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"layers": None}, "'layers' is missing or wrong"),
        ({"dtype": "float12"}, "storage type 'float12' is not known"),
        ({"dim": 0}, "at least one layer, channel"),
        ({"class_names": 3}, "is missing or wrong"),
    ],
)
def test_attributes_that_cannot_be_are_named(tmp_path, wrong, said):
    laid_out(tmp_path / "a.zarr")
    change_metadata(tmp_path / "a.zarr", **wrong)
    with pytest.raises((CacheError, UsageError), match=said):
        FeatureCache.open(tmp_path / "a.zarr")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"attributes"', "{}", '{"attributes": 1', b"\xff\xfe"])
def test_metadata_that_are_none_are_damage_and_not_a_crash(tmp_path, text):
    laid_out(tmp_path / "a.zarr")
    file = tmp_path / "a.zarr" / "zarr.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CacheError, match=r"a.zarr/zarr.json is damaged \(.*; extract with --repair restores it$"):
        FeatureCache.open(tmp_path / "a.zarr")
    (tmp_path / "a.zarr/status/metadata.zst").unlink()
    with pytest.raises(CacheError, match=r"a.zarr/zarr.json is damaged \(.*; restore it or extract again"):
        FeatureCache.open(tmp_path / "a.zarr")


def test_a_cache_of_no_known_format_is_refused_by_its_version(tmp_path):
    laid_out(tmp_path / "a.zarr")
    for unknown in (0, 3, "2", 2.0, True):
        change_metadata(tmp_path / "a.zarr", format_version=unknown)
        said = f"cache format version {unknown}; this version of whisper-at-cli reads versions 1, 2$"
        with pytest.raises(CacheError, match=said):
            FeatureCache.open(tmp_path / "a.zarr")
    change_metadata(tmp_path / "a.zarr", format_version=1)
    with pytest.raises(CacheError, match=r"its files have names with '\.', not '/'"):
        FeatureCache.open(tmp_path / "a.zarr")
    change_metadata(tmp_path / "a.zarr", format="another")
    with pytest.raises(UsageError, match="a Zarr group but not a feature cache"):
        FeatureCache.open(tmp_path / "a.zarr")


def test_states_have_the_numbers_that_are_on_disk(tmp_path):
    assert {state.name: int(state) for state in Status} == {"PENDING": 0, "DONE": 1, "FAILED": 2}
    for version in (1, 2):
        path = tmp_path / f"{version}.zarr"
        cache = planted_cache(path, np.ones((3, 1, 25, 2)), [0, 0, 0], failed=(1,), version=version)
        assert zarr.open_array(path / "status", mode="r")[:].tolist() == [1, 2, 1]
        assert cache.status.tolist() == [1, 2, 1] and cache.complete
    assert (tmp_path / "1.zarr/status/c/0").read_bytes()[:3] == bytes([1, 2, 1])


@pytest.mark.parametrize("clips, in_a_shard", [(128, 128), (129, 65)])
def test_a_shard_of_the_usual_size_holds_128_megabytes(tmp_path, clips, in_a_shard):
    large = spec(layers=1, dim=20000, class_names=())  # a megabyte a clip
    CacheWriter.create(tmp_path / "a.zarr", large, table(clips, labels=np.zeros((clips, 0), np.uint8))).close()
    assert FeatureCache.open(tmp_path / "a.zarr").clips_per_shard == in_a_shard


def test_what_the_room_offers_is_there():
    assert all(hasattr(extract.cache, name) for name in extract.cache.__all__)
