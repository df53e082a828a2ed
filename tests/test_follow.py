"""A cache follows its dataset: whatever is edited, it equals one that is extracted anew, or the command is refused."""

import csv
import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import array_bytes, make_backbone, noise, write_wav
from whisper_at_cli.extract import FeatureCache, extract
from whisper_at_cli.extract.cache import changes, rebuild
from whisper_at_cli.extract.cache.layout import Layout
from whisper_at_cli.extract.cache.rebuild import update_path
from whisper_at_cli.extract.cache.schema import CacheSpec, create_arrays
from whisper_at_cli.extract.cache.verify import verify
from whisper_at_cli.extract.datasets import Clip, Dataset, open_dataset
from whisper_at_cli.extract.datasets.digests import source_digests
from whisper_at_cli.extract.errors import CacheError
from whisper_at_cli.extract.pipeline.plan import plan_extraction
from whisper_at_cli.extract.pipeline.sync import sync
from whisper_at_cli.extract.sparse import SparseLabels

OPTIONS = {"clip_seconds": 1.0, "shard_mb": 4.2 * 3 * 25 * 64 * 2 / 1e6, "workers": 1, "batch_size": 2}


@dataclass
class Listed:
    """A manifest that is edited, beside its files."""

    folder: Path
    rows: list[dict] = field(default_factory=list)
    made: int = 0

    @property
    def path(self) -> Path:
        return self.folder / "clips.csv"

    def write(self) -> Path:
        with open(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "path", "label", "fold", "split", "start", "end"])
            writer.writeheader()
            writer.writerows(self.rows)
        return self.path

    def sound(self, path: str) -> None:
        """Write a file, and make sure that its time differs from any before."""
        self.made += 1
        file = write_wav(self.folder / path, noise(self.made, 1.5))
        os.utime(file, ns=(self.made * 10**9, self.made * 10**9))

    def add(self, at: int | None = None) -> None:
        name = f"n{self.made}"
        self.sound(f"{name}.wav")
        row = {"id": name, "path": f"{name}.wav", "label": "ab"[self.made % 2], "fold": 1 + self.made % 3}
        row |= {"split": "train", "start": 0, "end": 1}
        self.rows.insert(len(self.rows) if at is None else at, row)


@pytest.fixture
def listed(tmp_path) -> Listed:
    made = Listed(tmp_path / "sounds")
    for _ in range(9):
        made.add()
    return made


def run(listed: Listed, cache: Path, **options):
    return extract(listed.write(), cache, model=make_backbone(), **OPTIONS, **options)


def held(path: Path) -> dict[str, tuple]:
    """All that a cache says of each clip, by id."""
    cache = FeatureCache.open(path)
    assert cache.complete and verify(path).ok
    names = np.array(cache.spec.class_names, dtype=object)
    return {
        str(name): (
            cache.features([row]).tobytes(), cache.mean(rows=[row]).tobytes(), int(cache.valid_frames[row]),
            str(cache.paths[row]), int(cache.fold[row]), str(cache.split[row]),
            tuple(names[cache.labels[row] != 0]), int(cache.digests[row]),
        )
        for row, name in enumerate(cache.ids)
    }  # fmt: skip


def edit(listed: Listed, rng: np.random.Generator) -> str:
    """One edit, drawn at random; returns what it was."""
    row = listed.rows[rng.integers(len(listed.rows))]
    kind = str(rng.choice(["label", "class", "fold", "split", "span", "file", "moved", "add", "drop", "order"]))
    if kind == "label":
        row["label"] = "ba"["ab".find(row["label"])] if row["label"] in "ab" else "a"
    elif kind == "class":
        row["label"] = f"c{listed.made}"
        listed.made += 1
    elif kind == "fold":
        row["fold"] = row["fold"] % 3 + 1
    elif kind == "split":
        row["split"] = "test" if row["split"] == "train" else "train"
    elif kind == "span":
        row["start"] = 0.25 if row["start"] == 0 else 0
        row["end"] = row["start"] + 1
    elif kind == "file":
        listed.sound(row["path"])
    elif kind == "moved":
        listed.made += 1
        row["path"] = (listed.folder / row["path"]).rename(listed.folder / f"m{listed.made}.wav").name
    elif kind == "add":
        listed.add(int(rng.integers(len(listed.rows) + 1)))
    elif kind == "drop" and len(listed.rows) > 3:
        listed.rows.remove(row)
    else:
        rng.shuffle(listed.rows)
    return kind


