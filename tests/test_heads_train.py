"""Training finds what was planted, keeps validation clips out of training, and is decided by its seed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from planted import planted_cache
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.heads import evaluate_head, load_head, train_head
from whisper_at_cli.heads.evaluate import predict
from whisper_at_cli.heads.forms import Head, NormedLinear, build_head
from whisper_at_cli.heads.seen import seen_rows
from whisper_at_cli.heads.training import loop, runner
from whisper_at_cli.heads.training.fleet import clip_losses
from whisper_at_cli.heads.training.inner import watched_rows
from whisper_at_cli.heads.training.loader import Batch
from whisper_at_cli.heads.training.plan import plan
from whisper_at_cli.heads.training.ranks import Ranks
from whisper_at_cli.heads.training.recipe import Recipe, named_recipe

N, L, T, D, C = 120, 4, 25, 16, 4
CLASSES = np.arange(N) % C
FOLD = np.arange(N) // C % 3 + 1
FAST = Recipe(loss="ce", lr=0.02, epochs=6, average_from_epoch=4, time_mask_frames=0)


def planted_features(layer, *, seed=0, strength=2.0):
    """Noise everywhere; one layer (1 = first) also holds the class, as a constant over time. Layers differ in scale."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(N, L, T, D))
    features[:, layer - 1] += strength * rng.normal(size=(C, D))[CLASSES][:, None, :]
    return features.astype(np.float32)


@pytest.fixture
def cache(tmp_path):
    return planted_cache(tmp_path / "planted.zarr", planted_features(2), CLASSES, fold=FOLD)


@pytest.mark.parametrize(
    "head, width", [("wa-mlp", None), ("wa-tr", 8), ("tl-tr", None), ("tl-tr", 16), ("wa-pool", 16)]
)
def test_heads_over_all_layers_find_the_label_that_one_layer_holds(cache, head, width):
    result = train_head(cache, head=head, width=width, recipe=FAST.with_changes(epochs=10), device="cpu")
    assert result.metric == "accuracy" and result.value > 0.7  # chance is 0.25
    assert (result.head, result.dim, result.checkpoint) == (head, width or D, None)


def test_last_mlp_sees_the_last_layer_and_no_other(cache, tmp_path):
    assert train_head(cache, head="last-mlp", recipe=FAST, device="cpu").value < 0.5  # chance is 0.25
    last = planted_cache(tmp_path / "last.zarr", planted_features(L), CLASSES, fold=FOLD)
    assert train_head(last, head="last-mlp", recipe=FAST, device="cpu").value > 0.9


@pytest.mark.parametrize("layer", [1, 3])
def test_learned_weights_move_to_the_layer_that_holds_the_label(tmp_path, layer):
    cache = planted_cache(tmp_path / "a.zarr", planted_features(layer, strength=0.3), CLASSES, fold=FOLD)
    train_head(cache, head="wa-mlp", recipe=FAST, out=tmp_path / "head", device="cpu")
    weights = load_head(tmp_path / "head").layer_weight.detach()
    others = np.delete(weights.numpy(), layer - 1)
    assert weights[layer - 1] > others.max() + 0.02, weights


def test_labels_that_nothing_holds_are_not_found(tmp_path):
    """Were a validation clip trained on, these heads would know it."""
    noise = np.random.default_rng(1).normal(size=(N, L, T, 64)).astype(np.float32)
    cache = planted_cache(tmp_path / "noise.zarr", noise, CLASSES, fold=FOLD)
    unaided = FAST.with_changes(mixup_rate=0.0, label_smoothing=0.0, epochs=20)
    result = train_head(cache, head="wa-mlp", recipe=unaided, device="cpu")
    assert result.value < 0.45
    train_head(cache, head="wa-mlp", recipe=unaided, out=tmp_path / "head", device="cpu")
    with torch.no_grad():
        known = load_head(tmp_path / "head")(torch.from_numpy(cache.features(np.arange(N)))).argmax(dim=1)
    assert (known.numpy() == CLASSES).mean() > 0.9  # the head that saw all clips has learnt them by heart


