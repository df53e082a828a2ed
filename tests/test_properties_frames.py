"""Pooling to 25 frames, which frames are real, and tag windows: every position counted once, none made up."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.audio.decode import clip_from_samples
from whisper_at_cli.extract.backbones.encoder import POSITIONS_PER_SECOND, clip_samples, pool_frames
from whisper_at_cli.extract.cache.schema import FRAMES
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.pipeline.shard_run import real_frames
from whisper_at_cli.heads.tagging.windows import FrameAssembler, Span, plan_exact, tag_grid

HALVES = st.integers(1, 60)  # half seconds


@examples(40)
@given(HALVES, st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32), st.sampled_from([1e-3, 1.0, 1e4]))
def test_the_mean_over_frames_is_the_mean_over_positions(halves, clips, dim, seed, size):
    P = halves * POSITIONS_PER_SECOND // 2
    x = torch.randn(clips, P, dim, generator=torch.Generator().manual_seed(seed)) * size
    frames = pool_frames(x)
    assert frames.shape == (clips, FRAMES, dim) and frames.dtype == torch.float32
    exact = x.double().mean(dim=1)
    assert (frames.double().mean(dim=1) - exact).abs().max() <= 1e-6 * size * 4
    slow = torch.stack([part.double().mean(dim=1) for part in x.split(P // FRAMES, dim=1)], dim=1)
    assert (frames - slow).abs().max() <= 1e-6 * size * 4


@examples(60)
@given(st.integers(FRAMES, 1500), st.floats(-1e4, 1e4, width=32))
def test_what_is_constant_stays_constant_whatever_the_length(positions, value):
    frames = pool_frames(torch.full((1, positions, 2), value))
    assert (frames - value).abs().max() <= 2e-6 * abs(value)


@examples(60)
@given(st.integers(FRAMES, 1500), st.integers(0, 2**32))
def test_a_frame_is_the_mean_of_the_positions_that_touch_it(positions, seed):
    x = torch.randn(1, positions, 1, generator=torch.Generator().manual_seed(seed))
    slow = [x[0, positions * t // FRAMES : -(-positions * (t + 1) // FRAMES)].mean() for t in range(FRAMES)]
    assert (pool_frames(x)[0, :, 0] - torch.stack(slow)).abs().max() <= 1e-6


def test_every_half_second_up_to_thirty_divides_into_frames_and_nothing_else_does():
    for halves in range(1, 61):
        samples = clip_samples(halves / 2)
        assert samples == halves * SAMPLE_RATE // 2 and (samples * POSITIONS_PER_SECOND // SAMPLE_RATE) % FRAMES == 0


@examples(100)
@given(st.floats(-5, 40) | st.sampled_from([float("nan"), float("inf"), 0.0, 30.5, 0.25, 29.75]))
def test_another_length_is_refused(seconds):
    if seconds * 2 == round(seconds * 2, 9) and float(seconds * 2).is_integer() and 0 < seconds <= 30:
        assert clip_samples(seconds) == seconds * SAMPLE_RATE
    else:
        with pytest.raises(UsageError, match="choose a multiple of 0.5 s"):
            clip_samples(seconds)


@examples(100)
@given(HALVES, st.floats(0, 1), st.integers(1, 9))
def test_padding_is_never_taken_for_real(halves, part, extra):
    """Frames that count as real hold real audio, and no real sample lies in another; padding is zeros."""
    samples = halves * SAMPLE_RATE // 2
    length = max(1, round(part * (samples + extra)))
    clip, real, _ = clip_from_samples(np.full(length, 0.5, dtype=np.float32), SAMPLE_RATE, samples)
    assert real == min(length, samples) and (clip[:real] == 16384).all() and not clip[real:].any()
    frame = samples // FRAMES
    valid = real_frames(real, samples)
    assert 1 <= valid <= FRAMES
    assert clip[: valid * frame].reshape(valid, frame).any(axis=1).all(), "a frame of padding counts as real"
    assert not clip[valid * frame :].any(), "a frame with real audio does not count"


@st.composite
def grids(draw):
    n = draw(st.sampled_from([1, 2, 5, 10, 20, 60]))
    window = draw(st.integers(1, 30))
    hop = draw(st.integers(1, window))
    return tag_grid(clip_seconds=n * 25 / 50, frames=25, resolution=window * n / 50, hop=hop * n / 50), n, window, hop


@examples(150)
@given(grids(), st.integers(-2, 4000))
def test_tag_windows_cover_every_frame_in_order_as_documented(made, positions):
    grid, n, window, hop = made
    assert (grid.frame_positions, grid.window, grid.hop) == (n, window, hop)
    windows = grid.windows(positions)
    frames = max(0, -(-positions // n))
    assert sorted({frame for first, last in windows for frame in range(first, last)}) == list(range(frames))
    for number, (first, last) in enumerate(windows):
        assert first == number * hop and 0 < last - first <= window + 1
        assert last - first == window or number == len(windows) - 1, "only the last differs in length"
    if len(windows) > 1 and positions % n:
        assert windows[-1][1] - windows[-1][0] > 1, "less than a frame is a window of its own"


@examples(80)
@given(grids(), st.integers(1, 800), st.integers(1, 30))
def test_exact_clips_hold_every_frame_of_every_window_once(made, positions, clip_frames):
    windows = made[0].windows(positions)
    plan = plan_exact(windows, clip_frames)
    for (first, last), parts in zip(windows, plan.parts, strict=True):
        held = [plan.starts[clip] + frame for clip, a, b in parts for frame in range(a, b)]
        assert held == list(range(first, last))
        assert all(0 <= a < b <= clip_frames for _, a, b in parts)


@examples(60)
@given(st.integers(1, 20), st.lists(st.tuples(st.integers(0, 200), st.integers(1, 150)), min_size=1, max_size=5))
def test_frames_put_together_are_means_of_their_positions_wherever_windows_lie(n, windows):
    """Each position holds its own number, so that a position that is counted twice or missed shows."""
    assembler, there = FrameAssembler(n), np.zeros(400, dtype=bool)
    for start, count in windows:
        span = Span(start, count, n)
        x_PD = torch.arange(start, start + count).float()[:, None]
        assembler.add(span.gather([span.pool(torch.cat([x_PD, torch.full((5, 1), torch.nan)]))]))
        there[start : start + count] = True
    for frame in range(400 // n):
        inside = np.flatnonzero(there[frame * n : (frame + 1) * n]) + frame * n
        found = assembler.take(frame, frame + 1)
        assert (found is None) == (len(inside) == 0)
        if found is not None:
            assert found.item() == pytest.approx(inside.mean(), rel=1e-6)
