"""A run that is killed anywhere continues and ends with the weights of one that nothing disturbed; another command in
its folder is refused."""

import json
import multiprocessing
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from planted import planted_cache
from whisper_at_cli.extract import FeatureCache
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.heads import load_head, train_head
from whisper_at_cli.heads.training import records
from whisper_at_cli.heads.training.recipe import Recipe

N, L, T, D, C = 60, 2, 25, 16, 3
RECIPE = Recipe(loss="ce", lr=0.01, epochs=8, average_from_epoch=4, time_mask_frames=4, batch_size=8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> FeatureCache:
    labels = np.arange(N) % C
    features = np.random.default_rng(0).normal(size=(N, L, T, D)) + np.eye(C, D)[labels][:, None, None, :]
    path = tmp_path_factory.mktemp("resume") / "a.zarr"
    return planted_cache(path, features, labels, fold=np.arange(N) // C % 3 + 1, shard_mb=0.02)


def run(path: Path, out: Path, options: dict) -> None:
    records.SAVING_SHARE = 1e9  # every epoch is saved, however fast it was
    head = options.get("head", "wa-tr")
    recipe = RECIPE if head == "wa-tr" else RECIPE.with_changes(time_mask_frames=0)
    train_head(FeatureCache.open(path), recipe=recipe, out=out, device="cpu", **({"head": head} | options))


def weights(out: Path) -> dict[str, bytes]:
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in sorted(out.rglob("head.safetensors"))}


def lines(out: Path) -> list[tuple]:
    kept = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return sorted((line["training"], line["epoch"], line["loss"]) for line in kept)


@pytest.mark.parametrize(
    "options",
    [{"head": "wa-tr"}, {"head": "wa-mlp", "seeds": 2}, {"head": "wa-tr", "tier": "stream"}],
    ids=["one by one", "side by side", "streamed"],
)
def test_kills_leave_no_trace(cache, tmp_path, options):
    """Each kill comes at a random moment after one more epoch was recorded."""
    run(cache.path, tmp_path / "whole", options)
    context, rng, out = multiprocessing.get_context("forkserver"), random.Random(0), tmp_path / "killed"
    context.set_forkserver_preload(["torch", "whisper_at_cli.heads.training.train", "matplotlib.figure"])
    epochs = len(lines(tmp_path / "whole"))
    seen = []
    for _ in range(6):
        child = context.Process(target=run, args=(cache.path, out, options))
        child.start()
        goal = (seen[-1] if seen else 0) + rng.randint(1, 5)
        while child.is_alive() and recorded(out) < goal:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        child.kill()
        child.join()
        seen.append(recorded(out))
    assert len({done for done in seen if 0 < done < epochs}) >= 2, f"too few kills hit a run in the middle: {seen}"
    run(cache.path, out, options)
    assert weights(out) == weights(tmp_path / "whole")
    assert lines(out) == lines(tmp_path / "whole")
    assert not list(out.rglob("group-*")) and not list(out.rglob(".*.partial"))


def recorded(out: Path) -> int:
    """Whole lines of the metrics so far."""
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_a_finished_run_is_not_done_again(cache, tmp_path, monkeypatch):
    first = train_head(cache, head="wa-tr", recipe=RECIPE, out=tmp_path / "a", device="cpu")
    before = weights(tmp_path / "a")
    reader = "whisper_at_cli.heads.training.runner.load_clips"
    monkeypatch.setattr(reader, lambda *args: pytest.fail("read the clips again"))
    again = train_head(cache, head="wa-tr", recipe=RECIPE, out=tmp_path / "a", device="cpu")
    assert (again.value, again.folds) == (first.value, first.folds) and weights(tmp_path / "a") == before


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"recipe": RECIPE.with_changes(lr=0.02)}, r"recipe.lr was 0.01 and is 0.02 now"),
        ({"seed": 3}, r"recipe.seed was 0 and is 3 now"),
        ({"head": "tl-tr"}, r"head was wa-tr and is tl-tr now"),
        ({"seeds": 2}, r"seeds was 1 and is 2 now"),
        ({"tier": "stream"}, r"order was drawn and is streamed now"),
        (
            {"faithful": True},
            r"recipe.mixup_partner was batch and is uniform now; recipe.time_mask_frames was 4 and is 9 now; "
            r"recipe.time_mask_layers was each",
        ),
    ],
)
def test_another_command_in_the_folder_is_refused_with_the_difference(cache, tmp_path, changed, said):
    options = dict(head="wa-tr", recipe=RECIPE.with_changes(epochs=1), out=tmp_path / "a", device="cpu")
    train_head(cache, **options)
    before = weights(tmp_path / "a")
    if "recipe" in changed:
        changed = {"recipe": changed["recipe"].with_changes(epochs=1)}
    with pytest.raises(UsageError, match=said + ".*--restart"):
        train_head(cache, **(options | changed))
    assert weights(tmp_path / "a") == before
    train_head(cache, **(options | changed), restart=True)
    assert weights(tmp_path / "a") != before


