"""README and docs: every command and every Python example runs, every link leads somewhere, every example parses."""

import json
import os
import re
import sys
import tomllib
import urllib.request
from collections import Counter
from pathlib import Path

import click
import imageio_ffmpeg
import pytest
from documents import DOCUMENTS, LANGUAGES, PROGRAM, ROOT, Document, calls, commands_of, faults, path_with, run
from documents import run_python as run_example
from substitutes import SHOWN_ONLY, SUBSTITUTES, substituted
from test_bucket import server  # noqa: F401 - a fixture
from workplace import Workplace

from whisper_at_cli.cli import cli
from whisper_at_cli.extract import FeatureCache
from whisper_at_cli.extract.datasets import open_dataset

NAMES = [document.name for document in DOCUMENTS]
BY_NAME = dict(zip(NAMES, DOCUMENTS, strict=True))
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)

# What a document says of a command's result, beyond its status and its files: document, part of the command, and either
# what it prints or a file that it leaves.
PROMISES = (
    ("README.md", "transcribe meeting.m4a", "[Mm]odern", ""),
    ("README.md", "train-head esc50.zarr", "", "tagger/head.safetensors"),
    ("docs/cache.md", "import esc50-npz", "", "copy.zarr/features/zarr.json"),
    ("docs/datasets.md", "extract audioset as.zarr", r"missing: --a\w+\n", ""),
    ("docs/datasets.md", "extract audioset as.zarr", r"8 of 9 listed clips are there \(88\.9 %\)", ""),
    ("docs/figures.md", "figure 1 esc10.zarr", "", "fig1.json"),
    ("docs/formats.md", "--format html", "", "pages/talk.html"),
    ("docs/formats.md", "--format srt", "[Mm]odern", ""),
    ("docs/head-files.md", "--fold 3", "trained on", ""),
    ("docs/heads.md", "--search --lr", "", "search/search.json"),
    ("docs/heads.md", "--dim 128 --out tagger", "", "tagger/curve.png"),
    ("docs/heads.md", "--dim 128 --out tagger", "", "tagger/fold-5/head.json"),
    ("docs/probes.md", "--figure layers.pdf", "", "layers.json"),
    ("docs/robustness.md", "--out robustness/own", "", "robustness/own/transcripts.jsonl"),
    ("docs/transcribe.md", "--model tiny.en --head tagger", "[Mm]odern", ""),
    ("docs/transcribe.md", "--json", "[Mm]odern", ""),
    ("docs/transcribe.md", "--word-timestamps", "[Mm]odern", ""),
)

# Where a document lists the fields of a JSON result: a block that begins so, or a table with this heading; the result.
LISTED = (
    ("docs/robustness.md", '{"model"', "tiny.json"),
    ("docs/transcribe.md", '{"audio"', "talk.json"),
    ("docs/formats.md", '{"audio"', "talk.json"),
    ("docs/report.md", '{"report"', "report.json"),
    ("docs/head-files.md", "| field | is |", "tagger/head.json"),
    ("docs/head-files.md", "| JSON field | is |", "evaluated.json"),
    ("docs/probes.md", "| field | |", "base-probe.json"),
)
# Fields of results that are not made here: several labels a clip, word times, pairs that were skipped.
NOT_ALWAYS = (
    {"mAP", "mAP_std", "class_ap", "classes_without_positives"} | {"words", "word"} | {"what", "reason", "failed"}
)
OTHER_PROGRAMS = ("python", "pip", "conda", "make", "uv", "git", "sbatch", "torchrun", "nvidia-smi")
OTHER_OPTIONS = {"--requeue", "--signal", "--cpus-per-task", "--array", "--nproc-per-node"}  # of sbatch and torchrun


@pytest.fixture(scope="session")
def workplace(shared, tiny_en, tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("things"), shared / "data", tiny_en)


@pytest.fixture
def hub(workplace, monkeypatch):
    """The Hugging Face hub out of reach, with what was downloaded earlier."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(workplace.store / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """An empty folder to run a document in, with the program on the PATH; what is imported from it is forgotten."""
    python = f"exec {sys.executable} -P"
    programs = {
        PROGRAM: f'{python} -m whisper_at_cli.cli "$@"',
        "pip": f'{python} -m pip "$@"',
        "torchrun": f'{python} -m torch.distributed.run "$@"',
        "srun": 'shift; exec "$@"',  # --cpus-per-task=N
        "ffmpeg": f'exec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"',
    }
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin", programs))
    monkeypatch.setenv("PROJECT", str(ROOT))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def ray_cluster(monkeypatch):
    """A Ray cluster of one node, at $RAY_HEAD."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="needs the extra ray")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    monkeypatch.setenv("RAY_HEAD", cluster.address)
    yield
    cluster.shutdown()


