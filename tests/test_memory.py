"""Crafted files do not become gigabytes: what is read takes little more than what is returned."""

import tracemalloc
import zipfile
from collections.abc import Callable

import numpy as np
import pytest

from whisper_at_cli.extract.cache import CacheSpec, CacheWriter, ClipTable, FeatureCache
from whisper_at_cli.extract.cache import import_npz as importing
from whisper_at_cli.extract.cache.npz import read_features
from whisper_at_cli.extract.datasets import open_dataset
from whisper_at_cli.extract.errors import CacheError, UsageError

T, LONG = 25, "x" * 3800


def peak(work: Callable[[], object]) -> int:
    """Bytes that some work has allocated at its highest."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def write_npz(path, header: bytes, zeros: int, version: int = 1) -> None:
    """An npz whose array has this header and so many zeros, packed a thousand times smaller."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("arr_0.npy", "w") as file:
        file.write(
            b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2 if version == 1 else 4, "little") + header
        )
        for _ in range(zeros >> 20):
            file.write(bytes(1 << 20))


def declared(*shape: int) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    return (text + " " * (117 - len(text)) + "\n").encode()


def test_an_npz_that_unpacks_to_more_than_a_clip_is_refused_before_it_is_unpacked(tmp_path):
    write_npz(tmp_path / "a.npz", declared(4, T, 1 << 20), 300 << 20)
    assert (tmp_path / "a.npz").stat().st_size < 1 << 20

    def refused() -> None:
        with pytest.raises(
            UsageError, match=r"a.npz: arr_0 is \(4, 25, 1048576\) float32, more than a clip's features"
        ):
            importing.import_npz(tmp_path, tmp_path / "a.zarr", backbone="b", clip_seconds=5)

    assert peak(refused) < 4 << 20


def test_an_npz_that_says_less_or_more_than_it_holds_or_whose_header_is_a_bomb_is_refused(tmp_path):
    write_npz(tmp_path / "more.npz", declared(4, T, 100), 200 << 20)
    write_npz(tmp_path / "less.npz", declared(4, T, 1 << 14), 1 << 20)
    write_npz(tmp_path / "header.npz", b" " * (100 << 20), 0, version=2)

    def refused() -> None:
        for name, shape, said in (
            ("more", (4, T, 100), "40000 bytes or more where 40000 belong"),
            ("less", (4, T, 1 << 14), "1048576 bytes or more where 6553600 belong"),
            ("header", (4, T, 100), "does not begin as an array of NumPy does"),
        ):
            with pytest.raises(CacheError, match=f"not a whole npz file: .*{said}"):
                read_features(tmp_path / f"{name}.npz", shape)

    assert peak(refused) < 10 << 20


@pytest.mark.parametrize("order", ["C", "F"])
def test_features_of_an_npz_take_their_own_memory(tmp_path, order):
    features = np.random.default_rng(0).random((4, T, 20_000), np.float32)
    np.savez_compressed(tmp_path / "a.npz", np.asarray(features, order=order))
    found: list[np.ndarray] = []
    assert peak(lambda: found.append(read_features(tmp_path / "a.npz", features.shape))) < 1.5 * features.nbytes
    assert np.array_equal(found[0], features)


def spec(classes: int = 0) -> CacheSpec:
    return CacheSpec("b", "w", 1, 4, 5.0, class_names=tuple(f"c{number}" for number in range(classes)))


def text_bytes(column: np.ndarray) -> int:
    return column.nbytes + sum(len(text) + 49 for text in column)


def test_one_long_path_gives_no_other_path_its_room(tmp_path):
    """As a fixed-width array, these 100,000 paths took 1.5 GB."""
    N = 100_000
    ids = [f"clip{number}" for number in range(N)]
    paths = np.array([*ids[:-1], LONG], dtype=object)
    table = ClipTable(np.array(ids, dtype=object), paths, np.zeros(N, np.int16), np.full(N, "train"), np.zeros((N, 0)))
    CacheWriter.create(tmp_path / "a.zarr", spec(), table).close()
    cache = FeatureCache.open(tmp_path / "a.zarr")
    assert peak(lambda: (cache.ids, cache.paths, cache.split)) < 1.5 * sum(
        map(text_bytes, (cache.ids, cache.paths))
    ) + 8 * N + (8 << 20)
    assert cache.paths[-1] == LONG and set(cache.split) == {"train"}


def test_texts_of_a_crafted_cache_take_what_they_hold(tmp_path):
    """Long texts, packed to a few kilobytes."""
    N = 4096
    paths = np.array([LONG + str(number) for number in range(N)], dtype=object)
    ids = np.array([f"clip{number}" for number in range(N)], dtype=object)
    table = ClipTable(ids, paths, np.zeros(N, np.int16), np.full(N, ""), np.zeros((N, 0)))
    CacheWriter.create(tmp_path / "a.zarr", spec(), table).close()
    assert sum(file.stat().st_size for file in (tmp_path / "a.zarr" / "path").rglob("*")) < 100_000
    cache = FeatureCache.open(tmp_path / "a.zarr")
    size = text_bytes(paths)
    assert peak(lambda: cache.paths) < 2.1 * size, "the texts, and the chunk that they are unpacked from"


def test_labels_of_a_cache_are_unpacked_where_they_are_returned(tmp_path):
    N, C = 20_000, 527
    ids = np.array([f"clip{number}" for number in range(N)], dtype=object)
    labels = np.random.default_rng(0).integers(0, 2, (N, C), dtype=np.uint8)
    table = ClipTable(ids, ids, np.zeros(N, np.int16), np.full(N, ""), labels)
    CacheWriter.create(tmp_path / "a.zarr", spec(C), table).close()
    cache = FeatureCache.open(tmp_path / "a.zarr")
    assert peak(lambda: cache.labels) < 1.5 * labels.nbytes
    assert np.array_equal(cache.labels, labels)


def test_a_manifest_with_a_long_path_takes_no_more_than_its_texts(tmp_path):
    N = 100_000
    with open(tmp_path / "m.csv", "w") as file:
        file.write("audio,labels\n")
        file.writelines(f"audio/clip_{number:06d}.wav,c{number % 500};c{number % 7}\n" for number in range(N))
        file.write(f"audio/{LONG}.wav,c0\n")
    found: list = []
    assert peak(lambda: found.append(open_dataset(tmp_path / "m.csv").table(sparse=True))) < 60 << 20
    assert len(found[0]) == N + 1 and found[0].paths[N] == f"audio/{LONG}.wav"


def test_an_import_of_long_names_takes_no_more_than_its_texts(tmp_path):
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "a.npz", np.zeros((1, T, 4), np.float32))
    lines = [f"a{number},a.npz,{LONG if number == 7 else 'p'}" for number in range(20_000)]
    (tmp_path / "labels.csv").write_text("\n".join(["id,file,path", *lines]))
    listed, names, _ = importing._listed_clips(
        tmp_path / "npz", {"a.npz": tmp_path / "npz" / "a.npz"}, tmp_path / "labels.csv", None, None
    )
    assert peak(lambda: importing._clip_table(listed, names)) < 10 << 20
    assert len(listed) == 20_000
