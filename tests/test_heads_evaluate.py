"""Evaluation takes every clip, in order, and only a cache that the head was made for."""

import numpy as np
import pytest
import torch

from planted import planted_cache
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.heads import build_head, evaluate, evaluate_head
from whisper_at_cli.heads.checkpoint import HeadDescription, load_head, save_head
from whisper_at_cli.heads.data import load_clips
from whisper_at_cli.heads.metrics import evaluate_scores

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
    return save_head(build_head("wa-tr", layers=L, dim=D, classes=C), folder, description)


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
    assert len(rows) == N - 1
    with torch.no_grad():
        logits = load_head(folder)(torch.from_numpy(cache.features(rows)))
    expected = evaluate_scores(logits, cache.labels[rows])
    assert found.accuracy == expected.accuracy
    np.testing.assert_allclose(found.class_ap, expected.class_ap)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"backbone": "base"}, "features with backbone base and .* has planted"),
        ({"weights_sha256": "f" * 64}, "features with weights_sha256 f"),
        ({"clip_seconds": 10.0}, "features with clip_seconds 10.0 and .* has 5.0"),
        ({"class_names": ("a", "b", "c", "d")}, r"features with class_names 4 \(a, b, c, d\)"),
    ],
)
def test_a_head_for_other_features_is_refused(cache, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        evaluate_head(saved_head(tmp_path / "head", cache, **changes), cache, device="cpu")
