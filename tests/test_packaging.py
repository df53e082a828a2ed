"""pyproject.toml, constraints.txt and environment.yml name the same things."""

import ast
import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(lines) -> dict[str, str]:
    found = (re.fullmatch(r"([\w.-]+)==([^\s;]+)(;.*)?", line.strip()) for line in lines)
    return {match[1]: match[2] for match in found if match}


CONSTRAINTS = pins((ROOT / "constraints.txt").read_text().splitlines())
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
PIP = next(entry["pip"] for entry in ENVIRONMENT if isinstance(entry, dict))


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def allows(requirement: str, pinned: str) -> bool:
    bounds = re.findall(r"(>=|<|==)([\d.]+)", requirement)
    checks = {">=": lambda a, b: a >= b, "<": lambda a, b: a < b, "==": lambda a, b: a == b}
    return all(checks[sign](version(pinned), version(bound)) for sign, bound in bounds)


def test_conda_and_pip_give_the_same_versions():
    assert pins(PIP) == CONSTRAINTS
    assert any(entry.startswith("-e .[") for entry in PIP)


def test_every_dependency_is_pinned_within_its_range():
    extras = PROJECT["optional-dependencies"]
    for requirement in PROJECT["dependencies"] + extras["demo"] + extras["test"]:
        name = re.match(r"[\w.-]+", requirement)[0]
        assert name in CONSTRAINTS, f"{name} is not in constraints.txt"
        assert allows(requirement, CONSTRAINTS[name]), f"{requirement} refuses {CONSTRAINTS[name]}"


def test_torch_2_11_satisfies_the_range_too():
    torch = next(entry for entry in PROJECT["dependencies"] if entry.startswith("torch"))
    assert allows(torch, "2.11.0") and allows(torch, "2.13.0")


def test_python_is_one_that_the_project_supports():
    python = next(entry for entry in ENVIRONMENT if isinstance(entry, str) and entry.startswith("python="))
    assert allows(PROJECT["requires-python"], python.split("=")[1])


def test_every_package_folder_is_packaged():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"whisper_at_cli"}
    for room in ("extract", "heads", "probe"):
        found |= {
            "whisper_at_cli." + ".".join(path.parent.relative_to(ROOT).parts)
            for path in (ROOT / room).rglob("__init__.py")
        }
    assert found == set(packages)


def test_type_checkers_see_the_names_that_packages_offer_lazily():
    for path in (path for room in ("extract", "heads", "probe") for path in (ROOT / room).rglob("__init__.py")):
        tree = ast.parse(path.read_text())
        package = ".".join(("whisper_at_cli", *path.parent.relative_to(ROOT).parts))
        offered = {
            name.value: f"{package}.{module.value}"
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
            for name, module in zip(node.value.keys, node.value.values, strict=True)
        }
        seen = {
            alias.asname: node.module
            for block in tree.body
            if isinstance(block, ast.If)
            for node in block.body
            for alias in node.names
        }
        assert seen == offered, path.relative_to(ROOT)
