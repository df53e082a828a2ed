"""`verify` says which array, shard and clips are damaged."""

import json

from test_cache import D, L, N, flip, small_cache

from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.cache.verify import Damage, verify


def test_arrays_of_another_shape_or_type_than_the_attributes_say_are_damage(tmp_path):
    cache = small_cache(tmp_path / "a.zarr")
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


def test_damage_of_status_and_of_valid_frames_names_its_shard(tmp_path):
    cache = small_cache(tmp_path / "a.zarr")
    flip(cache.path / "status/c/2", 0)
    flip(cache.path / "valid_frames/c/0", 0)
    assert verify(cache.path).damaged == (
        Damage(2, ("clip8", "clip9", "clip10"), "status/c/2 is damaged: its CRC-32C does not match"),
        Damage(0, ("clip0", "clip1", "clip2", "clip3"), "valid_frames/c/0 is damaged: its CRC-32C does not match"),
    )
    assert FeatureCache.open(cache.path).damaged_chunks == {"status": {2}, "valid_frames": set()}
