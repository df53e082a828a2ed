"""What is published: the wheel and the sdist, and what a person gets who installs one of them."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from whisper_at_cli import __version__

ROOT = Path(__file__).resolve().parents[1]
LEFT_HERE = ("build", "dist", "demo", "shared", "*.egg-info", "__pycache__", "*.zarr")
PUBLIC = """
from whisper_at_cli.extract import FeatureCache, extract, load_backbone, load_whisper
from whisper_at_cli.heads import load_head, train_head, Tagger
from whisper_at_cli.probe import LayerProbe, probe_layers
import whisper_at_cli
print(whisper_at_cli.__file__)
"""


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    return done


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Skips where pip finds no package index: builds fetch setuptools from one."""
    pytest.importorskip("build")
    asked = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries", "0", "-d",
             str(tmp_path_factory.mktemp("index")), "setuptools>=77"]  # fmt: skip
    found = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=120)
    if found.returncode:
        pytest.skip(f"the package index cannot be reached: {' '.join(found.stderr.split())[-200:]}")


@pytest.fixture(scope="module")
def built(tmp_path_factory, index) -> dict[str, Path]:
    """`sdist`, `wheel` as built from it, and `direct`, the wheel from the sources themselves."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(".*", *LEFT_HERE))
    build = (sys.executable, "-m", "build", folder / "source")
    run(*build, "--outdir", folder / "both")  # the wheel from the sdist
    run(*build, "--wheel", "--outdir", folder / "direct")
    (sdist,), (wheel,) = (folder / "both").glob("*.tar.gz"), (folder / "both").glob("*.whl")
    return {"sdist": sdist, "wheel": wheel, "direct": next((folder / "direct").glob("*.whl"))}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def installed_at(folder: Path) -> Path:
    """An empty virtual environment with pip, whose Python this is."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def surroundings() -> dict[str, str]:
    """The environment without whatever leads to this checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def check_installed(python: Path, folder: Path) -> None:
    """The command and the public names work from a folder that has nothing to do with the repository."""
    folder.mkdir()
    where = {"cwd": folder, "env": surroundings()}
    program = python.parent / "whisper-at-cli"
    assert __version__ in run(program, "--version", **where).stdout
    listed = run(program, "--help", **where).stdout.split("Commands:")[1]
    commands = re.findall(r"^  ([a-z][\w-]+)", listed, re.MULTILINE)
    assert {"extract", "probe", "train-head", "transcribe", "report", "demo"} <= set(commands)
    for command in commands:
        assert "Usage:" in run(program, command, "--help", **where).stdout, command
    counted = json.loads(run(program, "heads", "--model", "tiny.en", "--json", **where).stdout)
    assert {row["head"] for row in counted["heads"]} == {
        "concat-linear",
        "last-mlp",
        "wa-mlp",
        "wa-pool",
        "wa-tr",
        "tl-tr",
    }
    imported = Path(run(python, "-c", PUBLIC, **where).stdout.strip())
    assert imported.is_relative_to(python.parents[1]), "what was imported is not what was installed"


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(built):
    names = set(contents(built["wheel"]))
    package = {name.removeprefix("whisper_at_cli/") for name in names if name.startswith("whisper_at_cli/")}
    written = {
        str(path.relative_to(ROOT))
        for pattern in (
            "__init__.py",
            "cli.py",
            "py.typed",
            *(f"{room}/**/*" for room in ("extract", "heads", "probe")),
        )
        for path in ROOT.glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package == written
    assert {"heads/paper.json", "extract/templates/document.html"} <= package
    others = {name.split("/")[0] for name in names} - {"whisper_at_cli"}
    assert len(others) == 1 and next(iter(others)).endswith(".dist-info"), others


def test_the_sdist_builds_the_same_wheel_and_holds_no_part_of_the_tests(built):
    from_sdist, direct = contents(built["wheel"]), contents(built["direct"])
    assert from_sdist == direct
    with tarfile.open(built["sdist"]) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "shared", "docs"))]


def test_the_wheel_works_beside_what_is_installed_here(built, tmp_path):
    """In a fresh environment that sees this one's packages, but not this checkout."""
    python = installed_at(tmp_path / "venv")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", built["wheel"], env=surroundings())
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "beside.pth").write_text("".join(f"{path}\n" for path in sorted(here)))
    check_installed(python, tmp_path / "elsewhere")


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(built, tmp_path):
    """With all that it depends on, fetched from the package index; torch first and alone, as the Makefile does it."""
    python = installed_at(tmp_path / "venv")
    install = (python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")
    torch = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    run(*install, torch[0], env=surroundings())
    run(*install, built["wheel"], env=surroundings())
    check_installed(python, tmp_path / "elsewhere")
