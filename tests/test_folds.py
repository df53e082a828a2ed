"""Dividing a cache into training and testing: nothing leaks, the dataset's own division comes first."""

import numpy as np
import pytest

from whisper_at_cli.extract.cache.folds import _rarest_class, cache_folds, evaluation_folds
from whisper_at_cli.extract.cache.sources import source_recordings
from whisper_at_cli.extract.errors import UsageError

NO_FOLD = np.zeros(60, dtype=int)
NO_SPLIT = np.full(60, "", dtype=object)
CLASSES = np.arange(60) % 6
ALL_DONE = np.ones(60, dtype=bool)


def assert_no_clip_is_on_both_sides(folds):
    for fold in folds:
        assert not set(fold.train) & set(fold.test)


def test_each_official_fold_is_tested_once_on_all_the_others():
    official = np.arange(60) % 3 + 1
    folds, warnings = evaluation_folds(official, NO_SPLIT, CLASSES, ALL_DONE)
    assert [fold.number for fold in folds] == [1, 2, 3] and warnings == []
    assert_no_clip_is_on_both_sides(folds)
    for fold in folds:
        assert (official[fold.test] == fold.number).all()
        assert len(fold.train) + len(fold.test) == 60


def test_official_folds_win_over_a_split():
    split = np.where(np.arange(60) < 40, "train", "test")
    folds, _ = evaluation_folds(np.arange(60) % 3 + 1, split, CLASSES, ALL_DONE)
    assert len(folds) == 3


def test_an_unfinished_clip_neither_trains_nor_tests():
    done = np.arange(60) % 7 != 0
    for official in (NO_FOLD, np.arange(60) % 3 + 1):
        folds, _ = evaluation_folds(official, NO_SPLIT, CLASSES, done)
        for fold in folds:
            assert done[fold.train].all() and done[fold.test].all()
            assert len(fold.train) + len(fold.test) == done.sum()


def test_a_clip_without_a_fold_is_left_out_and_said_so():
    official = np.arange(60) % 4
    folds, warnings = evaluation_folds(official, NO_SPLIT, CLASSES, ALL_DONE)
    assert [fold.number for fold in folds] == [1, 2, 3]
    assert all((official[np.r_[fold.train, fold.test]] > 0).all() for fold in folds)
    assert warnings == ["15 finished clips have no fold and were left out"]


@pytest.mark.parametrize("name", ["test", "eval", "valid", "Validation"])
def test_a_split_trains_on_train_and_tests_on_the_rest(name):
    split = np.where(np.arange(60) < 40, "train", name)
    (fold,), warnings = evaluation_folds(NO_FOLD, split, CLASSES, ALL_DONE)
    assert fold.train.tolist() == list(range(40)) and fold.test.tolist() == list(range(40, 60)) and not warnings


def test_with_valid_and_test_splits_it_is_test_that_is_tested():
    split = np.array(["train"] * 40 + ["valid"] * 5 + ["test"] * 15)
    (fold,), warnings = evaluation_folds(NO_FOLD, split, CLASSES, ALL_DONE)
    assert fold.test.tolist() == list(range(45, 60))
    assert warnings == ["5 finished clips have a split other than train and test and were left out"]


@pytest.mark.parametrize(
    "official, split", [(NO_FOLD, NO_SPLIT), (NO_FOLD + 1, NO_SPLIT), (NO_FOLD, NO_SPLIT + "train")]
)
def test_random_folds_spread_every_class_evenly_with_a_warning(official, split):
    folds, warnings = evaluation_folds(official, split, CLASSES, ALL_DONE)
    assert len(folds) == 5 and "random" in warnings[0]
    assert_no_clip_is_on_both_sides(folds)
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(60))
    for fold in folds:
        assert np.bincount(CLASSES[fold.test], minlength=6).tolist() == [2] * 6


def test_the_seed_and_nothing_else_decides_random_folds():
    divisions = [evaluation_folds(NO_FOLD, NO_SPLIT, CLASSES, ALL_DONE, seed=seed)[0] for seed in (3, 3, 4)]
    tests = [folds[0].test.tolist() for folds in divisions]
    assert tests[0] == tests[1] != tests[2]


def test_one_label_a_clip_gives_the_same_folds_as_class_numbers():
    one_hot = np.eye(6, dtype=np.uint8)[CLASSES]
    by_number, by_label = (evaluation_folds(NO_FOLD, NO_SPLIT, labels, ALL_DONE)[0] for labels in (CLASSES, one_hot))
    for a, b in zip(by_number, by_label, strict=True):
        assert a.test.tolist() == b.test.tolist()


def test_a_rare_label_among_several_is_spread_over_the_folds():
    labels = np.zeros((60, 3), dtype=np.uint8)
    labels[:, 0] = 1
    labels[:10, 1] = 1
    labels[50:, :] = 0
    folds, _ = evaluation_folds(NO_FOLD, NO_SPLIT, labels, ALL_DONE)
    assert [int(labels[fold.test, 1].sum()) for fold in folds] == [2] * 5


def test_three_clips_make_three_folds_and_one_clip_is_refused():
    folds, _ = evaluation_folds(NO_FOLD[:3], NO_SPLIT[:3], CLASSES[:3], ALL_DONE[:3])
    assert len(folds) == 3
    with pytest.raises(UsageError, match="1 of 3 clips are finished"):
        evaluation_folds(NO_FOLD[:3], NO_SPLIT[:3], CLASSES[:3], np.array([True, False, False]))


