"""CKA between layers: the slow formula's, blind to rotation and scale, near 0 for unrelated features."""

import json

import numpy as np
import pytest
from test_cli import run

from planted import planted_cache
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.probe import similarity
from whisper_at_cli.probe.similarity import debiased_cka, layer_similarity


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def slow_hsic(K, L):
    """Song et al. (2012), equation 5, as sums over different clips."""
    n = len(K)
    ij = sum(K[i, j] * L[i, j] for i in range(n) for j in range(n) if i != j)
    ijq = sum(K[i, j] * L[i, q] for i in range(n) for j in range(n) for q in range(n) if len({i, j, q}) == 3)
    ijqr = sum(
        K[i, j] * L[q, r]
        for i in range(n) for j in range(n) for q in range(n) for r in range(n) if len({i, j, q, r}) == 4
    )  # fmt: skip
    pairs = n * (n - 1)
    return ij / pairs - 2 * ijq / (pairs * (n - 2)) + ijqr / (pairs * (n - 2) * (n - 3))


@pytest.mark.parametrize("block", [1 << 24, 20])
def test_cka_is_that_of_the_sums_over_different_clips(rng, block, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK", block)
    x = rng.normal(size=(9, 5))
    layers = [x, np.tanh(x @ rng.normal(size=(5, 7))), rng.normal(size=(9, 3)) + 4]
    grams = [layer @ layer.T for layer in layers]
    hsic = np.array([[slow_hsic(K, L) for L in grams] for K in grams])
    own = np.sqrt(np.diag(hsic))
    np.testing.assert_allclose(debiased_cka(layers), hsic / np.outer(own, own), rtol=1e-9)


def test_rotation_scale_and_shift_change_nothing_and_unrelated_layers_are_near_0(rng):
    x = rng.normal(size=(60, 200))
    turned = 3 * x @ np.linalg.qr(rng.normal(size=(200, 200)))[0]
    unrelated = [rng.normal(size=(60, 200)) for _ in range(20)]
    found = debiased_cka([x, turned, *unrelated])
    assert found[0, 1] == pytest.approx(1, abs=1e-9)
    assert abs(found[0, 2:].mean()) < 0.02, "the plain estimate is about 0.77 here"


def test_layers_of_two_caches_are_matched_by_their_clips(tmp_path, rng):
    x = rng.normal(size=(40, 3, 2, 8)).astype(np.float32)
    one = planted_cache(tmp_path / "a.zarr", x, np.arange(40) % 2)
    other = planted_cache(
        tmp_path / "b.zarr", x[:30, :2] @ rng.normal(size=(8, 8)).astype(np.float32), np.arange(30) % 2, failed=(3,),
        backbone="other",
    )  # fmt: skip
    found = layer_similarity(one, other)
    kept = [row for row in range(30) if row != 3]
    means = [cache.mean(layer=n, rows=kept) for cache, layers in ((one, 3), (other, 2)) for n in range(1, layers + 1)]
    np.testing.assert_allclose(found.cka, debiased_cka([m.astype(float) for m in means])[:3, 3:], atol=1e-5)
    assert found.clips == 29 and (found.first, found.second) == ("planted", "other")
    assert found.warnings[0].startswith("11 finished clips of ") and len(found.warnings) == 1
    alone = np.array(layer_similarity(one).cka)
    assert alone.shape == (3, 3) and np.diag(alone) == pytest.approx([1, 1, 1]) and (alone == alone.T).all()


def test_a_layer_that_is_the_same_for_all_clips_has_no_similarity(tmp_path, rng):
    x = rng.normal(size=(10, 2, 2, 4)).astype(np.float32)
    x[:, 1] = 1
    found = layer_similarity(planted_cache(tmp_path / "a.zarr", x, np.arange(10) % 2))
    assert found.cka == [[pytest.approx(1), None], [None, None]]
    with pytest.raises(UsageError, match="have 3 finished clips in common"):
        layer_similarity(planted_cache(tmp_path / "b.zarr", x[:3], np.arange(3) % 2))


def test_the_command_prints_and_draws_it(capsys, tmp_path, rng):
    x = rng.normal(size=(12, 3, 2, 4)).astype(np.float32)
    planted_cache(tmp_path / "a.zarr", x, np.arange(12) % 2)
    status, out, err = run(capsys, "cka", str(tmp_path / "a.zarr"), "--figure", str(tmp_path / "f.png"))
    assert status == 0 and "1.000" in out and "12 clips" in out and (tmp_path / "f.png").exists(), err
    status, out, _ = run(capsys, "cka", str(tmp_path / "a.zarr"), str(tmp_path / "a.zarr"), "--json")
    assert json.loads(out)["cka"][0][0] == pytest.approx(1)
    assert json.loads((tmp_path / "f.json").read_text())["cka"][1][1] == pytest.approx(1)
