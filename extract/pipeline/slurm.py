"""SLURM: which share of the work an array task has, and a job script that fills a cache with such tasks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from whisper_at_cli.extract.errors import UsageError

ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT")
TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}")  # minutes[:seconds], h:m:s, d-h[:m[:s]]


def slot_from_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    """The slot (i, n) of this process: its place in the job array, and in the array task where `srun` starts several.

    Raises UsageError outside SLURM, or where its variables make no sense.
    """
    parts = []
    if ARRAY[0] in environment:
        task, first, step, count = (_number(environment, name) for name in ARRAY)
        parts.append(((task - first) // max(1, step), count))
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        parts.append((_number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS")))
    if not parts:
        raise UsageError(
            "--shard auto reads the task number of a SLURM job array, and this is not a task of one "
            "(SLURM_ARRAY_TASK_ID is not set); submit it with sbatch --array=1-N, or give --shard I/N"
        )
    index, of = 0, 1
    for place, count in parts:
        if not 0 <= place < count:
            raise UsageError(f"SLURM says that this is task {place + 1} of {count}; give --shard I/N instead")
        index, of = index * count + place, of * count
    return index + 1, of


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "1" if name == ARRAY[2] else "")
    if not value.isdecimal():
        raise UsageError(f"{name} is {value!r}, not a number; give --shard I/N instead")
    return int(value)


@dataclass(frozen=True)
class SlurmJob:
    """What a job script asks the cluster for. Raises UsageError for a value that SLURM would refuse."""

    tasks: int
    cpus: int = 8  # per task: decoding needs about one per 30 clips/s
    gpus: int = 1
    memory_gb: int = 32
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    name: str = "whisper-at"
    setup: str | None = None  # a shell line that makes the command available

    def __post_init__(self):
        for what, value, least in (
            ("tasks", self.tasks, 1), ("cpus", self.cpus, 1), ("gpus", self.gpus, 0), ("memory-gb", self.memory_gb, 1),
        ):  # fmt: skip
            if value < least:
                raise UsageError(f"--{what} is {value}, and must be at least {least}")
        if not TIME.fullmatch(self.time):
            raise UsageError(f"--time {self.time!r} is not a time as SLURM writes it, such as 4:00:00 or 2-12:00:00")
        for what in ("partition", "account", "name"):
            value = getattr(self, what)
            if value is not None and not re.fullmatch(r"[\w.,@-]+", value):
                raise UsageError(f"--{what} {value!r} is not a name that SLURM takes")


def job_script(job: SlurmJob, extract_arguments: list[str]) -> str:
    """A script for `sbatch`: an array whose every task runs `extract` with these arguments and its own slot.

    A task that is stopped by its time limit or a lost node is queued again and continues.
    """
    asked = {
        "job-name": job.name,
        "array": f"1-{job.tasks}",
        "cpus-per-task": job.cpus,
        "gpus-per-task": job.gpus or None,
        "ntasks": 1,
        "mem": f"{job.memory_gb}G",
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "output": f"{job.name}-%A_%a.log",
    }
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{name}={value}" for name, value in asked.items() if value is not None]
    lines += [
        "#SBATCH --requeue",
        "# Every task fills shards of its own; submit the same script again and it continues what is not finished.",
        "set -euo pipefail",
    ]
    lines += [job.setup] if job.setup else []
    lines.append(shlex.join(["srun", "whisper-at-cli", "--quiet", "extract", *extract_arguments, "--shard", "auto"]))
    return "\n".join(lines) + "\n"