def test_every_finished_clip_is_validated_once_and_never_trained_on_then(tmp_path, monkeypatch):
    cache = planted_cache(tmp_path / "a.zarr", planted_features(2), CLASSES, fold=FOLD, failed=(0, 50))
    validated, trained = [], []

    def spy_predict(module, clips, positions):
        validated.append(clips.rows[positions])
        return predict(module, clips, positions)

    def spy_draw(positions, *args, original=loop.draw_epoch, **kwargs):
        drawn = original(positions, *args, **kwargs)
        trained.append(set(drawn.clip.tolist()) | set(drawn.partner.tolist()))
        return drawn

    monkeypatch.setattr(loop, "predict", spy_predict)
    monkeypatch.setattr(loop, "draw_epoch", spy_draw)
    few = FAST.with_changes(epochs=1, validate_every=0, mixup_partner="uniform")
    result = train_head(cache, head="wa-mlp", recipe=few, device="cpu")
    done = np.flatnonzero(cache.done)
    assert sorted(np.concatenate(validated)) == done.tolist()
    for rows, positions in zip(validated, trained, strict=True):
        assert not set(rows) & {done[position] for position in positions}
    assert [fold["fold"] for fold in result.folds] == [1, 2, 3]
    assert [fold["validation_clips"] for fold in result.folds] == [len(rows) for rows in validated]
    assert all(fold["train_clips"] + fold["validation_clips"] == N - 2 for fold in result.folds)


def test_a_result_has_what_its_json_promises(cache):
    told = []
    result = train_head(cache, head="wa-mlp", recipe=FAST, device="cpu", progress=lambda *now: told.append(now))
    values = [fold["value"] for fold in result.folds]
    assert (result.value, result.std) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values)))
    assert result.params == L + 2 * D + (D + 1) * C and result.backbone == cache.spec.backbone
    assert result.seconds > 0 and result.samples_per_second > 0 and result.warnings == []
    assert (result.recipe["lr"], result.recipe["precision"], result.device) == (FAST.lr, "float32", "cpu")
    assert [now[:2] for now in told] == [(epoch, 18) for epoch in range(3, 19, 3)]  # three folds side by side
    for fold in result.folds:
        assert {"mAP", "mAUC", "d_prime", "accuracy", "classes_without_positives", "epochs"} <= set(fold)
        assert fold["accuracy"] == fold["value"] and fold["epochs"] == 6


@pytest.mark.parametrize("head", ["wa-mlp", "tl-tr"])
def test_the_seed_decides_the_result(cache, tmp_path, head):
    def weights(name, seed):
        few = FAST.with_changes(epochs=2, precision="float32")
        train_head(cache, head=head, recipe=few, seed=seed, out=tmp_path / name, device="cpu")
        return (tmp_path / name / "head.safetensors").read_bytes()

    state = torch.random.get_rng_state()
    assert weights("a", 1) == weights("b", 1) != weights("c", 2)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's random numbers are left alone


def test_fold_heads_and_a_head_on_all_clips_are_saved(cache, tmp_path):
    out = tmp_path / "deep" / "head"
    result = train_head(cache, head="tl-tr", width=8, recipe=FAST, out=out, device="cpu")
    assert result.checkpoint == str(out)
    rows = np.arange(N)
    for fold in result.folds:
        module = load_head(out / f"fold-{fold['fold']}")
        test = rows[fold["fold"] == FOLD]
        with torch.no_grad():
            logits = module(torch.from_numpy(cache.features(test)))
        assert (logits.argmax(dim=1).numpy() == CLASSES[test]).mean() == pytest.approx(fold["value"])
        assert module.description.trained_clips == fold["train_clips"]
    description = load_head(out).description
    assert (description.trained_clips, description.value) == (N, pytest.approx(result.value))
    assert (description.head, description.width, description.loss, description.metric) == ("tl-tr", 8, "ce", "accuracy")
    assert description.recipe == json.loads(json.dumps(result.recipe))


def test_with_a_split_the_saved_head_is_the_validated_one(tmp_path):
    split = np.where(np.arange(N) < 80, "train", "valid")
    cache = planted_cache(tmp_path / "a.zarr", planted_features(2), CLASSES, split=split)
    result = train_head(cache, head="wa-mlp", recipe=FAST, out=tmp_path / "head", device="cpu")
    (fold,) = result.folds
    assert (fold["train_clips"], fold["validation_clips"], result.std) == (80, 40, 0)
    assert not (tmp_path / "head" / "fold-1").exists()
    assert load_head(tmp_path / "head").description.trained_clips == 80


def test_without_folds_or_split_random_folds_are_used_with_a_warning(tmp_path):
    cache = planted_cache(tmp_path / "a.zarr", planted_features(2), CLASSES)
    result = train_head(cache, head="wa-mlp", recipe=FAST, device="cpu")
    assert len(result.folds) == 5 and "random stratified folds" in result.warnings[0]


