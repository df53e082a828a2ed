"""The control of permuted labels: recordings trade their labels, so that no feature says anything of a label."""

from __future__ import annotations

import numpy as np


def permuted_by_recording(recordings: np.ndarray, seed: int) -> np.ndarray:
    """(n,) for each clip, the clip whose labels it gets: all clips of a recording get those of one other recording, in
    turn where it has fewer. (n,) are the recordings of the clips."""
    names, of_clip = np.unique(recordings, return_inverse=True)
    members = [np.flatnonzero(of_clip == at) for at in range(len(names))]
    giver = np.random.default_rng(seed).permutation(len(names))
    chosen = np.empty(len(recordings), dtype=np.int64)
    for at, clips in enumerate(members):
        given = members[giver[at]]
        chosen[clips] = given[np.arange(len(clips)) % len(given)]
    return chosen
