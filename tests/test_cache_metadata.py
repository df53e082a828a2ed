"""Every changed byte of a cache's metadata, or of their copy, is found by `verify` and mended by `extract --repair`."""

import json
import os
import shutil
from pathlib import Path

import pytest
from numcodecs import zstd
from test_cache_writer import created, filled

from conftest import array_bytes, make_backbone, noise, write_wav
from whisper_at_cli.extract import FeatureCache, extract
from whisper_at_cli.extract.cache.metadata import COPY, metadata_problems, restore_metadata
from whisper_at_cli.extract.cache.schema import array_shapes
from whisper_at_cli.extract.cache.sealed import sealed, unsealed
from whisper_at_cli.extract.cache.store import LocalStore
from whisper_at_cli.extract.cache.verify import verify
from whisper_at_cli.extract.errors import CacheError, WhisperATError
from whisper_at_cli.extract.pipeline import prepare

OPTIONS = {"clip_seconds": 0.5, "shard_mb": 3 * 3 * 25 * 64 / 1e6, "dtype": "int8", "workers": 1, "batch_size": 2}


@pytest.fixture
def path(tmp_path) -> Path:
    """A finished cache of every kind of array but labels."""
    with created(tmp_path / "a.zarr", dtype="int8") as writer:
        for shard in range(3):
            writer.write(shard, filled(writer.rows(shard), "int8", failed=(2,)))
    return tmp_path / "a.zarr"


def metadata_files(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("zarr.json"))


def is_found(path: Path) -> bool:
    """Whether `verify` says that something is damaged, or refuses the cache."""
    try:
        return not verify(path).ok
    except WhisperATError:
        return True


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]


def test_the_copy_holds_the_metadata_of_the_group_and_of_every_array(path):
    kept = json.loads(unsealed((path / COPY).read_bytes(), COPY, 1 << 20))
    cache = FeatureCache.open(path)
    arrays = array_shapes(cache.spec, len(cache))
    assert kept == {name: (path / name).read_text() for name in metadata_files(path)}
    assert set(kept) == {"zarr.json", *(f"{name}/zarr.json" for name in arrays)}
    assert metadata_problems(LocalStore(path)) == {} and verify(path).ok


