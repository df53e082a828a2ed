"""Batches are drawn, mixed and masked as a recipe says, and no clip is lost; every tier gives the same ones."""

import threading
import time

import numpy as np
import pytest
import torch

from planted import planted_cache
from whisper_at_cli.heads.training.batches import (
    Collected,
    Draw,
    balancing_weights,
    batch_bounds,
    draw_epoch,
    mix_and_mask,
    steps,
)
from whisper_at_cli.heads.training.data import Clips, load_clips
from whisper_at_cli.heads.training.loader import Epochs
from whisper_at_cli.heads.training.ranks import Ranks
from whisper_at_cli.heads.training.recipe import Recipe, named_recipe

PLAIN = Recipe(mixup_rate=0.0, time_mask_frames=0, label_smoothing=0.0)
CPU = torch.device("cpu")


@pytest.fixture
def clips():
    features = torch.randn(30, 2, 25, 4, generator=torch.Generator().manual_seed(0)).half()
    labels = torch.eye(5, dtype=torch.uint8)[torch.arange(30) % 5]
    return Clips(np.arange(30), features, labels, CPU)


def draw(recipe, positions=None, *, seed=0, frames=25, layers=2, weights=None):
    positions = np.arange(30) if positions is None else positions
    return draw_epoch(positions, recipe, np.random.default_rng(seed), frames=frames, layers=layers, weights=weights)


def batches(clips, draws, recipe, ranks=None):
    return list(Epochs(clips, recipe, ranks or Ranks()).batches(draws, (0,)))


@pytest.mark.parametrize("size", [1, 7, 10, 48])
def test_an_epoch_has_every_clip_once_whatever_the_batch_size(size):
    taken = list(steps([draw(PLAIN)], size))
    assert sorted(np.concatenate([step.clip[0] for step in taken])) == list(range(30))
    sizes = [step.clip.shape[1] for step in taken]
    assert max(sizes) <= size and max(sizes) - min(sizes) <= 1
    assert batch_bounds(30, size)[-1][1] == 30


@pytest.mark.parametrize("partner", ["batch", "uniform"])
def test_clips_and_partners_come_from_the_training_positions_only(partner):
    positions = np.array([3, 5, 8, 13, 21])
    drawn = draw(Recipe(mixup_rate=1.0, mixup_partner=partner), positions)
    for step in steps([drawn], 2):
        assert set(step.clip.ravel()) | set(step.partner.ravel()) <= set(positions)


def test_a_partner_in_the_batch_is_the_neighbour():
    for step in steps([draw(Recipe())], 7):
        assert step.partner[0].tolist() == [*step.clip[0, 1:], step.clip[0, 0]]


def test_a_short_epoch_draws_its_share():
    assert len(draw(PLAIN.with_changes(epoch_share=0.1))) == 3
    assert len(draw(PLAIN.with_changes(epoch_share=0.001))) == 1


def test_a_plain_batch_is_the_features_themselves_in_float32(clips):
    drawn = draw(PLAIN)
    (batch,) = batches(clips, [drawn], PLAIN)
    assert batch.inputs.dtype == batch.targets.dtype == torch.float32
    torch.testing.assert_close(batch.inputs[0], clips.features[drawn.clip].float(), rtol=0, atol=0)
    torch.testing.assert_close(batch.targets[0], clips.labels[drawn.clip].float(), rtol=0, atol=0)


@pytest.mark.parametrize("partner", ["batch", "uniform"])
@pytest.mark.parametrize("layers", ["each", "same"])
def test_mixing_and_masking_equal_a_plain_loop(clips, partner, layers):
    recipe = Recipe(mixup_rate=0.7, mixup_partner=partner, time_mask_layers=layers)
    drawn = draw(recipe, seed=3)
    (batch,) = batches(clips, [drawn], recipe)
    features, labels = clips.features.float(), clips.labels.float()
    partners = np.roll(drawn.clip, -1) if partner == "batch" else drawn.partner
    assert drawn.mask_start.shape == (30, 2 if layers == "each" else 1)
    for i in range(30):
        share, clip, other = float(drawn.share[i]), drawn.clip[i], partners[i]
        expected = share * features[clip] + (1 - share) * features[other]
        for layer in range(2):
            at = layer if layers == "each" else 0
            expected[layer, drawn.mask_start[i, at] : drawn.mask_end[i, at]] = 0
        torch.testing.assert_close(batch.inputs[0, i], expected, rtol=1e-5, atol=1e-5)
        label = share * labels[clip] + (1 - share) * labels[other]
        torch.testing.assert_close(batch.targets[0, i], label * 0.9 + 0.1 / 5)
    assert (drawn.share == 1).any() and (drawn.share < 1).any()


