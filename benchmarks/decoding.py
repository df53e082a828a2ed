"""Requests that benchmarks send to decoding processes, which import this file: it imports little."""

from __future__ import annotations

import numpy as np

from whisper_at_cli.extract.audio.sources import ClipSource
from whisper_at_cli.extract.pipeline.decode_worker import Outcome, read_clip


def decode_once(request: tuple[ClipSource, int]) -> Outcome:
    """Decode a clip of so many samples, and forget it."""
    source, samples = request
    return read_clip(source, np.empty(samples, np.int16))
