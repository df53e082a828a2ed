"""`verify` says which array, shard and clips are damaged."""

import json

import numpy as np
import pytest
from test_cache import D, L, N, flip, small_cache

from planted import planted_cache
from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.cache.verify import Damage, verify
from whisper_at_cli.extract.errors import UsageError


def test_arrays_of_another_shape_or_type_than_the_attributes_say_are_damage(tmp_path):
    """Also in caches of version 1, which have no copy of their metadata."""
    cache = small_cache(tmp_path / "a.zarr", version=1)
    for name, key, value, said in (
        ("mean", "shape", [N, L, D + 1], "mean/zarr.json says (11, 3, 9) float32, not (11, 3, 8) float32"),
        ("labels", "data_type", "int8", "labels/zarr.json says (11, 2) int8, not (11, 2) uint8"),
        ("path", "shape", [N + 1], "path/zarr.json says (12,)"),
    ):
        file = cache.path / name / "zarr.json"
        whole = file.read_text()
        file.write_text(json.dumps(json.loads(whole) | {key: value}))
        damage, *more = verify(cache.path).damaged
        assert (damage.shard, damage.clips) == (-1, ()) and damage.problem.startswith(said)
        assert all((other.shard, f"/{name} " in other.problem) == (-1, True) for other in more)
        file.write_text(whole)


def test_damage_of_status_and_of_valid_frames_names_its_shard_in_a_cache_of_version_1(tmp_path):
    cache = small_cache(tmp_path / "a.zarr", version=1)
    flip(cache.path / "status/c/2", 0)
    flip(cache.path / "valid_frames/c/0", 0)
    assert verify(cache.path).damaged == (
        Damage(0, ("clip0", "clip1", "clip2", "clip3"), "valid_frames/c/0 is damaged: its CRC-32C does not match"),
        Damage(2, ("clip8", "clip9", "clip10"), "status/c/2 is damaged: its CRC-32C does not match"),
    )
    again = FeatureCache.open(cache.path)
    assert again.status.tolist() == [1] * 8 + [0] * 3
    assert again.clip_status.problems == [(2, "status/c/2 is damaged: its CRC-32C does not match")]


def test_a_share_of_the_clips_is_drawn_and_all_else_is_read(tmp_path):
    cache = planted_cache(
        tmp_path / "a.zarr", np.random.default_rng(0).normal(size=(40, 2, 25, 4)), np.arange(40) % 2,
        shard_mb=4 * 2 * 25 * 4 * 4 / 1e6,
    )  # fmt: skip
    report = verify(cache.path, sample=0.25)
    assert (report.ok, report.clips_read, report.clips_done) == (True, 10, 40)
    assert verify(cache.path, sample=0.001).clips_read == 1
    for shard in range(10):
        flip(cache.path / f"features/c.{shard}.0.0.0", 7)
    found = verify(cache.path, sample=0.5)
    assert not found.ok and len(found.damaged) < len(verify(cache.path).damaged) == 10
    flip(cache.path / "labels/c.0.0", 3)
    assert any("labels" in damage.problem for damage in verify(cache.path, sample=0.025).damaged)
    for wrong in (0, -1, 1.5, np.nan):
        with pytest.raises(UsageError, match="above 0 and at most 1"):
            verify(cache.path, sample=wrong)


@pytest.mark.parametrize("workers", [1, 3, 50])
def test_any_number_of_threads_finds_the_same_in_the_same_order(tmp_path, workers):
    cache = planted_cache(
        tmp_path / "a.zarr", np.random.default_rng(0).normal(size=(40, 2, 25, 4)), np.arange(40) % 2,
        shard_mb=4 * 2 * 25 * 4 * 4 / 1e6, failed=(5, 6),
    )  # fmt: skip
    for shard in (1, 4, 9):
        flip(cache.path / f"features/c.{shard}.0.0.0", 7 + 408 * 4)
    seen = []
    report = verify(cache.path, workers=workers, progress=lambda *at: seen.append(at[:2]))
    assert [damage.shard for damage in report.damaged] == [1, 4, 9] and report.clips_read == 38
    assert seen[-1] == (38, 38) and seen == sorted(seen)