@pytest.mark.parametrize("seed", range(6))
def test_after_any_edits_a_cache_equals_one_that_is_extracted_anew_or_is_as_it_was(tmp_path, listed, seed):
    rng, path = np.random.default_rng(seed), tmp_path / "a.zarr"
    run(listed, path)
    for number in range(3):
        kinds = {edit(listed, rng) for _ in range(rng.integers(1, 4))}
        before = array_bytes(path)
        try:
            run(listed, path)
        except CacheError as error:
            assert kinds & {"span", "file", "moved", "drop"} and ("--update" in str(error) or "--prune" in str(error))
            assert array_bytes(path) == before
            run(listed, path, update=True, prune=True)
        run(listed, tmp_path / f"anew{number}.zarr")
        assert held(path) == held(tmp_path / f"anew{number}.zarr"), kinds
        assert run(listed, path).written == 0
        assert not list(tmp_path.glob(".a.zarr*"))


def test_labels_folds_and_splits_are_taken_over_and_counted_without_encoding(tmp_path, listed):
    run(listed, tmp_path / "a.zarr")
    for row in listed.rows[:3]:
        row["label"] = "new"
    listed.rows[8]["fold"], listed.rows[8]["split"] = 3, "test"
    report = run(listed, tmp_path / "a.zarr")
    assert (report.written, report.skipped) == (0, 9)
    assert [note for note in report.notes if "follows" in note] == [
        "the dataset has changed; the cache now follows it: fold of 1 clip, split of 1 clip, labels of 3 clips"
    ]


def test_what_would_cost_something_is_named_and_asked_for(tmp_path, listed):
    path = tmp_path / "a.zarr"
    run(listed, path)
    listed.sound("n3.wav")
    with pytest.raises(CacheError, match=r"audio of 1 clip \(n3\) has changed .* add --update"):
        run(listed, path)
    assert run(listed, path, update=True).written == 1
    for row in listed.rows[1:8]:
        (listed.folder / row["path"]).touch()
    with pytest.raises(CacheError, match=r"audio of 7 clips \(n1, n2, n3, n4, n5, \.\.\.\) has changed"):
        run(listed, path)
    run(listed, path, update=True)
    del listed.rows[2:4]
    with pytest.raises(CacheError, match=r"no longer has 2 clips \(n2, n3\) of .* add --prune"):
        run(listed, path)
    assert run(listed, path, prune=True).written == 0
    assert len(FeatureCache.open(path)) == 7


def test_a_copy_of_all_files_is_the_same_dataset_and_is_said(tmp_path, listed):
    path = tmp_path / "a.zarr"
    run(listed, path)
    for row in listed.rows:
        (listed.folder / row["path"]).touch()
    report = run(listed, path)
    assert report.written == 0 and any("taken for a copy" in note for note in report.notes)
    assert not any("copy" in note for note in run(listed, path).notes), "said once"
    for row in listed.rows:
        os.utime(listed.folder / row["path"], ns=(1, 1))
    listed.sound(listed.rows[0]["path"])
    with open(listed.folder / listed.rows[0]["path"], "ab") as file:
        file.write(b"RIFF")
    with pytest.raises(CacheError, match="has changed"):
        run(listed, path)


def test_new_clips_come_behind_the_others_and_alone_are_encoded(tmp_path, listed):
    run(listed, tmp_path / "a.zarr")
    listed.add(at=0)
    report = run(listed, tmp_path / "a.zarr")
    assert (report.written, report.skipped) == (1, 9)
    assert FeatureCache.open(tmp_path / "a.zarr").ids.tolist()[-1] == "n9"


def test_shards_that_stay_are_not_written_again(tmp_path, listed):
    path = tmp_path / "a.zarr"
    run(listed, path)
    first = (path / "features/c.0.0.0.0").stat().st_ino
    listed.rows[0]["label"] = "new"
    listed.add()
    run(listed, path)
    assert (path / "features/c.0.0.0.0").stat().st_ino == first


@pytest.mark.parametrize("how", ["relabelled", "sync", "update"])
def test_a_cache_of_version_1_is_continued_as_it_is_and_becomes_one_of_version_2_with_the_first_change(
    tmp_path, listed, how
):
    path, new = tmp_path / "a.zarr", tmp_path / "new.zarr"
    run(listed, new)
    made = FeatureCache.open(new)
    dataset = open_dataset(listed.path)
    table = replace(dataset.table(), digests=source_digests(dataset))
    create_arrays(path, made.spec, table, clips_per_shard=made.clips_per_shard, provenance={}, layout=Layout(1))
    attributes = json.loads((path / "zarr.json").read_text())
    attributes["attributes"]["source_digests"] = True
    (path / "zarr.json").write_text(json.dumps(attributes))
    assert run(listed, path, shard=(1, 2)).written + run(listed, path, shard=(2, 2)).written == 9
    assert run(listed, path).written == 0 and FeatureCache.open(path).layout.version == 1
    assert (path / "features/c/0/0/0/0").exists() and held(path) == held(new)
    if how == "update":
        listed.sound("n3.wav")
        run(listed, new, update=True)
        assert run(listed, path, update=True).written == 1
    else:
        listed.rows[0]["label"] = "new"
        run(listed, new)
        sync(listed.write(), path) if how == "sync" else run(listed, path)
    assert FeatureCache.open(path).layout.version == 2 and held(path) == held(new)
    assert array_bytes(path) == array_bytes(new)


