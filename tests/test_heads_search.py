"""What is chosen for a fold is chosen on clips that it does not test; results say on which."""

import json

import numpy as np
import pytest
import torch
from test_cli import run

from planted import planted_cache
from whisper_at_cli.extract.cache.sources import source_recordings
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.evaluation.predictions import load_predictions
from whisper_at_cli.heads import evaluate_head, load_head, search_heads, train_head
from whisper_at_cli.heads.training.inner import inner_divisions, watched_rows
from whisper_at_cli.heads.training.plan import plan
from whisper_at_cli.heads.training.recipe import Recipe

N, L, T, D, C = 60, 2, 25, 16, 3
FAST = Recipe(loss="ce", epochs=4, average_from_epoch=3, time_mask_frames=0, validate_every=0)
CLASSES = np.arange(N) % C
FOLD = np.arange(N) // C % 3 + 1
SPLIT = np.array(["train", "train", "train", "valid", "test"])[np.arange(N) // C % 5]


def features(seed=0, strength=0.3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, L, T, D)) + strength * np.eye(C, D)[CLASSES][:, None, None, :]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return planted_cache(tmp_path_factory.mktemp("search") / "a.zarr", features(), CLASSES, fold=FOLD)


@pytest.fixture(scope="module")
def with_valid(tmp_path_factory):
    return planted_cache(tmp_path_factory.mktemp("split") / "a.zarr", features(strength=1.5), CLASSES, split=SPLIT)


def test_each_row_is_what_training_that_combination_on_inner_folds_gives(cache, tmp_path):
    """With three folds, the two others of a fold test heads of the remaining one."""
    rates = (1e-5, 0.003, 0.03)
    found = search_heads(cache, head="wa-mlp", rates=rates, recipe=FAST, seeds=2, out=tmp_path / "s", device="cpu")
    rows = found.search["rows"]
    assert [row["rank"] for row in rows] == [1, 2, 3] and rows[-1]["lr"] == 1e-5
    assert [row["value"] for row in rows] == sorted((row["value"] for row in rows), reverse=True)
    records = json.loads((tmp_path / "s" / ".training" / "run.json").read_text())["finished"]
    assert sum(name.startswith("search/") for name in records) == 3 * 3  # a pair of folds serves both
    for row in rows:
        assert row["value"] == pytest.approx(np.mean(row["folds"]))
    for k, fold in enumerate(found.folds):
        best = max(rows, key=lambda row: (row["folds"][k], -abs(np.log(row["lr"] / FAST.lr))))
        assert fold["lr"] == best["lr"] and fold["fold"] in best["chosen_for"]
    assert found.selected_on == {"lr": "inner folds: the 2 other folds of each test fold"}
    assert json.loads((tmp_path / "s" / "search.json").read_text())["rows"] == rows
    again = search_heads(cache, head="wa-mlp", rates=rates, recipe=FAST, seeds=2, out=tmp_path / "s", device="cpu")
    assert again.search["rows"] == rows  # finished: nothing is trained again, so that even the seconds are the same
    with pytest.raises(UsageError, match="search was .* and is .* now"):
        search_heads(cache, head="wa-mlp", rates=(1,), recipe=FAST, seeds=2, out=tmp_path / "s", device="cpu")


def test_a_fold_is_tested_with_a_head_of_the_rate_that_was_chosen_for_it(cache, tmp_path):
    found = search_heads(cache, head="wa-mlp", rates=(0.003, 0.03), recipe=FAST, out=tmp_path / "s", device="cpu")
    for fold in found.folds:
        alone = train_head(cache, head="wa-mlp", recipe=FAST.with_changes(lr=fold["lr"]), device="cpu")
        assert fold["value"] == next(one["value"] for one in alone.folds if one["fold"] == fold["fold"])
    kept = load_head(tmp_path / "s").description
    assert kept.recipe["lr"] == next(row["lr"] for row in found.search["rows"] if row["kept"])
    assert kept.value == found.value and kept.selected_on == found.selected_on


