"""An encoder and a head on it as one trainable module, from waveforms to logits; saved, loaded and evaluated as such.

B clips, M mel bands, P positions (50 a second), T frames (25, or P where nothing is pooled), D channels, L layers.
"""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisper_at_cli.extract.backbones.encoder import (
    EncoderBlock,
    WhisperEncoder,
    clip_samples,
    encoder_from_state,
    windows,
)
from whisper_at_cli.extract.backbones.mel import log_mel
from whisper_at_cli.extract.backbones.weights import WhisperWeights
from whisper_at_cli.extract.cache.schema import FRAMES, METADATA
from whisper_at_cli.extract.datasets import Dataset, open_dataset
from whisper_at_cli.extract.devices import choose_device, cores
from whisper_at_cli.extract.errors import AudioError, UsageError, WhisperATError
from whisper_at_cli.extract.evaluation.metrics import evaluate_scores
from whisper_at_cli.extract.evaluation.predictions import checked_path
from whisper_at_cli.extract.progress import Progress
from whisper_at_cli.heads.checkpoint import HeadDescription, load_encoder_weights, load_head, save_head
from whisper_at_cli.heads.evaluate import NEEDS_AUDIO, Evaluation, as_evaluation, class_columns, scored_clips
from whisper_at_cli.heads.forms import Head
from whisper_at_cli.heads.layers import layer_weights
from whisper_at_cli.heads.seen import choose_rows
from whisper_at_cli.heads.training.data import free_bytes

SHARE_OF_FREE_MEMORY = 0.25  # for waveforms that are kept once they are decoded
EVALUATION_BATCH = 16


class EncoderWithHead(nn.Module):
    """Waveforms (B, samples) float32 at 16 kHz -> logits (B, C), through an encoder whose weights can be trained."""

    description: HeadDescription  # once it was loaded from a folder

    def __init__(self, encoder: WhisperEncoder, head: Head, *, pools: bool):
        super().__init__()
        self.encoder, self.head, self.pools = encoder, head, pools
        for block in encoder.blocks:
            block.qkv.bias.register_hook(_without_key)

    def forward(self, waveforms: Tensor) -> Tensor:
        return self.from_mel(self.mel(waveforms))

    @torch.no_grad()
    def mel(self, waveforms: Tensor) -> Tensor:
        return log_mel(waveforms, self.encoder.mels)

    def from_mel(self, mel_BMF: Tensor) -> Tensor:
        return self.head(trainable_features(self.encoder, mel_BMF, pooled=self.pools))


def new_model(weights: WhisperWeights, head: Head, *, pools: bool) -> EncoderWithHead:
    """A head on an encoder that starts from these weights, which stay as they are."""
    state = {name: value.clone() for name, value in weights.state.items() if name.startswith("encoder.")}
    return EncoderWithHead(encoder_from_state(state, heads=weights.dims["n_audio_head"]), head, pools=pools)


