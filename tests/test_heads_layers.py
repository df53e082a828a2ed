"""Heads say which layers they look at, and head.json holds the value that training prints."""

import json

import numpy as np
import pytest
import torch
from test_cli import run

from planted import planted_cache
from whisper_at_cli.heads import build_head, evaluate_head, load_head, train_head

N, L, T, D, C = 48, 4, 25, 16, 3
CLASSES = np.arange(N) % C
FOLD = np.arange(N) // C % 3 + 1


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(N, L, T, D)) + rng.normal(size=(C, L, 1, D))[CLASSES]
    return planted_cache(tmp_path_factory.mktemp("layers") / "a.zarr", features, CLASSES, fold=FOLD)


@torch.no_grad()
def test_attention_is_that_of_the_block_over_layers_written_out():
    torch.manual_seed(0)
    head = build_head("tl-tr", layers=L, dim=D, classes=C).eval()
    for parameter in head.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    features, attention = torch.randn(5, L, T, D), head.layer_tr.attn
    for clip, found in zip(features, head.layer_attention(features), strict=True):
        layers = torch.stack([head.time_tr(layer[None])[0].mean(dim=0) for layer in clip])
        normed, received = head.layer_tr.attn_ln(layers), torch.zeros(L)
        for first in range(0, D, D // 8):  # eight attention heads
            part = slice(first, first + D // 8)
            for query in attention.query(normed)[:, part]:
                scores = torch.stack([query @ key for key in attention.key(normed)[:, part]]) / (D // 8) ** 0.5
                received += scores.softmax(dim=0)
        torch.testing.assert_close(found, received / (8 * L), rtol=1e-4, atol=1e-6)
        assert found.sum() == pytest.approx(1)


def test_a_class_has_the_mean_attention_of_its_held_out_clips(cache, tmp_path, capsys):
    found = train_head(cache, head="tl-tr", width=8, changes={"epochs": 2}, out=tmp_path / "head", device="cpu")
    expected = np.zeros((C, L))
    for number in (1, 2, 3):
        rows = np.flatnonzero(number == FOLD)
        head = load_head(tmp_path / "head" / f"fold-{number}")
        attention = head.layer_attention(torch.from_numpy(cache.features(rows))).detach().numpy()
        np.add.at(expected, CLASSES[rows], attention / (N // C))
        evaluated = evaluate_head(tmp_path / "head" / f"fold-{number}", cache)
        of_fold = {f"class{c}": attention[CLASSES[rows] == c].mean(axis=0) for c in range(C)}
        for name, values in evaluated.class_attention.items():
            np.testing.assert_allclose(values, of_fold[name], atol=1e-5)
    assert list(found.class_attention) == list(cache.spec.class_names)
    np.testing.assert_allclose(list(found.class_attention.values()), expected, atol=1e-5)
    out = run(capsys, "evaluate", tmp_path / "head" / "fold-1", cache.path)[1]
    assert "attention to layers" in out
    out = run(capsys, "train-head", cache.path, "--head", "tl-tr", "--dim", "8", "--epochs", "1")[1]
    assert "attention to layers" in out and "mean over classes" in out


@pytest.mark.parametrize("head", ["wa-mlp", "wa-tr"])
def test_evaluate_says_what_each_layer_counts(cache, tmp_path, capsys, head):
    train_head(cache, head=head, changes={"epochs": 2}, out=tmp_path / "head", device="cpu")
    weights = load_head(tmp_path / "head").layer_weight.detach()
    status, out, _ = run(capsys, "evaluate", tmp_path / "head", cache.path, "--json")
    found = json.loads(out)
    assert status == 0 and found["class_attention"] is None
    assert found["layer_weights"] == pytest.approx((weights / weights.sum()).tolist())
    assert "layer weights" in run(capsys, "evaluate", tmp_path / "head", cache.path)[1]


@pytest.mark.parametrize("labels", ["single", "several"])
def test_head_json_holds_the_value_that_training_prints_with_its_interval(cache, tmp_path, labels):
    if labels == "several":
        several = np.eye(C, dtype=np.uint8)[CLASSES]
        several[::7, 0] = 1
        cache = planted_cache(tmp_path / "b.zarr", cache.features(np.arange(N)), several, fold=FOLD)
    found = train_head(cache, head="wa-mlp", changes={"epochs": 2}, out=tmp_path / "head", device="cpu")
    kept = load_head(tmp_path / "head").description
    assert (kept.value, kept.ci95) == (found.value, found.ci95) and kept.metric == found.metric
    values = [fold["value"] for fold in found.folds]
    assert (kept.fold_mean, kept.fold_std) == pytest.approx((np.mean(values), np.std(values)))
    assert (found.fold_mean, found.std) == (kept.fold_mean, kept.fold_std)
    assert found.seeds[0]["value"] == pytest.approx(found.value, abs=1e-6)
    if labels == "several":
        assert abs(found.value - found.fold_mean) > 1e-6  # pooled, and not the mean over folds
    one = load_head(tmp_path / "head" / "fold-2").description
    assert one.value == pytest.approx(values[1]) and one.ci95[0] <= one.value <= one.ci95[1]