def test_heads_side_by_side_get_the_batches_that_each_would_get_alone(clips):
    recipe = Recipe(batch_size=7)
    draws = [draw(recipe, np.arange(22), seed=1), draw(recipe, np.arange(5, 30), seed=2), None]
    together = batches(clips, draws, recipe)
    for m in (0, 1):
        alone = batches(clips, [draws[m]], recipe)
        assert [bool(batch.active[m]) for batch in together] == [True] * len(alone) + [False] * (
            len(together) - len(alone)
        )
        for one, many in zip(alone, together, strict=False):
            real = many.weight[m] > 0
            torch.testing.assert_close(many.inputs[m][real], one.inputs[0])
            torch.testing.assert_close(many.targets[m][real], one.targets[0])
            torch.testing.assert_close(many.weight[m][real], one.weight[0])
    assert not any(batch.active[2] or batch.weight[2].any() for batch in together)


@pytest.mark.parametrize("partner", ["batch", "uniform"])
@pytest.mark.parametrize("tier", ["memory", "stream"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_processes_share_out_the_batches_of_one(tmp_path, partner, tier, dtype):
    clips, recipe = stored_clips(tmp_path, dtype, tier)[1], Recipe(batch_size=9, mixup_partner=partner)
    whole = batches(clips, [draw(recipe)], recipe)
    parts = [batches(clips, [draw(recipe)], recipe, Ranks(rank, 2)) for rank in (0, 1)]
    for number, batch in enumerate(whole):
        for name in ("inputs", "targets", "weight"):
            joined = torch.cat([getattr(part[number], name) for part in parts], dim=1)
            torch.testing.assert_close(joined, getattr(batch, name), rtol=0, atol=0)


def stored_clips(folder, dtype, tier, reads="features"):
    """Thirty clips in shards of four."""
    rng = np.random.default_rng(1)
    scale = rng.uniform(0.5, 2, size=(30, 2, 4)).astype(np.float16) if dtype == "int8" else None
    features = np.round(rng.normal(size=(30, 2, 25, 4)) * 20)
    cache = planted_cache(
        folder / "a.zarr", features, np.arange(30) % 5, dtype=dtype, scale=scale,
        shard_mb=4.5 * 2 * 25 * 4 * {"int8": 1, "float16": 2, "float32": 4}[dtype] / 1e6,
    )  # fmt: skip
    return cache, load_clips(cache, np.arange(30), reads, CPU, tier)


@pytest.mark.parametrize("tier", ["memory", "stream"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_every_tier_and_type_gives_decoded_features_with_their_labels(tmp_path, tier, dtype):
    cache, clips = stored_clips(tmp_path, dtype, tier)
    assert clips.tier == tier
    expected, labels = cache.features(np.arange(30)).astype(np.float32), cache.labels
    seen = []
    for batch in batches(clips, [draw(PLAIN)], PLAIN.with_changes(batch_size=8)):
        for features, label in zip(batch.inputs[0].numpy(), batch.targets[0].numpy(), strict=True):
            (row,) = np.flatnonzero((expected == features).all(axis=(1, 2, 3)))
            assert (labels[row] == label).all()
            seen.append(row)
    assert sorted(seen) == list(range(30))
    torch.testing.assert_close(clips.batch(torch.tensor([4, 9])), torch.from_numpy(expected[[4, 9]]), rtol=0, atol=0)


@pytest.mark.parametrize("reads, shape", [("mean", (2, 1, 4)), ("last mean", (1, 1, 4))])
def test_means_stream_as_they_lie_in_memory(tmp_path, reads, shape):
    cache, streamed = stored_clips(tmp_path, "float32", "stream", reads)
    held = load_clips(cache, np.arange(30), reads, CPU, "memory")
    rows = [inputs for batch in batches(streamed, [draw(PLAIN)], PLAIN) for inputs in batch.inputs[0]]
    assert all(row.shape == shape for row in rows)
    assert sorted(row.sum().item() for row in rows) == sorted(held.features.sum(dim=(1, 2, 3)).tolist())


def test_a_streamed_epoch_has_as_many_turns_of_a_clip_as_were_drawn(tmp_path):
    cache, clips = stored_clips(tmp_path, "float32", "stream")
    weights = np.where(np.arange(30) < 2, 100.0, 1.0)
    drawn = draw(PLAIN, weights=weights)
    assert np.bincount(drawn.clip).max() > 8  # more turns than passes
    expected, seen = cache.features(np.arange(30)), np.zeros(30, dtype=int)
    for batch in batches(clips, [drawn], PLAIN.with_changes(batch_size=4)):
        for features in batch.inputs[0].numpy():
            seen += (expected == features).all(axis=(1, 2, 3))
    assert seen.tolist() == np.bincount(drawn.clip, minlength=30).tolist()


def test_masks_lie_inside_the_clip_and_reach_their_full_length():
    drawn = draw(Recipe(time_mask_frames=10), np.arange(4000), frames=25)
    length = drawn.mask_end - drawn.mask_start
    assert set(length.ravel().tolist()) == set(range(11))
    assert drawn.mask_start.min() == 0 and drawn.mask_end.max() == 25


def test_masks_of_layers_are_drawn_by_themselves_or_together():
    drawn = draw(Recipe(), np.arange(400), layers=3)
    assert (drawn.mask_start[:, 0] != drawn.mask_start[:, 1]).mean() > 0.8
    assert draw(Recipe(time_mask_layers="same"), np.arange(400), layers=3).mask_start.shape == (400, 1)


def test_mixup_takes_its_share_of_clips_with_weights_around_one_half():
    share = draw(Recipe(mixup_rate=0.5), np.arange(4000)).share
    assert abs((share < 1).mean() - 0.5) < 0.04
    mixed = share[share < 1]
    assert abs(mixed.mean() - 0.5) < 0.02 and abs(mixed.std() - np.sqrt(1 / 84)) < 0.01  # Beta(10, 10)


def test_balanced_sampling_draws_rare_and_frequent_labels_alike():
    labels = np.zeros((1000, 2), dtype=np.uint8)
    labels[:10, 0] = 1
    labels[10:, 1] = 1
    weights = balancing_weights(labels)
    assert weights[0] == pytest.approx(1000 / 10.01) and weights[-1] == pytest.approx(1000 / 990.01)
    drawn = draw(Recipe(class_balanced=True), np.arange(1000), weights=weights)
    assert abs((drawn.clip < 10).mean() - 0.5) < 0.06


def test_a_clip_with_two_labels_weighs_as_both():
    labels = np.array([[1, 0], [0, 1], [1, 1]], dtype=np.uint8)
    weights = balancing_weights(labels)
    assert weights[2] == pytest.approx(weights[0] + weights[1])


def test_the_seed_and_nothing_else_decides_an_epoch():
    def columns(drawn: Draw):
        return [getattr(drawn, name).tolist() for name in ("clip", "share", "mask_start", "mask_end")]

    assert columns(draw(Recipe(), seed=5)) == columns(draw(Recipe(), seed=5)) != columns(draw(Recipe(), seed=6))


def test_an_epoch_that_was_read_ahead_has_the_same_batches(tmp_path):
    """Streamed clips; what was started and never asked for leaves no thread behind."""
    cache = planted_cache(tmp_path / "s.zarr", np.random.default_rng(0).normal(size=(40, 2, 25, 4)), np.arange(40) % 4)
    clips = load_clips(cache, np.arange(40), "features", torch.device("cpu"), "stream")
    recipe = named_recipe("esc50", "tl-tr", dim=4).with_changes(batch_size=8)
    draws = [draw_epoch(np.arange(40), recipe, np.random.default_rng(n), frames=25, layers=2) for n in range(3)]
    plain = [[batch.inputs for batch in Epochs(clips, recipe, Ranks()).batches([draws[n]], (n,))] for n in range(2)]
    epochs, before = Epochs(clips, recipe, Ranks()), threading.active_count()
    for n in range(2):
        for step, batch in enumerate(epochs.batches([draws[n]], (n,))):
            assert torch.equal(batch.inputs, plain[n][step])
            if step == 2:
                epochs.read_ahead([draws[n + 1]], (n + 1,))
    del epochs
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_masked_frames_of_a_standardised_head_hold_the_mean():
    features = torch.randn(2, 3, 25, 4)
    start, end = torch.tensor([[3], [0]]), torch.tensor([[8], [0]])
    part = Collected(features, None, torch.zeros(2, 1), torch.arange(2), torch.ones(2), start, end, torch.ones(1, 2))
    hidden = torch.randn(3, 4)
    recipe = Recipe(mixup_rate=0.0, time_mask_layers="same")
    inputs, _ = mix_and_mask(part, recipe, hidden)
    torch.testing.assert_close(inputs[0, 0, :, 3:8], hidden[:, None].expand(3, 5, 4))
    assert (inputs[0, 1] == features[1]).all() and (inputs[0, 0, :, 8:] == features[0, :, 8:]).all()
    assert (mix_and_mask(part, recipe)[0][0, 0, :, 3:8] == 0).all()
