"""SLURM: which share of the work an array task has, and a job script that fills a cache with such tasks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from whisper_at_cli.extract.errors import UsageError

ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT")
SIGNAL_EARLY = 60  # SLURM sends a signal up to so many seconds before it was asked to
LONGEST_SIGNAL = 65535  # seconds; more is refused by sbatch


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
    signal_seconds: int = 120  # before the time limit a task stops and requeues itself
    max_requeues: int = 100
    partition: str | None = None
    account: str | None = None
    name: str = "whisper-at"
    setup: str | None = None  # a shell line that makes the command available

    def __post_init__(self) -> None:
        for what, value, least in (
            ("tasks", self.tasks, 1), ("cpus", self.cpus, 1), ("gpus", self.gpus, 0), ("memory-gb", self.memory_gb, 1),
            ("signal-seconds", self.signal_seconds, 1), ("max-requeues", self.max_requeues, 0),
        ):  # fmt: skip
            if value < least:
                raise UsageError(f"--{what} must be at least {least} (got {value})")
        if self.signal_seconds > LONGEST_SIGNAL:
            raise UsageError(f"--signal-seconds must be at most {LONGEST_SIGNAL} (got {self.signal_seconds})")
        limit = _limit_seconds(self.time)
        earliest = self.signal_seconds + SIGNAL_EARLY
        if limit and limit <= earliest:
            raise UsageError(
                f"--time {self.time} is {limit} seconds, and SLURM may signal a task {earliest} seconds before that: "
                "no time is left to work; use a longer --time or a shorter --signal-seconds"
            )
        for what in ("partition", "account", "name"):
            value = getattr(self, what)
            if value is not None and not re.fullmatch(r"[\w.,@-]+", value):
                raise UsageError(f"--{what} {value!r} is not a name that SLURM takes")


def _limit_seconds(time: str) -> int:
    """A time limit in seconds, rounded up to whole minutes as SLURM does; 0 is no limit."""
    days, dash, clock = time.rpartition("-")
    parts = clock.split(":")
    if len(parts) > 3 or not all(part.isdecimal() for part in [*parts, *([days] if dash else [])]):
        raise UsageError(f"--time {time!r} is not a time as SLURM writes it, such as 4:00:00 or 2-12:00:00")
    numbers = [int(part) for part in parts]
    if dash:  # days-hours, days-hours:minutes or days-hours:minutes:seconds
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:  # minutes or minutes:seconds
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return -(-total // 60) * 60


REQUEUE = """\
# SLURM kills a task at its time limit and does not requeue it: --requeue covers lost nodes and preemption only. So it
# sends USR1 before the limit; extract is stopped then, and the task puts itself back into the queue.
task="${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"  # SLURM_JOB_ID alone can stand for the whole array
stop_and_requeue() {{
    scancel --signal=TERM "$task" || true
    for _ in {{1..{patience}}}; do
        kill -0 "$step" 2>/dev/null || break
        sleep 1
    done
    if ! kill -0 "$step" 2>/dev/null && wait "$step"; then exit 0; fi  # it finished just in time
    if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {max_requeues} ]; then
        echo "not requeued: task $task was restarted ${{SLURM_RESTART_COUNT:-0}} times; submit the script again" >&2
        exit 1
    fi
    echo "the time limit is near: requeueing task $task" >&2
    scontrol requeue "$task"
    exit
}}
trap stop_and_requeue USR1
unset "${{!SLURM_CPU_BIND@}}"  # of a session that sbatch was run in: it would keep srun to that session's cores
{command} &
step=$!
wait "$step"  # the trap runs only while bash waits: that is why srun is in the background
"""


def job_script(job: SlurmJob, extract_arguments: list[str]) -> str:
    """A script for `sbatch`: an array whose every task runs `extract` with these arguments and its own slot.

    A task that loses its node or reaches its time limit is requeued and continues. One that finishes or fails is not.
    """
    asked = {
        "job-name": job.name,
        "array": f"1-{job.tasks}",
        "cpus-per-task": job.cpus,
        "gpus-per-task": job.gpus or None,
        "ntasks": 1,
        "mem": f"{job.memory_gb}G",
        "time": job.time,
        "signal": f"B:USR1@{job.signal_seconds}",
        "partition": job.partition,
        "account": job.account,
        "output": f"{job.name}-%A_%a.log",
        "open-mode": "append",  # a requeued task would overwrite its log
    }
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{name}={value}" for name, value in asked.items() if value is not None]
    lines += [
        "#SBATCH --requeue",
        "# Every task fills shards of its own; submit the same script again and it continues what is not finished.",
        "set -eo pipefail",
    ]
    lines += [job.setup] if job.setup else []
    words = ["srun", f"--cpus-per-task={job.cpus}"]  # since SLURM 22.05 srun does not take it over from sbatch
    words += ["whisper-at-cli", "--quiet", "extract", *extract_arguments, *_devices(job, extract_arguments)]
    command = shlex.join([*words, "--shard", "auto"])
    return (
        "\n".join(lines)
        + "\n"
        + REQUEUE.format(max_requeues=job.max_requeues, patience=min(30, -(-job.signal_seconds // 2)), command=command)
    )


def _devices(job: SlurmJob, extract_arguments: list[str]) -> list[str]:
    """`--device` for a task of several GPUs: `auto` would use the first only."""
    if job.gpus < 2 or any(argument.split("=")[0] == "--device" for argument in extract_arguments):
        return []
    return ["--device", ",".join(f"cuda:{index}" for index in range(job.gpus))]