def test_other_data_in_the_folder_are_refused(cache, tmp_path):
    options = dict(head="wa-mlp", recipe=RECIPE.with_changes(epochs=1, time_mask_frames=0), device="cpu")
    train_head(cache, out=tmp_path / "a", **options)
    labels = np.arange(N) % C
    other = planted_cache(tmp_path / "b.zarr", np.zeros((N, L, T, D)), labels, fold=np.arange(N) // C % 2 + 1)
    with pytest.raises(UsageError, match=r"folds was 3 .* and is 2"):
        train_head(other, out=tmp_path / "a", **options)


def test_leftovers_of_a_run_with_more_folds_do_not_survive_and_other_files_do(cache, tmp_path):
    few = RECIPE.with_changes(epochs=1, time_mask_frames=0)
    out = tmp_path / "a"
    train_head(cache, head="wa-mlp", recipe=few, seeds=2, out=out, tensorboard=True, device="cpu")
    (out / "notes.txt").write_text("mine")
    (out / "seed-1" / "fold-3" / "notes.txt").write_text("mine")
    split = planted_cache(
        tmp_path / "b.zarr", np.zeros((N, L, T, D)), np.arange(N) % C, split=["train", "valid"] * (N // 2)
    )
    train_head(split, head="wa-mlp", recipe=few, out=out, restart=True, device="cpu")
    kept = sorted(file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file())
    assert kept == [
        ".training/lock", ".training/run.json", ".training/scores/fold-1.npy", "curve.png", "head.json",
        "head.safetensors", "metrics.jsonl",
        "notes.txt", "seed-1/fold-3/notes.txt", "trained_on.safetensors",
    ]  # fmt: skip


def test_a_head_of_unknown_origin_is_not_replaced_unasked(cache, tmp_path):
    few = RECIPE.with_changes(epochs=1, time_mask_frames=0)
    train_head(cache, head="wa-mlp", recipe=few, out=tmp_path / "a", device="cpu")
    (tmp_path / "a" / ".training" / "run.json").unlink()
    with pytest.raises(UsageError, match="holds a head and no record of the run"):
        train_head(cache, head="wa-mlp", recipe=few, out=tmp_path / "a", device="cpu")


def test_two_processes_do_not_train_in_one_folder(cache, tmp_path):
    held = records.RunFolder(tmp_path / "a", {"order": "drawn"})
    with pytest.raises(UsageError, match="another process trains in .*a now"):
        records.RunFolder(tmp_path / "a", {"order": "drawn"})
    held.close()
    records.RunFolder(tmp_path / "a", {"order": "drawn"}).close()
    with pytest.raises(UsageError, match="order was drawn and is streamed"):
        records.RunFolder(tmp_path / "a", {"order": "streamed"})
    records.RunFolder(tmp_path / "a", {"order": "drawn"}).close()  # a refusal lets go of the folder


def test_a_damaged_record_is_named(tmp_path):
    records.RunFolder(tmp_path / "a", {}).close()
    (tmp_path / "a" / ".training" / "run.json").write_text("{")
    with pytest.raises(WhisperATError, match="run.json is damaged"):
        records.RunFolder(tmp_path / "a", {})
    records.RunFolder(tmp_path / "a", {}, restart=True).close()


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize("head, tier", [("wa-mlp", "memory"), ("tl-tr", "stream")])
def test_two_processes_of_torchrun_train_what_one_does(cache, tmp_path, head, tier):
    arguments = [
        "-m", "whisper_at_cli.cli", "train-head", str(cache.path), "--head", head, "--epochs", "3", "--batch-size", "7",
        "--device", "cpu", "--tier", tier, "--precision", "float32", "--json", "--out",
    ]  # fmt: skip
    both = subprocess.run([*TORCHRUN, *arguments, str(tmp_path / "two")], capture_output=True, text=True, check=False)
    assert both.returncode == 0, both.stderr
    result = json.loads(both.stdout)  # one document: only the first process prints
    assert result["processes"] == 2 and len(both.stdout.split('"head"')) == 2
    changes = dict(epochs=3, batch_size=7, precision="float32")
    alone = train_head(cache, head=head, changes=changes, tier=tier, out=tmp_path / "one", device="cpu")
    for name in ("fold-1", "fold-3", "."):
        single, double = (load_head(tmp_path / run / name).state_dict() for run in ("one", "two"))
        for key in single:
            np.testing.assert_allclose(double[key].numpy(), single[key].numpy(), rtol=1e-3, atol=2e-4)
    assert result["value"] == pytest.approx(alone.value, abs=0.04)
