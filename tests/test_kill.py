"""Killed anywhere, extraction continues and ends with the same bytes as if nothing had happened."""

import multiprocessing
import random
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import array_bytes, make_backbone, noise, write_wav
from whisper_at_cli.extract import FeatureCache, extract

KILLS = 20
CLIPS, CLIPS_PER_SHARD = 120, 3
OPTIONS = dict(clip_seconds=0.5, batch_size=2, shard_mb=CLIPS_PER_SHARD * 3 * 25 * 64 * 2 / 1e6)


def extract_in_child(sounds: Path, cache: Path, shard: tuple[int, int]) -> None:
    report = extract(sounds, cache, model=make_backbone(), shard=shard, **OPTIONS)
    assert report.failed == 0


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill") / "sounds"
    for index in range(CLIPS):
        write_wav(folder / f"{index:03d}.wav", noise(index, 0.5))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(sounds):
    """The bytes of a run that nothing disturbs, in a process like those that are killed."""
    path = sounds.parent / "whole.zarr"
    child = forkserver().Process(target=extract_in_child, args=(sounds, path, (1, 1)))
    child.start()
    child.join()
    assert child.exitcode == 0
    return array_bytes(path)


def forkserver():
    """Children that start at once: torch is imported before they are forked."""
    context = multiprocessing.get_context("forkserver")
    rooms = ("pipeline.local", "cache.reader")
    context.set_forkserver_preload(["torch", *(f"whisper_at_cli.extract.{room}" for room in rooms)])
    return context


def finished_shards(path: Path) -> int:
    if not path.exists():
        return 0
    cache = FeatureCache.open(path)
    return len(np.unique(np.flatnonzero(cache.status) // cache.clips_per_shard))


@pytest.mark.parametrize("processes", [1, 3])
def test_twenty_kills_leave_no_trace(sounds, uninterrupted, tmp_path, processes):
    """Each kill comes at a random moment of the work on the next shards, however fast the machine is."""
    path, context, rng = tmp_path / "killed.zarr", forkserver(), random.Random(processes)
    done_after_kill = [0]
    for kill in range(KILLS):
        children = [
            context.Process(target=extract_in_child, args=(sounds, path, (index, processes)))
            for index in range(1, processes + 1)
        ]
        for child in children:
            child.start()
        goal = finished_shards(path) + rng.choice((0, 1))
        while any(child.is_alive() for child in children) and (finished_shards(path) < goal or not path.exists()):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05) if kill else rng.uniform(0, 0.01))
        for child in rng.sample(children, len(children)):
            child.kill()
        for child in children:
            child.join()
        done_after_kill.append(int(FeatureCache.open(path).done.sum()))
    assert done_after_kill == sorted(done_after_kill), "a kill must never undo what was done"
    middle = [done for done in done_after_kill if 0 < done < CLIPS]
    assert len(set(middle)) >= 5, f"too few kills hit a run in the middle: {done_after_kill}"
    for index in range(1, processes + 1):
        extract_in_child(sounds, path, (index, processes))
    assert array_bytes(path) == uninterrupted
    assert not list(path.rglob(".*.partial"))