@pytest.fixture
def multi_label_cache(tmp_path):
    """Three independent labels, each readable in a layer of its own; a fourth that no clip has."""
    rng = np.random.default_rng(3)
    labels = np.c_[rng.random((N, 3)) < 0.4, np.zeros(N, dtype=bool)].astype(np.uint8)
    features = rng.normal(size=(N, L, T, D))
    for c in range(3):
        features[:, c] += 2 * labels[:, c, None, None] * rng.normal(size=D)
    return planted_cache(tmp_path / "multi.zarr", features.astype(np.float32), labels, fold=FOLD)


def test_several_labels_a_clip_are_trained_with_sigmoids_and_scored_by_map(multi_label_cache, tmp_path):
    recipe = named_recipe("as20k", "wa-mlp", dim=D).with_changes(lr=0.02, batch_size=16)
    for balanced in (False, True):
        balanced_recipe = recipe.with_changes(class_balanced=balanced)
        out = tmp_path / str(balanced)
        result = train_head(multi_label_cache, head="wa-mlp", recipe=balanced_recipe, out=out, device="cpu")
        assert result.metric == "mAP" and result.value > 0.85
        several, none = (
            (multi_label_cache.labels.sum(axis=1) > 1).sum(),
            (multi_label_cache.labels.sum(axis=1) == 0).sum(),
        )
        assert f"not accuracy: {several} of 120 clips have several labels" in result.warnings[0]
        assert f"{none} of 120 clips have no label" in result.warnings[0]
        never = f"{none} training clips have no label and are never drawn: drawing is class-balanced"
        assert result.warnings[1:] == [never] * balanced + [
            f"fold {k}: 1 of 4 classes have no validation clip and do not count" for k in (1, 2, 3)
        ]
        assert load_head(out).description.loss == "bce"


def test_the_data_choose_the_recipe_and_changes_apply_to_it(cache, multi_label_cache):
    few = {"epochs": 1, "average_from_epoch": None}
    single = train_head(cache, head="tl-tr", changes=few, seed=7, device="cpu").recipe
    assert (single["loss"], single["lr"], single["epochs"], single["seed"]) == ("ce", 5e-4, 1, 7)
    multi = train_head(multi_label_cache, head="tl-tr", changes=few, device="cpu").recipe
    assert (multi["loss"], multi["lr"]) == ("bce", 2e-4)
    named = train_head(cache, head="wa-mlp", recipe="as20k", changes=few, device="cpu").recipe
    assert (named["loss"], named["time_mask_frames"]) == ("bce", 0)


@pytest.mark.parametrize("head", ["wa-mlp", "wa-tr"])
def test_saved_weights_are_the_average_over_a_span_of_epochs(cache, tmp_path, monkeypatch, head):
    snapshots = []

    class Recording(loop.Fleet):
        def take_into_average(self, which):
            snapshots.append(self.weights[:, :L].detach().clone())
            super().take_into_average(which)

    monkeypatch.setattr(loop, "Fleet", Recording)
    recipe = FAST.with_changes(average_from_epoch=3, average_to_epoch=5)
    train_head(cache, head=head, recipe=recipe, out=tmp_path / "head", device="cpu")
    last_training = torch.stack(snapshots[-3:])  # epochs 3 to 5
    assert len(snapshots) == 3 * (2 if head == "wa-mlp" else 4)  # folds train side by side or one by one
    torch.testing.assert_close(load_head(tmp_path / "head").layer_weight, last_training.mean(dim=0)[0])


def test_a_small_head_trains_on_one_thread_and_the_rest_of_the_process_keeps_its_own(cache, monkeypatch):
    seen = []

    def spy_draw(*args, original=loop.draw_epoch, **kwargs):
        seen.append(torch.get_num_threads())
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "draw_epoch", spy_draw)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train_head(cache, head="wa-mlp", recipe=FAST.with_changes(epochs=1), device="cpu")
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_bfloat16_training_finds_the_label_too(cache):
    recipe = FAST.with_changes(precision="bfloat16")
    assert train_head(cache, head="tl-tr", recipe=recipe, device="cpu").value > 0.7


def test_a_loss_that_is_not_finite_stops_training(cache):
    with pytest.raises(
        WhisperATError, match=r"became nan in epoch .: the training diverged; lower --lr, which is 1e\+30"
    ):
        train_head(cache, head="tl-tr", recipe=FAST.with_changes(lr=1e30), device="cpu")


