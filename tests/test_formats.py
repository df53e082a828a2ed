"""A cache is a plain Zarr v3 group: xarray opens it as it is, tensorstore its numbers, named as designed."""

import numpy as np
import pytest
import tensorstore
import xarray

from planted import planted_cache

N, L, T, D = 11, 3, 25, 8
FEATURES = np.random.default_rng(0).normal(size=(N, L, T, D)).astype(np.float32) * np.logspace(-3, 3, D)
DIMENSIONS = {
    "features": ("clip", "layer", "frame", "channel"),
    "mean": ("clip", "layer", "channel"),
    "labels": ("clip", "class"),
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
        ("valid_frames", cache.valid_frames),
    ):  # fmt: skip
        np.testing.assert_array_equal(read(name), values)
