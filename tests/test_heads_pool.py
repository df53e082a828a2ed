"""WA-Pool from the command line, on real sounds: trained, evaluated, tagged with; and what its options do."""

import json

import numpy as np
import pytest
import torch
from test_cli import run
from test_heads_train import CLASSES, FOLD, N, planted_features

from planted import planted_cache
from whisper_at_cli.heads import load_head


@pytest.fixture
def cache(tmp_path):
    return planted_cache(tmp_path / "planted.zarr", planted_features(2), CLASSES, fold=FOLD)


def test_it_is_trained_by_its_own_recipe_and_standardised(cache, tmp_path, capsys):
    status, out, _ = run(
        capsys, "train-head", cache.path, "--head", "wa-pool", "--dim", "16", "--out", tmp_path / "head", "--json"
    )
    found = json.loads(out)
    assert status == 0 and found["value"] > 0.7 and found["dim"] == 16
    recipe = found["recipe"]
    assert (recipe["optimizer"], recipe["lr_schedule"], recipe["loss"]) == ("adamw", "cosine", "bce")
    assert recipe["standardise"] and recipe["dropout"] == 0.3
    assert sum(found["layer_weights"]) == pytest.approx(1)
    module = load_head(tmp_path / "head")
    assert module.description.name == "wa-pool-16" and module.description.standardised
    with torch.no_grad():
        share = module.frame_attention(torch.from_numpy(cache.features(np.arange(N))))
    torch.testing.assert_close(share.sum(dim=1), torch.ones(N))
    status, out, _ = run(capsys, "evaluate", tmp_path / "head" / "fold-1", cache.path, "--json")
    judged = json.loads(out)
    fold = next(each for each in found["folds"] if each["fold"] == 1)
    assert status == 0 and judged["accuracy"] == pytest.approx(fold["value"]) and len(judged["layer_weights"]) == 4


def test_options_change_it(cache, capsys):
    command = ("train-head", cache.path, "--head", "wa-pool", "--epochs", "1", "--json")
    plain, narrow, without, raw = (
        json.loads(run(capsys, *command, *more)[1])
        for more in ((), ("--dim", "32"), ("--no-block",), ("--no-standardise",))
    )
    assert (plain["dim"], narrow["dim"]) == (128, 32)
    assert without["params"] < narrow["params"] + 60_000 < plain["params"]
    assert plain["recipe"]["standardise"] and not raw["recipe"]["standardise"]
    status, _, err = run(capsys, "train-head", cache.path, "--head", "tl-tr", "--no-block")
    assert status == 2 and "--no-block is for wa-pool" in err
    status, _, err = run(capsys, *command, "--dim", "30")
    assert status == 2 and "multiple of 4" in err


def test_it_tags_files(esc10, esc10_cache, tmp_path, capsys):
    command = ("train-head", esc10_cache.path, "--head", "wa-pool", "--epochs", "4", "--no-block")
    assert run(capsys, *command, "--validate-every", "0", "--out", tmp_path / "head")[0] == 0
    file = next(path for path in sorted((esc10 / "audio").glob("*-0.ogg")))
    status, out, _ = run(
        capsys, "tag", file, "--head", tmp_path / "head", "--resolution", "1", "--all-labels", "--json"
    )
    found = json.loads(out.splitlines()[0])
    assert status == 0 and len(found["tags"]) == 5
    assert all(0 <= label["probability"] <= 1 for tag in found["tags"] for label in tag["labels"])
    best = max((label for tag in found["tags"] for label in tag["labels"]), key=lambda label: label["probability"])
    assert best["name"] == "dog"
