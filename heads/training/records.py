"""What a training run keeps in its folder, so that it can be watched, continued and trusted.

head.json, head.safetensors   the head; also in fold-N/ and, of several seeds, seed-S/fold-N/
trained_on.safetensors        hashes of the ids of the clips that it was trained on
metrics.jsonl                 a line for each epoch of each training
curve.png                     loss and validation metric over epochs
tensorboard/                  the same for TensorBoard, if asked for
.training/run.json            the command, what of it is finished, and its result
.training/NAME.safetensors    trainings under way: weights, optimiser, averages, epochs
.training/scores/NAME.npy     what each finished training says of its held-out clips

Every file but metrics.jsonl is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import Tensor

from whisper_at_cli import __version__
from whisper_at_cli.extract.cache.store import LocalStore
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.extract.folders import take_lock, writable_folder
from whisper_at_cli.heads.checkpoint import ENCODER, HEAD, TRAINED_ON

FORMAT_VERSION = 1
HIDDEN = ".training"
SAVING_SHARE = 0.05  # of the time, at most, goes into saving the state of trainings under way
HEAD_FILES = ("head.json", *(f"{name}.safetensors" for name in (HEAD, TRAINED_ON, ENCODER)))
TOP_FILES = (*HEAD_FILES, "metrics.jsonl", "curve.png", "search.json")


class RunFolder:
    """One process's hold on the folder of a run; a second process is refused.

    `command` is all that decides the weights. A folder that holds another command's run is refused, with the difference
    named, unless `restart` clears what it holds. Raises UsageError for that and for a folder that cannot be written.
    """

    def __init__(self, path: str | Path, command: dict, *, restart: bool = False):
        self.path, self.store = _made(Path(path)), LocalStore(path)
        self._lock = _locked(self.path / HIDDEN / "lock")
        self._next_save = 0.0
        self._metrics: TextIO | None = None
        try:
            self._run = self._begun(json.loads(json.dumps(command)), restart)
            self._write_run()
        except BaseException:
            os.close(self._lock)
            raise

    def _begun(self, command: dict, restart: bool) -> dict:
        """The record of this run: the one that is here, or a new one in a folder cleared of what runs leave."""
        kept = None if restart else self._read_run()
        if kept is None:
            if not restart and (self.path / "head.json").exists():
                raise UsageError(
                    f"{self.path} holds a head and no record of the run that made it: choose another --out, or give "
                    "--restart to replace it"
                )
            self._clear()
            kept = {"format_version": FORMAT_VERSION, "tool_version": __version__, "torch_version": torch.__version__}
            return kept | {"command": command, "finished": {}, "result": None}
        if different := differences(kept["command"], command):
            raise UsageError(
                f"{self.path} holds another run, in which {'; '.join(different)}: choose another --out, or give "
                "--restart to replace it"
            )
        return kept

    def close(self) -> None:
        if self._metrics:
            self._metrics.close()
        os.close(self._lock)

    @property
    def finished(self) -> dict[str, dict]:
        """What is known of each training that is done, by its name."""
        return self._run["finished"]

    @property
    def result(self) -> dict | None:
        """The result of the whole run, once there is one."""
        return self._run["result"]

    def finish(self, records: dict[str, dict], group: str) -> None:
        """The trainings of a group are done: what is known of each."""
        self._run["finished"] |= json.loads(json.dumps(records))
        self._write_run()
        (self.path / HIDDEN / f"{group}.safetensors").unlink(missing_ok=True)

    def finish_all(self, result: dict) -> None:
        self._run["result"] = json.loads(json.dumps(result))
        self._write_run()

    def save_state(self, group: str, tensors: Callable[[], dict[str, Tensor]], record: dict) -> None:
        """Keep the state of trainings under way, unless that was done so lately that it would cost too much time."""
        started = time.monotonic()
        if started < self._next_save:
            return
        from safetensors.torch import save

        data = save({name: tensor.contiguous() for name, tensor in tensors().items()}, {"record": json.dumps(record)})
        self.write(f"{HIDDEN}/{group}.safetensors", data)
        ended = time.monotonic()
        self._next_save = ended + (ended - started) / SAVING_SHARE

    def load_state(self, group: str) -> tuple[dict[str, Tensor], dict] | None:
        """State of trainings under way and the record beside it, None where there is none."""
        from safetensors import safe_open

        path = self.path / HIDDEN / f"{group}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
                return tensors, json.loads(file.metadata()["record"])
        except Exception as error:
            raise WhisperATError(f"{path} is damaged ({error}); give --restart to train anew") from error

    def save_scores(self, training: str, scores: np.ndarray) -> None:
        """Keep the scores of held-out clips, so that a run that is continued still has them all."""
        content = io.BytesIO()
        np.save(content, scores, allow_pickle=False)
        self.write(_scores_file(training), content.getvalue())

    def load_scores(self, training: str) -> np.ndarray | None:
        """None where an earlier version of this tool finished the training."""
        path = self.path / _scores_file(training)
        try:
            return np.load(path, allow_pickle=False) if path.exists() else None
        except (OSError, ValueError) as error:
            raise WhisperATError(f"{path} is damaged ({error}); give --restart to train anew") from error

    def append_metrics(self, lines: list[dict]) -> None:
        if self._metrics is None:
            self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - until close()
        self._metrics.write("".join(json.dumps(line) + "\n" for line in lines))
        self._metrics.flush()

    def keep_metrics(self, known: list[dict]) -> None:
        """Only these lines count: those of epochs that a killed run did and did not save are done again."""
        if self._metrics:
            self._metrics.close()
            self._metrics = None
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in known).encode())

    def _read_run(self) -> dict | None:
        data = self.store.read(f"{HIDDEN}/run.json")
        if data is None:
            return None
        try:
            kept = json.loads(data)
            if kept["format_version"] == FORMAT_VERSION:
                return kept
        except (ValueError, KeyError, TypeError) as error:
            raise WhisperATError(f"{self.path / HIDDEN / 'run.json'} is damaged ({error!r}); give --restart") from error
        raise UsageError(f"{self.path} holds a run of another version of this tool; give --restart to replace it")

    def _write_run(self) -> None:
        self.write(f"{HIDDEN}/run.json", (json.dumps(self._run, indent=1) + "\n").encode())

    def write(self, name: str, data: bytes) -> None:
        try:
            self.store.write_whole(name, [data])
        except OSError as error:
            raise WhisperATError(f"cannot write {self.path / name}: {error}; choose another --out") from error

    def _clear(self) -> None:
        """Remove what runs leave in their folders, and nothing else."""
        folders = [*self.path.glob("fold-[0-9]*"), *self.path.glob("seed-[0-9]*/fold-[0-9]*")]
        files = [self.path / name for name in TOP_FILES] + [folder / name for folder in folders for name in HEAD_FILES]
        files += [*self.path.glob(f"{HIDDEN}/*.safetensors"), *self.path.glob(f"{HIDDEN}/scores/*.npy")]
        for file in [*files, self.path / HIDDEN / "run.json"]:
            file.unlink(missing_ok=True)
        for events in self.path.glob("tensorboard/**/events.out.tfevents.*"):
            events.unlink()
        boards = sorted(self.path.glob("tensorboard/**/"), reverse=True)  # the inner ones first
        for folder in [*folders, *self.path.glob("seed-[0-9]*"), *boards]:
            with contextlib.suppress(OSError):  # what else lies in it is not ours
                folder.rmdir()


def _scores_file(training: str) -> str:
    return f"{HIDDEN}/scores/{training.replace('/', '+')}.npy"


def order_kept(path: str | Path) -> str | None:
    """In which order the run in this folder takes its clips, None where there is no run."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # what is wrong is said by RunFolder
        return _command_kept(path)["order"]
    return None


def precision_kept(path: str | Path) -> str | None:
    """The precision that the run in this folder began with, which may be another than `auto` is on this machine."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return _command_kept(path)["recipe"]["precision"]
    return None


def _command_kept(path: str | Path) -> dict:
    return json.loads((Path(path) / HIDDEN / "run.json").read_bytes())["command"]


def differences(before: dict, now: dict, prefix: str = "") -> list[str]:
    """What two commands differ in, in words."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} was {old} and is {new} now")
    return found


def _made(path: Path) -> Path:
    writable_folder(path)
    writable_folder(path / HIDDEN)
    return path


def _locked(path: Path) -> int:
    lock = os.open(path, os.O_RDWR | os.O_CREAT)
    if not take_lock(lock):
        os.close(lock)
        where = path.parent.parent
        raise UsageError(f"another process trains in {where} now: wait for it, or choose another --out")
    return lock
