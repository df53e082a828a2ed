"""AudioSet as everyone has it: what is missing is named and picked up later, what is there has the right labels."""

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import noise, write_wav
from whisper_at_cli.cli import main
from whisper_at_cli.extract import FeatureCache, extract
from whisper_at_cli.extract.cache import Status
from whisper_at_cli.extract.cache.folds import evaluation_folds
from whisper_at_cli.extract.datasets import open_dataset
from whisper_at_cli.extract.errors import UsageError

LETTERS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"))
HEAD = "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids={n}\n# YTID, start_seconds, end_seconds, labels\n"
LISTS = {"balanced_train_segments.csv": "train", "unbalanced_train_segments.csv": "train", "eval_segments.csv": "eval"}


def file_name(ytid: str, start: float, style: int) -> str:
    """The names under which people keep AudioSet."""
    names = (
        f"{ytid}.wav", f"Y{ytid}.wav", f"{ytid}_{start:.3f}.wav", f"{ytid}_{start:g}.wav",
        f"{ytid}_{start * 1000:.0f}.wav", f"{ytid}_{start:.3f}_{start + 10:.3f}.wav",
        f"{ytid}_{start * 1000:.0f}_{start * 1000 + 10000:.0f}.wav",
    )  # fmt: skip
    return names[style % len(names)]


