"""How an extraction is asked for: one record that every engine takes, and that a cache keeps as a command."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from whisper_at_cli.extract.backbones.load import Backbone
from whisper_at_cli.extract.backbones.recognise import check_model
from whisper_at_cli.extract.cache.schema import DEFAULT_SHARD_MB
from whisper_at_cli.extract.errors import UsageError

MEANWHILE = ("shard", "repair", "update", "prune", "workers")  # what is in a cache does not depend on these


def check_numbers(**numbers: float | None) -> None:
    """Raise UsageError for a number that is not above 0."""
    for name, value in numbers.items():
        if value is not None and not (0 < value < math.inf):
            raise UsageError(f"{name} is {value:g}, and must be above 0")


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How the clips of a dataset are read. Seconds are of audio."""

    format: str = "auto"  # the dataset's layout
    labels: str | Path | None = None  # a file that lists the classes; by default the one beside the dataset
    window: float | None = None  # seconds: every file is cut into clips of this length
    hop: float | None = None  # seconds from one window to the next; by default the window's length
    clip_seconds: float | None = None  # clips are cut or padded to this; by default the dataset's, else 10
    limit: int | None = None  # only the first so many clips

    def __post_init__(self) -> None:
        check_numbers(limit=self.limit)


@dataclass(frozen=True, kw_only=True)
class ExtractOptions(ReadOptions):
    """How a dataset is extracted. Raises UsageError for a number that is not above 0, and for an unknown model."""

    model: str | Path | Backbone  # a name, a file or a folder of weights, or a backbone
    dtype: str = "float16"  # storage type
    precision: str = "auto"  # of the arithmetic
    device: str = "auto"
    batch_size: int | None = None  # clips; by default what fits
    workers: int | None = None  # processes that decode; by default the cores
    shard_mb: float = DEFAULT_SHARD_MB  # megabytes of a shard file, in a new cache
    shard: tuple[int, int] = (1, 1)  # (i, n): the i-th of each n shards is done
    repair: bool = False  # also clips that failed or are damaged
    update: bool = False  # also clips whose audio has changed
    prune: bool = False  # clips that the dataset no longer has are dropped
    compile: bool = False  # torch.compile first

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(batch_size=self.batch_size, workers=self.workers, shard_mb=self.shard_mb)
        if isinstance(self.model, str | Path):
            check_model(self.model)

    @classmethod
    def of(cls, options: ExtractOptions | None, given: dict[str, Any]) -> ExtractOptions:
        """Options as they are, or made of keywords. Raises TypeError where both are given."""
        if options is not None and given:
            raise TypeError(f"give options, or {', '.join(given)}, and not both")
        return options or cls(**given)

    def command(self, dataset: object, cache: str | Path, *more: str) -> str | None:
        """A shell's line that makes the same cache; None for a backbone or a dataset that has no name in a shell."""
        if not isinstance(self.model, str | Path) or not isinstance(dataset, str | Path):
            return None
        words = ["whisper-at-cli", "extract", str(dataset), str(cache), "--model", str(self.model)]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in (*MEANWHILE, "model") or value == field.default:
                continue
            flag = f"--{field.name.replace('_', '-')}"
            words += [flag] if value is True else [flag, f"{value:g}" if isinstance(value, float) else str(value)]
        return shlex.join([*words, *more])
