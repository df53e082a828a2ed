"""Event files for TensorBoard, an optional extra: what metrics.jsonl holds, a run for each training."""

from __future__ import annotations

from pathlib import Path

from whisper_at_cli.extract.errors import UsageError

SHOWN = ("loss", "lr", "seconds", "waiting_seconds", "accuracy", "mAP")


class Board:
    """Writers below `folder`, opened when first used."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError("--tensorboard needs tensorboard: pip install 'whisper-at-cli[board]'") from error
        self.folder, self._make, self._writers = folder, SummaryWriter, {}

    def add(self, line: dict) -> None:
        """A line of metrics.jsonl. An epoch that is done again after a kill replaces what came after the one before."""
        name = line["training"]
        if name not in self._writers:
            self._writers[name] = self._make(str(self.folder / name), purge_step=line["epoch"])
        for quantity in SHOWN:
            if quantity in line:
                self._writers[name].add_scalar(quantity, line[quantity], line["epoch"])

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