@pytest.mark.parametrize("options", [{"recipe": FAST}, {"recipe": FAST.with_changes(patience=1, validate_every=1)}])
def test_what_is_chosen_for_a_fold_does_not_depend_on_its_clips(cache, tmp_path, options):
    """With features and labels of fold 1 replaced, the head that tests fold 1 stays what it was."""
    changed, labels = features(), np.where(FOLD == 1, (CLASSES + 1) % C, CLASSES)
    changed[FOLD == 1] = np.random.default_rng(8).normal(size=changed[FOLD == 1].shape)
    other = planted_cache(tmp_path / "b.zarr", changed, labels, fold=FOLD)
    weights, chosen = [], []
    for number, each in enumerate((cache, other)):
        out = tmp_path / f"s{number}"
        found = search_heads(
            each, head="wa-mlp", rates=(1e-4, 0.003, 0.03), out=out, device="cpu", together="never", **options
        )
        weights.append(load_head(out / "fold-1").state_dict())
        chosen.append(found.folds[0]["lr"])
    assert chosen[0] == chosen[1]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_the_valid_split_chooses_where_there_is_one(with_valid, tmp_path):
    recipe = FAST.with_changes(epochs=20)
    found = search_heads(
        with_valid, head="wa-mlp", rates=(1e-4, 0.003, 0.03), recipe=recipe, out=tmp_path / "s", device="cpu",
        predictions=tmp_path / "p.npz",
    )  # fmt: skip
    assert found.selected_on == {"lr": "the 12 clips of split valid"}
    assert not any("left out" in warning for warning in found.warnings)
    assert set(load_predictions(tmp_path / "p.npz").ids) == set(with_valid.ids[SPLIT == "test"])
    on_valid = []
    for rate in (1e-4, 0.003, 0.03):
        train_head(
            with_valid, head="wa-mlp", recipe=recipe.with_changes(lr=rate), out=tmp_path / f"{rate}", device="cpu"
        )
        on_valid.append(evaluate_head(tmp_path / f"{rate}", with_valid, split="valid").accuracy)
    chosen = next(row for row in found.search["rows"] if row["chosen_for"])
    assert chosen["value"] == max(row["value"] for row in found.search["rows"])
    assert abs(chosen["value"] - max(on_valid)) <= 2 / 12  # other random numbers, the same clips
    assert evaluate_head(tmp_path / "s", with_valid, split="valid").clips_trained_on == 12  # chosen on is not unseen
    assert evaluate_head(tmp_path / "s", with_valid).clips == 12  # those of test


def test_patience_watches_the_valid_split_and_says_so(with_valid, tmp_path, capsys):
    options = ("--patience", "2", "--epochs", "6", "--average-from-epoch", "none", "--recipe", "esc50")
    command = ("train-head", with_valid.path, "--head", "wa-mlp", *options, "--out", tmp_path / "head")
    status, out, _ = run(capsys, *command)
    assert status == 0 and "epoch chosen on" in out and "the 12 clips of split valid" in out
    lines = [json.loads(line) for line in (tmp_path / "head" / "metrics.jsonl").read_text().splitlines()]
    best = max(line["accuracy"] for line in lines)
    assert evaluate_head(tmp_path / "head", with_valid, split="valid").accuracy == best
    assert load_head(tmp_path / "head").description.selected_on == {"epoch": "the 12 clips of split valid"}


