"""Do the tests notice? Mutation testing of the feature cache and of the metrics: `make mutate`.

Faults are put into a temporary copy of the project, one at a time (operators.py says which), and the tests that reach
the faulty line are run, quickest first, until one fails: then the fault is noticed, or `killed`. A fault that makes the
program hang counts as killed as well. Which tests reach which line is recorded first (tests_reached.py). Each fault has
a process of its own, forked from this one, which has imported torch and the other libraries but nothing of the project.

A test that takes longer than LONGEST seconds is left out, and the tests of one fault stop after BUDGET seconds: both
can only lower the score, which is killed / (all faults but those that equivalent.py lists with a reason).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path

import coverage
import numpy
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from equivalent import EQUIVALENT
from operators import Mutant, mutants
from processes import in_child
from tests_reached import BUDGET, LONGEST, Chosen, record, run_tests, uses_of_names

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {  # what is mutated, and the tests that are asked, in this order
    "cache": (
        ["extract/cache/*.py"],
        ["test_cache*.py", "test_exchange*.py", "test_stream.py", "test_folds.py", "test_properties*cache*.py",
         "test_fuzz*.py", "test_heads_batches.py", "test_bucket.py"],
    ),
    "metrics": (
        ["extract/evaluation/metrics.py", "heads/tagging/events.py", "probe/scores.py", "probe/robustness/wer.py"],
        ["test_evaluation_metrics.py", "test_probe_scores.py", "test_robustness_wer.py", "test_tagging_events.py",
         "test_properties*metrics*.py"],
    ),
}  # fmt: skip
LIBRARIES = (
    "zarr zarr.codecs zarr.storage numcodecs google_crc32c h5py click sklearn.metrics sklearn.linear_model scipy.stats "
    "scipy.signal jiwer whisper.normalizers av rich safetensors obstore obstore.store hypothesis"
).split()
PATIENCE, GRACE = 4, 20.0  # a fault may take so many times the tests' usual time, and so many seconds
KILLED = ("killed", "timed out")


def copied(folder: Path) -> Path:
    """The project's files as they are now, under the package's name, with the reference data beside them."""
    tree = folder / "whisper_at_cli"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    if (ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to((ROOT.parent / "shared").resolve())
    return tree


def outcome(tree: Path, mutant: Mutant, tests: list[str], seconds: float) -> tuple[str, str]:
    """`killed`, `timed out` (killed, too), `survived`, or `not reached` where no test comes by; and who noticed."""
    if not tests:
        return "not reached", ""
    path, files = tree / mutant.file, sorted({test.partition("::")[0] for test in tests})
    whole, noticed = path.read_text(), tree.parent / "noticed"
    noticed.unlink(missing_ok=True)

    def work() -> int:
        sys.dont_write_bytecode = True
        return run_tests(tree, files, Chosen(tests, noticed), "-x")

    path.write_text(mutant.source())
    try:
        status = in_child(work, PATIENCE * seconds + GRACE, tree.parent / "mutant.log")
    finally:
        path.write_text(whole)
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise SystemExit(f"no test was found again for {mutant.file}: {mutant.change}")
    result = "timed out" if status is None else "killed" if status else "survived"
    return result, noticed.read_text() if noticed.exists() else ""


def reason_of(mutant: Mutant) -> str:
    """Why a mutant is no fault, or nothing."""
    for file, function, change, reason in EQUIVALENT:
        if (mutant.file, mutant.function) == (file, function) and change in mutant.change:
            return reason
    return ""


def score(counts: Counter) -> dict:
    """Killed of all that are faults, with the 95 % interval (Wilson's) that a sample of them leaves."""
    killed, valid = sum(counts[name] for name in KILLED), sum(counts.values()) - counts["equivalent"]
    said = {"mutants": sum(counts.values())}
    said |= {name: counts[name] for name in (*KILLED, "survived", "not reached", "equivalent")}
    if valid:
        share, z = killed / valid, 1.96
        middle, half = share + z * z / (2 * valid), z * math.sqrt(share * (1 - share) / valid + z * z / (4 * valid**2))
        ends = [round((middle + sign * half) / (1 + z * z / valid), 3) for sign in (-1, 1)]
        said |= {"score": round(share, 4), "interval": ends}
    return said


def drawn(every: list[Mutant], options) -> list[Mutant]:
    """The mutants that are tried: all in an order that the seed decides, a sample, or what survived before."""
    random.Random(options.seed).shuffle(every)
    if not options.again:
        return every[: options.sample]
    known = json.loads(options.again.read_text())["groups"].values()
    wanted = {(m["file"], m["function"], m["change"]) for group in known for m in group["survivors"]}
    return [mutant for mutant in every if (mutant.file, mutant.function, mutant.change) in wanted]


def try_group(tree: Path, sources: list[str], suites: list[str], options) -> dict:
    """The score of a group of files, and of each of them."""
    targets = sorted(path.relative_to(tree).as_posix() for pattern in sources for path in tree.glob(pattern))
    suites = options.tests or suites
    files = sorted({f"tests/{path.name}" for pattern in suites for path in (tree / "tests").glob(pattern)})
    every = [mutant for name in targets for mutant in mutants(name, (tree / name).read_text())]
    every = [mutant for mutant in every if fnmatch(mutant.file, options.files)]
    tried, started = drawn(every, options), time.monotonic()
    recorded, uses = record(tree, targets, files), uses_of_names(tree, targets)
    print(f"{len(recorded.seconds)} tests; these fail: {recorded.failed}; {len(tried)} mutants", flush=True)
    counts, left, excluded = defaultdict(Counter), [], []
    for at, mutant in enumerate(tried, 1):
        said = {"file": mutant.file, "function": mutant.function, "change": mutant.change}
        tests = recorded.of(mutant, uses, suites)
        result, by = outcome(tree, mutant, tests, sum(recorded.elapsed[test] for test in tests))
        if result not in KILLED and (reason := reason_of(mutant)):
            result = "equivalent"
            excluded.append({**said, "reason": reason})
        elif result not in KILLED:
            left.append(said)
        counts[mutant.file][result] += 1
        print(at, result, f"[{len(tests)}]", mutant.file, mutant.function, mutant.change, f"<{by}>", flush=True)
    return {
        "date": datetime.now(UTC).date().isoformat(), "seed": options.seed, "sample": options.sample,
        "tests": len(recorded.seconds), "tests_failed_without_a_fault": recorded.failed, "mutants_in_all": len(every),
        "minutes": round((time.monotonic() - started) / 60, 1),
        **score(sum(counts.values(), Counter())), "files": {name: score(counts[name]) for name in sorted(counts)},
        "survivors": sorted(left, key=lambda m: (m["file"], m["function"], m["change"])),
        "excluded": sorted(excluded, key=lambda m: (m["file"], m["function"], m["change"])),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=list(GROUPS), help="cache, metrics, or both")
    parser.add_argument("--sample", type=int, help="mutants of each group, drawn at random; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", default="*", help="pattern of the files to mutate")
    parser.add_argument("--tests", action="append", help="pattern of test files to run instead of the group's")
    parser.add_argument("--again", type=Path, help="only what survived by this result")
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON; groups that are not tried now stay")
    options = parser.parse_args()
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):  # an extra that is not installed
            importlib.import_module(name)
    gc.freeze()  # so that a forked process copies less
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        tree = copied(Path(folder).resolve())
        groups = {name: try_group(tree, *GROUPS[name], options) for name in options.groups}
        sys.path[:0] = [folder, str(tree / "benchmarks")]
        from record import machine, publish

        versions = {module.__name__: module.__version__ for module in (coverage, pytest, numpy, torch)}
        others = json.loads(options.out.read_text())["groups"] if options.out and options.out.exists() else {}
        publish({
            "benchmark": "mutation", "date": datetime.now(UTC).date().isoformat(), "machine": machine(),
            "versions": {"python": sys.version.split()[0], **versions},
            "settings": {"longest_test_seconds": LONGEST, "tests_seconds_per_mutant": BUDGET},
            "groups": others | groups,
        }, options.out)  # fmt: skip


if __name__ == "__main__":
    main()
