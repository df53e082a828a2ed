"""The benchmarks' table is what their results say, and the programs still run."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
RESULTS = sorted((FOLDER / "results").glob("*.json"))


@pytest.fixture(scope="module", autouse=True)
def own_modules():
    """The programs import each other by bare names, as they do when run; those names are forgotten afterwards."""
    names = {path.stem for path in FOLDER.glob("*.py")}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield
    for name in names & set(sys.modules):
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


@pytest.fixture
def table(own_modules):
    import table

    return table


@pytest.fixture
def plan(own_modules):
    import run

    return run


def measured(path: Path) -> dict:
    return json.loads(path.read_text())


def copied(table, tmp_path: Path, **changes: dict) -> dict:
    """The results as they are read from a copy in which some files are others."""
    for path in (FOLDER / "results").iterdir():
        data = path.read_bytes()
        if path.name in changes:
            data = json.dumps(changes[path.name]).encode()
        (tmp_path / path.name).write_bytes(data)
    return table.read_results(tmp_path)


def test_the_table_in_the_readme_is_what_the_results_say(table):
    text = table.README.read_text()
    again = table.written(text, table.read_results(), json.loads(table.OPEN.read_text()))
    assert text == again, "run `make bench-table`"


def test_a_number_changed_by_hand_in_the_table_is_found(table):
    """Every line between the markers is the program's: whatever is changed there comes back."""
    text = table.README.read_text()
    results, still_open = table.read_results(), json.loads(table.OPEN.read_text())
    for block, ours in (("table", "clips/s"), ("paper", "assumed")):
        begin = text.index(f"<!-- {block}: begin")
        at = text.index(ours, begin)
        changed = text[:at] + "7" + text[at:]
        assert at < text.index(f"<!-- {block}: end") and table.written(changed, results, still_open) == text


def test_a_changed_result_changes_the_table(table, tmp_path):
    name = "cache-cpu.json"
    result = measured(FOLDER / "results" / name)
    result["rows"][0]["ratio"] = 12.345
    found = table.table(copied(table, tmp_path, **{name: result}), [])
    (line,) = [line for line in found.splitlines() if "**12.3**" in line]
    assert "ratio at least 20: **not reached**" in line and "of the limit at least 0.4: reached" in line


