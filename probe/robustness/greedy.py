"""Whisper's greedy decoding of many windows at once: the same tokens as `whisper.decode` one by one, in less time.

Rows that have ended leave the batch, so that nobody waits for the longest transcript, nor for one that repeats itself
until Whisper's limit of 224 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from whisper.decoding import DecodingOptions, DecodingResult, DecodingTask

ENDED_SHARE = 0.2  # of a batch that leaves at once: each time, what is kept of the rest is copied


class GreedyBatch(DecodingTask):
    """A DecodingTask at temperature 0. `run` takes mels, or windows that are encoded already."""

    def _main_loop(self, audio_features: Tensor, tokens: Tensor):
        """Whisper's own loop over one token at a time, on fewer and fewer rows."""
        B = tokens.shape[0]
        rows = torch.arange(B, device=tokens.device)  # of the batch, that are still in `tokens`
        sums = torch.zeros(B, device=audio_features.device)
        ended = [None] * B
        ended_sums = torch.zeros_like(sums)
        no_speech = [float("nan")] * B
        try:
            for step in range(self.sample_len):
                logits = self.inference.logits(tokens, audio_features)
                if step == 0 and self.tokenizer.no_speech is not None:
                    at_start = logits[:, self.sot_index].float().softmax(dim=-1)
                    no_speech = at_start[:, self.tokenizer.no_speech].tolist()
                logits = logits[:, -1]
                for logit_filter in self.logit_filters:
                    logit_filter.apply(logits, tokens)
                tokens, completed = self.decoder.update(tokens, logits, sums)
                if completed or tokens.shape[-1] > self.n_ctx:
                    break
                over = tokens[:, -1] == self.tokenizer.eot
                if over.float().mean() >= ENDED_SHARE:
                    for at in over.nonzero().flatten().tolist():
                        ended[rows[at]], ended_sums[rows[at]] = tokens[at], sums[at]
                    stay = (~over).nonzero().flatten()
                    rows, tokens, sums, audio_features = rows[stay], tokens[stay], sums[stay], audio_features[stay]
                    for module, kept in self.inference.kv_cache.items():
                        self.inference.kv_cache[module] = kept[stay]
        finally:
            self.inference.cleanup_caching()
        for at, row in enumerate(rows.tolist()):
            ended[row], ended_sums[row] = tokens[at], sums[at]
        padded = torch.nn.utils.rnn.pad_sequence(ended, batch_first=True, padding_value=self.tokenizer.eot)
        return padded, ended_sums, no_speech


def decode_greedily(model, windows: Tensor, language: str) -> list[DecodingResult]:
    """What `whisper.decode` gives for each window at temperature 0, with timestamps, in float32.

    windows (B, mels, 3000) log-mel, or (B, 1500, channels) encoded. Not safe between threads that share a model:
    Whisper keeps keys and values through hooks on the model's own layers.
    """
    return GreedyBatch(model, DecodingOptions(language=language, fp16=False)).run(windows)
