"""What a standardised head takes from its features: mean and deviation of each layer and channel over training clips.

n clips, L layers, T frames, D channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli.heads.evaluate import BATCH_BYTES
from whisper_at_cli.heads.training.data import Clips

MOST_CLIPS = 20_000  # that are looked at, evenly spread: their mean of a channel is within 0.7 % of a deviation


@torch.no_grad()
def layer_statistics(clips: Clips, train: np.ndarray, *, last_layer: bool) -> tuple[Tensor, Tensor]:
    """Mean and deviation over the frames of the clips `train` (positions) of each layer and channel, (L, D) float32; of
    the last layer alone, (1, D). What does not vary has deviation 1."""
    if len(train) > MOST_CLIPS:
        train = train[np.linspace(0, len(train) - 1, MOST_CLIPS).round().astype(np.int64)]
    size = max(1, BATCH_BYTES // (4 * clips.features[0].numel()))
    exact = torch.float32 if clips.device.type == "mps" else torch.float64
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for some in torch.from_numpy(np.sort(train)).split(size):
        x_BLTD = clips.batch(some)
        x_BLTD = (x_BLTD[:, -1:] if last_layer else x_BLTD).to(exact)
        here = x_BLTD.shape[0] * x_BLTD.shape[2]
        variance, own = torch.var_mean(x_BLTD, dim=(0, 2), correction=0)
        if not count:
            mean, squares = torch.zeros_like(own), torch.zeros_like(own)
        apart, count = own - mean, count + here
        mean = mean + apart * (here / count)
        squares = squares + variance * here + apart.square() * (here * (count - here) / count)
    deviation = (squares / count).sqrt()
    deviation = torch.where(deviation <= torch.finfo(torch.float32).eps * mean.abs(), 1.0, deviation)
    return mean.float(), deviation.float()
