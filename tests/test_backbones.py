"""What `--model` may be: each kind is found by what it is, and a backbone of one's own needs no change here."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from whisper_forms import random_whisper, write_form

from conftest import make_backbone, noise, write_wav
from whisper_at_cli.cli import main
from whisper_at_cli.extract import FeatureCache, extract, load_backbone, load_whisper
from whisper_at_cli.extract.errors import UsageError, WeightsError, WhisperATError

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "backbones.md"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def mels(here):
    """The complete example of the guide, as its reader would save it."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (example,) = (block for block in blocks if "class Mels" in block)
    (here / "mels.py").write_text(example)
    return here


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


def test_the_backbone_of_the_guide_is_extracted_and_probed(mels, noise_folder, capsys):
    arguments = ("extract", noise_folder, "mels.zarr", "--model", "mels:load", "--clip-seconds", "1", "--device", "cpu")
    status, out, _ = run(capsys, *arguments, "--json")
    assert status == 0 and json.loads(out)["written"] == 12
    cache = FeatureCache.open("mels.zarr")
    assert (cache.spec.backbone, cache.spec.layers, cache.spec.dim) == ("mels", 2, 80)
    from whisper_at_cli.extract.audio.decode import as_float, load_clip
    from whisper_at_cli.extract.backbones.mel import log_mel

    bands = log_mel(torch.from_numpy(as_float(load_clip(noise_folder / cache.paths[3], 16000)[0]))[None], 80)[0].numpy()
    frames = bands.reshape(80, 25, 4).mean(axis=2).T
    np.testing.assert_allclose(cache.features([3])[0, 0], frames, rtol=2e-3, atol=2e-3)
    status, out, _ = run(capsys, *arguments, "--json")
    assert status == 0 and json.loads(out)["skipped"] == 12


def test_an_installed_package_adds_a_backbone_by_its_entry_point(mels, monkeypatch):
    information = mels / "mels-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: mels\nVersion: 1.0\n")
    entry = re.search(r"```toml\n(.*?)```", GUIDE.read_text(), re.DOTALL)[1]
    (information / "entry_points.txt").write_text(entry.replace("project.entry-points.", "").replace('"', ""))
    monkeypatch.syspath_prepend(mels)
    backbone = load_backbone("mels", device="cpu")
    assert backbone.name == "mels" and backbone.encode(torch.zeros(3, 16000)).shape == (3, 2, 25, 80)


def test_every_shell_and_python_example_of_the_guide_parses():
    import ast

    from click.testing import CliRunner

    from whisper_at_cli.cli import cli

    text = GUIDE.read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(block)
    commands = [line.split("#")[0].split()[1:] for line in re.findall(r"^whisper-at-cli .*$", text, re.MULTILINE)]
    assert len(commands) >= 9
    for command in commands:
        shown = CliRunner().invoke(cli, [command[0], "--help"]).output
        assert all(part in shown for part in command if part.startswith("--")), command


BAD = {
    "nothing": "def load(device, precision): pass",
    "half": "class Half: name, layers, dim = 'half', 0, 8\ndef load(device, precision): return Half()",
    "fails": "def load(device, precision): raise KeyError('weights')",
    "strange": "def load(): pass",
    "syntax": "def load(:",
    "value": "load = 3",
}


@pytest.mark.parametrize(
    "model, kind, said",
    [
        ("nothing:load", UsageError, "gives a NoneType, which is no backbone: name is missing"),
        ("half:load", UsageError, "layers is 0 and must be the number of layers; sample_rate is missing"),
        (
            "fails:load",
            WhisperATError,
            "fails when called with device='cpu' and precision='float32': KeyError: 'weights'",
        ),
        ("strange:load", WhisperATError, "TypeError"),
        ("syntax:load", WhisperATError, "fails when imported: SyntaxError"),
        ("value:load", UsageError, "is a int, not a function"),
        ("half:missing", UsageError, "has no attribute 'missing'"),
        ("absent:load", UsageError, "No module named 'absent'"),
        ("absent.pt", UsageError, "does not exist"),
        ("absent", UsageError, "no model 'absent'"),
    ],
)
def test_what_is_no_backbone_is_named_with_all_that_it_lacks(here, model, kind, said):
    for name, code in BAD.items():
        (here / f"{name}.py").write_text(code)
    with pytest.raises(kind) as refused:
        load_backbone(model, device="cpu")
    assert type(refused.value) is kind and said in str(refused.value), str(refused.value)
    assert "\n" not in str(refused.value)


class Wrapped:
    """A backbone whose features are changed."""

    def __init__(self, change):
        self.inner, self.change = make_backbone(), change

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def encode(self, waveforms):
        return self.change(self.inner.encode(waveforms))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda features: features[:, :2], r"gave \(2, 2, 25, 64\) torch.float32 for 2 clips, and must give \(2, 3,"),
        (lambda features: features.half(), "torch.float16 for 2 clips"),
        (lambda features: features[:1], r"gave \(1, 3, 25, 64\)"),
        (lambda features: features.numpy(), "gave <class 'numpy.ndarray'>"),
    ],
)
def test_features_of_another_shape_or_type_never_reach_a_cache(tmp_path, noise_folder, change, said):
    with pytest.raises(WhisperATError, match=said):
        extract(noise_folder, tmp_path / "a.zarr", model=Wrapped(change), clip_seconds=0.5, batch_size=2)