@pytest.mark.parametrize("head", ["last-mlp", "wa-mlp"])
def test_heads_trained_side_by_side_equal_those_trained_one_by_one(tmp_path, head):
    """Folds of unequal size, two seeds, balanced draws."""
    fold = np.where(np.arange(N) < 50, 1, np.where(np.arange(N) < 95, 2, 3))
    cache = planted_cache(tmp_path / "a.zarr", planted_features(2), CLASSES, fold=fold)
    recipe = FAST.with_changes(class_balanced=True, batch_size=16)
    together, alone = (
        train_head(cache, head=head, recipe=recipe, seeds=2, together=how, out=tmp_path / how, device="cpu")
        for how in ("auto", "never")
    )
    assert (together.heads_side_by_side, alone.heads_side_by_side) == (6, 1)
    assert [of_seed["seed"] for of_seed in together.seeds] == [0, 1]
    for name in ("seed-0/fold-1", "seed-0/fold-3", "seed-1/fold-2", "."):
        one, many = (load_head(tmp_path / how / name).state_dict() for how in ("never", "auto"))
        for key in one:
            torch.testing.assert_close(many[key], one[key], rtol=1e-4, atol=1e-5)


class OneLayer(Head):
    """The smallest head: a norm and a linear map."""

    def __init__(self):
        super().__init__()
        self.mlp_layer = NormedLinear(5, 3)

    def logits(self, features_BLTD):
        return self.mlp_layer(features_BLTD[:, 0, 0])


