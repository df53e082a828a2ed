"""docs/troubleshooting.md quotes what the tool prints: each message is provoked here, or stands in the source."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import noise, write_wav
from planted import planted_cache
from planted_sources import Crash
from whisper_at_cli.cli import main
from whisper_at_cli.extract.folders import take_lock
from whisper_at_cli.extract.pipeline import encode
from whisper_at_cli.extract.pipeline.decode_pool import DecodePool
from whisper_at_cli.extract.pipeline.decode_worker import Request, read_into_memory

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / "docs" / "troubleshooting.md").read_text()
BEGINNINGS = ("error: ", "failed: ", "note: ", "missing: ", "damaged: ", "encoder busy ", "Glyph ")
MESSAGES = [text for text in re.findall(r"`([^`\n]+)`", DOCUMENT) if text.startswith(BEGINNINGS)]
FEWEST_LETTERS = 25  # of a template in the source that is taken for a message

# What needs a machine that is not here (a GPU, a cluster), another version of a library, or a library to be missing.
# These are held against the source alone.
NOT_PROVOKED = [
    "note: there is an NVIDIA driver",  # test_doctor.py provokes it
    "error: a cache in a bucket needs obstore",
    "error: --engine ray needs Ray",
    "error: --tensorboard needs tensorboard",
    "error: ... holds a ... model, which needs the extra hf",
    "error: openai-whisper ... works otherwise",
    "error: cannot reach s3://...: no credentials",
    "error: cannot write to ...: No space left",
    "failed: ...: layer ... holds a value that is not finite",
    "error: shard ... (clips ... to ...) was lost",
    "error: encoders end before they have loaded the model",
]


def said_by(capsys, *arguments) -> list[str]:
    """The lines that a command prints."""
    with pytest.raises(SystemExit):
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return (captured.out + captured.err).splitlines()


def as_pattern(message: str) -> re.Pattern:
    return re.compile(".+?".join(re.escape(part) for part in message.split("...")))


def templates() -> list[str]:
    """Every string in the source, with `...` where a value is put in; and alternatives of what is chosen by `if`."""
    found = []
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] in ("extract", "heads", "probe", "cli.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


TEMPLATES = templates()


def stands_in_the_source(message: str) -> bool:
    """Whether some string of the source could become the message, or what follows its first word and a path."""
    body = message.split(": ", 1)[1]
    bodies = [body, body.split(": ", 1)[-1]]
    return any(
        as_pattern(template).fullmatch(text.replace("...", "x")) or as_pattern(text).fullmatch(template)
        for template in TEMPLATES
        if len(template.replace("...", "")) >= FEWEST_LETTERS
        for text in bodies
    )


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A dataset of two classes, and no network."""
    import urllib.error
    import urllib.request

    def refuse(*_, **__):
        raise urllib.error.URLError("[Errno -2] Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cached"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    for index in range(12):
        name = ("dog", "rain")[index // 6]
        write_wav(Path("sounds") / name / f"{name}{index % 6}.wav", noise(index, 1.0))
    return tmp_path


def provoke_cache(capsys, tiny_en) -> list[str]:
    extract = ("--quiet", "extract", "sounds", "sounds.zarr", "--model", tiny_en)
    lines = said_by(capsys, *extract)
    lines += said_by(capsys, *extract, "--clip-seconds", 5)
    gone = Path("sounds/dog/dog0.wav").rename("dog0.wav")
    lines += said_by(capsys, *extract)
    gone.rename("sounds/dog/dog0.wav")
    with open("sounds.zarr/status/.locks/1-of-1", "w") as held:
        assert take_lock(held)
        lines += said_by(capsys, *extract)
    shard = Path("sounds.zarr/features/c.0.0.0.0")
    data = bytearray(shard.read_bytes())
    data[200] ^= 4
    shard.write_bytes(data)
    lines += said_by(capsys, "probe", "sounds.zarr", "--kind", "attentive") + said_by(capsys, "probe", "absent.zarr")
    lines += said_by(capsys, "--quiet", *extract[1:], "--repair")
    settings = Path("sounds.zarr/zarr.json")
    before = settings.read_text()
    settings.write_text(before.replace('"format_version": 2', '"format_version": 3'))
    lines += said_by(capsys, "info", "sounds.zarr")
    settings.write_text(before)
    return lines + said_by(capsys, "probe", "sounds")


def provoke_audio(capsys, tiny_en) -> list[str]:
    import av

    for name, seed in (("a", 98), ("b", 99)):
        write_wav(Path(f"bad/dog/{name}.wav"), noise(seed, 1.0))
    Path("bad/dog/cut.wav").write_bytes(Path("bad/dog/a.wav").read_bytes()[:4000])
    Path("bad/dog/text.wav").write_text("woof")
    Path("bad/dog/zero.ogg").touch()
    with av.open("bad/dog/film.mp4", "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for packets in (av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8)), None):
            film.mux(stream.encode(packets))
    Path("bad.csv").write_text("audio,label\nbad/dog/a.wav,dog\nbad/dog/gone.wav,dog\n")
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("x")
    lines = said_by(capsys, "--quiet", "extract", "bad", "bad.zarr", "--model", tiny_en)
    with DecodePool(1) as pool:
        pool.share(1000)
        ((_, reason),) = pool.map(read_into_memory, [Request(Crash(), 100, 0)])
    lines.append(f"failed: bad/dog/crash.wav: {reason}")
    lines += said_by(capsys, "--quiet", "extract", "bad.csv", "listed.zarr", "--model", tiny_en)
    for source in ("notes", "notes/a.txt"):
        lines += said_by(capsys, "extract", source, "x.zarr", "--model", tiny_en)
    for name, text in (
        ("quote", 'audio,label\nbad/dog/a.wav,"dog\n'), ("comma", "audio,label\nbad/dog/a.wav,dog,cat\n"),
        ("names", "clip,species\nbad/dog/a.wav,dog\n"), ("species", "audio,species\nbad/dog/a.wav,dog\n"),
    ):  # fmt: skip
        Path(f"{name}.csv").write_text(text)
        lines += said_by(capsys, "--quiet", "extract", f"{name}.csv", f"{name}.zarr", "--model", tiny_en)
    write_wav(Path("long/dog/a.wav"), noise(0, 3.0))
    lines += said_by(capsys, "--quiet", "extract", "long", "long.zarr", "--model", tiny_en, "--clip-seconds", 1)
    return lines + said_by(capsys, "probe", "bad.zarr")


def provoke_options(capsys, tiny_en, monkeypatch) -> list[str]:
    extract, lines = ("extract", "sounds", "x.zarr", "--model"), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options in (
        (tiny_en, "--clip-seconds", 0.7), (tiny_en, "--device", "cuda"), (tiny_en, "--shard", "auto"), ("tiny-en",),
        ("base.en",), ("facebook/hubert-large",), (tiny_en, "--engine", "ray", "--address", "127.0.0.1:6999"),
    ):  # fmt: skip
        lines += said_by(capsys, *extract, *options)
    Path("cached/whisper").mkdir(parents=True, exist_ok=True)
    Path("cached/whisper/base.en.pt").write_bytes(b"x" * 1000)
    lines += said_by(capsys, *extract, "base.en") + said_by(capsys, *extract, "cached/whisper/base.en.pt")
    with monkeypatch.context() as patch:
        patch.setattr(encode, "_encode_to_host", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
        lines += said_by(capsys, *extract, tiny_en)
    with monkeypatch.context() as patch:
        patch.setattr("whisper_at_cli.extract.backbones.weights.DEMO_PACKAGE", "no_such_package")
        lines += said_by(capsys, "demo")
    for error in (KeyboardInterrupt(), ZeroDivisionError("a bug"), ModuleNotFoundError("No module named 'jiwer'")):
        with monkeypatch.context() as patch:
            patch.setattr("whisper_at_cli.extract.cache.summary.summarise", lambda _, e=error: (_ for _ in ()).throw(e))
            lines += said_by(capsys, "info", "x.zarr")
    return lines


def provoke_heads(capsys) -> list[str]:
    rng = np.random.default_rng(0)
    several = (rng.random((60, 4)) < 0.4).astype(np.uint8)
    several[:3] = 0
    planted_cache(Path("several.zarr"), rng.normal(size=(60, 2, 25, 16)), several, fold=np.arange(60) % 3 + 1)
    train = ("--quiet", "train-head", "sounds.zarr", "--head", "wa-mlp", "--out", "tagger", "--epochs")
    lines = said_by(capsys, "--quiet", "probe", "several.zarr") + said_by(capsys, "--quiet", "probe", "sounds.zarr")
    lines += said_by(capsys, *train, 2) + said_by(capsys, *train, 3)
    lines += said_by(capsys, "--quiet", "train-head", "several.zarr", "--head", "wa-mlp", "--epochs", 1)
    settings = Path("sounds.zarr/zarr.json").read_text().replace('"clip_seconds": 10.0', '"clip_seconds": 5.0')
    Path("sounds.zarr").rename("short.zarr")
    before = Path("short.zarr/zarr.json").read_text()
    Path("short.zarr/zarr.json").write_text(settings)
    lines += said_by(capsys, "evaluate", "tagger", "short.zarr") + said_by(capsys, "evaluate", "tagger", "bad.zarr")
    Path("short.zarr/zarr.json").write_text(before)
    lines += said_by(capsys, "evaluate", "tagger", "short.zarr")
    lines += said_by(capsys, "tag", "sounds/dog/dog1.wav", "--head", "tagger", "--resolution", 4.5)
    return lines


def provoke_model(capsys) -> list[str]:
    """Another model than a head's: a whole Whisper of random weights, small."""
    from whisper.model import ModelDimensions, Whisper

    dims = {
        "n_mels": 80, "n_audio_ctx": 1500, "n_audio_state": 64, "n_audio_head": 2, "n_audio_layer": 2,
        "n_vocab": 51864, "n_text_ctx": 448, "n_text_state": 64, "n_text_head": 2, "n_text_layer": 1,
    }  # fmt: skip
    state = {name: torch.zeros_like(tensor) for name, tensor in Whisper(ModelDimensions(**dims)).state_dict().items()}
    torch.save({"dims": dims, "model_state_dict": state}, "other.pt")
    return said_by(capsys, "tag", "sounds/dog/dog1.wav", "--head", "tagger", "--model", "other.pt")


def provoke_results(capsys) -> list[str]:
    Path("broken.json").write_text("probe: 1/4 layers\n{}")
    lines = said_by(capsys, "report", "broken.json", "--out", "r.html")
    rng = np.random.default_rng(0)
    planted_cache(Path("four.zarr"), rng.normal(size=(40, 2, 25, 16)), np.arange(40) % 4, fold=np.arange(40) // 8 + 1)
    with pytest.warns(UserWarning, match="Glyph") as warned:
        said_by(capsys, "--quiet", "figure", "1", "\N{CJK UNIFIED IDEOGRAPH-72AC}=four.zarr", "--out", "f.png")
    return lines + [str(warning.message) for warning in warned]


def test_every_quoted_message_is_still_said(capsys, workplace, tiny_en, monkeypatch):
    assert len(MESSAGES) > 40
    lines = provoke_cache(capsys, tiny_en) + provoke_audio(capsys, tiny_en)
    lines += provoke_options(capsys, tiny_en, monkeypatch) + provoke_heads(capsys) + provoke_model(capsys)
    lines += provoke_results(capsys)
    exempt = tuple(NOT_PROVOKED)
    silent = [
        message
        for message in MESSAGES
        if not message.startswith(exempt) and not any(as_pattern(message).search(line) for line in lines)
    ]
    assert not silent, "\n".join(["never said:", *silent, "", "said were:", *lines])


@pytest.mark.parametrize("beginning", NOT_PROVOKED)
def test_what_is_not_provoked_stands_in_the_source(beginning):
    quoted = [message for message in MESSAGES if message.startswith(beginning)]
    assert quoted, "the document no longer quotes it"
    for message in quoted:
        assert stands_in_the_source(message), message


def test_a_message_that_nobody_says_is_found_out():
    assert not stands_in_the_source("error: the moon is in the wrong phase for extraction; wait for a fortnight")
    assert not stands_in_the_source("error: --tensorboard needs tensorflow: pip install 'whisper-at-cli[board]'")
