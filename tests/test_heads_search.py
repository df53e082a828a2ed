"""A search ranks each combination as training it alone would, and the command says what it may not repeat."""

import json

import numpy as np
import pytest
from test_cli import run

from planted import planted_cache
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.heads import search_heads, train_head
from whisper_at_cli.heads.training.recipe import Recipe

N, L, T, D, C = 60, 2, 25, 16, 3
FAST = Recipe(loss="ce", epochs=4, average_from_epoch=3, time_mask_frames=0, validate_every=0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    labels = np.arange(N) % C
    features = np.random.default_rng(0).normal(size=(N, L, T, D)) + 0.3 * np.eye(C, D)[labels][:, None, None, :]
    path = tmp_path_factory.mktemp("search") / "a.zarr"
    return planted_cache(path, features, labels, fold=np.arange(N) // C % 3 + 1)


def test_each_row_is_what_training_that_combination_alone_gives(cache, tmp_path):
    rates = (1e-5, 0.003, 0.03)
    found = search_heads(cache, head="wa-mlp", rates=rates, recipe=FAST, seeds=2, out=tmp_path / "s", device="cpu")
    assert [row["rank"] for row in found.rows] == [1, 2, 3]
    assert [row["value"] for row in found.rows] == sorted((row["value"] for row in found.rows), reverse=True)
    assert found.rows[-1]["lr"] == 1e-5
    for row in found.rows:
        alone = train_head(cache, head="wa-mlp", recipe=FAST.with_changes(lr=row["lr"]), seeds=2, device="cpu")
        assert (row["value"], row["std"]) == (pytest.approx(alone.value), pytest.approx(alone.std))
        assert row["folds"] == pytest.approx([fold["value"] for fold in alone.folds])
    assert json.loads((tmp_path / "s" / "search.json").read_text())["rows"] == found.rows
    assert "optimistic" in found.warnings[-1] and not (tmp_path / "s" / "head.json").exists()
    again = search_heads(cache, head="wa-mlp", rates=rates, recipe=FAST, seeds=2, out=tmp_path / "s", device="cpu")
    assert again.rows == found.rows  # finished: nothing is trained again, so that even the seconds are the same
    with pytest.raises(UsageError, match="search was .* and is .* now"):
        search_heads(cache, head="wa-mlp", rates=(1,), recipe=FAST, seeds=2, out=tmp_path / "s", device="cpu")


def test_dimensions_are_searched_too(cache):
    found = search_heads(cache, head="tl-tr", widths=(8, 16), rates=(0.003,), recipe=FAST, device="cpu")
    assert sorted(row["dim"] for row in found.rows) == [8, 16]
    assert len({row["params"] for row in found.rows}) == 2


def test_the_default_grid_lies_around_the_recipes_rate(cache):
    found = search_heads(cache, head="wa-mlp", recipe=FAST.with_changes(lr=0.01, epochs=1), device="cpu")
    assert sorted(row["lr"] for row in found.rows) == pytest.approx([0.0025, 0.005, 0.01, 0.02, 0.04])


def test_the_command_searches_and_refuses_to_repeat_without_it(cache, capsys, tmp_path):
    command = ("train-head", cache.path, "--head", "wa-mlp", "--lr", "0.01", "--lr", "0.02", "--epochs", "1")
    status, out, err = run(capsys, *command)
    assert status == 2 and "--lr was given 2 times: add --search" in err
    status, out, err = run(capsys, *command, "--search", "--json")
    assert status == 0 and [row["rank"] for row in json.loads(out)["rows"]] == [1, 2] and "optimistic" in err
    assert "rank" in run(capsys, *command, "--search")[1]


def test_settings_reach_the_recipe_from_the_command_line(cache, capsys):
    given = (
        *("--average-from-epoch", "none", "--betas", "0.8", "0.9", "--class-balanced", "--no-class-balanced"),
        *("--mixup-rate", "0", "--label-smoothing", "0.2", "--batch-size", "7", "--epochs", "2", "--warmup-steps", "3"),
        *("--lr-decay", "0.5", "--patience", "1", "--faithful", "--time-mask-layers", "each", "--seeds", "2"),
    )
    status, out, _ = run(capsys, "train-head", cache.path, "--head", "wa-mlp", *given, "--json")
    result = json.loads(out)
    assert status == 0 and len(result["seeds"]) == 2
    expected = {
        "average_from_epoch": None, "betas": [0.8, 0.9], "class_balanced": False, "mixup_rate": 0.0, "patience": 1,
        "label_smoothing": 0.2, "batch_size": 7, "epochs": 2, "warmup_steps": 3, "lr_decay": 0.5,
        "mixup_partner": "uniform", "time_mask_layers": "each",
    }  # fmt: skip
    assert {name: result["recipe"][name] for name in expected} == expected
    for wrong, said in (("--epochs 0", "epochs is 0"), ("--average-to-epoch soon", "soon"), ("--tier disk", "disk")):
        status, _, err = run(capsys, "train-head", cache.path, "--head", "wa-mlp", *wrong.split())
        assert status == 2 and said in err and len(err.strip().splitlines()) == 1
