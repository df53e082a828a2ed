"""Tag windows: no second twice or missed, frames from where they lie best, whatever way the encoder's windows lie."""

import numpy as np
import pytest
import torch

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.heads.tagging.windows import FrameAssembler, Span, plan_exact, tag_grid, within

L, D = 2, 3


def encoded(start, count, n, value=None):
    """What layers hold where each position holds its own number in the file (or `value`), whoever encodes it."""
    positions = torch.arange(start, start + count).float() if value is None else torch.full((count,), value)
    padding = torch.full((7, D), torch.nan)  # behind the real audio lies padding, which nothing may read
    layers = [torch.cat([positions[:, None].expand(count, D) * (layer + 1), padding]) for layer in range(L)]
    span = Span(start, count, n)
    return span.gather([span.pool(layer) for layer in layers])


def whisper_windows(rng, total, *, least=200, length=1500):
    """Windows as Whisper moves them: at most 30 s long, each beginning at or before the end of the last."""
    start, windows = 0, []
    while start < total:
        count = min(length, total - start)
        windows.append((start, count))
        start += count if count < length or rng.random() < 0.3 else int(rng.integers(least, length + 1))
    return windows


@pytest.mark.parametrize("seconds, clip_seconds, frames", [(4.4, 10, 11), (8.8, 10, 22), (0.4, 10, 1), (2.2, 5, 11)])
def test_a_resolution_is_counted_in_whole_frames(seconds, clip_seconds, frames):
    grid = tag_grid(clip_seconds=clip_seconds, frames=25, resolution=seconds)
    assert (grid.window, grid.hop) == (frames, frames)


def test_any_multiple_of_a_frame_is_taken_and_nothing_else():
    for count in range(1, 2000):
        assert tag_grid(clip_seconds=10, frames=25, resolution=round(count * 0.4, 1)).window == count
    for wrong in (4.5, 0.2, 0, -0.4, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="0.4 s: choose a multiple"):
            tag_grid(clip_seconds=10, frames=25, resolution=wrong)
    with pytest.raises(UsageError, match="untagged"):
        tag_grid(clip_seconds=10, frames=25, resolution=2, hop=4)


