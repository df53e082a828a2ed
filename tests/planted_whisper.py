"""Whisper models with known behaviour: random weights and few layers, or an encoder that passes its input through."""

from __future__ import annotations

import torch
from torch import nn
from whisper.decoding import DecodingResult
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import get_tokenizer

from whisper_at_cli.heads.checkpoint import HeadDescription
from whisper_at_cli.heads.forms import build_head

MELS, DIM, LAYERS, CLASSES = 80, 16, 2, 3


def dimensions(*, multilingual: bool = False) -> ModelDimensions:
    return ModelDimensions(
        n_mels=MELS, n_audio_ctx=1500, n_audio_state=DIM, n_audio_head=2, n_audio_layer=LAYERS,
        n_vocab=51865 if multilingual else 51864, n_text_ctx=448, n_text_state=DIM, n_text_head=2, n_text_layer=2,
    )  # fmt: skip


def random_whisper(seed: int = 0, *, multilingual: bool = False) -> Whisper:
    """A small Whisper of random weights, whose timestamps move its windows in no order that means anything."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Whisper(dimensions(multilingual=multilingual))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


class PassingEncoder(nn.Module):
    """Each position is the mean of its two mel frames; block l multiplies by l. No position sees another."""

    class Times(nn.Module):
        def __init__(self, factor: float):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return x * self.factor

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.Times(layer + 1.0) for layer in range(LAYERS)])
        self.calls = 0

    def forward(self, mel):
        self.calls += 1
        x = mel.unflatten(2, (-1, 2)).mean(dim=3).transpose(1, 2)[..., :DIM].contiguous()
        for block in self.blocks:
            x = block(x)
        return x


class PlantedWhisper(Whisper):
    """Decodes to planted timestamps at once: `moves` says by how many positions each next window moves on.

    The first `failures` temperatures of each window are not good enough. None in `moves` is a window without speech.
    """

    @classmethod
    def make(cls, moves, failures: int = 0):
        model = cls(dimensions())
        model.encoder = PassingEncoder()
        model.moves, model.failures, model.asked = list(moves), failures, []
        return model.eval()

    def decode(self, mel, options):
        self.encoder(mel[None])
        self.asked.append(options.temperature)
        good = round(options.temperature / 0.2) >= self.failures
        move = self.moves.pop(0) if good and self.moves else 1500
        begin = get_tokenizer(False).timestamp_begin
        tokens = [begin, 2159, begin + move, begin + move] if move is not None else []
        return DecodingResult(
            None, "en", tokens=tokens, text="", avg_logprob=-0.1 if good else -5.0, compression_ratio=1.0,
            no_speech_prob=0.9 if move is None else 0.0, temperature=options.temperature,
        )  # fmt: skip


def planted_head(*, clip_seconds=5.0, loss="bce", dim=DIM, layers=LAYERS, form="wa-tr", sha256="", backbone="planted"):
    """A head of random weights, the same each time, with its description."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = build_head(form, layers=layers, dim=dim, classes=CLASSES)
    head.description = HeadDescription(
        head=form, layers=layers, dim=dim, frames=25, class_names=("dog", "rain", "siren"), backbone=backbone,
        weights_sha256=sha256, clip_seconds=clip_seconds, loss=loss,
    )  # fmt: skip
    return head.eval()
