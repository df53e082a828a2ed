"""Mutants of a Python file: each is the file with one small fault, of the kinds that people make.

What is changed: comparisons, arithmetic, `and`/`or`, `not`, conditions, numbers (one more, one less), flags, texts that
decide something, returned values, min/max and any/all; what is left out: a raise, a call whose result is not used, a
return, a change of something that lives on, `continue` for `break`.

What is left alone, by rule: the words of an error (all within a `raise`, an error or a `Damage`; that it is raised is
not left alone) and other texts of four words and more; docstrings, annotations, decorators (`frozen`, `maxsize`),
imports, `__repr__` and `TYPE_CHECKING`; `strict=` of zip, an assertion; and the operator in `folder / name`, which no
other can replace.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

COMPARED = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
CALCULATED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
}  # fmt: skip
OPPOSITE = {"min": "max", "max": "min", "any": "all", "all": "any", "argmin": "argmax", "argmax": "argmin"}
MESSAGE_WORDS = 4  # a text of so many words is read by people alone


@dataclass(frozen=True, eq=False)
class Mutant:
    """One fault. `function` is where it lies, dotted; `change` says what it is; `lines` are those it can change."""

    file: str
    function: str
    change: str
    lines: range
    name: str  # of the module's constant that it changes, or empty
    site: tuple  # what is replaced: a node, its field and the place in it
    new: object
    tree: ast.Module

    def source(self) -> str:
        old = _replace(self.site, self.new)
        try:
            return ast.unparse(ast.fix_missing_locations(self.tree))
        finally:
            _replace(self.site, old)


def mutants(file: str, source: str) -> list[Mutant]:
    """Every mutant of a file, in order. Those of one function with the same words are told apart by a number."""
    tree, found, seen = ast.parse(source), [], {}
    for site, new, where in _walk(tree, ()):
        function = ".".join(node.name for node in where if hasattr(node, "name")) or "<module>"
        statement = next(node for node in reversed((*where, _at(site))) if isinstance(node, ast.stmt))
        change = f"{_words(_at(site))} -> {_words(new)} in: {ast.unparse(statement).splitlines()[0][:100]}"
        number = seen[function, change] = seen.get((function, change), 0) + 1
        change += f" ({number})" if number > 1 else ""
        lines, name = _reach(statement, where, len(source.splitlines()))
        found.append(Mutant(file, function, change, lines, name, site, new, tree))
    return found


def _walk(node: ast.AST, where: tuple) -> Iterator[tuple[tuple, object, tuple]]:
    """Every place and what is to stand there instead, with the statements, functions and classes around it."""
    inside = (*where, node) if isinstance(node, ast.stmt) else where
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for at, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not _left_alone(child, node):
                site = (node, field, at)
                yield from ((site, new, inside) for new in _instead(child, node, field))
                yield from _walk(child, inside)


def _left_alone(node: ast.AST, parent: ast.AST) -> bool:  # noqa: PLR0911 - one rule a line
    if isinstance(parent, ast.Raise):
        return True
    if isinstance(node, ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.FunctionDef):
        return node.name == "__repr__"
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id.endswith("Error") or node.func.id == "Damage"
    if isinstance(node, ast.keyword):
        return node.arg == "strict"
    if isinstance(node, ast.JoinedStr | ast.Constant):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        text = "".join(part.value if isinstance(getattr(part, "value", None), str) else "-" for part in parts)
        return len(text.split()) >= MESSAGE_WORDS
    return False


def _instead(node: ast.AST, parent: ast.AST, field: str) -> Iterator[object]:
    """What is put in place of a node, one after another."""
    if isinstance(node, ast.stmt):
        yield from _other_statement(node, parent)
    elif isinstance(node, ast.Compare):
        for at, op in enumerate(node.ops):
            for other in COMPARED[type(op)]:
                yield ast.Compare(node.left, [*node.ops[:at], other(), *node.ops[at + 1 :]], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in CALCULATED and not _joins_paths(node):
        yield ast.BinOp(node.left, CALCULATED[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant):
        yield from (ast.Constant(value) for value in _other_constants(node.value))
    elif isinstance(node, ast.Name) and node.id in OPPOSITE:
        yield ast.Name(OPPOSITE[node.id], node.ctx)
    elif isinstance(node, ast.Attribute) and node.attr in OPPOSITE:
        yield ast.Attribute(node.value, OPPOSITE[node.attr], node.ctx)
    decides = field == "test" or (isinstance(parent, ast.comprehension) and field == "ifs")
    if decides and not isinstance(node, ast.Compare | ast.UnaryOp):
        yield ast.UnaryOp(ast.Not(), node)


def _other_statement(node: ast.stmt, parent: ast.AST) -> Iterator[ast.stmt]:
    if isinstance(node, ast.Return) and not (node.value is None or _is_none(node.value)):
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Raise | ast.Delete | ast.Return | ast.AugAssign | ast.Expr) or (
        isinstance(node, ast.Assign) and not all(isinstance(target, ast.Name | ast.Tuple) for target in node.targets)
    ):
        yield ast.Pass()
    elif isinstance(node, ast.Break | ast.Continue):
        yield ast.Continue() if isinstance(node, ast.Break) else ast.Break()
    if isinstance(node, ast.AugAssign) and not isinstance(node.op, ast.BitOr):
        yield ast.AugAssign(node.target, CALCULATED[type(node.op)](), node.value)


def _other_constants(value) -> list:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value - 1]
    if isinstance(value, str):
        return [value + "x"]
    return [value + b"x"] if isinstance(value, bytes) else []


def _joins_paths(node: ast.BinOp) -> bool:
    texts = (ast.JoinedStr, ast.Constant)
    paths = ("path", "folder", "name", "file", "cache")
    return isinstance(node.op, ast.Div) and any(
        (isinstance(side, texts) and not isinstance(getattr(side, "value", ""), int | float))
        or ast.unparse(side).split(".")[-1].lower() in paths
        for side in (node.left, node.right)
    )


def _reach(statement: ast.stmt, where: tuple, length: int) -> tuple[range, str]:
    """The lines whose tests can notice a change of a statement, and the name of the module's constant that it sets."""
    functions = [node for node in where if isinstance(node, ast.FunctionDef)]
    if isinstance(statement, ast.FunctionDef):  # its defaults
        return range(statement.body[0].lineno, statement.end_lineno + 1), ""
    if functions:
        body = getattr(statement, "body", None)
        last = max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno
        return range(statement.lineno, last + 1), ""
    classes = [node for node in where if isinstance(node, ast.ClassDef)]
    if classes:
        return range(classes[0].lineno, classes[0].end_lineno + 1), ""
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    return range(1, length + 1), ast.unparse(targets[0]) if isinstance(targets[0], ast.Name) else ""


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _words(node: ast.AST) -> str:
    text = " ".join(ast.unparse(ast.fix_missing_locations(node)).split())
    return text if len(text) <= 70 else f"{text[:45]} ... {text[-20:]}"


def _at(site: tuple) -> ast.AST:
    node, field, at = site
    return getattr(node, field) if at is None else getattr(node, field)[at]


def _replace(site: tuple, new: object) -> object:
    """Put something into a place; returns what was there."""
    node, field, at = site
    old = _at(site)
    if at is None:
        setattr(node, field, new)
    else:
        getattr(node, field)[at] = new
    return old