@pytest.mark.parametrize("seed", range(20))
def test_every_frame_is_in_one_window_without_overlap_and_in_some_window_with(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.choice([10, 20]))
    positions = int(rng.integers(1, 3000))
    window = int(rng.integers(1, 40))
    hop = int(rng.integers(1, window + 1))
    total = -(-positions // n)
    for step in (window, hop):
        grid = tag_grid(clip_seconds=n / 2, frames=25, resolution=window * n / 50, hop=step * n / 50)
        windows = grid.windows(positions)
        covered = np.zeros(total, int)
        for first, last in windows:
            assert 0 <= first < last <= total and first % step == 0
            covered[first:last] += 1
        assert covered.min() == 1 and (step < window or covered.max() == 1)
        assert all(last - first == window for first, last in windows[:-1])


def test_less_than_a_frame_at_the_end_joins_the_window_before_it():
    grid = tag_grid(clip_seconds=5, frames=25)
    assert grid.windows(500) == [(0, 25), (25, 50)]
    assert grid.windows(503) == [(0, 25), (25, 51)]
    assert grid.windows(510) == [(0, 25), (25, 50), (50, 51)]
    assert grid.windows(3) == [(0, 1)] and grid.windows(0) == []


def test_frames_are_those_of_the_file_wherever_the_windows_lie():
    """Each position holds its own number, so a frame's mean says which positions are in it, each how often."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        n, total = int(rng.choice([1, 4, 10, 20])), int(rng.integers(1, 9000))
        assembler = FrameAssembler(n)
        for start, count in whisper_windows(rng, total):
            assembler.add(encoded(start, count, n))
        frames = assembler.take(0, -(-total // n))
        numbers = np.arange(total, dtype=np.float64)
        expected = np.array([numbers[at : at + n].mean() for at in range(0, total, n)])
        for layer in range(L):
            np.testing.assert_allclose(frames[layer, :, 0], expected * (layer + 1), rtol=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_a_frame_comes_from_the_window_in_which_it_lies_furthest_from_the_edges(seed):
    rng = np.random.default_rng(seed)
    n, total = int(rng.choice([10, 20])), 4000
    windows = whisper_windows(rng, total)
    assembler = FrameAssembler(n)
    for number, (start, count) in enumerate(windows):
        assembler.add(encoded(start, count, n, value=float(number)))
    found = assembler.take(0, total // n)[0, :, 0]
    for frame in range(total // n):
        begin, end = frame * n, (frame + 1) * n
        distances = [min(begin - s, s + c - end) for s, c in windows]
        best = max(distances)
        if best >= 0:
            latest = max(number for number, distance in enumerate(distances) if distance == best)
            assert found[frame] == latest
        else:  # cut by the end of one window: each position from the first that has it
            first = [next(i for i, (s, c) in enumerate(windows) if s <= p < s + c) for p in range(begin, end)]
            assert found[frame] == pytest.approx(np.mean(first))


def test_three_hours_are_tagged_once_each_and_little_of_them_is_held():
    rng = np.random.default_rng(0)
    n, total = 20, 3 * 3600 * 50 + 7
    grid = tag_grid(clip_seconds=10, frames=25, resolution=4.4)
    waiting, assembler, centres, most = grid.windows(total), FrameAssembler(n), [], 0

    def finish(position):
        while waiting and waiting[0][1] * n <= position:
            first, last = waiting.pop(0)
            centres.append((first, last, assembler.take(first, last)[0, :, 0].double().mean().item()))
            assembler.drop_before(last)

    for start, count in whisper_windows(rng, total):
        finish(start)
        assembler.add(encoded(start, count, n))
        most = max(most, len(assembler._whole))
    finish(10**9)
    assert most < 200  # frames, of 27,000
    assert [first for first, _, _ in centres[1:]] == [last for _, last, _ in centres[:-1]]
    assert centres[0][0] == 0 and centres[-1][1] * n >= total and len(centres) == -(-total // (11 * n))
    for first, last, centre in centres[:-1]:
        assert centre == pytest.approx((first * n + last * n - 1) / 2, abs=0.5)


def test_what_was_dropped_is_not_tagged_again():
    assembler = FrameAssembler(10)
    assembler.add(encoded(0, 1500, 10))
    assembler.drop_before(100)
    assembler.add(encoded(0, 1500, 10))
    assert assembler.take(0, 100) is None and assembler.take(90, 110).shape == (L, 10, D)


def test_windows_are_cut_to_the_stretches_that_are_heard():
    assert within([(0, 25), (25, 50), (50, 75)], [(10, 30), (60, 61)]) == [(10, 25), (25, 30), (60, 61)]
    assert within([(0, 25)], [(3, 5), (20, 40)]) == [(3, 25)]
    assert within([(0, 25)], []) == []


@pytest.mark.parametrize("seed", range(20))
def test_exact_clips_hold_each_window_whole_and_once(seed):
    rng = np.random.default_rng(seed)
    window = int(rng.integers(1, 60))
    hop = int(rng.integers(1, window + 1))
    grid = tag_grid(clip_seconds=5, frames=25, resolution=window / 5, hop=hop / 5)
    windows = grid.windows(int(rng.integers(1, 3000)))
    plan = plan_exact(windows, 25)
    for (first, last), parts in zip(windows, plan.parts, strict=True):
        frames = [plan.starts[clip] + frame for clip, a, b in parts for frame in range(a, b)]
        assert frames == list(range(first, last))
        assert all(0 <= a < b <= 25 for _, a, b in parts)
        assert len(parts) == 1 or last - first > 25
    if window == hop == 25:
        assert plan.starts == [first for first, _ in windows]


def test_a_window_as_long_as_the_heads_clips_is_a_clip_of_its_own():
    windows = tag_grid(clip_seconds=5, frames=25, hop=1.0).windows(2000)
    assert plan_exact(windows, 25).starts == [first for first, _ in windows]
