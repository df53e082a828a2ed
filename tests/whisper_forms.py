"""A small random Whisper in every form of its weights, written by the tools that people write them with."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

LOSSLESS = (
    "pt-float32", "pt-float16", "hf-float32", "hf-float16", "hf-sharded", "hf-bin", "ct2-float32", "ct2-float16",
)  # fmt: skip
QUANTISED = ("ct2-int8", "ct2-int8_float16", "ct2-int8_bfloat16", "ct2-int16", "ct2-bfloat16")
VARIANTS = {"en": (80, 51864), "multilingual": (80, 51865), "v3": (128, 51866)}  # mels, tokens


def random_whisper(variant: str, *, initial: bool = False):
    """Transformers' Whisper with weights that float16 holds exactly; the same each time.

    `initial` keeps a new model's zero biases and unit norms, which CTranslate2 stores once under many names.
    """
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    mels, vocabulary = VARIANTS[variant]
    config = WhisperConfig(
        num_mel_bins=mels, vocab_size=vocabulary, d_model=64, encoder_layers=3, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=2, encoder_ffn_dim=256, decoder_ffn_dim=256,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(config).eval()
        for parameter in model.parameters():
            if not initial:
                parameter.data += torch.randn_like(parameter) / 10
            parameter.data = parameter.data.half().float()
    return model


def write_form(model, form: str, folder: Path) -> Path:
    """The model in one form; returns what `--model` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    kind, _, detail = form.partition("-")
    if kind == "pt":
        return _write_pt(model, folder / f"{form}.pt", getattr(torch, detail))
    if kind == "ct2":
        return _write_ctranslate2(model, folder / form, detail)
    if detail == "bin":
        model.save_pretrained(folder / form)
        (folder / form / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / form / "pytorch_model.bin")
    elif detail == "sharded":
        model.save_pretrained(folder / form, max_shard_size="2MB")
        assert len(list((folder / form).glob("model-*.safetensors"))) > 1
    else:
        (model.half() if detail == "float16" else model).save_pretrained(folder / form)
        model.float()
    return folder / form


def _write_pt(model, path: Path, dtype: torch.dtype) -> Path:
    """As OpenAI publishes them. The names are transformers' own, changed back by rules of this file's own."""
    parts = {
        "self_attn.": "attn.", "encoder_attn.": "cross_attn.", "q_proj": "query", "k_proj": "key", "v_proj": "value",
        "out_proj": "out", "self_attn_layer_norm": "attn_ln", "encoder_attn_layer_norm": "cross_attn_ln",
        "final_layer_norm": "mlp_ln", "fc1": "mlp.0", "fc2": "mlp.2", "layers.": "blocks.",
        "encoder.layer_norm": "encoder.ln_post", "decoder.layer_norm": "decoder.ln",
        "embed_positions.weight": "positional_embedding", "embed_tokens": "token_embedding",
    }  # fmt: skip
    state = {}
    for published, tensor in model.model.state_dict().items():
        name = published
        for theirs in sorted(parts, key=len, reverse=True):
            name = name.replace(theirs, parts[theirs])
        state[name] = tensor.to(dtype)
    config = model.config
    dims = {
        "n_mels": config.num_mel_bins, "n_audio_ctx": 1500, "n_audio_state": config.d_model,
        "n_audio_head": config.encoder_attention_heads, "n_audio_layer": config.encoder_layers,
        "n_vocab": config.vocab_size, "n_text_ctx": 448, "n_text_state": config.d_model,
        "n_text_head": config.decoder_attention_heads, "n_text_layer": config.decoder_layers,
    }  # fmt: skip
    torch.save({"dims": dims, "model_state_dict": state}, path)
    return path


def _write_ctranslate2(model, folder: Path, quantization: str) -> Path:
    from ctranslate2.converters import TransformersConverter

    class NoTokenizer:
        def get_vocab(self) -> dict:
            return {}

    class Converter(TransformersConverter):
        """Of a model in memory; its vocabulary is no part of the weights."""

        def load_model(self, model_class, name, **options):
            return copy.deepcopy(model)  # conversion scales the weights in place

        def load_tokenizer(self, tokenizer_class, name, **options):
            return NoTokenizer()

    source = folder.parent / "config-only"
    model.config.save_pretrained(source)
    Converter(str(source)).convert(str(folder), quantization=quantization)
    return folder


class Bomb:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")
