"""Speech recognisers with a CTC head from `transformers` (extra `hf`): wav2vec 2.0, HuBERT, WavLM, data2vec."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from whisper_at_cli.extract.audio import SAMPLE_RATE
from whisper_at_cli.extract.devices import choose_device
from whisper_at_cli.extract.errors import UsageError, WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Wav2Vec2Processor

BATCH_SIZE = {"cpu": 4}
GPU_BATCH_SIZE = 16
HUB_SECONDS = 10  # until the hub must have answered


class CTCRecogniser:
    """The most probable symbol at each frame, repeats merged. Safe between threads.

    Only utterances of one length share a batch: models that normalise over time (wav2vec2-base among them) would hear
    the padding of the others. Mixtures of one utterance all have its length.
    """

    reads_int16 = False

    def __init__(
        self, model: PreTrainedModel, processor: Wav2Vec2Processor, *, name: str, weights_sha256: str,
        device: torch.device, language: str = "en",
    ):  # fmt: skip
        from whisper_at_cli.probe.robustness.recognisers import default_streams

        self.model, self.processor, self.name, self.device = model, processor, name, device
        self.weights_sha256 = weights_sha256
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.settings = {"decoding": "ctc, greedy", "language": language}
        self.batch_size = BATCH_SIZE.get(device.type, GPU_BATCH_SIZE)
        self.streams = default_streams(device)

    @torch.inference_mode()
    def transcribe(self, waveforms: list[np.ndarray]) -> list[str]:
        texts = [""] * len(waveforms)
        order = sorted(range(len(waveforms)), key=lambda at: len(waveforms[at]))
        for samples, group in itertools.groupby(order, key=lambda at: len(waveforms[at])):
            if samples < self._shortest():
                continue  # shorter than one frame: nothing is said in it
            rows = list(group)
            prepared = [self._prepare(waveforms[at]) for at in rows]
            logits = self.model(torch.cat(prepared).to(self.device)).logits
            for at, text in zip(rows, self.processor.batch_decode(logits.argmax(dim=-1).cpu()), strict=True):
                texts[at] = text.strip()
        return texts

    def _prepare(self, samples: np.ndarray) -> torch.Tensor:
        """(1, samples): scaled as the model wants it, each utterance by itself."""
        return self.processor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values

    def _shortest(self) -> int:
        """Samples that the convolutions need for one frame."""
        need = 1
        for kernel, stride in zip(
            reversed(self.model.config.conv_kernel), reversed(self.model.config.conv_stride), strict=True
        ):
            need = (need - 1) * stride + kernel
        return need


def _ask_hub(name: str) -> None:
    """Raises UsageError where the hub has no such model or cannot be reached, unless it was downloaded before.

    Asked once and at once: `transformers` would try every file for half a minute, with a line for each try.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=HUB_SECONDS)
    except Exception as error:  # which HTTP library it comes from changes between versions of the hub's client
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{name} is no folder, and no model that can be had from the Hugging Face hub ({reason}); "
            "give a folder, or a name such as facebook/wav2vec2-base-960h"
        ) from error


def load_ctc(model: str | Path, *, device: str = "auto", language: str = "en") -> CTCRecogniser:
    """A CTC recogniser from a folder or by its name on the Hugging Face hub. `language` only says how it is scored.

    Raises UsageError where the extra is missing, the model cannot be had or is no CTC recogniser for 16 kHz.
    """
    try:
        from transformers import AutoModelForCTC, AutoProcessor
    except ImportError as error:
        raise UsageError(f"{model} needs transformers; run: pip install 'whisper-at-cli[hf]'") from error
    from whisper_at_cli.extract.backbones.weights import state_sha256
    from whisper_at_cli.probe.robustness.recognisers import check_language

    check_language(language)
    local = Path(model).is_dir()
    if not local:
        _ask_hub(str(model))
    try:
        processor = AutoProcessor.from_pretrained(str(model), local_files_only=local)
        loaded, report = AutoModelForCTC.from_pretrained(
            str(model), local_files_only=local, output_loading_info=True, dtype=torch.float32
        )
    except (ImportError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{model} cannot be used as a speech recogniser ({reason}); give a CTC model with its tokenizer, such as "
            "facebook/wav2vec2-base-960h, or a Whisper model"
        ) from error
    if not hasattr(processor, "tokenizer"):
        raise UsageError(
            f"{model} has no tokenizer, so its output is no text; give a model trained to recognise speech"
        )
    missing = sorted(name for name in report["missing_keys"] if "masked_spec_embed" not in name)
    if missing:  # the output layer of a model that was only pre-trained would be random
        raise WeightsError(
            f"{model} lacks {len(missing)} of its weights ({missing[0]}, ...): it was not trained to recognise speech, "
            "or is damaged; give a model with a trained CTC head"
        )
    if not hasattr(loaded.config, "conv_kernel"):
        raise UsageError(
            f"{model} does not take waveforms; give a model such as wav2vec 2.0, HuBERT, WavLM or data2vec"
        )
    if processor.feature_extractor.sampling_rate != SAMPLE_RATE:
        raise UsageError(f"{model} wants {processor.feature_extractor.sampling_rate} Hz; only {SAMPLE_RATE} is known")
    chosen, name = choose_device(device), Path(model).resolve().name if local else str(model)
    sha256 = state_sha256(loaded.state_dict())
    return CTCRecogniser(
        loaded.to(chosen).eval(), processor, name=name, weights_sha256=sha256, device=chosen, language=language
    )
