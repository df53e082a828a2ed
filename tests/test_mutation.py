"""Mutation testing itself: which faults are made, what is left alone, and that each is one change."""

import ast
import difflib
from pathlib import Path

import pytest
from mutation.equivalent import EQUIVALENT
from mutation.operators import mutants

ROOT = Path(__file__).resolve().parents[1]


def changes(source: str) -> list[str]:
    return [mutant.change.partition(" in: ")[0] for mutant in mutants("a.py", source)]


@pytest.mark.parametrize(
    "source, expected",
    [
        ("y = a < b", ["a < b -> a <= b", "a < b -> a >= b"]),
        ("y = a + b * c", ["a + b * c -> a - b * c", "b * c -> b / c"]),
        ("y = a and not b", ["a and (not b) -> a or not b", "not b -> b"]),
        ("y = (7, 1.5, True, 'x', b'z', None)",
         ["7 -> 8", "7 -> 6", "1.5 -> 2.5", "1.5 -> 0.5", "True -> False", "'x' -> 'xx'", "b'z' -> b'zx'"]),
        ("y = max(all(a), b.argmin())", ["max -> min", "all -> any", "b.argmin -> b.argmax"]),
        ("if ready: go()", ["ready -> not ready", "go() -> pass"]),
        ("y = [a for a in b if a]", ["a -> not a"]),
        ("def f():\n return a", ["return a -> return None"]),
        ("def f():\n return", ["return -> pass"]),
        ("def f(a=2): pass", ["2 -> 3", "2 -> 1"]),
        ("x.y = z", ["x.y = z -> pass"]), ("x = z", []), ("x += z", ["x += z -> pass", "x += z -> x -= z"]),
        ("for a in b:\n break", ["break -> continue"]),
        ("raise ValueError('a', 1 + 1)", ["raise ValueError('a', 1 + 1) -> pass"]),
        ("y = folder / 'name' / file", ["'name' -> 'namex'"]), ("y = f'{a}/c'", ["'/c' -> '/cx'"]),
    ],
)  # fmt: skip
def test_these_faults_are_made(source, expected):
    assert changes(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""What it is."""', "y: 'int' = x", "import a", "y = f'{a} is not what was asked for'",
        "y = StoreError(1, 'a')", "y = Damage(-1, (), 'a')", "y = zip(a, b, strict=True)",
        "class A:\n def __repr__(self):\n  return 'a'", "if TYPE_CHECKING:\n x.y = 1",
        "@cache(maxsize=4)\ndef f(): pass",
    ],
)  # fmt: skip
def test_these_are_left_alone(source):
    assert changes(source) == []


def test_each_mutant_is_one_change_of_the_line_that_it_names():
    file = "extract/cache/shards.py"
    source = (ROOT / file).read_text()
    plain = ast.unparse(ast.parse(source)).splitlines()
    found = mutants(file, source)
    assert len(found) > 100 and len({(mutant.function, mutant.change) for mutant in found}) == len(found)
    for mutant in found:
        diff = difflib.ndiff(plain, mutant.source().splitlines())
        gone = [line for line in diff if line.startswith("- ")]
        assert len(gone) == 1, mutant.change
        compile(mutant.source(), file, "exec")


def test_what_a_fault_can_reach_is_its_line_its_functions_body_its_class_or_where_its_name_is_read():
    source = (
        "N = 1\nclass A:\n    a = 2\n    def f(self, b=3):\n        c = 4\n        return (c +\n                5)\n"
    )
    reach = {mutant.change[:6]: (mutant.function, mutant.lines, mutant.name) for mutant in mutants("a.py", source)}
    assert reach["1 -> 2"] == ("<module>", range(1, 8), "N") and reach["2 -> 3"] == ("A", range(2, 8), "")
    assert reach["3 -> 4"] == ("A.f", range(5, 8), "") and reach["4 -> 5"] == ("A.f", range(5, 6), "")
    assert reach["5 -> 6"] == ("A.f", range(6, 8), "")


def test_every_mutant_that_is_listed_as_none_is_one_of_the_program():
    for file, function, change, reason in EQUIVALENT:
        found = [mutant for mutant in mutants(file, (ROOT / file).read_text()) if mutant.function == function]
        assert any(change in mutant.change for mutant in found), f"{file}: {function}: {change}"
        assert len(reason) > 20
