"""Every command and example in docs/transcribe.md works as it stands."""

import re
from pathlib import Path

import av
import numpy as np
import pytest
from planted_whisper import planted_head

from conftest import noise, write_wav
from whisper_at_cli.cli import main
from whisper_at_cli.extract.audio.decode import decode
from whisper_at_cli.extract.backbones.weights import read_weights
from whisper_at_cli.heads.checkpoint import save_head

PAGE = Path(__file__).resolve().parents[1] / "docs" / "transcribe.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), flags=re.S | re.M)


def write_m4a(path: Path, samples: np.ndarray) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


@pytest.fixture(scope="module")
def place(shared, tiny_en, tmp_path_factory):
    """Two seconds of speech as meeting.m4a, a folder of recordings, and a head of random weights."""
    place = tmp_path_factory.mktemp("docs")
    speech = decode(shared / "data" / "speech14" / "audio" / "LJ001-0002.flac")[:32000]
    write_m4a(place / "meeting.m4a", speech)
    write_wav(place / "recordings" / "a.wav", noise(0, 1.0))
    sha256 = read_weights("tiny.en").encoder_sha256()
    head = planted_head(dim=384, layers=4, backbone="tiny.en", sha256=sha256)
    save_head(head, place / "tagger", head.description)
    return place


@pytest.mark.parametrize("example", blocks("python"), ids=["functions", "tagger"])
def test_python_examples_run(place, monkeypatch, capsys, example):
    monkeypatch.chdir(place)
    exec(compile(example, str(PAGE), "exec"), {})
    assert "modern" in capsys.readouterr().out or "events" in example


@pytest.mark.parametrize("line", [line for block in blocks("sh") for line in block.splitlines()])
def test_commands_run(place, monkeypatch, capsys, line):
    monkeypatch.chdir(place)
    program, *arguments = line.split()
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    out = capsys.readouterr().out
    assert program == "whisper-at-cli" and exit.value.code == 0
    assert "modern" in out.lower() or '"tags"' in (place / "tags.jsonl").read_text()
