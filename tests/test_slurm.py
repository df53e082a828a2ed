"""SLURM: every task of an array finds its own share, the job script is one that SLURM takes, and a real array fills a
cache with the bytes of one process."""

import os
import re
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
    "environment, slot",
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
    "environment, message",
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
    "asked",
    [
        {"tasks": 0}, {"tasks": 2, "time": "soon"}, {"tasks": 2, "time": "1:2:3:4"}, {"tasks": 2, "partition": "a b"},
        {"tasks": 2, "cpus": 0}, {"tasks": 2, "signal_seconds": 65536}, {"tasks": 2, "signal_seconds": 0},
    ],
)  # fmt: skip
def test_a_job_that_slurm_would_refuse_is_refused_here(asked):
    with pytest.raises(UsageError):
        SlurmJob(**asked)


@pytest.mark.parametrize(
    "limit, seconds",
    [
        ("3", 180), ("2:30", 180), ("1:02:00", 3720), ("1-0", 86400), ("1-2:03", 93780),
        ("1-2:03:04", 93840), ("0", None),
    ],
)  # fmt: skip
def test_a_signal_that_leaves_no_time_to_work_is_refused(limit, seconds):
    """Otherwise the task would be requeued for ever; SLURM may signal a minute early, and rounds up to minutes."""
    if seconds is None:
        SlurmJob(tasks=1, time=limit, signal_seconds=65535)
        return
    SlurmJob(tasks=1, time=limit, signal_seconds=min(seconds - 61, 65535))
    if seconds < 65535:
        with pytest.raises(UsageError, match=f"--time {limit} is {seconds} seconds"):
            SlurmJob(tasks=1, time=limit, signal_seconds=seconds - 60)


@pytest.fixture
def run_script(tmp_path):
    """Run a job script with programs that stand in for SLURM's and note how they were called."""

    def run(script: str, srun: str, **environment: str) -> tuple[int, list[str]]:
        programs = tmp_path / "programs"
        programs.mkdir()
        for name, does in (("srun", srun), ("scancel", 'kill -TERM "$(cat $NOTES.step)"'), ("scontrol", "exit 0")):
            note = f'for word in {name} "$@"; do echo "$word" >> $NOTES; done'
            (programs / name).write_text(f"#!/bin/bash\n{note}\necho $$ > $NOTES.{name}\n{does}\n")
            (programs / name).chmod(0o755)
        notes = tmp_path / "notes"
        environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "NOTES": str(notes)} | environment
        environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "7"}
        ended = subprocess.run(["bash", "-c", script], env=environment, timeout=60, check=False)
        return ended.returncode, notes.read_text().splitlines()

    return run


def test_the_script_quotes_what_a_shell_would_split(run_script):
    script = job_script(SlurmJob(tasks=2, cpus=6), ["my sounds", "a;b.zarr", "--model", "tiny.en"])
    expected = ["whisper-at-cli", "--quiet", "extract", "my sounds", "a;b.zarr", "--model", "tiny.en"]
    assert run_script(script, "exit 0") == (0, ["srun", "--cpus-per-task=6", *expected, "--shard", "auto"])


def test_cores_of_the_session_that_submitted_the_job_do_not_bind_it(run_script):
    """sbatch passes on its environment, and inside `srun --pty bash` that has a mask of the session's cores."""
    script = job_script(SlurmJob(tasks=2), ["a", "b"])
    inherited = {
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
        "SLURM_CPU_BIND_LIST": "0x1",
        "SLURM_CPU_BIND_TYPE": "mask_cpu:",
    }
    ended, called = run_script(script, 'echo "bound: ${!SLURM_CPU_BIND@}" >> $NOTES', **inherited)
    assert ended == 0 and called[-1] == "bound: "


SIGNALLED = "echo $$ > $NOTES.step; sleep 0.3; kill -USR1 $PPID; for _ in {1..100}; do sleep 0.1; done"


@pytest.mark.parametrize(
    "srun, status, requeued",
    [
        ("exit 0", 0, False),
        ("exit 2", 2, False),  # a wrong option: a requeue would fail in the same way, for ever
        (SIGNALLED, 0, True),
        ("trap 'exit 0' TERM; " + SIGNALLED, 0, False),  # it finished just then
        ("trap 'exit 1' TERM; " + SIGNALLED, 0, True),
    ],
)
def test_a_task_is_requeued_only_if_its_time_ran_out(run_script, srun, status, requeued):
    ended, called = run_script(job_script(SlurmJob(tasks=2), ["a", "b"]), srun)
    assert (ended, "scontrol" in called) == (status, requeued)
    if requeued:  # this task alone: 7 would be the whole array
        assert called[-7:] == ["auto", "scancel", "--signal=TERM", "7_3", "scontrol", "requeue", "7_3"]


def test_a_task_is_not_requeued_for_ever(run_script):
    script = job_script(SlurmJob(tasks=2, max_requeues=5), ["a", "b"])
    ended, called = run_script(script, SIGNALLED, SLURM_RESTART_COUNT="5")
    assert ended == 1 and "scontrol" not in called


