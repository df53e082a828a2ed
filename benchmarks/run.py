"""Run every benchmark that two cores can do in half an hour, one after another, and write the table.

    python benchmarks/run.py --data ../shared/data
    python benchmarks/run.py --only cache-cpu --only heads-cpu
    python benchmarks/run.py --quick            # tiny sizes, into a temporary folder: do the programs still work?

The plan is printed first. Each program is a process of its own, so that none finds the memory or the threads of
another, and the machine should be idle: what else it does slows every part. `--data` has the folders `esc10`, in
ESC-50's layout, and `speech14`, with a manifest.csv; without it, what needs them is left out, and named. A program that
fails is named at the end, its old result stays, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CACHE, HEAD = "{work}/esc10.zarr", "{work}/head"
ESC10, SPEECH = "{data}/esc10", "{data}/speech14"
TRANSCRIBE = f"transcribe.py --speech {SPEECH} --sounds {ESC10} --checkpoint {HEAD}"


@dataclass(frozen=True)
class Step:
    """One process. `{data}` and `{work}` in its words are the data and a temporary folder."""

    name: str  # of its result, without .json; of a preparation, what it makes
    words: str  # program and arguments
    quick: str  # arguments that make it small
    minutes: float  # on two idle cores
    threads: int | None = None  # OMP_NUM_THREADS
    makes: str | None = None  # a preparation: what later steps need

    @property
    def needs_data(self) -> bool:
        return "{data}" in self.words or "{work}" in self.words


HOURS = ("scenes-tiny.en-cpu",)  # results that take so long, and are made by the command that they name

SYNTHETIC = "extract.py --random-weights base --clips 256 --clip-seconds 5 --rounds 3"
TINY = "--random-weights tiny --clips 4 --baseline-clips 2 --clip-seconds 1 --rounds 1 --matrix-seconds 0.05"
SMALL_CACHE = "--clips 16 --layers 4 --channels 64 --batch 4 --rounds 1 --repeats 1"
PLAN = (
    Step("the cache of ESC-10", f"-m whisper_at_cli.cli extract {ESC10} {CACHE} --model tiny.en", "", 0.3, makes=CACHE),
    Step(
        "a head", f"-m whisper_at_cli.cli train-head {CACHE} --head tl-tr --dim 128 --out {HEAD}",
        "--epochs 1 --average-from-epoch none", 1.5, makes=HEAD,
    ),
    Step(
        "extract-tiny.en-esc10-cpu", f"extract.py --model tiny.en --dataset {ESC10} --clips 400",
        "--clips 4 --baseline-clips 2 --rounds 1 --matrix-seconds 0.05", 0.7,
    ),
    Step("extract-base-float32-cpu", SYNTHETIC, TINY, 1.3),
    Step("extract-base-bfloat16-cpu", f"{SYNTHETIC} --precision bfloat16", TINY, 1.0),
    Step(
        "extract-large-v1-bfloat16-cpu",
        "extract.py --random-weights large-v1 --precision bfloat16 --clips 24 --baseline-clips 6 --rounds 1", TINY, 2.3,
    ),
    Step("host-cpu", "host.py", "--clips 128 --decoded 64 --rounds 1 --files wav", 5.5),
    Step("fidelity-tiny.en-esc10", f"fidelity.py --model tiny.en --dataset {ESC10}", "--clips 20 --error-clips 2", 0.8),
    Step("cache-cpu", "cache.py", f"{SMALL_CACHE} --shard-mb 0.05 --few-shards 2 --many-shards 4", 1.0),
    Step("cache-chunk-shapes", "chunks.py", f"{SMALL_CACHE} --per-shard 8", 0.5),
    Step("memory-base-cpu", "memory.py", "--random-weights tiny --clips 2 4", 1.7),
    Step(
        "engines-cpu", "engines.py --clips 300 --rounds 2 --figure {out}/engines-simulation.png",
        "--random-weights tiny --clips 4 --clip-seconds 1 --shard-mb 0.1 --rounds 1 --shards 300", 4.0,
    ),
    Step(
        "heads-cpu", "heads.py",
        "--clips 8 --layers 2 --channels 64 --classes 4 --dim 16 --batch 4 --rounds 1 --npz-clips 4", 1.2,
    ),
    Step(
        "nested-esc10-tiny.en-cpu",
        f"nested.py --cache {CACHE} --head concat-linear --head concat-linear-stats --head last-mlp --head wa-mlp",
        "--seeds 1 --epochs 1", 0.6,
    ),
    Step("probe-esc10-tiny.en-cpu", f"probe.py --cache {CACHE}", "--one-blas-thread --rounds 1", 0.6),
    Step("probe-large-cpu", "probe.py --large", "--clips 200 --rounds 1", 0.9),
    Step("rows-cpu", "rows.py", "--rows 2000", 1.6),
    Step("metrics-cpu", "metrics.py", "--clips 300 --classes 8", 0.5, threads=1),
    Step(
        "evaluation-cpu", "evaluation.py", "--layers 2 --clips 60 --classes 3 --rounds 1 --baseline-layers 1", 0.7,
        threads=1,
    ),
    Step(
        "transcribe-time-tiny.en", f"{TRANSCRIBE} --parts time --cases greedy fallback",
        "--repeats 1 --cases greedy --seconds 70", 2.2, threads=1,
    ),
    Step("transcribe-tags-tiny.en", f"{TRANSCRIBE} --parts events windows", "--parts events --seconds 70", 2.5),
    Step(  # F1 depends on the training, so there are two
        "transcribe-tags-second-tiny.en",
        f"transcribe.py --speech {SPEECH} --sounds {ESC10} --cache {CACHE} --head tl-tr --dim 128 --train-seed 1 "
        "--parts events", f"--checkpoint {HEAD} --seconds 70", 3.0,
    ),
)  # fmt: skip


def arguments(step: Step, quick: bool) -> str:
    """A step's words, and those that make it small; a later option counts more than an earlier one."""
    return f"{step.words} {step.quick}" if quick else step.words


