"""Batches are drawn, mixed and masked as a recipe says, and no clip is lost."""

import numpy as np
import pytest
import torch

from whisper_at_cli.heads.batches import Draw, balancing_weights, draw_epoch, make_batch
from whisper_at_cli.heads.data import Clips
from whisper_at_cli.heads.recipe import Recipe

PLAIN = Recipe(mixup_rate=0.0, time_mask_frames=0, label_smoothing=0.0)


@pytest.fixture
def clips():
    features = torch.randn(30, 2, 25, 4, generator=torch.Generator().manual_seed(0)).half()
    labels = torch.eye(5, dtype=torch.uint8)[torch.arange(30) % 5]
    return Clips(np.arange(30), features, labels, torch.device("cpu"))


def draw(recipe, positions=None, *, seed=0, frames=25, weights=None):
    positions = np.arange(30) if positions is None else positions
    return draw_epoch(positions, recipe, np.random.default_rng(seed), frames=frames, weights=weights)


@pytest.mark.parametrize("size", [1, 7, 10, 48])
def test_an_epoch_has_every_clip_once_whatever_the_batch_size(size):
    batches = list(draw(PLAIN).batches(size))
    assert sorted(torch.cat([batch.clip for batch in batches]).tolist()) == list(range(30))
    sizes = [len(batch.clip) for batch in batches]
    assert max(sizes) <= size and max(sizes) - min(sizes) <= 1


def test_clips_and_partners_come_from_the_training_positions_only():
    positions = np.array([3, 5, 8, 13, 21])
    drawn = draw(Recipe(mixup_rate=1.0), positions)
    assert set(drawn.clip.tolist()) == set(positions)
    assert set(drawn.partner.tolist()) <= set(positions)


def test_a_short_epoch_draws_its_share():
    assert len(draw(PLAIN.with_changes(epoch_share=0.1)).clip) == 3
    assert len(draw(PLAIN.with_changes(epoch_share=0.001)).clip) == 1


def test_a_plain_batch_is_the_features_themselves_in_float32(clips):
    drawn = draw(PLAIN)
    inputs, targets = make_batch(clips, drawn, PLAIN)
    assert inputs.dtype == targets.dtype == torch.float32
    torch.testing.assert_close(inputs, clips.features[drawn.clip].float(), rtol=0, atol=0)
    torch.testing.assert_close(targets, clips.labels[drawn.clip].float(), rtol=0, atol=0)


def test_mixing_and_masking_equal_a_plain_loop(clips):
    recipe = Recipe(mixup_rate=0.7, label_smoothing=0.1)
    drawn = draw(recipe, seed=3)
    inputs, targets = make_batch(clips, drawn, recipe)
    features, labels = clips.features.float(), clips.labels.float()
    for i in range(30):
        share, clip, partner = drawn.share[i], drawn.clip[i], drawn.partner[i]
        expected = share * features[clip] + (1 - share) * features[partner]
        expected[:, drawn.mask_start[i] : drawn.mask_end[i]] = 0
        torch.testing.assert_close(inputs[i], expected, rtol=1e-5, atol=1e-5)
        label = share * labels[clip] + (1 - share) * labels[partner]
        torch.testing.assert_close(targets[i], label * 0.9 + 0.1 / 5)
    assert (drawn.share == 1).any() and (drawn.share < 1).any()


def test_masks_lie_inside_the_clip_and_reach_their_full_length():
    drawn = draw(Recipe(time_mask_frames=10), np.arange(4000), frames=25)
    length = drawn.mask_end - drawn.mask_start
    assert set(length.tolist()) == set(range(11))
    assert drawn.mask_start.min() == 0 and drawn.mask_end.max() == 25


def test_mixup_takes_its_share_of_clips_with_weights_around_one_half():
    share = draw(Recipe(mixup_rate=0.5), np.arange(4000)).share.numpy()
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
    assert abs((drawn.clip < 10).float().mean() - 0.5) < 0.06


def test_a_clip_with_two_labels_weighs_as_both():
    labels = np.array([[1, 0], [0, 1], [1, 1]], dtype=np.uint8)
    weights = balancing_weights(labels)
    assert weights[2] == pytest.approx(weights[0] + weights[1])


def test_the_seed_and_nothing_else_decides_an_epoch():
    def columns(drawn: Draw):
        return [getattr(drawn, name).tolist() for name in ("clip", "partner", "share", "mask_start", "mask_end")]

    assert columns(draw(Recipe(), seed=5)) == columns(draw(Recipe(), seed=5)) != columns(draw(Recipe(), seed=6))
