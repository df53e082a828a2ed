"""Training finds what was planted, keeps validation clips out of training, and is decided by its seed."""

import json

import numpy as np
import pytest
import torch

from planted import planted_cache
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.heads import load_head, train, train_head
from whisper_at_cli.heads.evaluate import predict
from whisper_at_cli.heads.recipe import Recipe, named_recipe

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


@pytest.mark.parametrize("head, width", [("wa-mlp", None), ("wa-tr", None), ("tl-tr", None), ("tl-tr", 16)])
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

    def spy_draw(positions, *args, original=train.draw_epoch, **kwargs):
        drawn = original(positions, *args, **kwargs)
        trained.append(set(drawn.clip.tolist()) | set(drawn.partner.tolist()))
        return drawn

    monkeypatch.setattr(train, "predict", spy_predict)
    monkeypatch.setattr(train, "draw_epoch", spy_draw)
    result = train_head(cache, head="wa-mlp", recipe=FAST.with_changes(epochs=1), device="cpu")
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
    assert result.params == L + 2 * D + (D + 1) * C
    assert result.seconds > 0 and result.samples_per_second > 0 and result.warnings == []
    assert (result.recipe["lr"], result.recipe["precision"], result.device) == (FAST.lr, "float32", "cpu")
    assert [now[:2] for now in told] == [(epoch, 18) for epoch in range(1, 19)]


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
        test = rows[FOLD == fold["fold"]]
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
        result = train_head(multi_label_cache, head="wa-mlp", recipe=balanced_recipe, out=tmp_path / "h", device="cpu")
        assert result.metric == "mAP" and result.value > 0.85
        assert result.warnings == [
            f"fold {k}: 1 of 4 classes have no validation clip and do not count" for k in (1, 2, 3)
        ]
        assert load_head(tmp_path / "h").description.loss == "bce"


def test_the_data_choose_the_recipe_and_changes_apply_to_it(cache, multi_label_cache):
    few = {"epochs": 1, "average_from_epoch": None}
    single = train_head(cache, head="tl-tr", changes=few, seed=7, device="cpu").recipe
    assert (single["loss"], single["lr"], single["epochs"], single["seed"]) == ("ce", 5e-4, 1, 7)
    multi = train_head(multi_label_cache, head="tl-tr", changes=few, device="cpu").recipe
    assert (multi["loss"], multi["lr"]) == ("bce", 2e-4)
    named = train_head(cache, head="wa-mlp", recipe="as20k", changes=few, device="cpu").recipe
    assert (named["loss"], named["time_mask_frames"]) == ("bce", 0)


def test_saved_weights_are_the_average_over_the_last_epochs(cache, tmp_path, monkeypatch):
    snapshots = []

    class Recording(train.AveragedModel):
        def update_parameters(self, module):
            snapshots.append(module.layer_weight.detach().clone())
            super().update_parameters(module)

    monkeypatch.setattr(train, "AveragedModel", Recording)
    train_head(cache, head="wa-mlp", recipe=FAST, out=tmp_path / "head", device="cpu")
    last_training = torch.stack(snapshots[-3:])  # epochs 4 to 6
    assert len(snapshots) == 3 * 4
    torch.testing.assert_close(load_head(tmp_path / "head").layer_weight, last_training.mean(dim=0))


def test_a_small_head_trains_on_one_thread_and_the_rest_of_the_process_keeps_its_own(cache, monkeypatch):
    seen = []

    def spy_draw(*args, original=train.draw_epoch, **kwargs):
        seen.append(torch.get_num_threads())
        return original(*args, **kwargs)

    monkeypatch.setattr(train, "draw_epoch", spy_draw)
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
    with pytest.raises(WhisperATError, match="the loss became nan in epoch .: lower lr, which is 1e\\+30"):
        train_head(cache, head="tl-tr", recipe=FAST.with_changes(lr=1e30), device="cpu")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head": "mlp"}, "head 'mlp' is not known"),
        ({"head": "wa-tr", "width": 8}, "wa-tr has no projection"),
        ({"recipe": "esc10"}, "recipe 'esc10' is not known"),
        ({"changes": {"rate": 1}}, "no setting 'rate'"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"recipe": Recipe(loss="ce")}, "cannot be masked: set time_mask_frames to 0"),
        ({"head": "tl-tr", "recipe": Recipe(time_mask_frames=25)}, "clips have 25 frames: set it lower"),
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
    monkeypatch.setattr(train, "fit", lambda *args: pytest.fail("trained first"))
    with pytest.raises(UsageError, match="cannot make the folder"):
        train_head(cache, head="wa-mlp", recipe=FAST, out=tmp_path / "file" / "head", device="cpu")


def test_real_sounds_are_told_apart_by_wa_mlp(esc10_cache):
    assert train_head(esc10_cache, head="wa-mlp").value >= 0.89


@pytest.mark.slow
def test_real_sounds_are_told_apart_by_tl_tr(esc10_cache):
    assert train_head(esc10_cache, head="tl-tr", width=128).value >= 0.91
