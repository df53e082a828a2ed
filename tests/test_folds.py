"""Dividing a cache into training and testing: nothing leaks, the dataset's own division comes first."""

import numpy as np
import pytest

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.folds import evaluation_folds

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
