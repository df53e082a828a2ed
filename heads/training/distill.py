"""Learning from heads that are trained already: a clip's targets are its labels and what these teachers say, mixed.

A teacher is the folder of an earlier `train-head --out` on the same clips. For each fold its head that was trained
without that fold teaches, so that nothing of a test clip's label reaches the head that is tested on it.

n clips, C classes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.heads.checkpoint import id_hashes, load_head, read_record, trained_id_hashes
from whisper_at_cli.heads.evaluate import check_fits, stream_logits
from whisper_at_cli.heads.training.data import Clips

SHARE = 0.5  # of a target, that the teachers have by default


@dataclass(frozen=True)
class Teachers:
    """Folders of trained heads, and how much of a target is theirs, from 0 to 1. Raises UsageError for what is no
    share, or no head."""

    folders: tuple[Path, ...]
    share: float = SHARE

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"--teacher-share is {self.share:g}; choose a number above 0 and up to 1")
        for folder in self.folders:
            read_record(folder)

    def recorded(self) -> dict:
        """What of them decides the weights of the head that learns, for its description and its run's command."""
        return {
            "teachers": [read_record(folder)["head_sha256"][:12] for folder in self.folders],
            "teacher_share": self.share,
        }

    def of_fold(self, number: int) -> list[Path]:
        """The heads that teach where a fold is held out: those of every seed. Of number 0, where none is, those that
        were trained on all clips; and so where teachers were validated on a split."""
        found = []
        for folder in self.folders:
            heads = [folder / f"fold-{number}", *sorted(folder.glob(f"seed-*/fold-{number}"))]
            heads = [head for head in heads if (head / "head.json").is_file()] if number else []
            if number and not heads and [*folder.glob("fold-*"), *folder.glob("seed-*/fold-*")]:
                raise UsageError(
                    f"{folder} has no head that was trained without fold {number}; give the folder of a train-head "
                    "--out with the same folds"
                )
            found += heads or [folder]
        return found


def with_teachers(
    clips: Clips, labels: np.ndarray, teachers: Teachers, number: int, train: np.ndarray, test: np.ndarray, *,
    cache: FeatureCache, loss: str,
) -> Clips:  # fmt: skip
    """Clips whose training ones, `train` (positions), have targets (n, C) float32 in place of labels (n, C) 0/1.

    Raises UsageError where a teacher was trained on a clip of `test`, or on other features or classes.
    """
    targets = torch.from_numpy(labels).float()
    rows, said = clips.rows[train], []
    for folder in teachers.of_fold(number):
        known = trained_id_hashes(folder)
        if known is not None and len(test) and np.isin(id_hashes(cache.ids[clips.rows[test]]), known).any():
            raise UsageError(
                f"{folder} was trained on clips that the new head is to be tested on; give the folder of a train-head "
                "--out with the same folds or split"
            )
        module = load_head(folder)
        columns, _ = check_fits(module.description, cache)
        logits = stream_logits(module.to(clips.device), cache, rows, clips.device).float().cpu()
        p = logits.softmax(dim=1) if module.description.loss == "ce" else logits.sigmoid()
        own = torch.empty_like(p)
        own[:, torch.from_numpy(columns)] = p
        said.append(own)
    probabilities = torch.stack(said).mean(dim=0)
    if loss == "ce":
        probabilities = probabilities / probabilities.sum(dim=1, keepdim=True)
    own = torch.from_numpy(train)
    targets[own] = torch.lerp(targets[own], probabilities, teachers.share)
    return dataclasses.replace(clips, labels=targets.to(clips.labels.device))