def make_audioset(root: Path, entries: int, *, seconds: float = 0.0, missing=(), broken=(), classes: int = 527):
    """A made-up AudioSet: (ytid, start, label numbers, split) of each entry. Without seconds, files are empty."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    mids = [f"/m/{number:05x}" for number in range(classes)]
    lines = [f'{number},{mid},"Sound {number}, or so"\n' for number, mid in enumerate(mids)]
    (root / "class_labels_indices.csv").write_text("index,mid,display_name\n" + "".join(lines))
    planted, texts = [], {name: [] for name in LISTS}
    for row, letters in enumerate(LETTERS[rng.integers(64, size=(entries, 11))]):
        ytid, start = "".join(letters), float(rng.integers(60) * 5)
        labels = sorted(rng.choice(classes, size=rng.integers(1, 4), replace=False).tolist())
        name = list(LISTS)[row * 3 // entries]
        shuffled = ",".join(mids[label] for label in rng.permutation(labels))
        texts[name].append(f'{ytid}, {start:.3f}, {start + 10:.3f}, "{shuffled}"\n')
        planted.append((ytid, start, tuple(labels), LISTS[name]))
        if row in missing:
            continue
        path = root / "audio" / f"part{row % 7}" / file_name(ytid, start, row)
        if row in broken:
            path.write_bytes([b"", b"not a sound", b"RIFF\xff\xff\xff\xffWAVEfmt "][row % 3])
        elif seconds:
            write_wav(path, noise(row, seconds))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    for name, rows in texts.items():
        (root / name).write_text(HEAD.format(n=len(rows)) + "".join(rows))
    return planted


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


def test_a_thousand_entries_of_which_some_are_missing_and_some_broken(capsys, tmp_path, tiny_en):
    """150 missing and 20 broken: every other is extracted, each missing one named by id, and all labels are right."""
    order = np.random.default_rng(1).permutation(np.arange(14, 1000))
    missing, broken = set(order[:150].tolist()), set(order[150:170].tolist())
    root, cache_path = tmp_path / "audioset", tmp_path / "as.zarr"
    planted = make_audioset(root, 1000, seconds=0.1, missing=missing, broken=broken)
    command = ("extract", root, cache_path, "--model", tiny_en, "--clip-seconds", "0.5")
    status, out, err = run(capsys, *command)
    assert "850 of 1,000 listed clips are there (85.0 %)" in out
    assert "830 clips written, 0 were there, 170 failed" in out and status == 1, "broken files are failures"
    shown = [line.removeprefix("missing: ") for line in err.splitlines() if line.startswith("missing: ")]
    assert shown == [
        *(planted[row][0] for row in sorted(missing)[:20]),
        f"130 more; all of them: whisper-at-cli info {cache_path}",
    ]
    status, out, _ = run(capsys, *command, "--json")
    report = json.loads(out)
    by_error = {True: set(), False: set()}
    for failure in report["failures"]:
        by_error[failure["error"].startswith("missing:")].add(failure["id"])
    assert by_error == {True: {planted[row][0] for row in missing}, False: {planted[row][0] for row in broken}}
    assert (report["missing"], report["coverage"]) == (150, 0.85)

    cache = FeatureCache.open(cache_path)
    assert cache.ids.tolist() == [ytid for ytid, *_ in planted] and cache.split.tolist() == [
        split for *_, split in planted
    ]
    expected = np.zeros((1000, 527), dtype=np.uint8)
    for row, (_, _, labels, _) in enumerate(planted):
        expected[row, list(labels)] = 1
    np.testing.assert_array_equal(cache.labels, expected)
    assert cache.spec.class_names[3] == "Sound 3, or so" and len(cache.spec.class_names) == 527
    assert set(np.flatnonzero(~cache.done)) == missing | broken
    folds, _ = evaluation_folds(cache.fold, cache.split, cache.labels, cache.done)
    assert len(folds) == 1 and {planted[row][3] for row in folds[0].test} == {"eval"}

    for row in sorted(missing)[:10]:  # found again, each under another of the names
        write_wav(root / "found" / file_name(*planted[row][:2], row), noise(row, 0.1))
    status, out, _ = run(capsys, *command, "--json")
    report = json.loads(out)
    assert (report["written"], report["skipped"], report["failed"], report["missing"]) == (10, 830, 160, 140)
    again = FeatureCache.open(cache_path)
    assert again.done[sorted(missing)[:10]].all()
    assert again.paths[min(missing)].startswith("found/") and again.errors[min(missing)] == ""
    assert set(again.errors[list(broken)]) == set(cache.errors[list(broken)]), "other failures keep their reasons"
    np.testing.assert_array_equal(
        again.features(np.flatnonzero(cache.done)), cache.features(np.flatnonzero(cache.done))
    )


def test_missing_clips_alone_are_no_failure_of_audioset_but_no_clip_at_all_is(capsys, tmp_path, tiny_en):
    make_audioset(tmp_path / "as", 12, seconds=0.1, missing={3, 4}, classes=5)
    options = ("--model", tiny_en, "--clip-seconds", "0.5")
    status, out, _ = run(capsys, "extract", tmp_path / "as", tmp_path / "as.zarr", *options)
    assert status == 0 and "10 of 12 listed clips are there (83.3 %)" in out
    status, out, _ = run(capsys, "extract", tmp_path / "as" / "eval_segments.csv", tmp_path / "eval.zarr", *options)
    assert status == 0 and "4 clips written" in out and "listed" not in out
    make_audioset(tmp_path / "none", 12, missing=set(range(12)), classes=5)
    status, out, _ = run(capsys, "extract", tmp_path / "none", tmp_path / "none.zarr", *options)
    assert status == 1 and "0 of 12 listed clips are there (0.0 %)" in out


def test_repair_takes_up_missing_clips_too(tmp_path, random_backbone):
    planted = make_audioset(tmp_path / "as", 9, seconds=0.1, missing={1, 5}, classes=5)
    options = dict(model=random_backbone, clip_seconds=0.5)
    report = extract(tmp_path / "as", tmp_path / "as.zarr", **options)
    assert report.missing == 2 and report.ok
    assert [failure.error for failure in report.failures] == ["missing: No such file or directory"] * 2
    write_wav(tmp_path / "as" / f"{planted[5][0]}.wav", noise(0, 0.1))
    report = extract(tmp_path / "as", tmp_path / "as.zarr", repair=True, **options)
    assert (report.written, report.missing) == (1, 1)
    cache = FeatureCache.open(tmp_path / "as.zarr")
    assert (cache.status == Status.DONE).sum() == 8 and cache.paths[5] == f"{planted[5][0]}.wav"


def test_a_missing_file_of_another_dataset_is_a_failure(tmp_path, random_backbone):
    write_wav(tmp_path / "a.wav", noise(0, 0.1))
    (tmp_path / "manifest.csv").write_text("audio\na.wav\nb.wav\n")
    report = extract(tmp_path / "manifest.csv", tmp_path / "a.zarr", model=random_backbone, clip_seconds=0.5)
    assert (report.missing, report.coverage, report.ok) == (1, 0.5, False)


def test_each_list_can_be_chosen_and_all_are_used_by_default(tmp_path):
    planted = make_audioset(tmp_path / "as", 30)
    assert [clip.id for clip in open_dataset(tmp_path / "as").clips] == [ytid for ytid, *_ in planted]
    for name, split in LISTS.items():
        dataset = open_dataset(tmp_path / "as" / name)
        assert len(dataset) == 10 and {clip.split for clip in dataset.clips} == {split}
        assert all(dataset.audio_path(clip).is_file() for clip in dataset.clips)


def test_two_segments_of_one_video_are_kept_apart_by_their_start(tmp_path):
    make_audioset(tmp_path / "as", 3, classes=2)
    text = 'abcdefghijk, 0.000, 10.000, "/m/00000"\nabcdefghijk, 30.000, 40.000, "/m/00001"\n'
    (tmp_path / "as" / "eval_segments.csv").write_text(HEAD + text)
    (tmp_path / "as" / "abcdefghijk_30.flac").touch()
    clips = open_dataset(tmp_path / "as" / "eval_segments.csv").clips
    assert [(clip.id, clip.path) for clip in clips] == [
        ("abcdefghijk_0", "abcdefghijk"), ("abcdefghijk_30", "abcdefghijk_30.flac")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line, reason",
    [
        ("abcdefghijk, 0.000\n", "line 4 .*has 2 fields"),
        ('abcdefghijk, zero, 10.000, "/m/00000"\n', "line 4 .*start is 'zero'"),
        ('abcdefghijk, 20, 10.000, "/m/00000"\n', "line 4 .*end is 10 and start 20"),
        ('abcdefghijk, 0, 10.000, "/m/nothing"\n', "line 4 .*label '/m/nothing' is none of the 2 classes"),
        ('abcdefghijk, 0, 10, "/m/00000"\nabcdefghijk, 0, 10, "/m/00000"\n', "line 5 .*listed twice"),
        ('../../etc/passwd, 0, 10, "/m/00000"\n', "is not a YouTube id"),
    ],
)
def test_a_broken_segment_list_is_refused_with_its_line(tmp_path, line, reason):
    make_audioset(tmp_path / "as", 3, classes=2)
    (tmp_path / "as" / "eval_segments.csv").write_text(HEAD.format(n=1) + line)
    with pytest.raises(UsageError, match=reason):
        open_dataset(tmp_path / "as" / "eval_segments.csv")


def test_audioset_without_its_class_list_says_so(tmp_path):
    make_audioset(tmp_path / "as", 3, classes=2)
    (tmp_path / "as" / "class_labels_indices.csv").rename(tmp_path / "classes.csv")
    with pytest.raises(UsageError, match="class_labels_indices.csv.*--labels"):
        open_dataset(tmp_path / "as")
    assert len(open_dataset(tmp_path / "as", labels=tmp_path / "classes.csv").class_names) == 2
