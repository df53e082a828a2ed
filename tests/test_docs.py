"""README and docs: every command is one that exists with these options, and every Python example runs."""

import csv
import json
import re
import shlex
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from conftest import noise, write_wav
from whisper_at_cli.cli import cli
from whisper_at_cli.extract import FeatureCache, extract
from whisper_at_cli.heads import train_head
from whisper_at_cli.probe import probe_layers

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")], key=str)
RUN_ELSEWHERE = {"transcribe.md": "test_transcribe_docs.py", "backbones.md": "test_backbones.py"}
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


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
def things(esc10, esc10_cache, shared, tiny_en, tmp_path_factory) -> Path:
    """What the examples take for granted: datasets, caches, a head, results and speech, all small and real."""
    folder = tmp_path_factory.mktemp("docs")
    with open(esc10 / "meta" / "esc50.csv", newline="") as file:
        clips = list(csv.DictReader(file))
    taken, few = Counter(), []
    for clip in clips:
        taken[clip["fold"], clip["target"]] += 1
        few += [clip] * (taken[clip["fold"], clip["target"]] <= 2)
    for name in ("ESC-50", "ESC-10"):
        (folder / name / "meta").mkdir(parents=True)
        (folder / name / "audio").symlink_to(esc10 / "audio")
        with open(folder / name / "meta" / "esc50.csv", "w", newline="") as file:
            table = csv.DictWriter(file, few[0].keys())
            table.writeheader()
            table.writerows(few)
    extract(folder / "ESC-50", folder / "esc50.zarr", model=tiny_en)
    shutil.copytree(esc10_cache.path, folder / "esc10.zarr")
    train_head(esc10_cache, head="wa-mlp", changes={"epochs": 2}, out=folder / "tagger")
    (folder / "tiny.en.json").write_text(json.dumps(asdict(probe_layers(esc10_cache))))
    write_wav(folder / "talk.wav", noise(0, 12.0))
    talk = {
        "audio": "talk.wav", "model": "tiny.en", "language": "en", "duration": 12.0, "text": " So it is.",
        "segments": [{"id": 0, "start": 1.0, "end": 3.0, "text": " So it is."}],
        "tags": [{"start": 5.0, "end": 10.0, "labels": [{"name": "dog", "probability": 0.9, "logit": 2.2}]}],
        "events": [{"start": 5.0, "end": 9.0, "label": "dog", "probability": 0.9}],
        "head": {"head": "wa-mlp", "backbone": "tiny.en", "class_names": ["dog"]}, "settings": {},
    }  # fmt: skip
    (folder / "talk.json").write_text(json.dumps(talk))
    (folder / "clips.csv").write_text("audio,label\ntalk.wav,dog\n")
    with open(shared / "data" / "speech14" / "manifest.csv", newline="") as file:
        lines = file.read().splitlines()
    (folder / "speech").mkdir()
    for audio in {line.split(",")[0] for line in lines[1:3]}:
        (folder / "speech" / audio).parent.mkdir(exist_ok=True)
        (folder / "speech" / audio).symlink_to(shared / "data" / "speech14" / audio)
    (folder / "speech" / "manifest.csv").write_text("\n".join(lines[:3]) + "\n")
    return folder


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_python_example_runs(path, things, tmp_path, monkeypatch, capsys):
    if path.name in RUN_ELSEWHERE:
        assert path.name in (ROOT / "tests" / RUN_ELSEWHERE[path.name]).read_text()
        return
    workplace = tmp_path / "workplace"
    shutil.copytree(things, workplace, symlinks=True)
    if path.name == "README.md":  # trains this one itself
        shutil.rmtree(workplace / "tagger")
    monkeypatch.chdir(workplace)
    names: dict = {}
    for block in blocks(path, "python"):
        exec(compile(block, str(path), "exec"), names)


def test_the_documented_reader_reads_what_the_cache_holds(things, monkeypatch):
    monkeypatch.chdir(things)
    names: dict = {}
    exec(next(block for block in blocks(ROOT / "docs" / "cache.md", "python") if "def read_features" in block), names)
    cache = FeatureCache.open("esc50.zarr")
    for clip, layer in ((0, 1), (7, 3), (len(cache) - 1, cache.spec.layers)):
        assert (names["read_features"]("esc50.zarr", clip, layer) == cache.features([clip])[0, layer - 1]).all()
