"""Sound events from tag probabilities: where a label begins and ends, by two thresholds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from whisper_at_cli.extract.errors import UsageError

TOLERANCE = 1e-9  # seconds: 1.2 - 0.8 is not 0.4 in floating point


@dataclass(frozen=True)
class EventSettings:
    """An event begins where a label's probability reaches `on` and ends where it falls below `off`."""

    on: float = 0.5
    off: float = 0.3
    min_duration: float = 0.0  # seconds; shorter events are dropped, after merging
    merge_gap: float = 0.0  # seconds; events of a label that are no further apart become one

    def __post_init__(self):
        if not 0 < self.off <= self.on <= 1:
            raise UsageError(f"on is {self.on:g} and off {self.off:g}; choose 0 < off <= on <= 1")
        if not (self.min_duration >= 0 and self.merge_gap >= 0):
            raise UsageError(
                f"min_duration is {self.min_duration:g} and merge_gap {self.merge_gap:g}; neither can be negative"
            )


def cells(spans: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping windows as cells that do not overlap, each with the mean over the windows that cover it.

    spans (W, 2) in seconds, probabilities (W, C) -> edges (n + 1,), values (n, C); NaN where no window is.
    """
    edges, places = np.unique(spans, return_inverse=True)
    places = places.reshape(spans.shape)
    change = np.zeros((len(edges), probabilities.shape[1] + 1))
    weighted = np.concatenate([probabilities, np.ones((len(spans), 1))], axis=1, dtype=np.float64)
    np.add.at(change, places[:, 0], weighted)
    np.subtract.at(change, places[:, 1], weighted)
    running = np.cumsum(change, axis=0)[:-1]
    covering = np.round(running[:, -1:])
    with np.errstate(invalid="ignore", divide="ignore"):
        return edges, np.where(covering > 0, running[:, :-1] / covering, np.nan)


def find_events(spans: np.ndarray, probabilities: np.ndarray, names, settings: EventSettings) -> list[dict]:
    """Events in order of time: start and end in seconds, label, and probability, the highest in it."""
    if not len(spans):
        return []
    edges, values = cells(np.asarray(spans, dtype=np.float64), np.asarray(probabilities))
    found = []
    for index in np.flatnonzero((values >= settings.on).any(axis=0)):
        for start, end, peak in _events_of_one(edges, values[:, index], settings):
            found.append({"start": start, "end": end, "label": names[index], "probability": peak})
    return sorted(found, key=lambda event: (event["start"], event["end"], event["label"]))


def _events_of_one(edges: np.ndarray, values: np.ndarray, settings: EventSettings) -> list[tuple[float, float, float]]:
    """Start, end and highest probability of each event of one label."""
    above = values >= settings.off  # False for NaN: what was not heard ends an event
    change = np.flatnonzero(np.diff(np.concatenate([[False], above, [False]])))
    merged: list[tuple[float, float, float]] = []
    for first, last in zip(change[::2], change[1::2], strict=True):
        inside = np.flatnonzero(values[first:last] >= settings.on)
        if not len(inside):
            continue
        start, end, peak = edges[first + inside[0]], edges[last], values[first:last].max()
        if merged and start - merged[-1][1] <= settings.merge_gap + TOLERANCE:
            start, peak = merged[-1][0], max(peak, merged[-1][2])
            merged.pop()
        merged.append((float(start), float(end), float(peak)))
    return [event for event in merged if event[1] - event[0] >= settings.min_duration - TOLERANCE]
