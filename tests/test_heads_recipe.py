"""A recipe holds the paper's settings and refuses those that make no sense."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from planted import planted_cache
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.heads import evaluate_head, train_head
from whisper_at_cli.heads.training.batches import draw_epoch, smoothed
from whisper_at_cli.heads.training.recipe import Recipe, default_recipe_name, faithful_changes, named_recipe


def test_named_recipes_have_the_papers_settings(shared):
    paper = json.loads((shared / "reference" / "paper.json").read_text())["recipe"]
    for name in ("as20k", "as2m", "esc50"):
        recipe = named_recipe(name, "tl-tr", dim=1280, width=512)
        assert recipe.lr == paper["tl_tr_512"][name]["lr"]
        assert (recipe.batch_size, list(recipe.betas)) == (paper["batch_size"], paper["betas"])
        assert (recipe.weight_decay, recipe.label_smoothing) == (paper["weight_decay"], paper["label_smoothing"])
        assert (recipe.mixup_rate, recipe.mixup_alpha) == (paper["mixup_rate"], 10)
        assert recipe.time_mask_frames == paper["time_mask_frames"]
    for name in ("as20k", "esc50"):
        assert named_recipe(name, "tl-tr", dim=1280, width=512).epochs == paper["tl_tr_512"][name]["epochs"]
    detail, as2m = paper["as2m_detail"], named_recipe("as2m", "tl-tr", dim=1280)
    assert (as2m.epochs, as2m.epoch_share) == (detail["short_epochs"], detail["share_of_data_per_short_epoch"])
    assert [as2m.average_from_epoch, as2m.epochs] == detail["weight_averaging_epochs"]
    assert (as2m.lr_decay, as2m.lr_decay_from_epoch) == (detail["lr_decay"], detail["lr_decay_from_epoch"])
    assert as2m.lr_decay_every == detail["lr_decay_every"] and as2m.class_balanced
    for size, dim in (("large", 1280), ("medium", 1024), ("small", 768), ("base", 512), ("tiny", 384)):
        assert named_recipe("as2m", "tl-tr", dim=dim).lr == detail["lr"][size]


def test_the_data_choose_the_recipe():
    assert default_recipe_name("tl-tr", single_label=True, clips=2000) == "esc50"
    assert default_recipe_name("tl-tr", single_label=False, clips=20_000) == "as20k"
    assert default_recipe_name("tl-tr", single_label=False, clips=2_000_000) == "as2m"
    assert default_recipe_name("wa-pool", single_label=True, clips=2000) == "modern"


def test_wa_pool_and_linear_models_are_standardised_and_the_papers_heads_are_not():
    for name in ("as20k", "as2m", "esc50", "modern"):
        assert named_recipe(name, "wa-pool", dim=384).standardise
        assert named_recipe(name, "concat-linear", dim=384).standardise
        for head in ("last-mlp", "wa-mlp", "last-tr", "wa-tr", "tl-tr"):
            assert not named_recipe(name, head, dim=384).standardise


def test_heads_that_see_only_the_mean_have_no_time_mask():
    for name in ("last-mlp", "wa-mlp"):
        assert named_recipe("esc50", name, dim=384).time_mask_frames == 0
    assert named_recipe("esc50", "wa-tr", dim=384).time_mask_frames == 10


def test_the_learning_rate_falls_after_the_last_full_epoch_and_every_few_later():
    recipe = Recipe(lr=1.0, lr_decay=0.5, lr_decay_from_epoch=15, lr_decay_every=5)
    rates = {epoch: recipe.learning_rate(epoch, 0, 300) for epoch in (1, 15, 16, 20, 21, 30)}
    assert rates == {1: 1, 15: 1, 16: 0.5, 20: 0.5, 21: 0.25, 30: 0.125}


def test_the_learning_rate_warms_up_over_steps():
    recipe = Recipe(lr=1.0, warmup_steps=4)
    assert [recipe.learning_rate(1, step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    share = Recipe(lr=1.0, warmup_share=0.04)
    assert [share.learning_rate(1, step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_a_cosine_falls_from_the_full_rate_after_warming_up_to_nothing():
    recipe = Recipe(lr=1.0, warmup_steps=10, lr_schedule="cosine")
    rates = [recipe.learning_rate(1, step, 110) for step in range(110)]
    assert rates[9] == rates[10] == 1 and rates[0] == 0.1
    assert rates[60] == pytest.approx(0.5)
    assert rates == [*sorted(rates[:10]), *sorted(rates[10:], reverse=True)] and 0 < rates[-1] < 1e-3
    with pytest.raises(UsageError, match="lr_decay is 0.5 and must be 1 with the schedule cosine"):
        Recipe(lr_schedule="cosine", lr_decay=0.5)


def test_the_steps_of_a_run_are_counted_as_they_are_taken():
    recipe = Recipe(epochs=3, batch_size=10, average_from_epoch=None)
    assert [recipe.steps(clips) for clips in (1, 10, 11, 25)] == [3, 3, 6, 9]
    assert recipe.with_changes(drop_last=True).steps(25) == 6
    assert recipe.with_changes(epoch_share=0.1).steps(250) == 9


@pytest.mark.parametrize(
    "setting, value",
    [
        *[("batch_size", 0), ("batch_size", 2.5), ("lr", 0), ("lr", float("nan")), ("lr", "fast"), ("epochs", 0)],
        *[("epoch_share", 0), ("epoch_share", 1.5), ("betas", (0.9,)), ("betas", (0.9, 1.0)), ("betas", None)],
        *[("weight_decay", -1), ("loss", "mse"), ("label_smoothing", 1.0), ("mixup_rate", 1.1), ("mixup_alpha", 0)],
        *[("time_mask_frames", -1), ("lr_decay", 0), ("lr_decay_from_epoch", 0), ("lr_decay_every", 0)],
        *[("warmup_steps", -1), ("average_from_epoch", 0), ("average_from_epoch", 31), ("class_balanced", "yes")],
        *[("precision", "float64"), ("seed", -1), ("mixup_partner", "me"), ("time_mask_layers", "some")],
        *[("patience", 0), ("validate_every", -1), ("average_to_epoch", 0)],
        *[("optimizer", "sgd"), ("lr_schedule", "line"), ("warmup_share", 1.5), ("dropout", 1), ("standardise", 1)],
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(setting, value):
    with pytest.raises(UsageError, match=f"recipe: {setting} is"):
        Recipe(**{setting: value})


def test_every_setting_has_a_rule_and_a_help_and_an_option():
    from whisper_at_cli.heads.commands import train_head_command

    options = {parameter.name for parameter in train_head_command.params}
    for setting in dataclasses.fields(Recipe):
        assert setting.metadata["rule"][1] and setting.metadata["help"]
        assert setting.name in options or setting.name == "lr"  # which a search may repeat


def test_weights_are_averaged_over_a_span_of_epochs():
    recipe = Recipe(average_from_epoch=16, average_to_epoch=20)
    assert [epoch for epoch in range(1, 31) if recipe.averages(epoch)] == [16, 17, 18, 19, 20]
    assert [epoch for epoch in range(1, 31) if Recipe().averages(epoch)] == list(range(16, 31))
    assert not any(Recipe(average_from_epoch=None).averages(epoch) for epoch in range(1, 31))
    for wrong in ({"average_to_epoch": 3}, {"average_from_epoch": None, "average_to_epoch": 3}):
        with pytest.raises(UsageError, match="average_to_epoch is 3"):
            Recipe(**wrong)
    with pytest.raises(UsageError, match="validate_every is 0"):
        Recipe(patience=3, validate_every=0)


def test_changes_replace_settings_and_unknown_ones_are_refused():
    recipe = Recipe().with_changes(lr=1e-3, epochs=15)
    assert (recipe.lr, recipe.epochs, recipe.batch_size) == (1e-3, 15, 48)
    assert recipe.average_from_epoch == 8  # moved with the number of epochs
    assert Recipe().with_changes(epochs=1).average_from_epoch == 1
    assert Recipe().with_changes(epochs=15, average_from_epoch=None).average_from_epoch is None
    with pytest.raises(UsageError, match="no setting 'learning_rate'; its settings are batch_size, lr"):
        Recipe().with_changes(learning_rate=1)
    with pytest.raises(UsageError, match="epochs is 'many'"):
        Recipe().with_changes(epochs="many")


def test_a_recipe_survives_json():
    recipe = named_recipe("as2m", "wa-tr", dim=512)
    assert Recipe(**json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe


def test_unknown_recipes_and_heads_are_refused():
    with pytest.raises(UsageError, match="recipe 'esc10' is not known; choose from as20k, as2m, esc50"):
        named_recipe("esc10", "wa-mlp", dim=384)
    with pytest.raises(UsageError, match="head 'mlp' is not known"):
        named_recipe("esc50", "mlp", dim=384)


def test_faithful_has_every_setting_of_the_original_code():
    assert faithful_changes("tl-tr") == {
        "mixup_partner": "uniform", "time_mask_layers": "same", "time_mask_frames": 9,
        "label_smoothing_form": "original", "drop_last": True,
    }  # fmt: skip
    assert "time_mask_frames" not in faithful_changes("wa-mlp")


def test_the_originals_positives_of_unmixed_clips_are_one_less_the_smoothing():
    labels, share = torch.tensor([[1.0, 0, 1, 0], [0.4, 0.6, 0, 0]]), torch.tensor([1.0, 0.4])
    own = smoothed(labels, share, Recipe(label_smoothing=0.2))
    torch.testing.assert_close(own, labels * 0.8 + 0.05)
    theirs = smoothed(labels, share, Recipe(label_smoothing=0.2, label_smoothing_form="original"))
    torch.testing.assert_close(theirs, torch.tensor([[0.8, 0.05, 0.8, 0.05], [0.37, 0.53, 0.05, 0.05]]))


def test_a_dropped_last_batch_takes_no_part_in_training_and_validation(tmp_path):
    rng = np.random.default_rng(0)
    assert len(draw_epoch(np.arange(50), Recipe(batch_size=16, drop_last=True), rng, frames=25, layers=1)) == 48
    assert len(draw_epoch(np.arange(10), Recipe(batch_size=16, drop_last=True), rng, frames=25, layers=1)) == 10
    labels = np.arange(60) % 3
    cache = planted_cache(tmp_path / "a.zarr", rng.normal(size=(60, 2, 5, 8)), labels, fold=np.arange(60) // 3 % 2 + 1)
    recipe = Recipe(loss="ce", epochs=2, batch_size=8, average_from_epoch=None, time_mask_frames=0)
    found = train_head(cache, head="wa-mlp", recipe=recipe, faithful=True, out=tmp_path / "head", device="cpu")
    assert [fold["validation_clips"] for fold in found.folds] == [24, 24] and found.intervals["clips"] == 48
    assert any("12 clips are not tested" in said for said in found.warnings)
    rows = np.flatnonzero(np.arange(60) // 3 % 2 == 0)[:24]
    assert evaluate_head(tmp_path / "head" / "fold-1", cache, rows=rows).accuracy == found.folds[0]["value"]
    whole = train_head(cache, head="wa-mlp", recipe=recipe, device="cpu")
    assert [fold["validation_clips"] for fold in whole.folds] == [30, 30]
