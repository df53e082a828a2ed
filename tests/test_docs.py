"""README and docs: every command and every Python example runs, every link leads somewhere, every example parses."""

import csv
import io
import json
import re
import sys
import time
import tomllib

import pytest
from documents import DOCUMENTS, LANGUAGES, PROGRAM, ROOT, commands_of, faults, path_with, run, run_python
from substitutes import SUBSTITUTES, substituted
from test_bucket import needs_server, server  # noqa: F401 - a fixture
from workplace import Workplace

from whisper_at_cli.extract import FeatureCache

NAMES = [document.name for document in DOCUMENTS]


@pytest.fixture(scope="session")
def workplace(shared, tiny_en, tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("things"), shared / "data", tiny_en)


@pytest.fixture
def here(workplace, tmp_path, monkeypatch):
    """An empty folder to run a document in, with the program on the PATH; what is imported from it is forgotten."""
    import huggingface_hub.constants

    python = f"exec {sys.executable} -P"
    programs = {PROGRAM: f'{python} -m whisper_at_cli.cli "$@"', "pip": f'{python} -m pip "$@"'}
    programs["torchrun"] = f'{python} -m torch.distributed.run "$@"'
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin", programs))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(workplace.store / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_command_and_example_runs(document, workplace, here, capfd):
    workplace.lay_out(document, here)
    ran = []
    for block in document.blocks:
        if block.file:
            (here / block.file).write_text(block.text)
        elif block.language == "python":
            began = time.perf_counter()
            run_python(block, document.name)
            print(f"{time.perf_counter() - began:6.1f} s  python")
        for command in commands_of(block.text) if block.language == "sh" else ():
            began = time.perf_counter()
            text = substituted(document.name, command.text)
            outcome = run(text)
            found = faults(command, text, outcome)
            assert not found, f"{text}: {'; '.join(found)}\n{outcome.out[-2000:]}\n{outcome.err[-2000:]}"
            ran.append(command)
            print(f"{time.perf_counter() - began:6.1f} s  {text}")
    with capfd.disabled():
        print(capfd.readouterr().out)
    assert ran == document.commands
