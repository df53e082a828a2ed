"""A cache is a plain Zarr v3 group: xarray opens it as it is, tensorstore its numbers, named as designed."""

import numpy as np
import pytest
import tensorstore
import xarray
import zarr

from planted import forget, planted_cache
from whisper_at_cli.extract.cache import CacheWriter, FeatureCache
from whisper_at_cli.extract.cache.store import LocalStore

N, L, T, D = 11, 3, 25, 8
FEATURES = np.random.default_rng(0).normal(size=(N, L, T, D)).astype(np.float32) * np.logspace(-3, 3, D)
DIMENSIONS = {
    "features": ("clip", "layer", "frame", "channel"),
    "mean": ("clip", "layer", "channel"),
    "labels": ("clip", "class"),
    "layer": ("layer",),
    "class": ("class",),
} | dict.fromkeys(("valid_frames", "status", "error", "id", "path", "fold", "split", "digest"), ("clip",))


@pytest.fixture(params=["float32", "float16"])
def cache(request, tmp_path):
    """Eleven clips in shards of four, of which one failed."""
    size = np.dtype(request.param).itemsize
    return planted_cache(
        tmp_path / "a.zarr", FEATURES, np.arange(N) % 2, dtype=request.param, shard_mb=4 * L * T * D * size / 1e6,
        fold=np.arange(N) % 5, split=["train"] * N, failed=(2,), class_names=["dog", "cat"],
    )  # fmt: skip


@pytest.mark.filterwarnings("error:.*is not recognized")  # of a file that is no array
@pytest.mark.filterwarnings("ignore:.*consolidated.*:RuntimeWarning")
@pytest.mark.parametrize("options", [{"consolidated": False}, {}])
def test_xarray_opens_a_cache_as_it_is(cache, options):
    with xarray.open_zarr(cache.path, **options) as dataset:
        assert {name: array.dims for name, array in dataset.variables.items()} == DIMENSIONS
        done = np.flatnonzero(cache.done)
        assert dataset["features"].dtype == dataset["mean"].dtype == cache.spec.dtype
        np.testing.assert_array_equal(dataset["features"].values[done], cache.features(done))
        assert np.isnan(dataset["features"].values[2]).all()
        np.testing.assert_array_equal(dataset["mean"].values[done].astype(np.float32), cache.mean())
        for name, values in (("labels", cache.labels), ("status", cache.status), ("fold", cache.fold)):
            assert dataset[name].dtype == values.dtype
            np.testing.assert_array_equal(dataset[name].values, values)
        for name, values in (("id", cache.ids), ("split", cache.split), ("error", cache.errors)):
            assert dataset[name].values.tolist() == values.tolist()
        assert dataset.attrs["backbone"] == "planted" and dataset.attrs["class_names"] == ["dog", "cat"]
        of_clips = {"id", "path", "split", "fold", "digest", "status", "valid_frames", "error"}
        assert set(dataset.coords) == of_clips | {"layer", "class"} and set(dataset.indexes) == {"layer", "class"}
        one = dataset["features"].sel(layer=2).isel(clip=dataset["fold"].values == 3)
        np.testing.assert_array_equal(one.values, cache.layer(2, [3, 8], dtype=cache.spec.dtype))
        assert one["id"].values.tolist() == ["clip3", "clip8"]
        assert dataset["labels"].sel({"class": "cat"}).values.tolist() == cache.labels[:, 1].tolist()


@pytest.mark.filterwarnings("ignore:.*consolidated.*:RuntimeWarning")
def test_xarray_decodes_int8_by_the_scale(tmp_path):
    rng = np.random.default_rng(1)
    stored, scale = rng.integers(-127, 128, (N, L, T, D)), rng.random((N, L, D)).astype(np.float16)
    cache = planted_cache(tmp_path / "a.zarr", stored, np.arange(N) % 2, dtype="int8", scale=scale, failed=(2,))
    with xarray.open_zarr(cache.path) as dataset:
        assert dataset["features"].attrs["ancillary_variables"] == "scale"
        assert dataset["features"].dtype == np.int8, "as it is stored"
        decoded = dataset["features"] * dataset["scale"].astype("float32")
        values = decoded.transpose("clip", "layer", "frame", "channel").values
        done = np.flatnonzero(cache.done)
        np.testing.assert_array_equal(values[done], cache.features(done))
        assert np.isnan(values[2]).all(), "a failed clip is no number"
        rounded = (dataset["features"] * dataset["scale"]).transpose(*decoded.dims)
        assert rounded.dtype == np.float16, "as NumPy multiplies int8 by float16"
        np.testing.assert_allclose(rounded.values[done], decoded.values[done], rtol=1e-3)


def test_other_readers_see_features_at_once_and_status_when_a_process_has_finished(tmp_path):
    """While it is at work what is known of its clips is in the log alone."""
    path = tmp_path / "a.zarr"
    cache = planted_cache(path, FEATURES, np.arange(N) % 2)
    forget(path, 0)
    CacheWriter.join(path).mark(0, np.full(N, T, np.uint8), np.ones(N, np.uint8), {})
    group = zarr.open_group(path, mode="r")
    assert not group["status"][:].any()
    np.testing.assert_array_equal(group["features"][:], FEATURES.astype(np.float32))
    assert FeatureCache.open(path).done.all() and cache.done.all()
    with CacheWriter(LocalStore(path), (1, 1)):
        pass
    assert group["status"][:].all()


def test_tensorstore_opens_every_array_of_numbers(cache):
    def read(name):
        store = tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(cache.path / name)}}, read=True, open=True
        ).result()
        assert tuple(store.domain.labels) == DIMENSIONS[name]
        return store.read().result()

    done = np.flatnonzero(cache.done)
    features, mean = read("features"), read("mean")
    assert features.dtype == mean.dtype == cache.spec.dtype
    np.testing.assert_array_equal(features[done], cache.features(done))
    np.testing.assert_array_equal(mean[done].astype(np.float32), cache.mean())
    for name, values in (
        ("labels", cache.labels), ("status", cache.status), ("fold", cache.fold), ("digest", cache.digests),
        ("valid_frames", cache.valid_frames), ("layer", np.arange(1, L + 1)),
    ):  # fmt: skip
        np.testing.assert_array_equal(read(name), values)
    with pytest.raises(ValueError, match="data_type"):
        read("class")  # tensorstore knows no text
