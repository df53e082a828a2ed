"""Heads that learn from trained heads: targets are mixed as asked, and no teacher has seen what it helps to test."""

import json

import numpy as np
import pytest
import torch
from test_cli import run
from test_heads_train import CLASSES, FAST, FOLD, C, N, planted_features

from planted import planted_cache
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.heads import load_head, train_head
from whisper_at_cli.heads.training.data import load_clips
from whisper_at_cli.heads.training.distill import Teachers, with_teachers

LABELS = np.eye(C, dtype=np.uint8)[CLASSES]


@pytest.fixture
def cache(tmp_path):
    return planted_cache(tmp_path / "planted.zarr", planted_features(2, strength=0.5), CLASSES, fold=FOLD)


@pytest.fixture
def teacher(cache, tmp_path):
    train_head(cache, head="wa-pool", width=16, recipe=FAST, out=tmp_path / "teacher", device="cpu")
    return tmp_path / "teacher"


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_targets_are_labels_and_what_the_head_of_that_fold_says(cache, teacher, loss):
    clips = load_clips(cache, np.arange(N), "mean", torch.device("cpu"))
    train, test = np.flatnonzero(FOLD != 2), np.flatnonzero(FOLD == 2)
    taught = with_teachers(clips, LABELS, Teachers((teacher,), 0.25), 2, train, test, cache=cache, loss=loss)
    with torch.no_grad():
        said = load_head(teacher / "fold-2")(torch.from_numpy(cache.features(train))).softmax(dim=1)
    torch.testing.assert_close(taught.labels[train], 0.75 * torch.from_numpy(LABELS[train]) + 0.25 * said)
    assert (taught.labels[test].numpy() == LABELS[test]).all() and taught.features is clips.features


def test_a_teacher_that_knows_the_test_clips_is_refused(cache, teacher):
    clips = load_clips(cache, np.arange(N), "mean", torch.device("cpu"))
    train, test = np.flatnonzero(FOLD != 2), np.flatnonzero(FOLD == 2)
    for wrong, number in ((teacher / "fold-1", 2), (teacher, 1)):
        with pytest.raises(UsageError, match="was trained on clips that the new head is to be tested on"):
            with_teachers(clips, LABELS, Teachers((wrong,)), number, train, test, cache=cache, loss="ce")
    with pytest.raises(UsageError, match="no head that was trained without fold 7"):
        Teachers((teacher,)).of_fold(7)


def test_every_seed_of_a_teacher_teaches(cache, tmp_path):
    train_head(cache, head="wa-mlp", recipe=FAST, out=tmp_path / "two", seeds=2, device="cpu")
    found = Teachers((tmp_path / "two",)).of_fold(3)
    assert found == [tmp_path / "two" / f"seed-{seed}" / "fold-3" for seed in (0, 1)]
    assert Teachers((tmp_path / "two",)).of_fold(0) == [tmp_path / "two"]


def test_a_taught_head_differs_says_so_and_continues(cache, teacher, tmp_path):
    plain = train_head(cache, head="wa-mlp", recipe=FAST, device="cpu")
    taught = train_head(
        cache, head="wa-mlp", recipe=FAST, teachers=Teachers((teacher,), 1.0), out=tmp_path / "taught", device="cpu"
    )
    assert taught.layer_weights != pytest.approx(plain.layer_weights) and taught.heads_side_by_side == 1
    recorded = load_head(tmp_path / "taught").description.recipe
    assert recorded["teacher_share"] == 1 and len(recorded["teachers"]) == 1
    again = train_head(
        cache, head="wa-mlp", recipe=FAST, teachers=Teachers((teacher,), 1.0), out=tmp_path / "taught", device="cpu"
    )
    assert again.value == taught.value
    with pytest.raises(UsageError):
        train_head(cache, head="wa-mlp", recipe=FAST, out=tmp_path / "taught", device="cpu")


def test_the_command_takes_teachers_and_refuses_what_does_not_go(cache, teacher, tmp_path, capsys):
    command = ("train-head", cache.path, "--head", "wa-mlp", "--epochs", "2", "--teacher", teacher)
    status, out, _ = run(capsys, *command, "--teacher-share", "0.3", "--json")
    assert status == 0 and json.loads(out)["recipe"]["teacher_share"] == 0.3
    for more, said in (
        (("--search",), "--teacher does not go with --search"),
        (("--teacher-share", "0"), "--teacher-share is 0"),
        (("--teacher", tmp_path), "holds no head"),
    ):
        status, _, err = run(capsys, *command, *more)
        assert status == 2 and said in err
    status, _, err = run(capsys, *command[:-2], "--teacher-share", "0.3")
    assert status == 2 and "--teacher-share needs --teacher" in err
    status, _, err = run(capsys, "train-head", cache.path, "--head", "concat-linear", "--teacher", teacher)
    assert status == 2 and "which is solved" in err


@pytest.mark.parametrize("tier", ["memory", "stream"])
def test_what_is_streamed_has_the_targets_too(cache, teacher, tier, tmp_path):
    """And so permuted labels, which a stream once took from the cache instead."""
    losses = []
    for name, options in (
        ("plain", {}), ("permuted", {"permute_labels": True}), ("taught", {"teachers": Teachers((teacher,))}),
    ):  # fmt: skip
        recipe = FAST.with_changes(lr=1e-9, epochs=1, average_from_epoch=None, mixup_rate=0.0)
        train_head(cache, head="wa-mlp", recipe=recipe, tier=tier, out=tmp_path / name, device="cpu", **options)
        line = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        losses.append(line["loss"])
    assert len({round(loss, 6) for loss in losses}) == 3
