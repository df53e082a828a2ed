"""Events: they begin and end where probabilities cross the thresholds, and nowhere else."""

from itertools import pairwise

import numpy as np
import pytest

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.heads.tagging.events import TOLERANCE, EventSettings, cells, find_events


def events(values, *, spans=None, hop=1.0, **settings):
    values = np.atleast_2d(np.asarray(values, dtype=float).T).T
    spans = np.array([(n * hop, (n + 1) * hop) for n in range(len(values))]) if spans is None else np.array(spans)
    names = [f"class{c}" for c in range(values.shape[1])]
    return [
        (event["start"], event["end"], event["label"], event["probability"])
        for event in find_events(spans, values, names, EventSettings(**settings))
    ]


def test_an_event_begins_at_on_and_lasts_until_below_off():
    values = [0.1, 0.4, 0.6, 0.4, 0.35, 0.2, 0.4, 0.1]
    assert events(values, on=0.5, off=0.3) == [(2, 5, "class0", 0.6)]
    assert events(values, on=0.5, off=0.5) == [(2, 3, "class0", 0.6)]
    assert events(values, on=0.7, off=0.3) == []


def test_what_stays_below_on_is_no_event_and_ends_nothing():
    assert events([0.4, 0.0, 0.9, 0.0, 0.4, 0.0, 0.9]) == [(2, 3, "class0", 0.9), (6, 7, "class0", 0.9)]


def test_what_settings_are_when_nothing_is_said():
    assert EventSettings() == EventSettings(on=0.5, off=0.3, min_duration=0.0, merge_gap=0.0)


def test_short_gaps_are_merged_and_short_events_dropped_in_this_order():
    values = [0.9, 0.0, 0.9, 0.0, 0.0, 0.9]
    assert len(events(values)) == 3
    assert events(values, merge_gap=1.0) == [(0, 3, "class0", 0.9), (5, 6, "class0", 0.9)]
    assert events(values, merge_gap=1.0, min_duration=2.0) == [(0, 3, "class0", 0.9)]
    assert events(values, merge_gap=2.0) == [(0, 6, "class0", 0.9)]


def test_lengths_that_floating_point_misses_by_a_hair_count():
    values = [0.0, 0.9, 0.0, 0.9]
    assert len(events(values, hop=0.4, merge_gap=0.4)) == 1  # 1.2 - 0.8 is 0.39999999999999997
    assert len(events(values, hop=0.4, min_duration=0.4)) == 2


def test_labels_are_independent_and_in_order_of_time():
    found = events([[0.9, 0.0], [0.9, 0.8], [0.0, 0.8]])
    assert found == [(0, 2, "class0", 0.9), (1, 3, "class1", 0.8)]


def test_what_was_not_heard_ends_an_event():
    assert events([0.9, 0.9], spans=[(0, 5), (20, 25)]) == [(0, 5, "class0", 0.9), (20, 25, "class0", 0.9)]


@pytest.mark.parametrize("seed", range(5))
def test_overlapping_windows_are_averaged_cell_by_cell(seed):
    rng = np.random.default_rng(seed)
    starts = np.arange(20) * 1.0
    spans = np.stack([starts, starts + 4], axis=1)
    spans[15:] += 10  # a hole of some seconds
    values = rng.random((20, 3))
    edges, found = cells(spans, values)
    for n, (start, end) in enumerate(pairwise(edges)):
        covering = (spans[:, 0] <= start) & (spans[:, 1] >= end)
        if covering.any():
            np.testing.assert_allclose(found[n], values[covering].mean(axis=0))
        else:
            assert np.isnan(found[n]).all()
    assert np.isnan(found).any()


def test_nothing_heard_is_no_event():
    assert find_events(np.zeros((0, 2)), np.zeros((0, 3)), ["a", "b", "c"], EventSettings()) == []


@pytest.mark.parametrize("wrong", [{"on": 0.2, "off": 0.3}, {"off": 0}, {"on": 1.1}, {"min_duration": -0.1},
                                   {"merge_gap": -0.1}, {"merge_gap": float("nan")}, {"on": float("nan")}])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(UsageError):
        EventSettings(**wrong)


def test_an_event_joins_the_one_just_before_it_and_no_earlier_one():
    values = [0.9, 0.0, 0.0, 0.6, 0.0, 0.7, 0.0, 0.8]
    assert events(values, merge_gap=1.0) == [(0, 1, "class0", 0.9), (3, 8, "class0", 0.8)]
    assert events(values[::-1], merge_gap=1.0) == [(0, 5, "class0", 0.8), (7, 8, "class0", 0.9)]


def test_a_probability_of_just_on_or_off_belongs_to_the_event():
    assert events([0.5, 0.3, 0.5, 0.2], on=0.5, off=0.3) == [(0, 3, "class0", 0.5)]
    assert events([1.0, 0.0], on=1, off=1) == [(0, 1, "class0", 1.0)]


def test_lengths_may_miss_by_the_tolerance_and_by_no_more():
    for missing, kept in ((TOLERANCE, 1), (1.5 * TOLERANCE, 0)):
        assert len(events([0.9, 0.0], spans=[(0, 2 - missing), (3, 4)], min_duration=2)) == kept
    for gap, found in ((TOLERANCE, 1), (1.5 * TOLERANCE, 2)):
        assert len(events([0.9, 0.0, 0.9], spans=[(-1, 0), (3, 4), (gap, 1)])) == found


def test_events_that_begin_together_are_in_order_of_their_end_and_then_of_their_label():
    values = [[0.9, 0.9, 0.9], [0.9, 0.0, 0.0]]
    assert [label for _, _, label, _ in events(values)] == ["class1", "class2", "class0"]
