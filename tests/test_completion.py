"""After Tab: commands, options, values, models and files, in a real bash and fast."""

import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from whisper_at_cli.cli import cli
from whisper_at_cli.extract import completion

FREE_TEXT = {  # parameters for which there is nothing to suggest
    "time", "partition", "account", "name", "setup", "backbone", "parameters", "language", "title", "split",
    "splits", "classes", "temperature", "suppress_tokens", "initial_prompt", "clip_timestamps", "options",
}  # fmt: skip
OPTIONS_OF_EXTRACT = (
    "--model --format --labels --window --hop --limit --dry-run --clip-seconds --dtype --precision "
    "--batch-size --workers"
)


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A folder with data in it, and `whisper-at-cli` on the path, whatever is installed."""
    program = tmp_path / "bin" / "whisper-at-cli"
    program.parent.mkdir()
    code = "import sys; from whisper_at_cli.cli import main; main()"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -c {shlex.quote(code)} "$@"\n')
    program.chmod(0o755)
    work = tmp_path / "work"
    for name in ("sounds/dog", "sounds.zarr", "my-whisper"):
        (work / name).mkdir(parents=True)
    for name in ("clips.csv", "own.pt", "notes.txt"):
        (work / name).touch()
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(work)
    return work


def after_tab(line: str) -> list[str]:
    """What bash offers where the cursor is at the end of the line, by the documented script."""
    words = shlex.split(line) + [""] * line.endswith(" ")
    script = f"""
        eval "$(_WHISPER_AT_CLI_COMPLETE=bash_source whisper-at-cli)"
        compopt() {{ echo "$2"; }}
        COMP_WORDS=({" ".join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}
        _whisper_at_cli_completion whisper-at-cli
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    if not shutil.which("bash"):
        pytest.skip("there is no bash")
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    "line, offered",
    [
        ("whisper-at-cli pr", ["probe"]),
        ("whisper-at-cli extract --dt", ["--dtype"]),
        ("whisper-at-cli extract a b --dtype ", ["float16", "float32", "int8"]),
        ("whisper-at-cli extract a b --format u", ["urbansound8k"]),
        ("whisper-at-cli train-head a --head w", ["wa-pool", "wa-mlp", "wa-tr"]),
        ("whisper-at-cli transcribe a --format t", ["txt", "tsv"]),
        ("whisper-at-cli extract a b --model medium", ["medium", "medium.en"]),
        ("whisper-at-cli extract a b --model m", ["medium", "medium.en", "my-whisper"]),
        ("whisper-at-cli extract a b --model o", ["own.pt"]),
        ("whisper-at-cli extract a b --model ../w", ["default", ""]),
        ("whisper-at-cli extract s", ["default", ""]),
        ("whisper-at-cli evaluate t s", ["default", ""]),
        ("whisper-at-cli figure ", ["1", "2", "3", "5"]),
    ],
)
def test_bash_is_offered(shell, line, offered):
    assert after_tab(line) == offered


def test_all_commands_are_offered(shell):
    assert after_tab("whisper-at-cli ") == list(cli.commands)


def test_a_person_presses_tab_in_bash(shell):
    """Keys into an interactive bash on a terminal: a command, an option, a value and a path are all completed."""
    if not shutil.which("bash"):
        pytest.skip("there is no bash")
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"PS1": "READY>", "TERM": "dumb", "INPUTRC": "/dev/null"}
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
    try:
        _read_until(terminal, "READY>")
        _type(terminal, 'eval "$(_WHISPER_AT_CLI_COMPLETE=bash_source whisper-at-cli)"\n', "READY>")
        _type(terminal, "whisper-at-cli ext\t", "extract ")
        _type(terminal, "cl\t", "clips.csv ")
        _type(terminal, "x.zarr --prec\t", "--precision ")
        _type(terminal, "bf\t", "bfloat16 ")
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