def test_an_object_that_is_no_backbone_is_refused_by_extract(tmp_path, noise_folder):
    with pytest.raises(UsageError, match="model gives a int, which is no backbone"):
        extract(noise_folder, tmp_path / "a.zarr", model=3)


# folders and the hub


def test_folders_are_told_apart_by_their_content(tmp_path):
    whisper, converted = (write_form(random_whisper("en"), form, tmp_path) for form in ("hf-float16", "ct2-float16"))
    first, second = (load_backbone(folder, device="cpu") for folder in (whisper, converted))
    assert type(first) is type(second) and first.weights_sha256 == second.weights_sha256
    assert (first.layers, first.dim) == (3, 64)
    other = tmp_path / "other"
    other.mkdir()
    for content, error, said in (
        ('{"model_type": "bert"}', UsageError, "holds a bert model; known are whisper, wav2vec2, hubert"),
        ("{}", UsageError, "names no model_type"),
        ("[", WeightsError, "cannot be read"),
        ('{"model_type": "whisper"}', WeightsError, "how many attention heads"),
        ('{"model_type": "hubert"}', WeightsError, "could not be read as a hubert model"),
    ):
        (other / "config.json").write_text(content)
        with pytest.raises(error, match=said):
            load_backbone(other, device="cpu")
    (other / "config.json").write_text('{"model_type": "hubert"}')
    with pytest.raises(UsageError, match="holds a hubert model, not a Whisper model"):
        load_whisper(other, device="cpu")


def test_without_transformers_the_message_names_the_extra(tmp_path, monkeypatch):
    whisper = write_form(random_whisper("en"), "hf-float16", tmp_path / "whisper")
    (tmp_path / "config.json").write_text('{"model_type": "hubert"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for model in (tmp_path, "facebook/hubert-base-ls960"):
        with pytest.raises(UsageError, match=r"pip install 'whisper-at-cli\[hf\]'"):
            load_backbone(model, device="cpu")
    assert load_backbone(whisper, device="cpu").layers == 3, "safetensors are enough for Whisper"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository, laid out on disk as huggingface_hub does; `files` is what was asked of it."""
    import hashlib
    from types import SimpleNamespace

    import huggingface_hub

    source = write_form(random_whisper("en"), "hf-sharded", tmp_path / "source")
    (source / "pytorch_model.bin").write_text("not wanted")
    state = SimpleNamespace(online=True, files=None, blobs=tmp_path / "hub" / "blobs")
    snapshot = tmp_path / "hub" / "snapshots" / "0123456789abcdef"

    def model_info(self, name, **options):
        if not state.online:
            raise ConnectionError("no route\nto host")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=path.name) for path in source.iterdir()])

    def snapshot_download(name, *, allow_patterns=None, local_files_only=False):
        if local_files_only and not snapshot.exists():
            raise FileNotFoundError("nothing was downloaded")
        if not local_files_only:
            state.files = allow_patterns
            snapshot.mkdir(parents=True, exist_ok=True)
            state.blobs.mkdir(exist_ok=True)
            for name in allow_patterns:
                data = (source / name).read_bytes()
                blob = state.blobs / hashlib.sha256(data).hexdigest()
                if not blob.exists():
                    blob.write_bytes(data)
                    (snapshot / name).symlink_to(blob)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_a_hub_name_is_downloaded_once_and_checked(hub):
    backbone = load_backbone("someone/whisper-small-ish", device="cpu")
    assert backbone.name == "someone/whisper-small-ish" and backbone.layers == 3
    assert "model.safetensors.index.json" in hub.files and "pytorch_model.bin" not in hub.files
    assert sum(name.startswith("model-0000") for name in hub.files) > 1
    hub.online = False
    assert load_backbone("someone/whisper-small-ish", device="cpu").weights_sha256 == backbone.weights_sha256
    blob = max(hub.blobs.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[-5] ^= 1
    blob.write_bytes(data)
    with pytest.raises(WeightsError, match=f"its SHA-256 is not the published {blob.name}; delete"):
        load_backbone("someone/whisper-small-ish", device="cpu")


def test_a_failed_download_is_one_clear_line(hub, capsys, tmp_path):
    hub.online = False
    write_wav(tmp_path / "sounds" / "a.wav", noise(0, 1))
    status, out, err = run(
        capsys, "extract", tmp_path / "sounds", tmp_path / "a.zarr", "--model", "facebook/hubert-base"
    )
    assert status == 1 and out == ""
    assert err.strip() == (
        "error: facebook/hubert-base is no file or folder here, and could not be downloaded from the Hugging Face hub "
        "(no route to host)"
    )