def test_one_of_several_tasks_does_not_change_the_cache_under_the_others(tmp_path, listed):
    path = tmp_path / "a.zarr"
    run(listed, path)
    listed.rows[0]["label"] = "new"
    with pytest.raises(CacheError, match=r"labels of 1 clip\).*whisper-at-cli sync"):
        run(listed, path, shard=(1, 2))


def test_sync_follows_without_encoding_and_says_what_is_left(tmp_path, listed):
    path = tmp_path / "a.zarr"
    run(listed, path)
    assert (sync(listed.write(), path).changed, FeatureCache.open(path).complete) == ("", True)
    listed.rows[0]["label"] = "new"
    listed.add()
    listed.sound("n4.wav")
    del listed.rows[7]
    with pytest.raises(CacheError, match="add --prune"):
        sync(listed.write(), path, update=True)
    report = sync(listed.write(), path, update=True, prune=True)
    assert (report.clips, report.pending) == (9, 2)
    assert report.changed == "labels of 1 clip, audio of 1 clip, 1 clip added, 1 clip dropped"
    assert run(listed, path, shard=(1, 2)).written + run(listed, path, shard=(2, 2)).written == 2
    run(listed, tmp_path / "anew.zarr")
    assert held(path) == held(tmp_path / "anew.zarr")


def test_a_dry_run_says_what_differs_and_changes_nothing(tmp_path, listed):
    path = tmp_path / "a.zarr"
    run(listed, path)
    listed.rows[0]["label"] = "new"
    listed.add()
    listed.sound("n4.wav")
    del listed.rows[7]
    before = array_bytes(path)
    plan = plan_extraction(listed.write(), path, model=make_backbone(), clip_seconds=1.0)
    assert plan.changed == "labels of 1 clip, audio of 1 clip, 1 clip added, 1 clip dropped"
    assert (plan.clips, plan.done) == (9, 7) and array_bytes(path) == before


def test_settings_that_differ_are_refused_before_anything_is_changed(tmp_path, listed):
    path = tmp_path / "a.zarr"
    run(listed, path)
    listed.rows[0]["label"] = "new"
    before = array_bytes(path)
    with pytest.raises(CacheError, match="made with other settings .*random0, not random1"):
        extract(listed.write(), path, model=make_backbone(1), **OPTIONS)
    assert array_bytes(path) == before


def test_a_system_that_cannot_exchange_names_does_it_in_two_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(rebuild.ctypes, "CDLL", lambda *_args, **_options: object())
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    rebuild.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a/b").exists() and (tmp_path / "b/a").exists() and len(list(tmp_path.iterdir())) == 2