@pytest.fixture
def buckets(server, workplace, monkeypatch):  # noqa: F811 - the fixture
    """The bucket `sounds` with ESC-50 in it, and the empty bucket `features`, on a server of the S3 protocol."""
    import obstore

    for name, value in (("ACCESS_KEY_ID", "planted"), ("SECRET_ACCESS_KEY", "planted"), ("REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    for name in ("sounds", "features"):
        urllib.request.urlopen(urllib.request.Request(f"{server}/{name}", method="PUT")).close()
    sounds = obstore.store.from_url("s3://sounds", endpoint=server, client_options={"allow_http": True})
    for path in sorted(workplace["ESC-50"].rglob("*.*")):
        obstore.put(sounds, f"ESC-50/{path.relative_to(workplace['ESC-50'])}", path.read_bytes())


SERVICES = (("--engine ray", "ray_cluster"), ("s3://", "buckets"))  # a command with this needs that fixture


@each_document
def test_every_command_and_example_runs(document, workplace, here, request):
    for mentioned, fixture in SERVICES:
        if any(mentioned in command.text for command in document.commands):
            request.getfixturevalue(fixture)
    workplace.lay_out(document, here)
    ran, examples, began = [], 0, cpu_seconds()
    for block in document.blocks:
        if block.file:
            (here / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            run_example(block, document.name)
            examples += 1
        for command in commands_of(block.text) if block.language == "sh" else ():
            run_command(document, command)
            ran.append(command)
    assert ran == document.commands
    assert examples == sum(block.language == "python" and not block.file for block in document.blocks)
    print(f"{document.name}: {len(ran)} commands, {examples} examples, {cpu_seconds() - began:.0f} s of processor time")


def run_command(document, command) -> None:
    """Run a command, or what stands in for it; all that the document lets a reader expect has to come true."""
    text, began = substituted(document.name, command.text), cpu_seconds()
    outcome = run(text)
    found = faults(command, text, outcome)
    for name, part, printed, file in PROMISES:
        if name == document.name and part in command.text:
            found += [f"nothing like {printed!r} printed"] * (not re.search(printed, outcome.out + outcome.err))
            found += [f"no {file}"] * (not Path(file).exists())
    assert not found, f"{text}: {'; '.join(found)}\n{outcome.out[-2000:]}\n{outcome.err[-2000:]}"
    print(f"{cpu_seconds() - began:6.1f} s  {text}")


def cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    return sum(os.times()[:4])


def test_no_command_is_hidden_from_these_tests():
    """Every line in a fenced block that names the program is one of the commands, or is within one."""
    for document in DOCUMENTS:
        for block in document.blocks:
            assert block.language in LANGUAGES, f"{document.name}: a block of {block.language!r} is checked by nothing"
            programs = PROGRAM if document.name in SHOWN_ONLY else "|".join((PROGRAM, *OTHER_PROGRAMS))
            shown = [line for line in block.text.splitlines() if re.match(rf"\s*\$?\s*({programs}) ", line)]
            assert not shown or block.language == "sh", f"{document.name}: {shown[0]} is not in a block of sh"
        shown = [line for block in document.blocks if block.language == "sh" for line in block.text.splitlines()]
        text = "\n".join(command.text for command in document.commands)
        for line in shown:
            words = line.split("#")[0].rstrip("\\").split()
            assert " ".join(words) in " ".join(text.split()), f"{document.name}: {line} is run by nothing"
        bare = re.search(rf"^ {{4}}{PROGRAM} ", document.text, re.MULTILINE)
        assert not bare, f"{document.name}: a command without a fence"


def test_every_substitute_is_of_a_command_and_has_a_reason():
    for entry in SUBSTITUTES:
        commands = BY_NAME[entry.document].commands
        assert any(entry.text in command.text for command in commands), f"{entry} is used by no command"
        assert entry.reason and entry.instead != entry.text
    assert max(Counter((entry.document, entry.text) for entry in SUBSTITUTES).values()) == 1


def test_every_promise_and_service_is_of_a_command():
    for name, part, *_ in PROMISES:
        assert any(part in command.text for command in BY_NAME[name].commands), (name, part)
    commands = " ".join(command.text for document in DOCUMENTS for command in document.commands)
    assert all(mentioned in commands for mentioned, _ in SERVICES)


@each_document
def test_every_command_exists_with_its_options(document):
    """As it is written, before anything is substituted."""
    for arguments in [each for command in document.commands for each in calls(command)]:
        with cli.make_context(PROGRAM, list(arguments)) as context:
            name, command, rest = cli.resolve_command(context, [*context._protected_args, *context.args])
            command.make_context(name, rest, parent=context)


@each_document
def test_options_in_the_text_are_those_of_the_commands(document):
    of_command = {
        name: {opt for parameter in command.params for opt in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in cli.commands.items()
        if isinstance(command, click.Command)
    }
    known = {"--help", "--debug", "--quiet", *OTHER_OPTIONS}.union(*of_command.values())
    for code in re.findall(r"`([^`]+)`", document.prose):
        words = code.removeprefix(f"{PROGRAM} ").split()
        if words[0] in OTHER_PROGRAMS:
            continue
        allowed = of_command[words[0]] | {"--help"} if words[0] in of_command else known
        strange = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", code)) - allowed
        assert not strange or " -- " in code, f"`{code}` has no {', '.join(sorted(strange))}"


@pytest.mark.parametrize("path", [ROOT / "benchmarks" / "README.md", *(ROOT / name for name in NAMES)], ids=str)
def test_every_link_leads_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", Document.read(path).prose):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name} links to {link}: there is no such file"
        assert not anchor or anchor in Document.read(target).anchors, f"{path.name} links to {link}: no such heading"


@each_document
def test_json_and_toml_blocks_parse(document):
    for block in document.blocks:
        if block.language == "json":
            parts = [block.text] if block.text.count("\n{") == 0 else block.text.splitlines()
            assert all(isinstance(json.loads(part), dict) for part in parts)
        if block.language == "toml":
            assert tomllib.loads(block.text)


def test_the_documented_manifests_name_the_same_clips(tmp_path):
    read = {}
    for block in BY_NAME["docs/datasets.md"].blocks:
        if block.file:
            (tmp_path / block.file).write_text(block.text)
            dataset = open_dataset(tmp_path / block.file)
            read[block.file] = [
                (clip.path, clip.start, clip.end, {dataset.class_names[label] for label in clip.labels})
                for clip in dataset.clips
            ]
    assert set(read) == {"clips.csv", "clips.jsonl"} and read["clips.csv"] == read["clips.jsonl"]
    assert read["clips.csv"][0] == ("recordings/monday.flac", 12.5, 22.5, {"dog", "rain"})


@pytest.mark.parametrize("name, begins, result", LISTED, ids=lambda value: value[:20])
def test_documented_fields_are_those_of_the_result(name, begins, result, workplace, hub):
    document = BY_NAME[name]
    if begins.startswith("{"):
        (block,) = (block for block in document.blocks if block.text.startswith(begins))
        listed = set(re.findall(r'(?<!: )"(\w+)"', block.text))
    else:
        table = document.text.split(begins)[1].split("\n\n")[0].splitlines()[2:]
        listed = {field for row in table for field in re.findall(r"`(\w+)", row.split("|")[1])}
    thing, _, inside = result.partition("/")
    there = set(keys(json.loads((workplace[thing] / inside if inside else workplace[thing]).read_text())))
    assert len(listed) >= 5 and listed - there <= NOT_ALWAYS, sorted(listed - there)


def keys(value) -> list[str]:
    """Every key in a JSON value."""
    if isinstance(value, dict):
        return [*value, *(key for each in value.values() for key in keys(each))]
    return [key for each in value for key in keys(each)] if isinstance(value, list) else []


def test_the_documented_reader_reads_what_the_cache_holds(workplace, monkeypatch, tmp_path):
    cache = FeatureCache.open(workplace["esc50.zarr"])
    monkeypatch.chdir(workplace.store)
    names: dict = {}
    exec(next(block.text for block in BY_NAME["docs/cache.md"].blocks if "def read_features" in block.text), names)
    for clip, layer in ((0, 1), (7, 3), (len(cache) - 1, cache.spec.layers)):
        assert (names["read_features"]("esc50.zarr", clip, layer) == cache.features([clip])[0, layer - 1]).all()
