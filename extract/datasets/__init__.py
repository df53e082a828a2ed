"""Datasets: which clips there are, and what is in them. One small file per layout; `open_dataset` recognises them."""

from whisper_at_cli.extract.datasets.base import Clip, Dataset
from whisper_at_cli.extract.datasets.recognise import FORMATS, open_dataset
from whisper_at_cli.extract.datasets.windows import windowed

__all__ = ["FORMATS", "Clip", "Dataset", "open_dataset", "windowed"]
