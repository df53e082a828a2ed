"""README and docs: every command and every Python example runs, every link leads somewhere, every example parses."""

import csv
import io
import json
import re
import sys
import os
import tomllib
import urllib.request

import imageio_ffmpeg
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
    programs["srun"] = 'exec "$@"'
    programs["ffmpeg"] = f'exec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"'
    programs["torchrun"] = f'{python} -m torch.distributed.run "$@"'
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin", programs))
    monkeypatch.setenv("PROJECT", str(ROOT))
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


def cpu_seconds():
    return sum(os.times()[:4])


@pytest.fixture
def ray_cluster(monkeypatch):
    """A Ray cluster of one node, at $RAY_HEAD."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    monkeypatch.setenv("RAY_HEAD", cluster.address)
    yield
    cluster.shutdown()


@pytest.fixture
def buckets(server, workplace, monkeypatch):
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


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_command_and_example_runs(document, workplace, here, request, capfd):
    for mentioned, fixture in (("--engine ray", "ray_cluster"), ("whisper-at-cli extract s3://", "buckets")):
        if mentioned in document.text:
            request.getfixturevalue(fixture)
    workplace.lay_out(document, here)
    ran = []
    for block in document.blocks:
        if block.file:
            (here / block.file).write_text(block.text)
        elif block.language == "python":
            began = cpu_seconds()
            run_python(block, document.name)
            print(f"{cpu_seconds() - began:6.1f} s  python")
        for command in commands_of(block.text) if block.language == "sh" else ():
            began = cpu_seconds()
            text = substituted(document.name, command.text)
            outcome = run(text)
            found = faults(command, text, outcome)
            assert not found, f"{text}: {'; '.join(found)}\n{outcome.out[-2000:]}\n{outcome.err[-2000:]}"
            ran.append(command)
            print(f"{cpu_seconds() - began:6.1f} s  {text}")
    with capfd.disabled():
        print(capfd.readouterr().out)
    assert ran == document.commands