def _type(terminal: int, keys: str, expected: str) -> None:
    os.write(terminal, keys.encode())
    _read_until(terminal, expected)


def _read_until(terminal: int, expected: str, seconds: float = 30.0) -> None:
    seen, end = "", time.monotonic() + seconds
    while expected not in seen:
        assert select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0], f"{expected!r} not in {seen!r}"
        seen += os.read(terminal, 4096).decode(errors="replace")


@pytest.mark.parametrize(
    "words", ["whisper-at-cli ", "whisper-at-cli extract a b --model ", "whisper-at-cli train-head a --head "]
)
def test_completion_imports_nothing_heavy(shell, words):
    heavy = ("torch", "numpy", "zarr", "sklearn", "scipy", "matplotlib", "rich", "av", "whisper")
    code = (
        "import sys; from whisper_at_cli.cli import main\ntry: main([])\nexcept SystemExit: pass\n"
        f"print('heavy:', [name for name in {heavy} if name in sys.modules])"
    )
    settings = {"_WHISPER_AT_CLI_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | settings
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == "heavy: []" and len(lines) > 3


def test_every_option_has_something_to_suggest_or_is_free_text():
    silent = set()
    for command in cli.commands.values():
        for parameter in command.params:
            chosen = isinstance(parameter.type, click.Path | click.Choice) or getattr(parameter, "is_flag", False)
            number = parameter.type.name.split()[0] in ("integer", "float")  # also ranges of them
            if not (chosen or number or "shell_complete" in vars(parameter)):
                silent.add(parameter.name)
    assert silent == FREE_TEXT


def test_what_is_suggested_is_what_the_library_takes():
    from whisper_at_cli.extract.backbones.encoder import PRECISIONS
    from whisper_at_cli.extract.cache.schema import DTYPES
    from whisper_at_cli.extract.datasets.recognise import FORMATS
    from whisper_at_cli.heads import forms, original, tables
    from whisper_at_cli.heads.tagging import tagger
    from whisper_at_cli.heads.training import data, recipe
    from whisper_at_cli.probe import layers
    from whisper_at_cli.probe.commands import FIGURE_OPTIONS
    from whisper_at_cli.probe.robustness import mixing

    of, values = completion.VALUES_OF, completion.VALUES
    assert set(completion.DATASETS) == {"auto", *FORMATS}
    assert set(values["dtype"]) == set(DTYPES) and set(values["precision"]) == {"auto", *PRECISIONS}
    assert set(of["probe", "kind"]) == set(layers.KINDS) - {"faithful"}
    assert of["figure", "number"] == tuple(FIGURE_OPTIONS)
    assert set(of["robustness", "mixing"]) == set(mixing.FORMS)
    assert set(of["train-head", "head"]) == set(forms.FORMS)
    assert set(of["train-head", "recipe"]) == set(recipe.NAMED)
    assert set(of["train-head", "tier"]) == {"auto", *data.TIERS}
    assert of["export-head", "prefix"] == original.PREFIXES and of["table", "form"] == tables.FORMATS
    assert set(of["transcribe", "tag_window"]) == set(tagger.TAG_WINDOWS)
    default = recipe.Recipe()
    for name in ("loss", "mixup_partner", "time_mask_layers", "precision"):
        for value in of.get(("train-head", name)) or values[name]:
            default.with_changes(**{name: value})


def test_no_suggestion_is_for_a_parameter_that_is_gone():
    there = {(name, parameter.name) for name, command in cli.commands.items() for parameter in command.params}
    assert {*completion.VALUES_OF, *completion.PATHS, *completion.MODELS} <= there
    assert set(completion.VALUES) <= {name for _, name in there}


def test_the_documents_say_how_to_switch_it_on():
    text = (Path(__file__).resolve().parents[1] / "docs" / "install.md").read_text()
    for name in ("bash", "zsh", "fish"):
        assert f"_WHISPER_AT_CLI_COMPLETE={name}_source whisper-at-cli" in text