@pytest.mark.parametrize("path", [path for path in RESULTS if "rows" in measured(path)], ids=lambda path: path.stem)
def test_rows_are_made_from_what_was_measured(path):
    """The program that wrote a result makes the same rows of it again: no number of a row was written by hand."""
    result = measured(path)
    (program,) = [word for word in result["command"].split() if word.startswith("benchmarks/")]
    module = runpy.run_path(str(FOLDER.parent / program))
    rows = module["as20k_rows" if result["benchmark"] == "heads as20k" else "rows"]
    from record import row_to_json

    assert [row_to_json(row) for row in rows({**result, "rows": None})] == result["rows"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_has_a_row_with_what_a_reader_needs_or_a_reason(table, path):
    if path.name in table.NO_RATIO:
        assert len(table.NO_RATIO[path.name]) > 30 and "rows" not in measured(path)
        return
    result = measured(path)
    lines = [line for line in table.README.read_text().splitlines() if f"(results/{path.name})" in line]
    assert len(lines) == len(result["rows"]) + 1, "a line a row, and one for what made it"
    assert result["machine"]["processor"] and result["versions"] and len(result["date"]) == 10
    for row in result["rows"]:
        assert row["group"] in table.GROUPS and row["what"]
        assert "baseline" in row or "limit" in row or row.get("asked"), f"nothing stands beside {row['what']}"
        assert ("ratio" in row) <= ("baseline" in row) and ("share" in row) <= ("limit" in row)


def test_a_result_without_rows_is_refused(table, tmp_path):
    with pytest.raises(ValueError, match="metrics-cpu.json holds no rows"):
        copied(table, tmp_path, **{"metrics-cpu.json": {"benchmark": "metrics"}})


def test_an_open_figure_stands_in_the_table_until_its_result_comes(table):
    results, still_open = table.read_results(), json.loads(table.OPEN.read_text())
    assert still_open and all(entry["why"] in table.README.read_text() for entry in still_open)
    entry = still_open[0]
    assert entry["command"] in table.table(results, still_open)
    come = {**results, entry["result"]: next(iter(results.values()))}
    assert entry["command"] not in table.table(come, still_open)


def test_commands_of_open_figures_are_understood(plan):
    """Every program that is named for an open figure knows the options it is given."""
    for entry in json.loads((FOLDER / "open.json").read_text()):
        python, program, *words = entry["command"].split()
        assert python == "python" and (FOLDER.parent / program).is_file()
        known = (FOLDER.parent / program).read_text() + (FOLDER / "record.py").read_text()
        for word in words:
            if word.startswith("--"):
                name = word.removeprefix("--")
                assert f'"{word}"' in known or f"{name.replace('-', '_')}=" in known, f"{program} has no {word}"
        assert words[words.index("--out") + 1] == f"benchmarks/results/{entry['result']}"


@pytest.mark.parametrize(
    "value, text", [(0, "0"), (3477, "3,477"), (0.633, "0.633"), (1.0, "1"), (26.15, "26.1"), (1.44e-6, "1.4e-6")]
)
def test_numbers_are_short(value, text):
    from record import number

    assert number(value) == text


def test_markers_that_are_not_there_once_are_refused(table):
    with pytest.raises(ValueError, match="once each"):
        table.between("no markers", "table", "block")


def test_the_plan_makes_every_result_that_two_cores_can(plan):
    made = {f"{step.name}.json" for step in plan.PLAN if not step.makes} | {f"{name}.json" for name in plan.HOURS}
    kept = {path.name for path in RESULTS if "rows" in measured(path)}
    assert made == {name for name in kept if "gpu" not in name}
    assert sum(step.minutes for step in plan.PLAN) < 45, "as benchmarks/README.md says"


@pytest.mark.parametrize("name", ["cache-cpu", "cache-chunk-shapes", "metrics-cpu", "rows-cpu"])
def test_a_program_runs_and_its_result_makes_a_table(plan, table, tmp_path, name):
    """As `make bench` runs it, but tiny."""
    (step,) = [step for step in plan.PLAN if step.name == name]
    words = plan.command(step, out=tmp_path, data=None, work=tmp_path, quick=True)
    assert plan.run(step, words, tmp_path / "log.txt"), (tmp_path / "log.txt").read_text()
    result = measured(tmp_path / f"{name}.json")
    lines = table.table({f"{name}.json": result}, []).splitlines()
    assert sum(f"(results/{name}.json)" in line for line in lines) == len(result["rows"]) + 1
    assert f"python benchmarks/{Path(words[1]).name}" in result["command"] and str(tmp_path) not in result["command"]


@pytest.mark.slow
def test_every_program_of_the_plan_runs(shared):
    """`run.py --quick`: the whole plan, tiny, in a temporary folder."""
    words = [sys.executable, str(FOLDER / "run.py"), "--quick", "--data", str(shared / "data")]
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_program_that_fails_is_named_with_its_status(plan, tmp_path, capsys):
    step = plan.Step("none", "table.py --no-such-option", "", 0)
    words = plan.command(step, out=tmp_path, data=None, work=tmp_path, quick=False)
    assert not plan.run(step, words, tmp_path / "log.txt")
    assert "FAILED with status 2: none" in capsys.readouterr().out


@pytest.mark.slow
def test_one_command_makes_the_table_of_esc10(shared, tmp_path, tiny_en):
    """Random weights and log-mel statistics lie below every trained layer; the heads are left out here."""
    words = [sys.executable, str(FOLDER / "esc10_table.py"), str(shared / "data" / "esc10"), "--model", str(tiny_en)]
    done = subprocess.run([*words, "--heads", "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    names = [row["name"] for row in table["systems"]]
    assert names == [
        *(f"{of}:layer-{n}" for of in ("layers", "random") for n in (1, 2, 3, 4)),
        "log-mel:layer-1",
        "chance",
    ]
    below = [pair for pair in table["pairs"] if pair["a"].startswith("layers") and not pair["b"].startswith("layers")]
    assert len(below) == 24 and all(pair["difference"] > 0 and pair["p_adjusted"] < 0.001 for pair in below)
    assert "All models" in (tmp_path / "report.html").read_text() and done.stdout.startswith("| model |")
