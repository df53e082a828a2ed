"""Evaluation takes every clip, in order, and only a cache that the head was made for."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from test_cli import run

from planted import planted_cache
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.evaluation.metrics import evaluate_scores
from whisper_at_cli.heads import build_head, evaluate, evaluate_head, train_head
from whisper_at_cli.heads.checkpoint import HeadDescription, load_head, save_head
from whisper_at_cli.heads.training.data import load_clips

N, L, T, D, C = 53, 3, 25, 16, 4


@pytest.fixture
def cache(tmp_path):
    features = np.random.default_rng(0).normal(size=(N, L, T, D)).astype(np.float32)
    return planted_cache(tmp_path / "a.zarr", features, np.arange(N) % C, failed=(5,))


def saved_head(folder, cache, **changes):
    spec = cache.spec
    fields = dict(
        head="wa-tr", layers=spec.layers, dim=spec.dim, frames=spec.frames, class_names=spec.class_names,
        backbone=spec.backbone, weights_sha256=spec.weights_sha256, clip_seconds=spec.clip_seconds, loss="ce",
    )  # fmt: skip
    description = HeadDescription(**(fields | changes))
    module = build_head("wa-tr", layers=description.layers, dim=description.dim, classes=description.classes)
    return save_head(module, folder, description)


@pytest.mark.parametrize("batch_bytes", [1, 7 * 4 * L * T * D, 1 << 30])
@torch.no_grad()
def test_predictions_are_those_of_each_clip_alone_whatever_the_batch(cache, batch_bytes, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH_BYTES", batch_bytes)
    module = build_head("wa-tr", layers=L, dim=D, classes=C)
    clips = load_clips(cache, np.flatnonzero(cache.done), "features", torch.device("cpu"))
    positions = np.array([10, 3, 50, 3, *range(20)])
    logits = evaluate.predict(module, clips, positions)
    alone = torch.cat([module(clips.batch(torch.tensor([position]))) for position in positions])
    np.testing.assert_allclose(logits, alone.numpy(), rtol=1e-5, atol=1e-5)


def test_evaluation_counts_every_finished_clip(cache, tmp_path):
    folder = saved_head(tmp_path / "head", cache)
    found = evaluate_head(folder, cache, device="cpu")
    rows = np.flatnonzero(cache.done)
    assert len(rows) == N - 1 == found.clips
    with torch.no_grad():
        logits = load_head(folder)(torch.from_numpy(cache.features(rows)))
    expected = evaluate_scores(logits, cache.labels[rows])
    assert found.accuracy == expected.accuracy
    np.testing.assert_allclose(list(found.class_ap.values()), expected.class_ap)
    assert list(found.class_ap) == list(cache.spec.class_names)
    assert np.trace(found.confusion["matrix"]) == round(found.accuracy * found.clips)
    assert list(found.class_clips.values()) == cache.labels[rows].sum(axis=0).tolist()


@pytest.mark.parametrize(
    "head", ["last-mlp", "wa-mlp", "last-tr", "wa-tr", "tl-tr", "concat-linear", "concat-linear-stats"]
)
@torch.no_grad()
def test_logits_of_a_cache_read_in_pieces_are_those_of_all_of_it_at_once(cache, head, monkeypatch):
    module = build_head(head, layers=L, dim=D, classes=C).eval()
    rows = np.flatnonzero(cache.done)[::-1].copy()
    whole = module(torch.from_numpy(cache.features(rows)))
    monkeypatch.setattr(evaluate, "READ_BYTES", 5 * 4 * L * T * D)
    told = []

    def progress(done, total, message=""):
        told.append((done, total))

    streamed = evaluate.stream_logits(module, cache, rows, torch.device("cpu"), progress)
    torch.testing.assert_close(streamed, whole, rtol=1e-5, atol=1e-5)
    assert told[-1] == (N - 1, N - 1)
    assert head in ("last-mlp", "wa-mlp", "concat-linear") or len(told) == -(-(N - 1) // 5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"backbone": "base"}, "features with backbone base and .* has planted"),
        ({"weights_sha256": "f" * 64}, "features with weights_sha256 f"),
        ({"clip_seconds": 10.0}, "features with clip_seconds 10.0 and .* has 5.0"),
        ({"layers": 4}, "features with layers 4 and .* has 3"),
        ({"dim": 32}, "features with dim 32 and .* has 16"),
        (
            {"class_names": ("class0", "class1", "dog", "class2")},
            "lacks 1 classes .'dog'. of the head's; the head does not know 1 classes .'class3'.",
        ),
        ({"class_names": ("class0", "class1", "class2")}, "tells 3 classes apart and .* has 4"),
    ],
)
def test_a_head_for_other_features_or_classes_is_refused_with_the_difference(cache, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        evaluate_head(saved_head(tmp_path / "head", cache, **changes), cache, device="cpu")


def test_classes_in_another_order_are_matched_by_name(cache, tmp_path):
    names = cache.spec.class_names
    straight = evaluate_head(saved_head(tmp_path / "head", cache), cache, device="cpu")
    module = load_head(tmp_path / "head")
    order = [2, 0, 3, 1]
    for parameter in module.mlp_layer[1].parameters():
        parameter.data = parameter.data[order]
    description = dataclasses.replace(module.description, class_names=tuple(names[c] for c in order))
    save_head(module, tmp_path / "other", description)
    turned = evaluate_head(tmp_path / "other", cache, device="cpu")
    assert turned.class_ap == pytest.approx(straight.class_ap) and turned.accuracy == straight.accuracy
    assert list(turned.class_ap) != list(straight.class_ap)
    assert any("matched by name" in note for note in turned.notes)


def test_a_head_that_does_not_know_its_classes_or_weights_is_used_with_a_note(cache, tmp_path):
    folder = saved_head(
        tmp_path / "head", cache, class_names=tuple("0123"), class_names_known=False, weights_sha256="unknown"
    )
    notes = " ".join(evaluate_head(folder, cache, device="cpu").notes)
    assert "does not know its classes' names" in notes and "only the backbone's name was compared" in notes


@pytest.fixture
def folds(tmp_path):
    """Sixty clips in five folds and two splits, and heads as training leaves them, but for the ids of their clips."""
    features = np.random.default_rng(0).normal(size=(60, L, T, D)).astype(np.float32)
    split = np.array(["train", "test"])[np.arange(60) % 2]
    return planted_cache(tmp_path / "f.zarr", features, np.arange(60) % C, fold=np.arange(60) // 12 + 1, split=split)


def head_trained_on(folder, cache, rows=None, **changes):
    """A head whose folder says on which clips it was trained, or only how many they were."""
    spec = cache.spec
    description = HeadDescription(
        head="wa-mlp", layers=L, dim=D, frames=T, class_names=spec.class_names, backbone=spec.backbone,
        weights_sha256=spec.weights_sha256, clip_seconds=spec.clip_seconds, loss="ce", **changes,
    )  # fmt: skip
    ids = None if rows is None else cache.ids[rows]
    return save_head(build_head("wa-mlp", layers=L, dim=D, classes=C), folder, description, trained_ids=ids)


def test_a_head_is_evaluated_on_the_clips_that_it_was_not_trained_on(folds, tmp_path):
    folder = head_trained_on(tmp_path / "any", folds, np.flatnonzero(folds.fold != 3))
    found = evaluate_head(folder, folds, device="cpu")
    assert (found.clips, found.clips_trained_on) == (12, 0)
    assert found.chosen == "clips that the head was not trained on"
    assert not any("trained on" in note for note in found.notes)


def test_training_error_is_called_that(folds, tmp_path):
    folder = head_trained_on(tmp_path / "any", folds, np.arange(60))
    found = evaluate_head(folder, folds, device="cpu")
    assert (found.clips, found.clips_trained_on) == (60, 60)
    assert any("trained on 60 of these 60 clips" in note for note in found.notes)
    folder = head_trained_on(tmp_path / "part", folds, np.flatnonzero(folds.fold != 3))
    found = evaluate_head(folder, folds, rows=np.arange(30), device="cpu")
    assert (found.clips, found.clips_trained_on) == (30, 24)


def test_a_head_from_another_dataset_knows_none_of_the_clips(folds, tmp_path):
    other = planted_cache(tmp_path / "o.zarr", np.zeros((3, L, T, D), np.float32), [0, 1, 3])
    with_other_ids = type("Other", (), {"spec": other.spec, "ids": np.array(["x", "y", "z"])})
    folder = head_trained_on(tmp_path / "any", with_other_ids, np.arange(3))
    found = evaluate_head(folder, folds, device="cpu")
    assert (found.clips, found.clips_trained_on, found.chosen) == (60, 0, "all finished clips")


@pytest.mark.parametrize("number", [1, 4])
def test_the_folder_of_a_fold_says_which_clips_were_held_out_where_no_ids_are_recorded(folds, tmp_path, number):
    folder = head_trained_on(tmp_path / "head" / f"fold-{number}", folds, trained_clips=48)
    found = evaluate_head(folder, folds, device="cpu")
    assert (found.clips, found.clips_trained_on) == (12, 0)
    found = evaluate_head(folder, folds, fold=number % 5 + 1, device="cpu")
    assert (found.clips, found.clips_trained_on, found.chosen) == (12, 12, f"fold {number % 5 + 1}")


def test_a_head_trained_on_all_folds_is_recognised_by_its_count_and_else_it_is_said_that_nothing_is_known(
    folds, tmp_path
):
    found = evaluate_head(head_trained_on(tmp_path / "all", folds, trained_clips=60), folds, device="cpu")
    assert found.clips_trained_on == 60
    found = evaluate_head(head_trained_on(tmp_path / "some", folds, trained_clips=31), folds, device="cpu")
    assert found.clips_trained_on is None and any("was not recorded" in note for note in found.notes)


def test_fold_and_split_choose_clips_and_are_named_when_there_are_none(folds, tmp_path):
    folder = head_trained_on(tmp_path / "head", folds)
    assert evaluate_head(folder, folds, split="test", device="cpu").clips == 30
    assert evaluate_head(folder, folds, split="test", fold=2, device="cpu").clips == 6
    with pytest.raises(UsageError, match="no finished clip of fold 9; its folds are 1, 2, 3, 4, 5, its splits test"):
        evaluate_head(folder, folds, fold=9, device="cpu")
    with pytest.raises(UsageError, match="given together"):
        evaluate_head(folder, folds, fold=1, rows=np.arange(3), device="cpu")


def test_heads_that_training_saved_are_evaluated_as_training_validated_them(folds, tmp_path):
    result = train_head(folds, head="wa-mlp", changes={"epochs": 2}, out=tmp_path / "head", device="cpu")
    for fold in result.folds:
        found = evaluate_head(tmp_path / "head" / f"fold-{fold['fold']}", folds, device="cpu")
        assert (found.clips, found.clips_trained_on) == (12, 0)
        assert found.accuracy == pytest.approx(fold["value"])
    assert evaluate_head(tmp_path / "head", folds, device="cpu").clips_trained_on == 60


def test_the_command_prints_metrics_and_json(capsys, folds, tmp_path):
    folder = head_trained_on(tmp_path / "head", folds, np.flatnonzero(folds.fold != 3))
    status, out, err = run(capsys, "evaluate", folder, folds.path, "--json", "--device", "cpu")
    found = json.loads(out)
    assert status == 0 and {"mAP", "mAUC", "d_prime", "accuracy", "class_ap", "confusion"} <= set(found)
    assert set(found["class_ap"]) == set(folds.spec.class_names) and found["clips"] == 12
    status, out, err = run(capsys, "evaluate", folder, folds.path, "--fold", "1")
    assert status == 0 and "mAP" in out and "fold 1" in out and "trained on 12 of these 12" in err
    status, _, err = run(capsys, "evaluate", tmp_path, folds.path)
    assert status == 2 and "holds no head" in err


def test_no_negatives_and_no_positives_are_null_in_json(capsys, tmp_path):
    labels = np.tile([1, 0, 0, 0], (6, 1))
    cache = planted_cache(tmp_path / "one.zarr", np.random.default_rng(0).normal(size=(6, L, T, D)), labels)
    status, out, err = run(capsys, "evaluate", head_trained_on(tmp_path / "head", cache), cache.path, "--json")
    found = json.loads(out)
    assert status == 0 and found["class_ap"]["class1"] is None and found["mAUC"] is None and found["d_prime"] is None
    assert "3 of 4 classes are in none of the clips" in err and "1 of 4 classes are in every clip" in err
