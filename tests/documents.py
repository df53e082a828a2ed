"""What README and docs hold, and how it is run: shell and Python blocks in their order, as a reader would type them.

Two conventions tie a document's text to its blocks. Where the paragraph before a block says "in a file `NAME`", the
block is the content of that file. Where a command's comment says "exit status N", the command ends with that status.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from whisper_at_cli.cli import main

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")], key=str)
PROGRAM = "whisper-at-cli"
LANGUAGES = ("sh", "python", "json", "csv", "toml", "bibtex", "text", "")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MULTI_LINE = re.compile(r"^\s*(for|while|if|case|export|cd|function)\b|<<", re.MULTILINE)  # lines that need one shell
SHELL_CHARACTERS = set("|&;()<`$*")
COMMAND_SECONDS = 120


@dataclass(frozen=True)
class Block:
    """One fenced block: its language and text, and the name of the file that it is the content of ("" for none)."""

    language: str
    text: str
    file: str


@dataclass(frozen=True)
class Command:
    """What a shell gets at once: a line with its continuations, or a block whose lines need one shell."""

    text: str

    @property
    def status(self) -> int:
        said = re.search(r"#.*\bexit status (\d)", self.text)
        return int(said[1]) if said else 0


@dataclass(frozen=True)
class Document:
    name: str
    text: str

    @classmethod
    def read(cls, path: Path) -> Document:
        return cls(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))

    @property
    def blocks(self) -> list[Block]:
        found = []
        for match in FENCE.finditer(self.text):
            paragraph = self.text[: match.start()].rstrip().rsplit("\n\n", 1)[-1]
            file = re.search(r"in a file `([^`]+)`", paragraph)
            found.append(Block(match[1], match[2], file[1] if file and match[1] != "sh" else ""))
        return found

    @property
    def commands(self) -> list[Command]:
        return [command for block in self.blocks if block.language == "sh" for command in commands_of(block.text)]

    @property
    def prose(self) -> str:
        """All but the fenced blocks."""
        return FENCE.sub("", self.text)

    @property
    def anchors(self) -> list[str]:
        """What links to a heading name it, as GitHub makes it."""
        headings = re.findall(r"^#+ (.*)$", self.prose, re.MULTILINE)
        return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


DOCUMENTS = [Document.read(path) for path in PATHS]


def commands_of(text: str) -> list[Command]:
    if MULTI_LINE.search(text):
        return [Command(text)]
    lines = text.replace("\\\n", " ").splitlines()
    return [Command(" ".join(line.split())) for line in lines if line.split("#")[0].strip()]


def calls(command: Command) -> list[list[str]]:
    """The arguments of every `whisper-at-cli ...` in a command, however a shell or torchrun starts it."""
    found = []
    for line in command.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace("-m whisper_at_cli.cli", PROGRAM), comments=True)
        while PROGRAM in words:
            words = words[words.index(PROGRAM) + 1 :]
            end = next((at for at, word in enumerate(words) if word in (">", "|", ">>", ";", "&&")), len(words))
            found.append(words[:end])
    return found


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed; `out` is also what went into a file by `>`."""

    status: int
    out: str
    err: str


def run(command: str) -> Outcome:
    """One command in the working folder: the program itself in this process, everything else in a real shell."""
    words, target = split(command)
    if words is None:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], capture_output=True, text=True, timeout=COMMAND_SECONDS,
            env=os.environ | {"HOME": str(Path.cwd())}, check=False,
        )  # fmt: skip
        return Outcome(done.returncode, done.stdout, done.stderr)
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words[1:])
        except SystemExit as end:
            status = end.code or 0
    if target:
        Path(target).write_text(out.getvalue(), encoding="utf-8")
    return Outcome(status, out.getvalue(), err.getvalue())


def split(command: str) -> tuple[list[str] | None, str]:
    """The words of a plain `whisper-at-cli ...` and the file after `>`; None for the words where a shell is needed."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words, target = list(lexer), ""
    if len(words) > 2 and words[-2] == ">":
        target, words = words[-1], words[:-2]
    special = [word for word in words if set(word) <= SHELL_CHARACTERS or word.startswith(("~", "$"))]
    if "\n" in command or words[:1] != [PROGRAM] or special:
        return None, ""
    return words, target


def faults(command: Command, ran: str, outcome: Outcome) -> list[str]:
    """What a reader would not expect of a command that the document shows: wrong status, a file that is not there."""
    found = []
    if outcome.status != command.status:
        found.append(f"exit status {outcome.status}, not {command.status}")
    if "Traceback" in outcome.err:
        found.append("a traceback")
    words, target = split(ran)
    if words is None or command.status:
        return found
    files = [words[at + 1] for at, word in enumerate(words[:-1]) if word in ("--out", "--csv", "--figure")]
    files += words[3:4] if words[1] in ("extract", "import", "export", "import-head", "export-head") else []
    files += [target] if target else []
    found += [f"no {file}" for file in files if "://" not in file and not _holds_something(Path(file))]
    if not files and not outcome.out.strip():
        found.append("it prints nothing and leaves nothing")
    if "--json" in words and not _is_json(outcome.out):
        found.append("what --json prints is not JSON")
    return found


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size > 0


def _is_json(text: str) -> bool:
    """One value, or one on each line."""
    for parts in ([text], text.splitlines()):
        with contextlib.suppress(ValueError):
            return bool([json.loads(part) for part in parts])
    return False


def run_python(block: Block, name: str) -> str:
    """What a Python example prints; each begins with nothing but its own imports."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block.text, name, "exec"), {"__name__": "__main__"})
    return out.getvalue()


def path_with(folder: Path, programs: dict[str, str]) -> str:
    """A PATH on which these shell scripts come first."""
    folder.mkdir()
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