@pytest.mark.parametrize(
    "dataset, name, other",
    [
        ("esc50", "1-17367-A-10", "3-17367-B-10"),
        ("urbansound8k", "100032-3-0-0", "100032-3-0-12"),
        ("audioset", "Y--4gqARaEJE_0.000_10.000", "--4gqARaEJE_10000_20000"),
        ("esc50", "siren_part1", "siren_part22"),
        ("mine", "walk 7-Segment-3", "walk 7-segment-4"),
    ],
)
def test_clips_of_one_recording_are_told_by_their_names(dataset, name, other):
    for ids, paths in (([name, other], ["", ""]), (["a", "b"], [f"audio/{name}.wav", f"audio/{other}.flac"])):
        first, second = source_recordings(np.array(ids), np.array(paths), dataset)
        assert first == second


@pytest.mark.parametrize(
    "name, other",
    [
        ("1-17367-A-10", "1-17368-A-10"),
        ("dog_1", "dog_2"),
        ("dog_1_2", "dog_1_3"),
        ("clip0", "clip1"),
        ("take1", "take2"),
        ("2024-11-22", "2024-11-23"),
        ("a/walk_part1", "b/walk_part1"),
    ],
)
def test_names_that_leave_a_doubt_are_recordings_of_their_own(name, other):
    first, second = source_recordings(np.array([name, other]), np.array(["", ""]))
    assert first != second


@pytest.mark.parametrize("dataset", ["", "mine", "esc50", "urbansound8k", "audioset"])
@pytest.mark.parametrize(
    "name, other, of",
    [
        ("1-17367-A-10", "3-17367-B-10", "esc50"),
        ("2021-05-01-00", "2021-06-02-08", "urbansound8k"),
        ("MSP-PODCAST_0001_0003", "MSP-PODCAST_0002_0006", "audioset"),
    ],
)
def test_names_that_resemble_those_of_another_dataset_are_recordings_of_their_own(dataset, name, other, of):
    first, second = source_recordings(np.array([name, other]), np.array(["", ""]), dataset)
    assert (first == second) is (dataset == of)


def test_parts_of_one_file_are_one_recording():
    ids, paths = np.array(["a_0", "a_10", "b"]), np.array(["x/a.wav", "x/a.wav", "x/b.wav"])
    first, second, other = source_recordings(ids, paths, "mine")
    assert first == second != other


def test_random_folds_keep_each_recording_together_and_classes_spread():
    rng = np.random.default_rng(0)
    source = rng.permutation(np.r_[np.repeat(np.arange(15), 3), 100 + np.arange(15)])
    labels = source % 3
    folds, (warning,) = evaluation_folds(NO_FOLD, NO_SPLIT, labels, ALL_DONE, sources=lambda: source)
    assert_no_clip_is_on_both_sides(folds)
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(60))
    for fold in folds:
        assert not set(source[fold.train]) & set(source[fold.test])
        assert (np.bincount(labels[fold.test], minlength=3) >= 3).all() and 10 <= len(fold.test) <= 14
    assert "45 clips share 15 recordings" in warning and "kept within one fold" in warning


def test_unique_recordings_change_nothing_and_official_folds_do_not_ask():
    plain, unique = (
        evaluation_folds(NO_FOLD, NO_SPLIT, CLASSES, ALL_DONE, sources=s) for s in (None, lambda: np.arange(60))
    )
    assert plain[1] == unique[1]
    assert all((a.test == b.test).all() for a, b in zip(plain[0], unique[0], strict=True))
    evaluation_folds(np.arange(60) % 3 + 1, NO_SPLIT, CLASSES, ALL_DONE, sources=lambda: 1 / 0)


def test_a_single_recording_cannot_be_kept_apart_and_is_said():
    folds, (warning,) = evaluation_folds(NO_FOLD, NO_SPLIT, CLASSES, ALL_DONE, sources=lambda: np.zeros(60))
    assert len(folds) == 5 and "scores are too high" in warning


def test_two_recordings_make_two_folds():
    folds, _ = evaluation_folds(NO_FOLD, NO_SPLIT, CLASSES, ALL_DONE, sources=lambda: np.arange(60) % 2)
    assert len(folds) == 2 and {len(fold.test) for fold in folds} == {30}


def test_without_its_folds_a_cache_of_esc_10_is_still_divided_by_recording(esc10_cache):
    class Foldless:
        ids, paths, labels, done, split, dataset = (
            getattr(esc10_cache, n) for n in ("ids", "paths", "labels", "done", "split", "dataset")
        )
        fold = np.zeros(len(esc10_cache), dtype=int)

    folds, (warning,) = cache_folds(Foldless(), seed=0)
    source = np.array([name.split("-")[1] for name in Foldless.ids])
    for fold in folds:
        assert not set(source[fold.train]) & set(source[fold.test])
        assert 70 <= len(fold.test) <= 90
    assert "recordings" in warning


def test_the_rarest_of_a_clips_labels_decides_and_no_label_is_a_class_of_its_own():
    labels = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0]])
    assert _rarest_class(labels).tolist() == [1, 0, -1, 2, -1]
    assert _rarest_class(np.zeros((2, 0))).tolist() == [-1, -1]