@pytest.mark.parametrize("name, form", [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
@pytest.mark.parametrize("heads", [0, 1, 3], ids=["a module", "an mlp head", "three side by side"])
def test_the_step_is_that_of_torchs_adam(name, form, heads):
    torch.manual_seed(0)
    modules = [build_head("last-mlp", layers=1, dim=5, classes=3) for _ in range(heads)] or [OneLayer()]
    inputs, targets = torch.randn(len(modules), 8, 1, 1, 5), torch.rand(len(modules), 8, 3)
    recipe = Recipe(weight_decay=0.1, optimizer=name)
    fleet = loop.Fleet(modules, recipe, torch.device("cpu"))
    rates = np.array([0.01, 0.02, 0.005])[: len(modules)]
    batch = Batch(inputs, targets, torch.full((len(modules), 8), 1 / 8), np.ones(len(modules), dtype=bool))
    for _ in range(20):
        fleet.step(batch, rates, Ranks())
    for module, rate, x, y, found in zip(modules, rates, inputs, targets, fleet.weights, strict=True):
        optimizer = form(module.parameters(), lr=rate, betas=recipe.betas, weight_decay=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(module(x), y).backward()
            optimizer.step()
        expected = torch.nn.utils.parameters_to_vector(module.parameters())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_adamw_is_the_same_for_heads_side_by_side(cache):
    recipe = FAST.with_changes(optimizer="adamw", weight_decay=0.1)
    together, alone = (
        train_head(cache, head="wa-mlp", recipe=recipe, together=how, device="cpu") for how in ("auto", "never")
    )
    assert (together.heads_side_by_side, alone.heads_side_by_side) == (3, 1)
    assert together.layer_weights == pytest.approx(alone.layer_weights)
    other = train_head(cache, head="wa-mlp", recipe=recipe.with_changes(optimizer="adam"), device="cpu")
    assert together.layer_weights != pytest.approx(other.layer_weights)


@pytest.mark.parametrize("head", ["wa-mlp", "wa-pool"])
def test_dropout_is_decided_by_the_seed_and_changes_what_is_learnt(cache, head, tmp_path):
    def losses(name, recipe):
        train_head(cache, head=head, recipe=recipe, out=tmp_path / name, device="cpu")
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    recipe = FAST.with_changes(dropout=0.5)
    torch.manual_seed(1)
    first = losses("first", recipe)
    torch.manual_seed(2)
    assert losses("again", recipe) == first != losses("without", FAST)


@pytest.mark.parametrize("head", ["last-mlp", "wa-mlp", "wa-tr", "wa-pool"])
@pytest.mark.parametrize("tier", ["memory", "stream"])
def test_statistics_are_those_of_the_training_clips_of_each_fold(cache, tmp_path, head, tier):
    recipe = FAST.with_changes(standardise=True, epochs=1, average_from_epoch=None)
    train_head(cache, head=head, recipe=recipe, out=tmp_path / "head", tier=tier, device="cpu")
    for fold in (1, 2, 3):
        module = load_head(tmp_path / "head" / f"fold-{fold}")
        features = torch.from_numpy(cache.features(np.flatnonzero(fold != FOLD)))
        if head.endswith("mlp"):
            features = features.mean(dim=2, keepdim=True)
        features = features[:, -1:] if head == "last-mlp" else features
        torch.testing.assert_close(module.standard_mean, features.mean(dim=(0, 2)), rtol=1e-4, atol=1e-5)
        deviation = features.std(dim=(0, 2), correction=0)
        torch.testing.assert_close(module.standard_deviation, deviation, rtol=1e-4, atol=1e-5)
        assert module.description.standardised and module.description.recipe["standardise"]


def test_a_channel_that_never_varies_is_left_as_it_is(tmp_path):
    features = planted_features(2)
    features[:, :, :, 3] = 7
    cache = planted_cache(tmp_path / "flat.zarr", features, CLASSES, fold=FOLD)
    recipe = FAST.with_changes(standardise=True)
    result = train_head(cache, head="wa-pool", width=16, recipe=recipe, out=tmp_path / "head", device="cpu")
    assert result.value > 0.6
    assert (load_head(tmp_path / "head").standard_deviation[:, 3] == 1).all()


def test_heads_side_by_side_have_statistics_of_their_own(cache):
    recipe = FAST.with_changes(standardise=True)
    together, alone = (
        train_head(cache, head="wa-mlp", recipe=recipe, together=how, device="cpu") for how in ("auto", "never")
    )
    assert (together.heads_side_by_side, alone.heads_side_by_side) == (3, 1)
    assert together.layer_weights == pytest.approx(alone.layer_weights)


def test_the_asymmetric_loss_is_bce_that_makes_little_of_what_is_known_to_be_absent():
    logits = torch.tensor([[[-6.0, 3.0, 0.0, 2.0]]])
    absent, present = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    assert clip_losses(logits, present, "asymmetric") == pytest.approx(clip_losses(logits, present, "bce").item())
    assert clip_losses(logits[..., :1], absent[..., :1], "asymmetric") == 0  # below the margin
    p = 1 / (1 + np.exp(-2)) - 0.05
    expected = -(p**4) * np.log(1 - p)
    assert clip_losses(logits[..., 3:], absent[..., 3:], "asymmetric").item() == pytest.approx(expected, rel=1e-5)


def watched_in(cache, number, recipe):
    job = plan(
        cache, head="wa-mlp", width=None, recipe=recipe, changes={}, faithful=False, device=torch.device("cpu"),
        tier="memory",
    )  # fmt: skip
    return watched_rows(job, next(fold.train for fold in job.folds if fold.number == number))


def test_several_seeds_give_mean_and_spread(cache):
    several = train_head(cache, head="wa-mlp", recipe=FAST, seeds=3, device="cpu")
    alone = [train_head(cache, head="wa-mlp", recipe=FAST, seed=seed, device="cpu").value for seed in range(3)]
    assert [of_seed["value"] for of_seed in several.seeds] == pytest.approx(alone)
    assert (several.value, several.std_over_seeds) == (pytest.approx(np.mean(alone)), pytest.approx(np.std(alone)))
    values = [[fold["value"] for fold in of_seed["folds"]] for of_seed in several.seeds]
    assert [fold["value"] for fold in several.folds] == pytest.approx(np.mean(values, axis=0))


@pytest.mark.parametrize("head", ["wa-mlp", "wa-tr"])
def test_training_stops_early_where_validation_does_not_improve(tmp_path, head):
    noise = np.random.default_rng(1).normal(size=(N, L, T, 64)).astype(np.float32)
    cache = planted_cache(tmp_path / "noise.zarr", noise, CLASSES, fold=FOLD)
    recipe = FAST.with_changes(epochs=40, patience=3, average_from_epoch=None)
    result = train_head(cache, head=head, recipe=recipe, out=tmp_path / "head", device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "head" / "metrics.jsonl").read_text().splitlines()]
    for fold in result.folds:
        curve = [line["accuracy"] for line in lines if line["fold"] == fold["fold"]]
        assert fold["epochs"] == len(curve) == int(np.argmax(curve)) + 1 + 3 < 40
        head_of_fold = load_head(tmp_path / "head" / f"fold-{fold['fold']}")
        seen = seen_rows(cache, head_of_fold.description, tmp_path / "head" / f"fold-{fold['fold']}")
        assert seen.sum() == np.sum(fold["fold"] != FOLD) and fold["train_clips"] == round(0.8 * seen.sum())
        watched = watched_in(cache, fold["fold"], recipe)
        found = evaluate_head(head_of_fold, cache, rows=watched).accuracy
        assert found == max(curve)  # the weights of the best epoch, on the clips that were watched
    assert "fifth of the training clips" in result.selected_on["epoch"]
    epochs = round(np.mean([fold["epochs"] for fold in result.folds]))
    assert sum(line["training"] == "all" for line in lines) == epochs


def test_every_epoch_has_a_line_and_the_curve_a_picture(cache, tmp_path):
    result = train_head(cache, head="wa-tr", recipe=FAST, out=tmp_path / "head", device="cpu")
    lines = [json.loads(line) for line in Path(result.metrics_file).read_text().splitlines()]
    assert [(line["training"], line["epoch"]) for line in lines] == [
        (name, epoch) for name in ("fold-1", "fold-2", "fold-3", "all") for epoch in range(1, 7)
    ]
    assert all({"loss", "lr", "seed", "samples", "seconds", "waiting_seconds"} <= set(line) for line in lines)
    assert all(("accuracy" in line) is (line["training"] != "all") for line in lines)
    assert (tmp_path / "head" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_gets_what_the_records_have(cache, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train_head(cache, head="wa-mlp", recipe=FAST, out=tmp_path / "head", tensorboard=True, device="cpu")
    shown = events.EventAccumulator(str(tmp_path / "head" / "tensorboard" / "fold-2"))
    shown.Reload()
    lines = [json.loads(line) for line in (tmp_path / "head" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["training"] == "fold-2"]
    assert [point.value for point in shown.Scalars("loss")] == pytest.approx(losses)
    assert [point.step for point in shown.Scalars("accuracy")] == list(range(1, 7))


@pytest.mark.parametrize("head", ["wa-mlp", "tl-tr"])
def test_streaming_trains_as_well_as_memory(cache, head):
    results = {
        tier: train_head(cache, head=head, recipe=FAST.with_changes(epochs=10), tier=tier, device="cpu")
        for tier in ("memory", "stream")
    }
    assert {tier: result.tier for tier, result in results.items()} == {"memory": "memory", "stream": "stream"}
    assert min(result.value for result in results.values()) > 0.7  # chance is 0.25


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head": "mlp"}, "head 'mlp' is not known"),
        ({"head": "last-tr", "width": 8}, "last-tr has no projection"),
        ({"recipe": "esc10"}, "recipe 'esc10' is not known"),
        ({"changes": {"rate": 1}}, "no setting 'rate'"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"recipe": Recipe(loss="ce")}, "cannot be masked: set time_mask_frames to 0"),
        ({"head": "tl-tr", "recipe": Recipe(time_mask_frames=25)}, "clips have 25 frames: set it lower"),
        ({"seeds": 0}, "0 seeds were asked for"),
        ({"tier": "disk"}, "tier 'disk' is not known"),
        ({"together": "always"}, "together is 'always' and must be one of auto, never"),
        ({"tensorboard": True, "out": None}, "--tensorboard writes its files into the folder of --out"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(cache, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        train_head(cache, **({"head": "wa-mlp", "out": tmp_path / "head"} | options))
    assert not (tmp_path / "head").exists()


def test_a_cache_without_finished_clips_is_refused(tmp_path):
    cache = planted_cache(tmp_path / "a.zarr", planted_features(2), CLASSES, failed=range(N))
    with pytest.raises(UsageError, match="0 of 120 clips are finished"):
        train_head(cache, head="wa-mlp", device="cpu")


def test_softmax_loss_for_several_labels_a_clip_is_refused(multi_label_cache):
    with pytest.raises(UsageError, match="loss ce needs exactly one label"):
        train_head(multi_label_cache, head="wa-mlp", recipe=FAST, device="cpu")


def test_an_out_folder_that_cannot_be_made_is_refused_before_training(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(runner, "train_group", lambda *args: pytest.fail("trained first"))
    with pytest.raises(UsageError, match="cannot make the folder"):
        train_head(cache, head="wa-mlp", recipe=FAST, out=tmp_path / "file" / "head", device="cpu")


def test_real_sounds_are_told_apart_by_wa_mlp(esc10_cache):
    assert train_head(esc10_cache, head="wa-mlp").value >= 0.89


@pytest.mark.slow
def test_real_sounds_are_told_apart_by_tl_tr(esc10_cache):
    assert train_head(esc10_cache, head="tl-tr", width=128).value >= 0.91
