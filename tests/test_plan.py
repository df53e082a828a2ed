"""`--limit` takes the first clips and says so; `--dry-run` says what a run would make, and makes nothing."""

import json
import math

import numpy as np
import pytest
import zarr

from conftest import noise, write_wav
from whisper_at_cli.cli import main
from whisper_at_cli.extract import FeatureCache, extract
from whisper_at_cli.extract.errors import CacheError, UsageError
from whisper_at_cli.extract.pipeline import plan
from whisper_at_cli.extract.pipeline.plan import plan_extraction


@pytest.fixture
def sounds(tmp_path):
    for number in range(6):
        write_wav(tmp_path / "sounds" / ("cat", "dog")[number % 2] / f"{number}.wav", noise(number, 2.0))
    return tmp_path / "sounds"


def test_a_limit_takes_the_first_clips_and_is_recorded(tmp_path, sounds, random_backbone):
    whole = extract(sounds, tmp_path / "whole.zarr", model=random_backbone, clip_seconds=1.0)
    some = extract(sounds, tmp_path / "some.zarr", model=random_backbone, clip_seconds=1.0, limit=4)
    assert (whole.clips, some.clips, some.written) == (6, 4, 4)
    ours, theirs = FeatureCache.open(tmp_path / "some.zarr"), FeatureCache.open(tmp_path / "whole.zarr")
    assert ours.ids.tolist() == theirs.ids[:4].tolist() and ours.spec.class_names == ("cat", "dog")
    assert np.allclose(ours.features(range(4)), theirs.features(range(4)), atol=2e-3)
    assert ours.attributes["made"]["limit"] == 4 and "limit" not in theirs.attributes["made"]
    assert extract(sounds, tmp_path / "some.zarr", model=random_backbone, clip_seconds=1.0, limit=4).skipped == 4
    with pytest.raises(CacheError, match="no longer has 2 clips"):
        extract(sounds, tmp_path / "some.zarr", model=random_backbone, clip_seconds=1.0, limit=2)
    grown = extract(sounds, tmp_path / "some.zarr", model=random_backbone, clip_seconds=1.0)
    assert (grown.written, grown.skipped) == (2, 4)
    assert "limit" not in FeatureCache.open(tmp_path / "some.zarr").attributes["made"]
    windows = extract(sounds, tmp_path / "windows.zarr", model=random_backbone, window=1.0, limit=3)
    assert windows.written == 3 and FeatureCache.open(tmp_path / "windows.zarr").ids.tolist() == ["0_0", "0_1", "2_0"]
    assert extract(sounds, tmp_path / "all.zarr", model=random_backbone, clip_seconds=1.0, limit=99).written == 6
    with pytest.raises(UsageError, match="limit is 0"):
        extract(sounds, tmp_path / "none.zarr", model=random_backbone, limit=0)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_plan_says_what_a_cache_then_has(tmp_path, sounds, random_backbone, dtype):
    asked = {"model": random_backbone, "clip_seconds": 1.0, "dtype": dtype, "limit": 5, "batch_size": 2}
    found = plan_extraction(sounds, tmp_path / "a.zarr", **asked)
    assert not (tmp_path / "a.zarr").exists() and (found.exists, found.done, found.clips) == (False, 0, 5)
    assert found.hours == round(5 / 3600, 3) and (found.classes, found.batch_size, found.device) == (2, 2, "cpu")
    assert found.clips_per_second > 0 and math.isclose(found.seconds, 5 / found.clips_per_second, abs_tol=0.06)
    assert any("2 classes from folder names" in note for note in found.notes)
    extract(sounds, tmp_path / "a.zarr", **asked)
    cache = FeatureCache.open(tmp_path / "a.zarr")
    assert (cache.spec.layers, cache.spec.dim, cache.clips_per_shard) == (
        found.layers,
        found.dim,
        found.clips_per_shard,
    )
    arrays = zarr.open_group(tmp_path / "a.zarr", mode="r").arrays()
    assert found.bytes == sum(array.nbytes for _, array in arrays if array.dtype.kind not in "TO")
    again = plan_extraction(sounds, tmp_path / "a.zarr", **asked)
    assert (again.exists, again.done, again.seconds, again.clips_per_second) == (True, 5, None, None)


def test_a_time_that_would_take_long_to_measure_is_not_stated(tmp_path, sounds, random_backbone, monkeypatch):
    monkeypatch.setattr(plan, "TIMED_SECONDS", 0.0)
    found = plan_extraction(sounds, tmp_path / "a.zarr", model=random_backbone, clip_seconds=1.0)
    assert (found.seconds, found.clips_per_second) == (None, None)


def test_a_dry_run_prints_a_table_or_json(tmp_path, sounds, tiny_en, capsys):
    command = ["extract", str(sounds), str(tmp_path / "a.zarr"), "--model", str(tiny_en), "--dry-run", "--limit", "2"]
    for more in ([], ["--json"], ["--engine", "ray"]):
        with pytest.raises(SystemExit) as exit:
            main([*command, *more])
        out, err = capsys.readouterr()
        assert exit.value.code == (2 if "ray" in more else 0), err
        if more == ["--json"]:
            assert json.loads(out)["clips"] == 2 and json.loads(out)["bytes"] > 0
    assert "--dry-run is for --engine local and one device" in err and not (tmp_path / "a.zarr").exists()