def test_every_changed_byte_of_metadata_is_found_and_restored(path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    store, done = LocalStore(path), FeatureCache.open(path).done.tolist()
    for name in metadata_files(path):
        data = (path / name).read_bytes()
        for at in range(len(data)):
            (path / name).write_bytes(changed(data, at))
            assert metadata_problems(store) == {name: f"{name} is not what {COPY} says"}
            if at % 97 == 0:
                assert is_found(path), f"{name} byte {at}"
                assert not believed(path) or believed(path) == done
                assert restore_metadata(store) == [name] and (path / name).read_bytes() == data
        (path / name).write_bytes(data)
    assert verify(path).ok and not list(path.rglob("*.partial"))


def believed(path: Path) -> list[bool]:
    """Which clips count as done; none where the cache is refused."""
    try:
        return FeatureCache.open(path).done.tolist()
    except WhisperATError:
        return []


def test_every_changed_byte_of_the_copy_is_found_and_it_is_made_again(path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    data = (path / COPY).read_bytes()
    for at in range(len(data)):
        (path / COPY).write_bytes(changed(data, at))
        assert metadata_problems(LocalStore(path)) == {COPY: f"{COPY} is damaged: its CRC-32C does not match"}
        if at % 97 == 0:
            assert is_found(path)
            assert restore_metadata(LocalStore(path)) == [COPY] and (path / COPY).read_bytes() == data
    (path / COPY).unlink()
    assert [damage.problem for damage in verify(path).damaged] == [f"{COPY} is missing"]
    assert restore_metadata(LocalStore(path)) == [COPY] and (path / COPY).read_bytes() == data


@pytest.mark.parametrize("kept", [
    b"", b"{", b"[]", b'{"zarr.json": 1}', b'{"../zarr.json": "{}"}', b'{"/tmp/zarr.json": "{}"}', b"[" * 100_000,
    b'{"features/c.0.0.0.0": "{}"}', b'{"a/b/zarr.json": "{}"}', b"\xff",
])  # fmt: skip
def test_a_copy_that_says_what_cannot_be_is_damage_and_names_no_file_outside_the_cache(path, kept):
    before = (path / COPY).read_bytes()
    (path / COPY).write_bytes(b"".join(sealed(kept)))
    assert list(metadata_problems(LocalStore(path))) == [COPY] and not verify(path).ok
    assert restore_metadata(LocalStore(path)) == [COPY] and (path / COPY).read_bytes() == before


def test_a_copy_that_would_be_huge_is_damage(path):
    (path / COPY).write_bytes(b"".join(sealed(bytes(1 << 27))))
    assert "134217728 bytes unpacked" in metadata_problems(LocalStore(path))[COPY]
    assert zstd.decompress((path / COPY).read_bytes()[:-4])[:1] == b"\0"


def test_metadata_whose_copy_is_damaged_too_are_not_made_up(path):
    (path / "mean/zarr.json").write_text("{")
    (path / COPY).write_bytes(b"")
    with pytest.raises(CacheError, match=f"mean/zarr.json and its copy {COPY} are damaged; restore one of them"):
        restore_metadata(LocalStore(path))


def test_a_folder_that_is_no_cache_of_version_2_is_left_as_it_is(tmp_path):
    for name, text in (
        ("none", None),
        ("other", '{"attributes": {}}'),
        ("old", '{"attributes": {"format_version": 1}}'),
    ):
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "zarr.json").write_text(text)
        assert restore_metadata(LocalStore(tmp_path / name)) == []
        assert [file.name for file in (tmp_path / name).iterdir()] == (["zarr.json"] if text else [])


def test_extract_with_repair_restores_each_metadata_file_and_says_so(tmp_path):
    for number in range(4):
        write_wav(tmp_path / f"sounds/{'ab'[number % 2]}/{number}.wav", noise(number, 0.5))
    path, model = tmp_path / "a.zarr", make_backbone()
    extract(tmp_path / "sounds", path, model=model, **OPTIONS)
    whole = array_bytes(path)
    files = [*metadata_files(path), COPY]
    assert len(files) == 16
    for number, name in enumerate(files):
        data = (path / name).read_bytes()
        if number % 3:
            (path / name).write_bytes(changed(data, len(data) // 2))
        else:
            (path / name).unlink()
        report = extract(tmp_path / "sounds", path, model=model, repair=True, **OPTIONS)
        assert f"damaged metadata of the cache was restored: {name}" in report.notes
        assert report.written == 0 and (path / name).read_bytes() == data and array_bytes(path) == whole
    assert verify(path).ok


def test_metadata_are_restored_before_the_precision_of_the_cache_is_asked_for(path):
    """By name of a model, its precision is taken from the cache, which could not be opened."""
    (path / "zarr.json").write_text("{")
    with pytest.raises(CacheError, match="extract with --repair restores it"):
        prepare.precision_of(path, "auto")
    assert prepare.restored(path) == "damaged metadata of the cache was restored: zarr.json"
    assert prepare.precision_of(path, "auto") == "float32" and prepare.restored(path) is None


def test_a_cache_of_another_version_by_a_changed_byte_is_not_continued(path):
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text.replace('"format_version": 2', '"format_version": 1'))
    assert (path / "zarr.json").read_text() != text
    with pytest.raises(
        CacheError, match=r"its files have names with '\.', not '/'\); extract with --repair restores it"
    ):
        FeatureCache.open(path)
    shutil.copytree(path, path.with_name("b.zarr"))
    with pytest.raises(CacheError):
        created(path, dtype="int8")
