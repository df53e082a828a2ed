"""Which tests reach which lines of the cache and the metrics, recorded with coverage.py while they all pass."""

from __future__ import annotations

import ast
import os
import pickle
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import coverage
import numpy as np
import pytest
from operators import Mutant
from processes import in_child

LONGEST = 4.0  # seconds of a test
BUDGET = 25.0  # seconds of tests for one fault
RECORDING = 1800  # seconds that all tests may take
Uses = dict[str, set[tuple[str, int]]]  # name -> files and lines


@dataclass
class Recorded:
    """What the tests do without a fault. What a line that runs on import reaches is under the test "".

    seconds  of the processor, by test, in the order in which the groups of test files are asked
    elapsed  the same on the clock
    reach    the tests that come by each line, by file
    failed   tests that fail, which are left out
    """

    seconds: dict[str, float] = field(default_factory=dict)
    elapsed: dict[str, float] = field(default_factory=dict)
    reach: dict[str, dict[int, set[str]]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def of(self, mutant: Mutant, uses: Uses, suites: list[str]) -> list[str]:
        """The tests that can notice a fault: of the first suite first, and of each the quickest first."""
        here = self.reach.get(mutant.file, {})
        found = set().union(*(self.reach.get(file, {}).get(line, ()) for file, line in uses.get(mutant.name, ())))
        found = found or set().union(*(here.get(line, ()) for line in mutant.lines))
        if found <= {""}:  # it runs on import alone: whoever comes by the file may notice, else all
            found = found and (set().union(*here.values()) - {""} or self.seconds.keys() - set(self.failed))
        chosen, spent = [], 0.0
        place = {test: next(at for at, suite in enumerate(suites) if _is_of(test, suite)) for test in found - {""}}
        for test in sorted(place, key=lambda test: (place[test], self.seconds[test], test)):
            spent += self.seconds[test]
            if self.seconds[test] <= LONGEST and (spent <= BUDGET or not chosen):
                chosen.append(test)
        return chosen


def _clocks() -> np.ndarray:
    return np.array([time.monotonic(), time.process_time()])


def _is_of(test: str, suite: str) -> bool:
    return fnmatch(test.partition("::")[0].removeprefix("tests/"), suite)


class _Recorder:
    """A pytest plugin that fills a Recorded.

    What several tests share is made by the first of them, and by each that runs alone: its time counts for all.
    """

    def __init__(self, tracer: coverage.Coverage):
        self.tracer, self.found, self.skipped = tracer, Recorded(), set()
        self.shared: dict[str, np.ndarray] = {}  # fixture -> seconds on the clock and of the processor
        self.alone: dict[str, np.ndarray] = {}  # test -> the same, without what is shared
        self.uses: dict[str, tuple[str, ...]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        before = _clocks()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                self.shared[fixturedef.argname] = self.shared.get(fixturedef.argname, 0) + _clocks() - before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.tracer.switch_context(item.nodeid)
        before, shared = _clocks(), sum(self.shared.values())
        try:
            return (yield)
        finally:
            self.alone[item.nodeid] = _clocks() - before - (sum(self.shared.values()) - shared)
            self.uses[item.nodeid] = tuple(item.fixturenames)
            self.tracer.switch_context("")

    def pytest_sessionfinish(self):
        for test, alone in self.alone.items():
            both = alone + sum(self.shared.get(name, 0) for name in self.uses[test])
            self.found.elapsed[test], self.found.seconds[test] = both.tolist()

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.found.failed.append(report.nodeid)
        if report.skipped:
            self.skipped.add(report.nodeid)


class Chosen:
    """A pytest plugin that runs these tests alone, in this order, and writes down which was the first to fail."""

    def __init__(self, tests: list[str], noticed: Path):
        self.place, self.noticed = {test: at for at, test in enumerate(tests)}, noticed

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((item for item in items if item.nodeid in self.place), key=lambda i: self.place[i.nodeid])

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.noticed.write_text(report.nodeid)


def run_tests(tree: Path, files: list[str], plugin, *options: str) -> int:
    """The project's tests, for a process of their own: all of these files, or what a plugin chooses of them."""
    os.chdir(tree)
    sys.path.insert(0, str(tree.parent))
    os.environ |= {"PYTHONPATH": str(tree.parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    base = f"--basetemp={tree.parent / 'tests'}"
    return pytest.main(["-q", "--tb=line", "-p", "no:cacheprovider", base, *options, *files], plugins=[plugin])


def record(tree: Path, targets: list[str], files: list[str]) -> Recorded:
    """Run the tests once as they are. Those that fail here are left out and named; those that skip are left out."""
    out, log = tree.parent / "recorded", tree.parent / "record.log"

    def work() -> int:
        sys.dont_write_bytecode = False  # what is compiled here need not be for each fault
        tracer = coverage.Coverage(data_file=None, config_file=False, include=[str(tree / name) for name in targets])
        tracer.set_option("run:core", "ctrace")  # the one that knows which test is running
        tracer.start()
        recorder = _Recorder(tracer)
        run_tests(tree, files, recorder)
        tracer.stop()
        found = recorder.found
        unfit = {*found.failed, *recorder.skipped}
        for name in targets:
            lines = tracer.get_data().contexts_by_lineno(str(tree / name))
            found.reach[name] = {line: set(tests) - unfit for line, tests in lines.items()}
        out.write_bytes(pickle.dumps(found))
        return 0

    if in_child(work, RECORDING, log) != 0:
        raise SystemExit(f"the tests could not be recorded:\n{log.read_text(errors='replace')[-3000:]}")
    return pickle.loads(out.read_bytes())


def uses_of_names(tree: Path, targets: list[str]) -> Uses:
    """Where each name is read, within the functions of these files."""
    uses = defaultdict(set)
    for name in targets:
        for function in ast.walk(ast.parse((tree / name).read_text())):
            for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
                if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
                    uses[getattr(node, "id", getattr(node, "attr", ""))].add((name, node.lineno))
    return uses
