"""Caches made of caches: merged, selected, copied; what is in them, what is refused, and what a stop leaves."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import zarr

from planted import planted_cache
from whisper_at_cli.cli import main
from whisper_at_cli.extract.cache import CacheWriter, FeatureCache, Status, copying, derive, gather
from whisper_at_cli.extract.cache.store import BucketStore, LocalStore
from whisper_at_cli.extract.cache.verify import verify
from whisper_at_cli.extract.errors import CacheError, UsageError
from whisper_at_cli.heads import train_head
from whisper_at_cli.probe import probe_layers

L, T, D = 3, 25, 8
CLIP_BYTES = L * T * D * 4
BEFORE = Path(__file__).parent / "before"


def values(clips: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(clips, L, T, D)).astype(np.float32)


def cache_of(path: Path, clips: int, seed: int, names: list[str], *, first: int = 0, **options) -> FeatureCache:
    """Clips named after their place, classes in turn, in shards of four."""
    labels = np.eye(len(names), dtype=np.uint8)[np.arange(clips) % len(names)]
    options = {
        "shard_mb": 4.2 * CLIP_BYTES / 1e6,
        "split": ["train", "test"] * (clips // 2) + ["train"] * (clips % 2),
    } | options
    cache = planted_cache(
        path, values(clips, seed), labels, class_names=names, fold=np.arange(clips) % 5 + 1, **options
    )
    with_ids(cache, first)
    return FeatureCache.open(path)


def with_ids(cache: FeatureCache, first: int) -> None:
    group = zarr.open_group(cache.path, mode="r+")
    group["id"][:] = np.array([f"clip{first + row}" for row in range(len(cache))], dtype=object)


def test_merged_caches_hold_the_clips_of_all_with_classes_by_name(tmp_path):
    first = cache_of(tmp_path / "a", 10, 0, ["rain", "dog"], failed=(3,))
    second = cache_of(tmp_path / "b", 7, 1, ["dog", "cat"], first=10)
    report = derive.merge([first.path, second.path], tmp_path / "out")
    assert (report.clips, report.done, report.failed, report.written) == (17, 16, 1, 17) and report.left_out == 0
    merged = FeatureCache.open(tmp_path / "out")
    assert merged.ids.tolist() == [f"clip{row}" for row in range(17)]
    assert merged.spec.class_names == ("rain", "dog", "cat")
    named = [[merged.spec.class_names[c] for c in np.flatnonzero(row)] for row in merged.labels]
    assert named == [["rain"], ["dog"]] * 5 + [["dog"], ["cat"]] * 3 + [["dog"]]
    assert merged.fold.tolist() == [*first.fold, *second.fold] and merged.split.tolist() == [
        *first.split,
        *second.split,
    ]
    done = [row for row in range(17) if row != 3]
    expected = np.concatenate([values(10, 0), values(7, 1)])[done]
    assert (merged.features(done) == expected).all() and np.allclose(
        merged.mean(rows=done), expected.mean(2), atol=1e-6
    )
    assert merged.errors[3] == "planted failure" and merged.status[3] == Status.FAILED
    assert verify(merged.path).ok
    shard = merged.layout.file("features", 0)
    assert (tmp_path / "a" / shard).stat().st_ino == (tmp_path / "out" / shard).stat().st_ino, "linked, not copied"


def test_what_cannot_be_merged_is_refused_and_named(tmp_path):
    first = cache_of(tmp_path / "a", 6, 0, ["rain", "dog"])
    second = cache_of(tmp_path / "b", 6, 1, ["rain", "dog"], first=4)
    with pytest.raises(UsageError, match="have a clip 'clip4'|have a clip clip4"):
        derive.merge([first.path, second.path], tmp_path / "out")
    other = cache_of(tmp_path / "c", 6, 1, ["rain", "dog"], first=20, backbone="another")
    with pytest.raises(CacheError, match="other settings .backbone: planted, not another"):
        derive.merge([first.path, other.path], tmp_path / "out")
    with pytest.raises(UsageError, match="two caches or more; 1 was given"):
        derive.merge([first.path], tmp_path / "out")
    with pytest.raises(UsageError, match="is one of the caches"):
        derive.select(first.path, first.path)
    assert not (tmp_path / "out").exists()


def test_pending_clips_are_refused_or_left_out_on_request(tmp_path):
    source = cache_of(tmp_path / "a", 10, 0, ["rain", "dog"])
    spec, table = source.spec, derive._table(source, np.arange(10), source.spec.class_names)
    with CacheWriter.create(tmp_path / "b", spec, table, clips_per_shard=4) as writer:
        gather.fill_shard(writer, 1, gather.Origins.one(source, np.arange(10)))
    for call in (
        lambda **more: derive.select(tmp_path / "b", tmp_path / "out", **more),
        lambda **more: derive.merge([tmp_path / "b", cache_of(tmp_path / "c", 2, 1, ["rain", "dog"], first=50).path],
                                    tmp_path / "both", **more),
    ):  # fmt: skip
        with pytest.raises(CacheError, match="6 clips are pending. Finish it with `extract`, or leave them out"):
            call()
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        assert call(skip_pending=True).left_out == 6
    assert FeatureCache.open(tmp_path / "out").ids.tolist() == ["clip4", "clip5", "clip6", "clip7"]


def test_a_selection_has_the_clips_classes_and_layers_that_were_asked_for(tmp_path):
    source = cache_of(tmp_path / "a", 12, 0, ["rain", "dog", "cat"])
    derive.select(source.path, tmp_path / "out", splits=["test"], classes=["dog", "cat"], layers=[3, 1])
    part = FeatureCache.open(tmp_path / "out")
    rows = [row for row in range(12) if row % 2 and row % 3]
    assert part.ids.tolist() == [f"clip{row}" for row in rows] and part.spec.class_names == ("dog", "cat")
    assert part.labels.tolist() == source.labels[rows][:, 1:].tolist()
    assert part.layer_numbers == (1, 3) and part.spec.layers == 2
    assert (part.features(range(len(rows))) == values(12, 0)[rows][:, [0, 2]]).all()
    assert (part.layer(3) == values(12, 0)[rows, 2]).all() and (part.mean(3) == source.mean(3, rows)).all()
    with pytest.raises(UsageError, match="has layers 1, 3; layer 2 was asked for"):
        part.layer(2)
    assert verify(part.path).ok and zarr.open_group(part.path, mode="r")["layer"][:].tolist() == [1, 3]
    probed = probe_layers(part)
    assert [row.layer for row in probed.layers] == [1, 3]
    with pytest.raises(UsageError, match="has layers 1, 3; layer 2 was asked for"):
        probe_layers(part, layers=[2])
    with pytest.raises(UsageError, match="has only layers 1, 3; a head needs all layers"):
        train_head(part, head="last-mlp", out=tmp_path / "head")
    again = derive.select(part.path, tmp_path / "last", layers=[3])
    assert again.layers == 1 and FeatureCache.open(tmp_path / "last").layer_numbers == (3,)


def test_the_first_layers_alone_are_not_taken_for_a_whole_encoder(tmp_path):
    source = cache_of(tmp_path / "a", 6, 0, ["rain", "dog"])
    derive.select(source.path, tmp_path / "out", layers=[1, 2])
    part = FeatureCache.open(tmp_path / "out")
    assert part.layer_numbers == part.spec.layer_numbers == (1, 2) and verify(part.path).ok
    assert (part.features(range(6)) == values(6, 0)[:, :2]).all()
    assert derive.select(source.path, tmp_path / "out", layers=[1, 2]).written == 0
    derive.select(source.path, tmp_path / "all", layers=[1, 2, 3])
    assert FeatureCache.open(tmp_path / "all").spec == source.spec
    with pytest.raises(UsageError, match="has only layers 1, 2; a head needs all layers"):
        train_head(part, head="last-mlp", out=tmp_path / "head")


@pytest.mark.parametrize("before", ["float32", "float16", "int8"])
@pytest.mark.parametrize("after", ["float32", "float16", "int8"])
def test_a_selection_in_another_type_holds_the_same_numbers_as_far_as_it_can(tmp_path, before, after):
    source = cache_of(tmp_path / "a", 6, 0, ["rain", "dog"])
    derive.select(source.path, tmp_path / "b", dtype=before)
    derive.select(tmp_path / "b", tmp_path / "c", dtype=after)
    exact, found = values(6, 0), FeatureCache.open(tmp_path / "c")
    bound = 0 if {before, after} == {"float32"} else 2e-3 if "int8" not in (before, after) else 0.04
    assert found.spec.dtype == after and np.abs(found.features(range(6)) - exact).max() <= bound
    assert np.abs(found.mean() - exact.mean(2)).max() <= (0 if bound == 0 else 1e-3) and verify(found.path).ok


def test_values_that_a_type_cannot_hold_are_refused_with_the_clip(tmp_path):
    large = values(6, 0)
    large[4, 1, 0, 0] = 1e6
    source = planted_cache(tmp_path / "a", large, np.arange(6) % 2)
    with pytest.raises(CacheError, match="clip clip4 of .* has values that float16 cannot hold"):
        derive.select(source.path, tmp_path / "b", dtype="float16")


def test_what_cannot_be_selected_is_refused_with_what_there_is(tmp_path):
    source = cache_of(tmp_path / "a", 6, 0, ["rain", "dog"])
    for options, said in (
        ({"splits": ["valid"]}, "has no split 'valid'; its splits: test, train"),
        ({"classes": ["cat"]}, "has no class 'cat'; its classes: rain, dog"),
        ({"layers": [4]}, "has layers 1 to 3; layer 4 was asked for"),
        ({"splits": ["test"], "classes": ["rain"]}, "no clip of .* is in this selection"),
    ):
        with pytest.raises(UsageError, match=said):
            derive.select(source.path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("at", range(4))
def test_a_stopped_merge_is_continued_by_the_same_command(tmp_path, monkeypatch, at):
    first = cache_of(tmp_path / "a", 10, 0, ["rain", "dog"])
    second = cache_of(tmp_path / "b", 7, 1, ["rain", "dog"], first=10)
    fill, count = derive.fill_shard, []

    def stop(*args):
        count.append(1)
        if len(count) == at + 1:
            raise KeyboardInterrupt
        fill(*args)

    with monkeypatch.context() as patch:
        patch.setattr(derive, "fill_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            derive.merge([first.path, second.path], tmp_path / "out")
    report = derive.merge([first.path, second.path], tmp_path / "out")
    assert report.written == 17 - 4 * at
    merged = FeatureCache.open(tmp_path / "out")
    assert (merged.features(range(17)) == np.concatenate([values(10, 0), values(7, 1)])).all()
    assert derive.merge([first.path, second.path], tmp_path / "out").written == 0


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_a_selection_brings_a_cache_of_version_1_up_to_date(tmp_path, dtype):
    with tarfile.open(BEFORE / f"version-1-{dtype}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    old = FeatureCache.open(tmp_path / "a.zarr")
    derive.select(old.path, tmp_path / "new", skip_pending=True)
    new = FeatureCache.open(tmp_path / "new")
    assert new.layout.version == 2 and new.errors.tolist() == old.errors[:6].tolist()
    done = np.flatnonzero(new.done)
    assert (new.stored_features(done) == old.stored_features(done)).all() and verify(new.path).ok


def files(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*") if file.is_file() and ".locks" not in file.parts
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_copy_has_the_same_files(tmp_path, dtype):
    cache_of(tmp_path / "a", 10, 0, ["rain", "dog"], failed=(4, 5, 6, 7))
    derive.select(tmp_path / "a", tmp_path / "b", dtype=dtype)
    report = copying.copy(tmp_path / "b", tmp_path / "c")
    assert files(tmp_path / "c") == files(tmp_path / "b") and verify(tmp_path / "c").ok
    assert (report.files, report.copied, report.skipped) == (len(files(tmp_path / "b")), report.files, 0)
    with pytest.raises(UsageError, match="is there already"):
        copying.copy(tmp_path / "b", tmp_path / "c")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"me")
    with pytest.raises(UsageError, match=r"holds other files \(me.jpg"):
        copying.copy(tmp_path / "b", tmp_path / "photos")


def test_a_stopped_copy_is_no_cache_and_is_completed(tmp_path, monkeypatch):
    source = cache_of(tmp_path / "a", 40, 0, ["rain", "dog"])
    whole, write = files(source.path), LocalStore.write_whole
    monkeypatch.setattr(copying, "FILES_PER_NOTE", 3)
    skipped = 0
    for stop in range(2, len(whole), 4):
        count = []

        def stopping(self, name, buffers, count=count, stop=stop):
            if not name.startswith(copying.NOTED):
                count.append(name)
                if len(count) > stop:
                    raise KeyboardInterrupt
            write(self, name, buffers)

        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "write_whole", stopping)
            with pytest.raises(KeyboardInterrupt):
                copying.copy(source.path, tmp_path / "out")
        with pytest.raises(UsageError, match="is not a feature cache"):
            FeatureCache.open(tmp_path / "out")
        report = copying.copy(source.path, tmp_path / "out")
        assert files(tmp_path / "out") == whole and report.copied + report.skipped == len(whole)
        skipped = max(skipped, report.skipped)
        shutil.rmtree(tmp_path / "out")
    assert skipped > len(whole) // 2, "what was copied is not copied again"


def test_a_file_that_changed_since_it_was_copied_is_copied_again(tmp_path, monkeypatch):
    source = cache_of(tmp_path / "a", 10, 0, ["rain", "dog"])
    monkeypatch.setattr(copying, "FILES_PER_NOTE", 1)
    with monkeypatch.context() as patch:
        patch.setattr(copying, "_check_copy", lambda *args: None)
        patch.setattr(copying._Notes, "remove", lambda self: (tmp_path / "out/zarr.json").unlink())
        copying.copy(source.path, tmp_path / "out")
    derive.select(source.path, tmp_path / "b", splits=["train"])
    shard = source.path / source.layout.file("features", 1)
    changed = files(tmp_path / "b")["features/c.0.0.0.0"]
    shard.write_bytes(changed)
    report = copying.copy(source.path, tmp_path / "out")
    assert report.skipped == report.files - 2, "the shard, and the group's metadata"
    assert files(tmp_path / "out") == files(source.path)


@pytest.mark.parametrize("name", ["features/c.1.0.0.0", "mean/c.0.0.0", "id/c.0", "status/log/merged", "labels/c.0.0"])
def test_a_damaged_cache_is_not_copied(tmp_path, name):
    source = cache_of(tmp_path / "a", 10, 0, ["rain", "dog"])
    file = source.path / name
    data = bytearray(file.read_bytes())
    for at in (3, len(data) // 2, len(data) - 1):
        data[at] ^= 4
        file.write_bytes(data)
        with pytest.raises(CacheError, match="damaged"):
            copying.copy(source.path, tmp_path / "out")
        data[at] ^= 4
    file.write_bytes(data)
    copying.copy(source.path, tmp_path / "out")
    assert verify(tmp_path / "out").ok


def test_a_cache_goes_to_a_bucket_and_back(tmp_path, monkeypatch):
    obstore = pytest.importorskip("obstore", reason="needs obstore: pip install 'whisper-at-cli[cloud]'")
    memory = obstore.store.MemoryStore()
    monkeypatch.setattr(obstore.store, "from_url", lambda *args, **options: memory)
    source = cache_of(tmp_path / "a", 10, 0, ["rain", "dog"])
    copying.copy(source.path, "s3://bucket/a.zarr")
    assert verify("s3://bucket/a.zarr").ok
    assert BucketStore("s3://bucket/a.zarr").sizes() == {name: len(data) for name, data in files(source.path).items()}
    copying.copy("s3://bucket/a.zarr", tmp_path / "b")
    assert files(tmp_path / "b") == files(source.path)
    derive.select("s3://bucket/a.zarr", tmp_path / "c", layers=[2])
    assert (FeatureCache.open(tmp_path / "c").layer(2) == values(10, 0)[:, 1]).all()


def test_the_commands_do_what_they_say(tmp_path, capsys):
    cache_of(tmp_path / "a", 10, 0, ["rain", "dog"])
    cache_of(tmp_path / "b", 7, 1, ["dog", "cat"], first=10)
    a, b, out, part, there = (str(tmp_path / name) for name in ("a", "b", "out", "part", "there"))

    def run(*words: str, status: int = 0) -> str:
        with pytest.raises(SystemExit) as exit:
            main(list(words))
        captured = capsys.readouterr()
        assert exit.value.code == status, captured.err
        return captured.err if status else captured.out

    assert json.loads(run("merge", a, b, out, "--json"))["clips"] == 17
    text = run("select", out, part, "--split", "test", "--layers", "1,3", "--dtype", "int8")
    assert "8 clips (8 done), 2 layers, int8" in text
    made = FeatureCache.open(part).attributes["made"]
    assert made["command"] == f"whisper-at-cli select {out} {part} --split test --layers 1,3 --dtype int8"
    assert made["sources"][0]["made"]["sources"][1]["cache"] == b
    assert "files copied" in run("copy", part, there) and verify(there).ok
    refused = run("select", out, str(tmp_path / "x"), "--layers", "3-1", status=2)
    assert "--layers 3-1 is empty: give the lower layer first, as 1-3" in refused
