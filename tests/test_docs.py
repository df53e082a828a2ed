"""README and docs: every command is one that exists with these options, and every Python example runs."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from whisper_at_cli.cli import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")], key=str)
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


def commands(path: Path) -> list[list[str]]:
    """The arguments of every `whisper-at-cli ...` in a document's shell blocks."""
    found = []
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "whisper-at-cli" in words:
                words = words[words.index("whisper-at-cli") + 1 :]
                end = next((at for at, word in enumerate(words) if word in (">", "|", ">>", ";", "&&")), len(words))
                found.append(words[:end])
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_command_in_the_documents_exists_with_its_options(path):
    for arguments in commands(path):
        with cli.make_context("whisper-at-cli", list(arguments)) as context:
            name, command, rest = cli.resolve_command(context, [*context._protected_args, *context.args])
            command.make_context(name, rest, parent=context)


@pytest.fixture(scope="module")
def workplace(esc10, esc10_cache, tmp_path_factory) -> Path:
    """A folder that holds what the examples take for granted: ESC-50 (here ESC-10) and its cache."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "ESC-50").symlink_to(esc10)
    shutil.copytree(esc10_cache.path, folder / "esc50.zarr")
    return folder


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_python_example_runs(path, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    names: dict = {}
    for block in blocks(path, "python"):
        exec(compile(block, str(path), "exec"), names)


def test_the_documented_reader_reads_what_the_cache_holds(workplace, monkeypatch):
    from whisper_at_cli.extract import FeatureCache

    monkeypatch.chdir(workplace)
    names: dict = {}
    exec(next(block for block in blocks(ROOT / "docs" / "cache.md", "python") if "def read_features" in block), names)
    cache = FeatureCache.open("esc50.zarr")
    for clip, layer in ((0, 1), (7, 3), (len(cache) - 1, cache.spec.layers)):
        assert (names["read_features"]("esc50.zarr", clip, layer) == cache.features([clip])[0, layer - 1]).all()
