"""Logits of a head on clips of a cache, and the metrics of a saved head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.devices import choose_device
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.heads.checkpoint import HeadDescription, load_head
from whisper_at_cli.heads.data import Clips, load_clips
from whisper_at_cli.heads.metrics import Metrics, evaluate_scores

BATCH_BYTES = 64 << 20  # of float32 features


@torch.no_grad()
def predict(module: nn.Module, clips: Clips, positions: np.ndarray) -> np.ndarray:
    """Logits (n, C) float32 of every one of these clips, in this order."""
    module.eval()
    clip_bytes = 4 * clips.features[0].numel()
    batches = torch.from_numpy(positions).split(max(1, BATCH_BYTES // clip_bytes))
    return torch.cat([module(clips.batch(batch)).cpu() for batch in batches]).numpy()


def evaluate_head(
    checkpoint: str | Path | nn.Module, cache: FeatureCache, *, rows: np.ndarray | None = None, device: str = "auto"
) -> Metrics:
    """Metrics of a saved head on some rows of a cache, all finished ones by default.

    Raises UsageError where the cache's features or classes are not those that the head was trained on.
    """
    target = choose_device(device)
    module = checkpoint if isinstance(checkpoint, nn.Module) else load_head(checkpoint)
    check_fits(module.description, cache)
    rows = np.flatnonzero(cache.done) if rows is None else np.asarray(rows)
    if not len(rows):
        raise UsageError(f"{cache.path} has no finished clips to evaluate on; run extract again to continue it")
    clips = load_clips(cache, rows, module.reads, target)
    logits = predict(module.to(target), clips, np.arange(len(rows)))
    return evaluate_scores(logits, cache.labels[rows])


def check_fits(description: HeadDescription, cache: FeatureCache) -> None:
    """Raises UsageError where a head was not made for the features and classes of a cache."""
    for name in ("backbone", "weights_sha256", "layers", "dim", "frames", "clip_seconds", "class_names"):
        needed, found = getattr(description, name), getattr(cache.spec, name)
        if needed != found:
            raise UsageError(
                f"the head was trained on features with {name} {_short(needed)} and {cache.path} has {_short(found)}: "
                "use a cache made like the one it was trained on"
            )


def _short(value) -> str:
    text = f"{len(value)} ({', '.join(value)})" if isinstance(value, tuple) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
