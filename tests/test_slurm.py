"""SLURM: every task of an array finds its own share, the job script is one that SLURM takes, and a real array fills a
cache with the bytes of one process."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import array_bytes, noise, write_wav
from whisper_at_cli.extract import FeatureCache, extract
from whisper_at_cli.extract.cache.summary import summarise
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.pipeline.slurm import SlurmJob, job_script, slot_from_environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")


def array(task, first, step, count, **others) -> dict[str, str]:
    names = ("ID", "MIN", "STEP", "COUNT")
    values = zip(names, (task, first, step, count), strict=True)
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values} | others


@pytest.mark.parametrize(
    ("environment", "slot"),
    [
        (array(1, 1, 1, 3), (1, 3)),
        (array(3, 1, 1, 3), (3, 3)),
        (array(0, 0, 1, 4), (1, 4)),
        (array(7, 3, 2, 5), (3, 5)),
        (array(2, 1, 1, 3, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1"), (4, 6)),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, (3, 4)),
    ],
)
def test_a_task_finds_its_slot(environment, slot):
    assert slot_from_environment(environment) == slot


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "not a task of one"),
        ({"SLURM_JOB_ID": "7"}, "not a task of one"),
        (array("x", 1, 1, 3), "not a number"),
        (array(9, 1, 1, 3), "task 9 of 3"),
    ],
)
def test_outside_an_array_auto_is_refused(environment, message):
    with pytest.raises(UsageError, match=message):
        slot_from_environment(environment)


def test_tasks_of_a_combined_array_have_every_slot_once():
    slots = [
        slot_from_environment(array(task, 1, 1, 3, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID=str(process)))
        for task in (1, 2, 3)
        for process in (0, 1)
    ]
    assert sorted(slots) == [(index, 6) for index in range(1, 7)]


@pytest.mark.parametrize(
    "asked", [{"tasks": 0}, {"tasks": 2, "time": "soon"}, {"tasks": 2, "partition": "a b"}, {"tasks": 2, "cpus": 0}]
)
def test_a_job_that_slurm_would_refuse_is_refused_here(asked):
    with pytest.raises(UsageError):
        SlurmJob(**asked)


def test_the_script_quotes_what_a_shell_would_split(tmp_path):
    script = job_script(SlurmJob(tasks=2), ["my sounds", "a;b.zarr", "--model", "tiny.en"])
    (tmp_path / "srun").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (tmp_path / "srun").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True, check=True).stdout
    expected = ["whisper-at-cli", "--quiet", "extract", "my sounds", "a;b.zarr", "--model", "tiny.en"]
    assert words.splitlines() == [*expected, "--shard", "auto"]


@pytest.fixture
def sounds(tmp_path) -> Path:
    for index in range(12):
        write_wav(tmp_path / "sounds" / ("low", "high")[index % 2] / f"{index:02d}.wav", noise(index, 1.0))
    return tmp_path / "sounds"


def test_info_says_what_each_task_still_lacks(sounds, tmp_path, random_backbone):
    options = dict(model=random_backbone, clip_seconds=1.0, shard_mb=3 * 3 * 25 * 64 * 2 / 1e6)
    for slot in ((1, 3), (3, 3)):
        extract(sounds, tmp_path / "a.zarr", shard=slot, **options)
    slots = summarise(tmp_path / "a.zarr")["slots"]
    assert [(slot["shard"], slot["done"], slot["pending"], slot["running"]) for slot in slots] == [
        ("1/3", 6, 0, False), ("2/3", 0, 3, False), ("3/3", 3, 0, False),
    ]  # fmt: skip


def test_info_sees_which_task_is_running(sounds, tmp_path, random_backbone):
    seen = []

    def look(*_):
        seen.append([slot["running"] for slot in summarise(tmp_path / "a.zarr")["slots"]])

    extract(sounds, tmp_path / "a.zarr", shard=(2, 3), model=random_backbone, clip_seconds=1.0, progress=look)
    assert seen[0] == [False, True, False]
    assert [slot["running"] for slot in summarise(tmp_path / "a.zarr")["slots"]] == [False, False, False]


class Cluster:
    """A SLURM controller and one node on this machine, in one folder, on ports of their own."""

    def __init__(self, folder: Path):
        self.folder, self.processes = folder, []
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        folder = self.folder
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        controller, node = _free_ports(2)
        host = subprocess.run(["hostname", "-s"], capture_output=True, text=True, check=True).stdout.strip()
        settings = {
            "ClusterName": "test", "SlurmctldHost": "localhost", "SlurmUser": "root",
            "SlurmctldPort": controller, "SlurmdPort": node,
            "AuthType": "auth/munge", "AuthInfo": f"socket={folder}/munge.socket", "CredType": "cred/munge",
            "StateSaveLocation": folder / "state", "SlurmdSpoolDir": folder / "spool",
            "SlurmctldPidFile": folder / "slurmctld.pid", "SlurmdPidFile": folder / "slurmd.pid",
            "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none", "AccountingStorageType": "accounting_storage/none",
            "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_Core", "SwitchType": "switch/none",
            "MpiDefault": "none", "ReturnToService": 2,
        }  # fmt: skip
        lines = [f"{name}={value}" for name, value in settings.items()]
        lines.append(f"NodeName=here NodeHostname={host} NodeAddr=127.0.0.1 Port={node} CPUs=2 RealMemory=4000")
        lines.append("PartitionName=main Nodes=here Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES")
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        munge = [f"--{name}={folder}/munge{end}" for name, end in
                 (("socket", ".socket"), ("key-file", ".key"), ("pid-file", ".pid"), ("log-file", ".log"),
                  ("seed-file", ".seed"))]  # fmt: skip
        self._run("munged", "--foreground", "--force", *munge)
        self._wait("munge.socket", lambda: (folder / "munge.socket").exists())
        self._run("slurmctld", "-D")
        self._wait("controller", lambda: self.ask("scontrol", "ping").stdout.count("UP"))
        self._run("slurmd", "-D", "-N", "here")
        self._wait("node", lambda: "idle" in self.ask("sinfo", "-h").stdout)

    def _run(self, *command: str) -> None:
        log = open(self.folder / f"{command[0]}.out", "w")
        self.processes.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def _wait(self, what: str, ready) -> None:
        for _ in range(100):
            if ready():
                return
            time.sleep(0.2)
        logs = "\n".join(f"{log.name}: {log.read_text()[-500:]}" for log in self.folder.glob("*.out"))
        pytest.skip(f"SLURM's {what} did not start here: {logs}")

    def ask(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd=self.folder)

    def run_to_its_end(self, script: str) -> None:
        (self.folder / "job.sh").write_text(script)
        submitted = self.ask("sbatch", "job.sh")
        assert submitted.returncode == 0, submitted.stderr
        for _ in range(300):
            if not self.ask("squeue", "-h").stdout.strip():
                return
            time.sleep(0.5)
        raise AssertionError(self.ask("squeue").stdout)

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def cluster(tmp_path):
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and Debian's slurmctld, slurmd, slurm-client and munge; missing: {missing or 'root'}")
    (tmp_path / "slurm").mkdir()
    cluster = Cluster(tmp_path / "slurm")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def test_an_array_of_three_tasks_fills_one_cache(cluster, sounds, tmp_path, tiny_en):
    """A real controller, node and array; the script as the command `slurm` prints it."""
    cache, options = tmp_path / "array.zarr", ["--model", "tiny.en", "--clip-seconds", "1", "--shard-mb", "0.2"]
    program = [sys.executable, "-m", "whisper_at_cli.cli"]
    command = [*program, "slurm", sounds, cache, "--tasks", "3", "--gpus", "0", "--cpus", "1", "--memory-gb", "1"]
    setup = f'srun() {{ shift; command srun {sys.executable} -m whisper_at_cli.cli "$@"; }}'  # no program on the PATH
    script = subprocess.run(
        [*command, "--setup", setup, "--", *options], capture_output=True, text=True, check=True
    ).stdout
    cluster.run_to_its_end(script)
    logs = "\n".join(log.read_text() for log in cluster.folder.glob("*.log"))
    assert FeatureCache.open(cache).complete, logs
    slots = summarise(cache)["slots"]
    assert [slot["shard"] for slot in slots] == ["1/3", "2/3", "3/3"] and all(slot["done"] for slot in slots), logs
    subprocess.run([*program, "--quiet", "extract", sounds, tmp_path / "one.zarr", *options], check=True)
    assert array_bytes(cache) == array_bytes(tmp_path / "one.zarr")