def command(step: Step, *, out: Path, data: Path | None, work: Path, quick: bool) -> list[str]:
    """What is run for a step, as a list of words."""
    filled = arguments(step, quick).format(data=data, work=work, out=out).split()
    if step.makes:
        return [sys.executable, *filled]
    return [sys.executable, str(FOLDER / filled[0]), *filled[1:], "--out", str(out / f"{step.name}.json")]


def run(step: Step, words: list[str], log: Path) -> bool:
    """Whether it went well; what it prints goes to the log, and its end to the terminal if not."""
    threads = {"OMP_NUM_THREADS": str(step.threads)} if step.threads else {}
    started = time.perf_counter()
    with open(log, "w") as file:
        status = subprocess.run(
            words, check=False, stdout=file, stderr=subprocess.STDOUT, env=os.environ | threads
        ).returncode
    took = time.perf_counter() - started
    print(f"{took:7.1f} s  {'done' if status == 0 else f'FAILED with status {status}'}: {step.name}", flush=True)
    if status:
        print("\n".join(f"    {line}" for line in log.read_text().splitlines()[-15:]), flush=True)
    return status == 0


def chosen_steps(options: argparse.Namespace) -> list[Step]:
    """The steps to be run, in their order: those asked for that the data allow, and what makes what they need."""
    steps = [step for step in PLAN if not step.makes and (not options.only or step.name in options.only)]
    missing = [step for step in steps if step.needs_data and options.data is None]
    for step in missing:
        print(f"left out, since it needs --data: {step.name}")
    steps = [step for step in steps if step not in missing]
    for made in reversed([step for step in PLAN if step.makes]):
        if any(made.makes and made.makes in arguments(step, options.quick) for step in steps):
            steps.insert(0, made)
    return steps


def show(steps: list[Step], quick: bool) -> None:
    """The plan, with what it should take."""
    for number, step in enumerate(steps, 1):
        threads = f"OMP_NUM_THREADS={step.threads} " if step.threads else ""
        words = arguments(step, quick).format(data="DATA", work="WORK", out="OUT")
        print(f"{number:3}. {step.minutes:4.1f} min  {step.name}: {threads}{words}")
    if not quick:
        print(f"     {sum(step.minutes for step in steps):4.1f} min in all, on two idle cores", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of esc10 and speech14")
    names = [step.name for step in PLAN if not step.makes]
    parser.add_argument("--only", action="append", choices=names, metavar="RESULT", help="repeatable")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, into a temporary folder; no table")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    options = parser.parse_args()
    if options.data is not None:
        if not (options.data / "esc10").is_dir():
            parser.error(f"there is no folder esc10 in {options.data}; give another --data, or leave it out")
        options.data = options.data.resolve()
    steps = chosen_steps(options)
    show(steps, options.quick)
    if options.plan:
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        out = work / "results"
        out.mkdir()
        failed = []
        for step in steps:
            words = command(step, out=out, data=options.data, work=work, quick=options.quick)
            if not run(step, words, work / "log.txt"):
                failed.append(step.name)
            elif not options.quick:
                for path in out.iterdir():  # a result replaces the older one when it is whole
                    shutil.move(path, FOLDER / "results" / path.name)
    if not options.quick:
        subprocess.run([sys.executable, str(FOLDER / "table.py")], check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
