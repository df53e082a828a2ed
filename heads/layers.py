"""Which layers of the encoder a head looks at: the weights of WA heads, the attention of TL-Tr for each class.

n clips, L layers, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.heads.forms import Head


def layer_weights(module: Head) -> list[float] | None:
    """What each layer counts in a head that averages them, 1 in all; None of another head."""
    shares = module.layer_shares()
    return None if shares is None else shares.tolist()


def attention_sums(attention: Tensor, labels: np.ndarray) -> dict[str, Any]:
    """Of attention (n, L) to layers and labels (n, C): `sums` (C, L) over the clips that have a class, and `clips`
    (C,), how many these are."""
    sums = torch.from_numpy(labels != 0).to(attention.dtype).T @ attention
    return {"sums": sums.tolist(), "clips": (labels != 0).sum(axis=0).tolist()}


def mean_attention(found: list[dict[str, Any]], class_names: tuple[str, ...]) -> dict[str, list[float]]:
    """For each class that some clip has: the share of attention to each layer, as a mean over its clips in all of
    these sums."""
    sums = np.sum([each["sums"] for each in found], axis=0)
    count = np.sum([each["clips"] for each in found], axis=0)
    return {
        name: (row / clips).tolist() for name, row, clips in zip(class_names, sums, count, strict=True) if clips
    }  # fmt: skip
