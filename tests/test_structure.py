"""The shape of the code: small functions and files, imports one way, no except that takes everything.

A function or a file that is longer for a good reason says so: `# long: why` in a function's first lines (from its
decorators to the first statement after its docstring), or on a line of its own in a file.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FUNCTION_LINES, FILE_LINES = 60, 500
SHIPPED = ["*.py", "extract/**/*.py", "heads/**/*.py", "probe/**/*.py"]
ALL = [*SHIPPED, "benchmarks/*.py", "tests/*.py"]
EXCUSE = re.compile(r"# long: \S+ \S+")  # two words at least
MAY_IMPORT = {"extract": {"extract"}, "heads": {"extract", "heads"}, "probe": {"extract", "probe"}}


def files(patterns: list[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in ROOT.glob(pattern)})


def parsed(path: Path) -> tuple[list[str], ast.Module]:
    text = path.read_text()
    return text.splitlines(), ast.parse(text)


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def head(function: ast.FunctionDef | ast.AsyncFunctionDef) -> range:
    """Lines (from 1) of what stands before a function's work: decorators, signature, docstring."""
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    body = function.body[1:] if ast.get_docstring(function) is not None and function.body[1:] else function.body
    return range(first, body[0].lineno + 1)


def too_long(lines: list[str], tree: ast.Module) -> list[str]:
    """Functions over the limit without an excuse; a decorator's lines are not the function's."""
    found = []
    for function in functions(tree):
        length = function.end_lineno - function.lineno + 1
        if length > FUNCTION_LINES and not any(EXCUSE.search(lines[number - 1]) for number in head(function)):
            found.append(f"line {function.lineno}: {function.name} has {length} lines")
    return found


def bare_excepts(tree: ast.Module) -> list[int]:
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type is None]


def rooms_imported(tree: ast.Module) -> set[str]:
    """The rooms of this package that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    parts = [name.split(".") for name in names if name.startswith("whisper_at_cli.")]
    return {part[1] for part in parts if part[1] in (*MAY_IMPORT, "cli")}


@pytest.mark.parametrize("path", files(ALL), ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_and_files_are_short_or_say_why_not(path):
    lines, tree = parsed(path)
    assert not too_long(lines, tree), f"split them, or give a reason: # long: why (over {FUNCTION_LINES} lines)"
    excused = any(EXCUSE.match(line) for line in lines)
    assert len(lines) <= FILE_LINES or excused, f"{len(lines)} lines: split it, or give a reason: # long: why"


def test_no_except_takes_everything():
    found = {path.relative_to(ROOT): lines for path in files(ALL) if (lines := bare_excepts(parsed(path)[1]))}
    assert not found


def test_imports_go_one_way():
    """cli -> heads, probe -> extract."""
    for room, allowed in MAY_IMPORT.items():
        for path in files([f"{room}/**/*.py"]):
            against = rooms_imported(parsed(path)[1]) - allowed
            assert not against, f"{path.relative_to(ROOT)} imports {', '.join(sorted(against))}"


def test_what_would_be_wrong_is_found():
    """The checks above see what they are for."""
    body = "\n".join("    x = 1" for _ in range(FUNCTION_LINES))
    long, excused = f"def f():\n{body}\n", f"def f():\n    # long: a table of cases\n{body}\n"
    documented = f'def f(\n    a,\n):\n    """Does it.\n\n    # long: a table of cases\n    """\n{body}\n'
    late = f"def f():\n{body}\n    # long: too late to be seen\n    x = 2\n"
    assert [bool(too_long(text.splitlines(), ast.parse(text))) for text in (long, excused, documented, late)] == [
        True, False, False, True,
    ]  # fmt: skip
    assert bare_excepts(ast.parse("try:\n    pass\nexcept:\n    pass\n")) == [3]
    sources = (
        "from whisper_at_cli import heads",
        "import whisper_at_cli.probe.job",
        "def f():\n    from whisper_at_cli.cli import x",
    )
    assert [rooms_imported(ast.parse(source)) for source in sources] == [{"heads"}, {"probe"}, {"cli"}]