@pytest.mark.parametrize(
    "gpus, given, used",
    [(0, [], None), (1, [], None), (4, [], "cuda:0,cuda:1,cuda:2,cuda:3"), (4, ["--device=cuda"], None)],
)
def test_a_task_of_several_gpus_uses_them_all(gpus, given, used):
    command = job_script(SlurmJob(tasks=2, gpus=gpus), ["a", "b", *given]).split("srun --cpus")[1]
    assert (f"--device {used} " in command) if used else ("--device " not in command)


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
            "AuthType": "auth/munge", "CredType": "cred/munge",
            "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",  # so long a requeued job waits
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
        self._wait("munge.socket", (folder / "munge.socket").exists)
        self._run("slurmctld", "-D")
        self._wait("controller", lambda: self.ask("scontrol", "ping").stdout.count("UP"))
        self._run("slurmd", "-D", "-N", "here")
        self._wait("node", lambda: "idle" in self.ask("sinfo", "-h").stdout)

    def _run(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "w") as log:
            self.processes.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def _wait(self, what: str, ready) -> None:
        for _ in range(100):
            if ready():
                return
            time.sleep(0.2)
        logs = "\n".join(f"{log.name}: {log.read_text()[-500:]}" for log in self.folder.glob("*.out"))
        pytest.skip(f"SLURM's {what} did not start here: {logs}")

    def ask(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, cwd=self.folder, check=False
        )

    def run_to_its_end(self, script: str) -> None:
        (self.folder / "job.sh").write_text(script)
        submitted = self.ask("sbatch", "job.sh")
        assert submitted.returncode == 0, submitted.stderr
        for _ in range(600):
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


@pytest.fixture
def setup_line(tmp_path) -> str:
    """For `--setup`: puts a whisper-at-cli on the PATH that runs this package, and modules of the test beside it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "whisper-at-cli").write_text(f'#!/bin/sh\nexec {sys.executable} -m whisper_at_cli.cli "$@"\n')
    (tmp_path / "bin" / "whisper-at-cli").chmod(0o755)
    return f"export PATH={tmp_path}/bin:$PATH PYTHONPATH={tmp_path}:{os.environ.get('PYTHONPATH', '')}"


def printed_script(sounds, cache, setup_line, slurm_options, extract_options) -> str:
    command = [sys.executable, "-m", "whisper_at_cli.cli", "slurm", sounds, cache, "--gpus", "0", "--cpus", "1"]
    command += ["--memory-gb", "1", "--setup", setup_line, *slurm_options, "--", *extract_options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_an_array_of_three_tasks_fills_one_cache(cluster, sounds, tmp_path, setup_line, tiny_en):
    """A real controller, node and array; the script as the command `slurm` prints it."""
    cache, options = tmp_path / "array.zarr", ["--model", "tiny.en", "--clip-seconds", "1", "--shard-mb", "0.2"]
    cluster.run_to_its_end(printed_script(sounds, cache, setup_line, ["--tasks", "3"], options))
    logs = "\n".join(log.read_text() for log in cluster.folder.glob("*.log"))
    assert FeatureCache.open(cache).complete, logs
    slots = summarise(cache)["slots"]
    assert [slot["shard"] for slot in slots] == ["1/3", "2/3", "3/3"] and all(slot["done"] for slot in slots), logs
    program = [sys.executable, "-m", "whisper_at_cli.cli"]
    subprocess.run([*program, "--quiet", "extract", sounds, tmp_path / "one.zarr", *options], check=True)
    assert array_bytes(cache) == array_bytes(tmp_path / "one.zarr")


def test_a_task_that_fails_is_not_requeued(cluster, sounds, tmp_path, setup_line):
    options = ["--model", "tiny.en", "--dtype", "float7"]
    cluster.run_to_its_end(printed_script(sounds, tmp_path / "a.zarr", setup_line, ["--tasks", "1"], options))
    (log,) = (log.read_text() for log in cluster.folder.glob("*.log"))
    assert log.count("float7") == 1 and "requeueing" not in log, log


SLOW_BACKBONE = """
import os, time, torch
class Backbone:
    name, layers, dim, sample_rate, weights_sha256 = "slow", 1, 8, 16000, "none"
    precision, device = "float32", torch.device("cpu")
    def encode(self, waveforms):
        if "SLURM_RESTART_COUNT" not in os.environ and "SLURM_JOB_ID" in os.environ:
            time.sleep(12)  # the first start meets its time limit
        return waveforms.abs().mean(dim=1)[:, None, None, None].expand(-1, 1, 25, 8).contiguous()
def load(device=None, precision=None):
    return Backbone()
"""


@pytest.mark.slow
def test_a_task_at_its_time_limit_is_signalled_requeued_and_finishes(cluster, sounds, tmp_path, setup_line):
    """Two minutes: SLURM counts time limits in minutes, and looks at them every half minute."""
    (tmp_path / "slow_backbone.py").write_text(SLOW_BACKBONE)
    cache, options = tmp_path / "a.zarr", ["--model", "slow_backbone:load", "--clip-seconds", "1"]
    options += ["--batch-size", "1", "--shard-mb", "0.0004"]
    limits = ["--tasks", "1", "--time", "0:02:00", "--signal-seconds", "50"]
    cluster.run_to_its_end(printed_script(sounds, cache, setup_line, limits, options))
    (log,) = (log.read_text() for log in cluster.folder.glob("*.log"))
    (written, there), *more = re.findall(r"(\d+) clips written, (\d+) were there", log)
    assert log.count("the time limit is near: requeueing task") == 1 and not more and "TIME LIMIT" not in log, log
    assert int(there) and int(written) + int(there) == 12, log
    assert FeatureCache.open(cache).complete, log
    program = [sys.executable, "-m", "whisper_at_cli.cli", "--quiet", "extract", sounds, tmp_path / "one.zarr"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([*program, *options], env=environment, check=True)
    assert array_bytes(cache) == array_bytes(tmp_path / "one.zarr")