def trainable_features(encoder: WhisperEncoder, mel_BMF: Tensor, *, pooled: bool) -> Tensor:
    """What the frozen encoder gives, by operations that gradients can pass: (B, L, 25, D).

    Not pooled, its last layer alone at every position: (B, 1, P, D).
    """
    x_BPD = encoder.stem2(windows(encoder.stem1(windows(mel_BMF.transpose(1, 2), 1), gelu=True), 2), gelu=True)
    P = x_BPD.shape[1]
    x_BPD = x_BPD.float() + encoder.positions[:P]
    layers = []
    for block in encoder.blocks:
        x_BPD = _through(block, x_BPD)
        if pooled:
            layers.append(x_BPD.unflatten(1, (FRAMES, P // FRAMES)).mean(dim=2))
    return torch.stack(layers, dim=1) if pooled else x_BPD[:, None]


def _through(block: EncoderBlock, x_BPD: Tensor) -> Tensor:
    """As the block's own forward, which overwrites its input."""
    qkv = block.qkv(block.attention_norm(x_BPD)).unflatten(-1, (3, block.heads, -1))
    mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
    x_BPD = x_BPD + block.out(mixed)
    return x_BPD + block.contract(block.expand(block.mlp_norm(x_BPD), gelu=True))


def _without_key(gradient: Tensor) -> Tensor:
    """Whisper's key has no bias, so its place stays 0: its gradient is rounding, which Adam would take for steps."""
    gradient = gradient.clone()
    gradient.unflatten(0, (3, -1))[1] = 0
    return gradient


def openai_state(encoder: WhisperEncoder) -> dict[str, Tensor]:
    """The encoder's weights in OpenAI's names, from which `encoder_from_state` makes it again."""
    state = OrderedDict()
    for number, stem in ((1, encoder.stem1), (2, encoder.stem2)):
        state[f"encoder.conv{number}.weight"] = stem.weight.unflatten(1, (3, -1)).transpose(1, 2)
        state[f"encoder.conv{number}.bias"] = stem.bias
    state["encoder.positional_embedding"] = encoder.positions
    for layer, block in enumerate(encoder.blocks):
        name = f"encoder.blocks.{layer}"
        weights, biases = block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)
        for at, part in enumerate(("query", "key", "value")):
            state[f"{name}.attn.{part}.weight"] = weights[at]
            if part != "key":
                state[f"{name}.attn.{part}.bias"] = biases[at]
        for old, new in (
            ("attn_ln", block.attention_norm), ("attn.out", block.out), ("mlp_ln", block.mlp_norm),
            ("mlp.0", block.expand), ("mlp.2", block.contract),
        ):  # fmt: skip
            state[f"{name}.{old}.weight"], state[f"{name}.{old}.bias"] = new.weight, new.bias
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def save_end_to_end(
    model: EncoderWithHead, folder: str | Path, description: HeadDescription, trained_ids: Iterable[str]
) -> Path:
    """Head, encoder and description in one folder. The description gets the checksum of the encoder as it is now."""
    state = openai_state(model.encoder)
    sha256 = WhisperWeights(description.backbone, "", {}, state).encoder_sha256()
    described = dataclasses.replace(
        description, weights_sha256=sha256, encoder={"mels": model.encoder.mels, "heads": model.encoder.blocks[0].heads}
    )
    return save_head(model.head, folder, described, trained_ids=trained_ids, encoder=state)


def load_end_to_end(folder: str | Path, device: str | torch.device = "cpu") -> EncoderWithHead:
    """A head and the encoder that was trained with it, ready to use: waveforms (B, samples) to logits (B, C).

    Raises UsageError where the head has no encoder of its own, WhisperATError where something is damaged.
    """
    state = load_encoder_weights(folder)
    head = load_head(folder)
    made_of = head.description.encoder
    assert made_of is not None, "load_encoder_weights has refused a head without an encoder"
    encoder = encoder_from_state(state, heads=made_of["heads"])
    model = EncoderWithHead(encoder, head, pools=head.description.frames == FRAMES)
    model.description = head.description
    return model.to(device).eval()


def evaluate_end_to_end(
    checkpoint: str | Path, dataset: str | Path | Dataset, *, fold: int | None = None, split: str | None = None,
    format: str = "auto", device: str = "auto", predictions: str | Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:  # fmt: skip
    """Metrics of a head and its own encoder on the audio of a dataset; which clips, as in `evaluate_head`.

    Clips that cannot be read are left out and named. Raises UsageError where the classes differ or nothing can be read.
    """
    started = time.monotonic()
    predictions = checked_path(predictions) if predictions else None
    target = choose_device(device)
    model = load_end_to_end(checkpoint, target)
    description = model.description
    if not isinstance(dataset, Dataset):
        if (Path(dataset) / METADATA).is_file():
            raise UsageError(NEEDS_AUDIO.format(checkpoint))
        dataset = open_dataset(dataset, format=format)
    columns, notes = class_columns(description, dataset.class_names, str(dataset.root))
    listed = ListedClips.of(dataset)
    choice = choose_rows(listed, description, Path(checkpoint), fold=fold, split=split)
    audio = Waveforms(dataset, clip_samples(description.clip_seconds), keep_bytes=0)
    logits, read = predict_audio(model, audio, choice.rows, target, progress)
    if not read.any():
        raise WhisperATError(f"none of the {len(read)} clips of {dataset.root} could be read: {audio.failure_note()}")
    choice = choice.only(read)
    labels = torch.from_numpy(dataset.table().labels[choice.rows][:, columns]).to(target)
    metrics, seconds = evaluate_scores(logits, labels), time.monotonic() - started
    source = f"evaluate {checkpoint} {dataset.root}"
    scored = scored_clips(listed, choice.rows, labels, logits, description, source=source)
    if predictions:
        scored.save(predictions)
    return as_evaluation(
        metrics, scored, description, labels.sum(dim=0).tolist(), checkpoint=str(checkpoint), data=str(dataset.root),
        clips=len(choice.rows), chosen=choice.text, clips_trained_on=choice.trained_on, seconds=seconds,
        clips_per_second=len(choice.rows) / seconds, device=str(target),
        notes=[*notes, *choice.notes, *([audio.failure_note()] if audio.failures else [])],
        predictions_file=None if predictions is None else str(predictions), layer_weights=layer_weights(model.head),
    )  # fmt: skip


@torch.no_grad()
def predict_audio(
    model: EncoderWithHead, audio: Waveforms, rows: np.ndarray, device: torch.device, progress: Progress | None = None
) -> tuple[Tensor, np.ndarray]:
    """Logits (n, C) of those of these clips that could be read, in order, and (len(rows),) bool: which these are."""
    model.eval()
    parts = np.array_split(rows, max(1, -(-len(rows) // EVALUATION_BATCH)))
    logits, read, done = [], [], 0
    for waveforms, good in audio.ahead(parts):
        if len(waveforms):
            logits.append(model(waveforms.to(device)).float())
        read.append(good)
        done += len(good)
        if progress:
            progress(done, len(rows))
    return torch.cat(logits) if logits else torch.zeros(0), np.concatenate(read)


@dataclass(frozen=True, eq=False)
class ListedClips:
    """A dataset's clips with the columns that a cache has, all of them finished: what `choose_rows` looks at."""

    path: Path
    ids: np.ndarray
    paths: np.ndarray
    fold: np.ndarray
    split: np.ndarray
    labels: np.ndarray
    done: np.ndarray
    dataset: str  # its name

    @classmethod
    def of(cls, dataset: Dataset) -> ListedClips:
        table = dataset.table()
        done = np.ones(len(table), dtype=bool)
        split = np.asarray(table.split, dtype=str)
        ids, paths = (np.asarray(column.astype(object)) for column in (table.ids, table.paths))
        return cls(dataset.root, ids, paths, table.fold, split, np.asarray(table.labels), done, dataset.name)

    def __len__(self) -> int:
        return len(self.ids)


class Waveforms:
    """The audio of a dataset's clips, decoded by as many threads as there are cores and kept while `keep_bytes` last.

    Used from one thread. `failures` holds what could not be read, row -> reason.
    """

    def __init__(self, dataset: Dataset, samples: int, *, keep_bytes: int | None = None):
        if keep_bytes is None:
            keep_bytes = int((free_bytes(torch.device("cpu")) or 0) * SHARE_OF_FREE_MEMORY)
        self.dataset, self.samples, self.room = dataset, samples, keep_bytes // (4 * samples)
        self.failures: dict[int, str] = {}
        self._kept: dict[int, np.ndarray] = {}

    def ahead(self, parts: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, np.ndarray]]:
        """For each array of rows: waveforms (n, samples) float32 of those that could be read, and (rows,) bool: which.

        The next part is decoded while one is in use.
        """
        with ThreadPoolExecutor(cores(), thread_name_prefix="decode") as pool:
            waiting = [pool.submit(self._read, row) for row in parts[0].tolist()] if len(parts) else []
            for at, rows in enumerate(parts):
                found = [future.result() for future in waiting]
                following = parts[at + 1].tolist() if at + 1 < len(parts) else []
                waiting = [pool.submit(self._read, row) for row in following]
                yield self._collect(rows, found)

    def failure_note(self) -> str:
        """One line on what could not be read."""
        row, reason = next(iter(self.failures.items()))
        return f"{len(self.failures)} clips could not be read and were left out, the first {self._name(row)}: {reason}"

    def _name(self, row: int) -> str:
        return self.dataset.clips[row].path

    def _read(self, row: int) -> np.ndarray | str:
        if row in self._kept:
            return self._kept[row]
        try:
            return self.dataset.waveform(row, self.samples)[0]
        except AudioError as error:
            return str(error)

    def _collect(self, rows: np.ndarray, found: list[np.ndarray | str]) -> tuple[Tensor, np.ndarray]:
        good = np.array([not isinstance(clip, str) for clip in found], dtype=bool)
        for row, clip in zip(rows.tolist(), found, strict=True):
            if isinstance(clip, str):
                self.failures[row] = clip
            elif len(self._kept) < self.room:
                self._kept[row] = clip
        clips = [clip for clip in found if not isinstance(clip, str)]
        return torch.from_numpy(np.stack(clips) if clips else np.zeros((0, self.samples), np.float32)), good
