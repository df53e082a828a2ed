"""The sizes that Whisper comes in, by OpenAI's names: known without reading any weights."""

from __future__ import annotations

from dataclasses import dataclass

MAX_POSITIONS = 1500  # of the encoder: 30 s
ENGLISH_VOCABULARY = 51864  # of every .en model
ENGLISH_END_OF_TEXT = 50256  # the number of <|endoftext|> in .en models; 50257 in the others
VOCABULARIES = {
    80: (ENGLISH_VOCABULARY, 51865),
    128: (51866,),
}  # by mel bands; large-v3 and turbo have one language more
ALIASES = {"large": "large-v3", "large-v3-turbo": "turbo"}  # two names of one file


@dataclass(frozen=True)
class WhisperSize:
    """The sizes of one Whisper encoder, and the number of blocks of its decoder."""

    mels: int
    layers: int
    dim: int
    heads: int
    decoder_layers: int


_SIZES = {
    "tiny": WhisperSize(80, 4, 384, 6, 4),
    "base": WhisperSize(80, 6, 512, 8, 6),
    "small": WhisperSize(80, 12, 768, 12, 12),
    "medium": WhisperSize(80, 24, 1024, 16, 24),
}
_LARGE, _LARGE_V3 = WhisperSize(80, 32, 1280, 20, 32), WhisperSize(128, 32, 1280, 20, 32)
_TURBO = WhisperSize(128, 32, 1280, 20, 4)
WHISPER_SIZES: dict[str, WhisperSize] = (
    _SIZES
    | {f"{name}.en": size for name, size in _SIZES.items()}
    | {"large-v1": _LARGE, "large-v2": _LARGE, "large-v3": _LARGE_V3, "large": _LARGE_V3}
    | {"large-v3-turbo": _TURBO, "turbo": _TURBO}
)


def name_by_size(dims: dict[str, int]) -> str | None:
    """The one OpenAI model that has these dimensions; None where there is none, or more than one (large-v1 and -v2)."""
    size = WhisperSize(
        dims["n_mels"], dims["n_audio_layer"], dims["n_audio_state"], dims["n_audio_head"], dims["n_text_layer"]
    )
    english = dims["n_vocab"] == ENGLISH_VOCABULARY
    names = [
        name
        for name, known in WHISPER_SIZES.items()
        if known == size and name.endswith(".en") == english and name not in ALIASES
    ]
    return names[0] if len(names) == 1 else None