def test_a_kill_between_the_two_steps_loses_nothing(tmp_path):
    (tmp_path / ".a.zarr.before").mkdir()
    rebuild.recover(tmp_path / "a.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


def _run_in_child(listed: Listed, path: Path) -> None:
    run(listed, path, update=True, prune=True)


def test_a_kill_at_any_time_leaves_the_old_cache_or_the_new_one(tmp_path, listed):
    path, context = tmp_path / "a.zarr", multiprocessing.get_context("spawn")
    run(listed, path)
    old = held(path)
    del listed.rows[1]
    listed.add(at=0)
    listed.sound("n5.wav")
    listed.rows[4]["label"] = "new"
    run(listed, tmp_path / "anew.zarr")
    new = held(tmp_path / "anew.zarr")
    for number in range(8):
        child = context.Process(target=_run_in_child, args=(listed, path))
        child.start()
        wait_until_update(path, child, number * 0.012)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        cache = FeatureCache.open(path)
        assert set(cache.ids.tolist()) in (set(old), set(new))
    run(listed, path, update=True, prune=True)
    assert held(path) == new
    assert not update_path(path).exists()


def wait_until_update(path: Path, child, seconds: float) -> None:
    """Until an update has begun, and a moment longer."""
    end = time.monotonic() + 60
    while not update_path(path).exists() and child.is_alive() and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(seconds)


def test_labels_are_compared_by_name_many_rows_at_a_time(monkeypatch):
    """Sparse or not, and with another list of classes, as they are row by row."""
    monkeypatch.setattr(changes, "ROWS_COMPARED", 3)
    rng = np.random.default_rng(0)
    old, new = (rng.integers(2, size=(20, 3)).astype(np.uint8) for _ in range(2))
    spec = CacheSpec("b", "", 1, 1, 1.0, class_names=("x", "y", "z"))
    here, ours = np.arange(0, 20, 2), rng.permutation(20)[:10]
    new[ours[:5], :] = old[here[:5], :]
    for names in (("x", "y", "z"), ("z", "x", "y"), ("x", "y", "w")):
        told = SimpleNamespace(labels=old, spec=replace(spec, class_names=names))
        expected = [
            {names[c] for c in np.flatnonzero(old[a])} != {"xyz"[c] for c in np.flatnonzero(new[b])}
            for a, b in zip(here, ours, strict=True)
        ]
        sparse = SparseLabels.of([np.flatnonzero(row).tolist() for row in new], 3)
        for labels in (new, sparse):
            assert changes._labels_differ(told, spec, here, labels, ours).tolist() == expected


def test_digests_of_files_are_those_of_their_sources(tmp_path):
    """Of whole files, parts, and files that are not there: read from columns, as one by one."""

    class Others(Dataset):
        def source(self, row):
            return super().source(row)

    write_wav(tmp_path / "a.wav", noise(1, 1.5))
    clips = (
        Clip("a", "a.wav"),
        Clip("b", "a.wav", start=0.5),
        Clip("c", "a.wav", start=0.5, end=1.0),
        Clip("d", "d.wav"),
    )
    for some in (clips, clips[:1], clips[3:]):
        found = source_digests(Dataset("d", tmp_path, some))
        assert found.tolist() == source_digests(Others("d", tmp_path, some)).tolist()
        assert (found == 0).tolist() == [clip.id == "d" for clip in some] and len(set(found)) == len(some)


def test_digests_tell_files_parts_sizes_and_times_apart(listed):
    dataset = open_dataset(listed.write())
    first = source_digests(dataset)
    assert len(set(first.tolist())) == 9 and first.all()
    assert (source_digests(dataset) == first).all()
    os.utime(listed.folder / "n0.wav", ns=(5, 5))
    (listed.folder / "n1.wav").unlink()
    changed = source_digests(replace(dataset, clips=(*dataset.clips[:8], replace(dataset.clips[8], start=0.5))))
    assert np.flatnonzero(changed != first).tolist() == [0, 1, 8] and changed[1] == 0


@pytest.mark.parametrize("where", ["chunk", "metadata", "gone"])
@pytest.mark.parametrize("name", ["id", "path", "split", "fold", "labels", "digest", "error"])
def test_repair_mends_every_column_from_the_dataset(tmp_path, listed, name, where):
    path = tmp_path / "a.zarr"
    listed.sound("n2.wav")
    (listed.folder / "n2.wav").write_bytes(b"RIFF")
    run(listed, path)
    whole = held_or_failed(path)
    files = [file for file in (path / name).rglob("*") if file.is_file()]
    if where == "gone":
        for file in files:
            file.unlink()
    else:
        file = next(file for file in files if (file.name == "zarr.json") == (where == "metadata"))
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0x80
        file.write_bytes(data)
    assert not verify(path).ok
    report = run(listed, path, repair=True)
    restored, mended = (
        f"damaged metadata of the cache was restored: {name}/zarr.json",
        f"damaged are written again from the dataset: {name}",
    )
    if name == "error":  # made of the log
        mended = (
            f"damaged status of clips was rewritten: error{'/c.0 is damaged' if where == 'chunk' else ' is not what'}"
        )
    said = {"chunk": [mended], "metadata": [restored], "gone": [restored, mended]}[where]
    assert all(any(words in note for note in report.notes) for words in said), report.notes
    assert verify(path).ok and held_or_failed(path) == whole
    assert run(listed, path).written == 0


def held_or_failed(path: Path) -> dict[str, tuple]:
    cache = FeatureCache.open(path)
    found = {}
    for row, name in enumerate(cache.ids):
        features = cache.features([row]).tobytes() if cache.done[row] else str(cache.errors[row])
        found[str(name)] = (
            features, str(cache.paths[row]), int(cache.fold[row]), str(cache.split[row]),
            cache.labels[row].tolist(), int(cache.digests[row]),
        )  # fmt: skip
    return found


def test_columns_are_not_mended_where_nobody_knows_which_clip_is_which(tmp_path, listed):
    path = tmp_path / "a.zarr"
    run(listed, path)
    for name in ("id", "labels"):
        next((path / name).glob("c.*")).unlink()
    del listed.rows[0]
    with pytest.raises(CacheError, match=r"damaged columns \(id.*no longer holds the same clips"):
        run(listed, path, repair=True)
    listed.add()
    with pytest.raises(CacheError, match="no longer holds the same clips"):
        run(listed, path, repair=True)