def test_recordings_stay_whole_in_random_inner_folds(tmp_path):
    """Two folds: inner folds are random. Segments of one recording must not stand on both sides."""
    cache = planted_cache(tmp_path / "a.zarr", features(), CLASSES, fold=np.arange(N) // 6 % 2 + 1)
    cache.__dict__["ids"] = np.array([f"rec{i // 6}_part{i % 6}" for i in range(N)])
    options = dict(head="wa-mlp", width=None, recipe=FAST, changes={}, faithful=False, tier="memory")
    job = plan(cache, device=torch.device("cpu"), chooses=True, **options)
    recordings = source_recordings(cache.ids, cache.paths, cache.dataset)
    assert len(set(recordings)) < N
    divisions = inner_divisions(job)
    assert {number for each in divisions for number, _ in each.tests} == {1, 2}
    for each in divisions:
        for number, test in each.tests:
            outer = next(fold for fold in job.folds if fold.number == number)
            assert not set(test) & set(outer.test) and not set(each.train) & set(outer.test)
            assert not set(recordings[test]) & set(recordings[each.train])
    watched = watched_rows(job, job.folds[0].train)
    assert 0 < len(watched) < len(job.folds[0].train) / 2
    assert not set(recordings[watched]) & set(recordings[np.setdiff1d(job.folds[0].train, watched)])


def test_dimensions_are_searched_too(cache):
    found = search_heads(cache, head="tl-tr", widths=(8, 16), rates=(0.003,), recipe=FAST, device="cpu")
    assert sorted(row["dim"] for row in found.search["rows"]) == [8, 16]
    assert len({row["params"] for row in found.search["rows"]}) == 2
    assert set(found.selected_on) == {"lr", "dim"}
    assert found.dim == next(row["dim"] for row in found.search["rows"] if row["kept"])


def test_the_default_grid_has_the_recipes_rate_and_those_from_2e_4_to_1e_2(cache):
    found = search_heads(cache, head="wa-mlp", recipe=FAST.with_changes(lr=0.02, epochs=1), device="cpu")
    assert sorted(row["lr"] for row in found.search["rows"]) == [2e-4, 5e-4, 1e-3, 3e-3, 1e-2, 0.02]


def test_the_command_searches_and_refuses_to_repeat_without_it(cache, capsys, tmp_path):
    command = ("train-head", cache.path, "--head", "wa-mlp", "--lr", "0.01", "--lr", "0.02", "--epochs", "1")
    status, out, err = run(capsys, *command)
    assert status == 2 and "--lr was given 2 times: add --search" in err
    status, out, err = run(capsys, *command, "--search", "--json")
    found = json.loads(out)
    assert status == 0 and [row["rank"] for row in found["search"]["rows"]] == [1, 2] and found["ci95"]
    out = run(capsys, *command, "--search")[1]
    assert "rank" in out and "inner accuracy" in out and "lr chosen on" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "head, options",
    [
        ("concat-linear", {"repeats": 8}),
        ("wa-mlp", {"search": True, "repeats": 8}),
        ("wa-mlp", {"changes": {"patience": 2, "average_from_epoch": None, "epochs": 12}}),
        ("wa-mlp", {"search": True, "split": True, "repeats": 20}),
        ("wa-tr", {"search": True, "repeats": 4}),
    ],
    ids=("concat-linear", "search", "patience", "valid", "wa-tr"),
)
def test_with_permuted_labels_every_selected_number_is_at_chance_within_its_interval(tmp_path, head, options):
    """Clips of a recording are alike, in four classes that layer 2 holds. Selection that saw a test clip, or one of its
    recording, would lie above chance; so would a number that is the best of those that were tried.

    concat-linear may lie below chance: with nothing to learn it chooses a penalty that leaves the shares of classes
    alone, and a fold that has more clips of a class leaves fewer of it to train on."""
    options = dict(options)
    repeats, searched, split = (options.pop(name, default) for name, default in
                                (("repeats", 20), ("search", False), ("split", False)))  # fmt: skip
    y = np.repeat(np.arange(60) % 4, 2)
    rng = np.random.default_rng(0)
    held = rng.normal(size=(60, 2, 5, 12))[np.arange(120) // 2] + 0.1 * rng.normal(size=(120, 2, 5, 12))
    held[:, 1, :, :4] += 6 * np.eye(4)[y][:, None, :]
    recording = np.arange(120) // 2
    columns = {"split": np.array(["train", "train", "valid", "test", "test"])[recording % 5]} if split else {
        "fold": recording % 5 + 1
    }  # fmt: skip
    cache = planted_cache(tmp_path / "a.zarr", held, y, **columns)
    recipe = None if head == "concat-linear" else FAST.with_changes(validate_every=1)
    inside, values = 0, []
    for seed in range(repeats):
        run_it = search_heads if searched else train_head
        more = {"rates": (0.001, 0.01, 0.1)} if searched else {}
        found = run_it(cache, head=head, recipe=recipe, permute_labels=True, seed=seed, device="cpu", **more, **options)
        assert found.permuted_labels and found.selected_on and any("permuted" in said for said in found.warnings)
        inside += found.ci95[0] <= 0.25 <= (1 if head == "concat-linear" else found.ci95[1])
        values.append(found.value)
    assert inside >= int(0.85 * repeats), values
    spread = 3 * np.std(values) / np.sqrt(repeats) + 0.01
    assert np.mean(values) < 0.25 + spread, values
    if head != "concat-linear":
        assert np.mean(values) > 0.25 - spread, values


def test_labels_can_be_permuted_and_the_result_says_so(cache, tmp_path, capsys):
    command = ("train-head", cache.path, "--head", "concat-linear", "--permute-labels", "--json")
    status, out, err = run(capsys, *command, "--out", tmp_path / "head", "--predictions", tmp_path / "p.npz")
    assert status == 0 and json.loads(out)["permuted_labels"] and "permuted by recording" in err
    assert load_head(tmp_path / "head").description.permuted_labels
    scored = load_predictions(tmp_path / "p.npz")
    order = [list(cache.ids).index(one) for one in scored.ids]
    assert (scored.labels != cache.labels[order]).any()
    assert sorted(scored.labels.argmax(1)) == sorted(CLASSES)  # the same labels, on other clips


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
        "mixup_partner": "uniform", "time_mask_layers": "each", "label_smoothing_form": "original", "drop_last": True,
    }  # fmt: skip
    assert {name: result["recipe"][name] for name in expected} == expected
    for wrong, said in (("--epochs 0", "epochs is 0"), ("--average-to-epoch soon", "soon"), ("--tier disk", "disk")):
        status, _, err = run(capsys, "train-head", cache.path, "--head", "wa-mlp", *wrong.split())
        assert status == 2 and said in err and len(err.strip().splitlines()) == 1
