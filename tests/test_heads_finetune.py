"""The encoder is trained through the features that it gives frozen, as gently as asked, and comes back from disk."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_cli import run
from torch import nn
from whisper.model import AudioEncoder

from conftest import write_wav
from whisper_at_cli.extract import load_backbone
from whisper_at_cli.extract.backbones.encoder import WhisperEncoder, encoder_from_state
from whisper_at_cli.extract.backbones.mel import log_mel
from whisper_at_cli.extract.backbones.weights import WhisperWeights, read_weights
from whisper_at_cli.extract.datasets import open_dataset
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.extract.evaluation.predictions import load_predictions
from whisper_at_cli.heads import build_head, evaluate_end_to_end, evaluate_head, finetune, load_end_to_end, load_head
from whisper_at_cli.heads.checkpoint import load_encoder_weights
from whisper_at_cli.heads.endtoend import EncoderWithHead, Waveforms, openai_state, trainable_features
from whisper_at_cli.heads.training.finetune import Batch, hide_frames, mix_waveforms
from whisper_at_cli.heads.training.recipe import Recipe

MELS, L, D, HEADS = 80, 2, 32, 2
QUICK = {"epochs": 4, "batch_size": 8, "lr": 3e-3, "mixup_rate": 0.0, "time_mask_frames": 0}


@pytest.fixture(scope="module")
def weights():
    """A small random encoder in OpenAI's names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = WhisperEncoder(mels=MELS, layers=L, dim=D, heads=HEADS)
        for block in encoder.blocks:
            block.qkv.bias.data[D : 2 * D] = 0  # Whisper's key has none
        encoder.positions.normal_(std=0.1)
    dims = {"n_audio_state": D, "n_audio_layer": L, "n_audio_head": HEADS, "n_mels": MELS}
    return WhisperWeights("random", "", dims, openai_state(encoder))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Two classes of sixteen clips of 1 s: a low and a high tone in noise, and one file that is no sound."""
    root, rng = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    for index in range(32):
        time, name = np.arange(16000) / 16000, ("low", "high")[index % 2]
        tone = np.sin(2 * np.pi * (300 if name == "low" else 3000) * time + rng.uniform(0, 6))
        write_wav(root / name / f"{index:02d}.wav", 0.2 * tone + 0.02 * rng.normal(size=16000))
    (root / "low" / "text.wav").write_text("no sound")
    return root


def tune(sounds, weights, **options):
    changes = QUICK | options.pop("changes", {})
    settings = dict(model=weights, clip_seconds=1.0, fold=1, recipe="esc50", device="cpu", changes=changes) | options
    return finetune(sounds, **settings)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_features_of_the_trainable_encoder_are_the_frozen_ones(esc10, tiny_en):
    dataset = open_dataset(esc10)
    waveforms = torch.from_numpy(np.stack([dataset.waveform(row, 80000)[0] for row in (0, 100, 399)]))
    frozen = load_backbone(tiny_en, device="cpu").encode(waveforms)
    read = read_weights(tiny_en)
    encoder, mel = encoder_from_state(read.state, heads=read.dims["n_audio_head"]), log_mel(waveforms, 80)
    found = trainable_features(encoder, mel, pooled=True)
    assert found.shape == frozen.shape == (3, 4, 25, 384)
    for layer in range(4):
        assert relative(found[:, layer], frozen[:, layer]) < 1e-5
    last = trainable_features(encoder, mel, pooled=False)
    assert last.shape == (3, 1, 250, 384)
    assert relative(last[:, 0].unflatten(1, (25, 10)).mean(dim=2), frozen[:, -1]) < 1e-5


def test_gradients_are_those_of_openais_modules(weights):
    mel = torch.randn(2, MELS, 100, generator=torch.Generator().manual_seed(1))
    ours = encoder_from_state({k: v.clone() for k, v in weights.state.items()}, heads=HEADS)
    EncoderWithHead(ours, nn.Identity(), pools=False)
    trainable_features(ours, mel, pooled=False).square().mean().backward()
    theirs = AudioEncoder(MELS, 1500, D, HEADS, L)
    named = {name.removeprefix("encoder."): value.clone() for name, value in weights.state.items()}
    theirs.load_state_dict(named, strict=False)
    x = F.gelu(theirs.conv2(F.gelu(theirs.conv1(mel)))).permute(0, 2, 1)
    x = x + theirs.positional_embedding[: x.shape[1]]
    for block in theirs.blocks:
        x = block(x)
    x.square().mean().backward()
    conv = theirs.conv1.weight.grad.transpose(1, 2).flatten(1)
    assert relative(ours.stem1.weight.grad, conv) < 1e-4
    for mine, its in zip(ours.blocks, theirs.blocks, strict=True):
        parts = [its.attn.query.weight.grad, its.attn.key.weight.grad, its.attn.value.weight.grad]
        assert relative(mine.qkv.weight.grad, torch.cat(parts)) < 1e-4
        assert relative(mine.contract.weight.grad, its.mlp[2].weight.grad) < 1e-4
        assert (mine.qkv.bias.grad[D : 2 * D] == 0).all() and (mine.qkv.bias.grad[:D] != 0).any()


def test_an_encoder_in_openais_names_comes_back_bit_for_bit(weights):
    encoder = encoder_from_state(weights.state, heads=HEADS)
    again = encoder_from_state(openai_state(encoder), heads=HEADS)
    for name, value in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_training_lowers_the_loss_and_moves_the_encoder_by_the_smaller_rate(sounds, weights, tmp_path):
    before = {name: value.clone() for name, value in weights.state.items()}
    changes = {"average_from_epoch": None}
    result = tune(sounds, weights, out=tmp_path / "tuned", changes=changes, encoder_lr_share=0.01)
    losses = result.losses[0]
    assert losses[-1] < 0.7 * losses[0] and result.value > 0.9 and result.encoder_lr == pytest.approx(3e-5)
    assert all(torch.equal(value, before[name]) for name, value in weights.state.items())  # what was given stays
    steps = 4 * -(-result.folds[0]["train_clips"] // 8)
    after = load_encoder_weights(tmp_path / "tuned")
    assert torch.equal(after["encoder.positional_embedding"], before["encoder.positional_embedding"])
    for name in ("encoder.conv1.weight", "encoder.blocks.0.attn.query.weight", "encoder.blocks.1.mlp.0.weight"):
        moved = (after[name] - before[name]).abs()
        assert 0 < moved.max() <= 1.5 * steps * 3e-5 and moved.mean() > 3e-5, name
    head = load_head(tmp_path / "tuned")
    fresh = build_head("last-tr", layers=L, dim=D, classes=2)
    spread = (head.mlp_layer[1].weight - fresh.mlp_layer[1].weight).abs().max()
    assert spread > 20 * moved.max()


def test_a_frozen_encoder_stays_and_gives_another_head(sounds, weights, tmp_path):
    frozen = tune(sounds, weights, out=tmp_path / "frozen", encoder_lr_share=0.0)
    tune(sounds, weights, out=tmp_path / "tuned")
    assert frozen.encoder_lr == 0
    kept = load_encoder_weights(tmp_path / "frozen")
    assert all(torch.equal(kept[name], weights.state[name]) for name in kept)
    clip = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [load_end_to_end(tmp_path / name)(clip) for name in ("frozen", "tuned")]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("head", ["last-tr", "wa-mlp", "tl-tr"])
def test_a_saved_model_gives_the_predictions_that_it_was_validated_by(sounds, weights, tmp_path, head):
    result = tune(sounds, weights, out=tmp_path / "tuned", head=head, changes={"epochs": 2})
    found = evaluate_end_to_end(tmp_path / "tuned", sounds, device="cpu")
    assert found.chosen == "clips that the head was not trained on" and found.clips_trained_on == 0
    assert found.accuracy == pytest.approx(result.value) and found.clips == result.folds[0]["validation_clips"]
    model = load_end_to_end(tmp_path / "tuned")
    assert result.params == sum(p.numel() for p in model.parameters())
    assert model.description.frames == (50 if head == "last-tr" else 25)
    assert model.description.weights_sha256 == WhisperWeights("", "", {}, openai_state(model.encoder)).encoder_sha256()
    clips = torch.randn(3, 16000)
    with torch.no_grad():
        torch.testing.assert_close(model(clips), torch.cat([model(clip[None]) for clip in clips]), rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_model_and_another_another(sounds, weights):
    runs = [tune(sounds, weights, seed=seed, changes={"epochs": 1}).losses for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


def test_wa_pool_is_tuned_by_its_recipe_and_its_dropout_is_decided_by_the_seed(sounds, weights):
    runs = []
    for other in (1, 2):
        torch.manual_seed(other)
        runs.append(tune(sounds, weights, head="wa-pool", recipe=None, changes={"epochs": 1}))
    assert runs[0].losses == runs[1].losses and runs[0].dim == 128
    assert (runs[0].recipe["optimizer"], runs[0].recipe["dropout"], runs[0].recipe["standardise"]) == (
        "adamw",
        0.3,
        False,
    )
    with pytest.raises(UsageError, match="--standardise does nothing with --unfreeze"):
        tune(sounds, weights, head="wa-pool", changes={"standardise": True})


def test_folds_are_each_held_out_and_the_saved_model_saw_all_clips(sounds, weights, tmp_path):
    result = tune(
        sounds, weights, fold=None, out=tmp_path / "tuned", changes={"epochs": 1}, predictions=tmp_path / "p.npz"
    )
    scored = load_predictions(tmp_path / "p.npz")
    values = [fold["value"] for fold in result.folds]
    assert len(scored.ids) == 32 and result.intervals["clips"] == 32 and set(scored.folds) == {1, 2, 3, 4, 5}
    assert result.ci95[0] <= result.value <= result.ci95[1] and result.value == pytest.approx(np.mean(values))
    assert (result.fold_mean, result.std) == pytest.approx((np.mean(values), np.std(values)))
    right = scored.scores[0].argmax(axis=1) == scored.labels.argmax(axis=1)
    assert [right[scored.folds == fold["fold"]].mean() for fold in result.folds] == pytest.approx(values)
    kept = load_head(tmp_path / "tuned").description
    assert (kept.value, kept.ci95, kept.fold_std) == (result.value, result.ci95, result.std)
    assert [fold["fold"] for fold in result.folds] == [1, 2, 3, 4, 5] and len(result.losses) == 6
    assert sum(fold["validation_clips"] for fold in result.folds) == 32
    assert any("1 clips could not be read" in note and "low/text.wav" in note for note in result.warnings)
    whole = evaluate_end_to_end(tmp_path / "tuned", sounds, device="cpu")
    assert (whole.clips, whole.clips_trained_on) == (32, 32)
    assert any("1 clips could not be read" in note for note in whole.notes)
    part = evaluate_end_to_end(tmp_path / "tuned" / "fold-2", sounds, device="cpu")
    assert part.clips_trained_on == 0 and part.clips == result.folds[1]["validation_clips"]


def test_waveforms_are_mixed_with_their_labels_and_unreadable_ones_left_out():
    column = torch.tensor
    draw = Batch(column([4, 7, 9]), column([7, 9, 4]), column([0.25, 1.0, 0.5]), column([0] * 3), column([0] * 3))
    labels = torch.zeros(10, 2, dtype=torch.uint8)
    labels[4, 0] = labels[7, 1] = labels[9, 1] = 1
    recipe = Recipe(label_smoothing=0.2)
    waveforms = torch.tensor([[4.0, 4], [7, 7], [9, 9]])
    mixed, targets, kept = mix_waveforms(draw, waveforms, column([0, 1, 2, 1, 1, 0]), labels, recipe)
    assert kept.all() and mixed[:, 0].tolist() == [0.25 * 4 + 0.75 * 7, 7, 6.5]
    expected = torch.tensor([[0.25, 0.75], [0, 1], [0.5, 0.5]]) * 0.8 + 0.1
    torch.testing.assert_close(targets, expected)
    waveforms = torch.tensor([[4.0, 4], [9, 9]])  # clip 7 could not be read
    mixed, targets, kept = mix_waveforms(draw, waveforms, column([0, -1, 1, -1, -1, 0]), labels, recipe)
    assert kept.tolist() == [True, False, True] and mixed[:, 0].tolist() == [4, 6.5]
    torch.testing.assert_close(targets[0], torch.tensor([0.9, 0.1]))


def test_hidden_frames_are_as_silent_as_the_clips_quietest_place():
    mel = torch.randn(2, 3, 100)
    hidden = hide_frames(mel, torch.tensor([5, 0]), torch.tensor([10, 0]))
    assert torch.equal(hidden[1], mel[1])
    assert (hidden[0, :, 20:40] == mel[0].min()).all()
    assert torch.equal(hidden[0, :, :20], mel[0, :, :20]) and torch.equal(hidden[0, :, 40:], mel[0, :, 40:])


def test_waveforms_are_kept_once_decoded_and_the_same_when_they_are_not(sounds):
    dataset = open_dataset(sounds)
    parts = [np.array([0, 5, 3]), np.array([5, 32]), np.array([5, 5])]
    kept, fresh = Waveforms(dataset, 8000, keep_bytes=1 << 20), Waveforms(dataset, 8000, keep_bytes=0)
    for (one, good), (other, also) in zip(kept.ahead(parts), fresh.ahead(parts), strict=True):
        assert torch.equal(one, other) and (good == also).all()
    assert set(kept._kept) == {0, 5, 3} | ({32} - set(kept.failures)) and not fresh._kept


@pytest.mark.parametrize(
    "options, message",
    [
        ({"encoder_lr_share": 2.0}, "share of the learning rate is 2.0"),
        ({"head": "mlp"}, "'mlp' is not known"),
        ({"head": "tl-tr", "width": 7}, "cannot project to 7 channels"),
        ({"fold": 9}, "fold 9 was asked for, and .* has 1, 2, 3, 4, 5"),
        ({"clip_seconds": 0.7}, "does not divide into 25 frames"),
        ({"recipe": "mine"}, "recipe 'mine' is not known"),
    ],
)
def test_what_cannot_work_is_refused_before_any_audio_is_read(sounds, weights, options, message, monkeypatch):
    monkeypatch.setattr(Waveforms, "_read", lambda *arguments: pytest.fail("audio was read"))
    with pytest.raises(UsageError, match=message):
        tune(sounds, weights, **options)


def test_a_loss_that_is_not_finite_ends_the_run(sounds, weights):
    with pytest.raises(WhisperATError, match="lower --lr"):
        tune(sounds, weights, changes={"lr": 1e30}, encoder_lr_share=1.0)


def test_the_commands_tune_and_evaluate_from_audio(capsys, sounds, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("whisper_at_cli.heads.training.finetune.read_weights", lambda _: weights)
    status, out, err = run(
        capsys, "train-head", sounds, "--unfreeze", "--model", "random", "--head", "wa-mlp", "--recipe", "esc50",
        "--epochs", 1, "--batch-size", 16, "--encoder-lr-share", 0.1, "--fold", 2, "--out", tmp_path / "tuned",
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert status == 0, err
    result = json.loads(out)
    assert {"head", "dim", "params", "metric", "value", "folds", "seconds", "checkpoint"} <= set(result)
    assert result["ci95"] and result["intervals"]["draws"] == 10_000
    status, out, _ = run(capsys, "evaluate", tmp_path / "tuned", sounds, "--device", "cpu", "--json")
    assert status == 0 and json.loads(out)["accuracy"] == pytest.approx(result["value"])
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "zarr.json").write_text("{}")
    status, _, err = run(capsys, "evaluate", tmp_path / "tuned", tmp_path / "a.zarr")
    assert status == 2 and "give the dataset instead" in err
    with pytest.raises(UsageError, match="give the dataset instead"):
        evaluate_head(tmp_path / "tuned", None, device="cpu")
    with pytest.raises(UsageError, match="no encoder of its own"):
        record = json.loads((tmp_path / "tuned" / "head.json").read_text())
        (tmp_path / "tuned" / "head.json").write_text(json.dumps(record | {"encoder": None}))
        load_end_to_end(tmp_path / "tuned")
