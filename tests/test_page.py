"""The page of a transcription: what is in it, and that nothing a user wrote gets out of its place."""

import base64
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

from conftest import noise, write_wav
from pages import HOSTILE, Elements, assert_nothing_got_out
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.heads.tagging.page import clock, render_page, timeline_data, write_page


def label(name, probability):
    return {"name": name, "probability": probability, "logit": 0.0}


RESULT = {
    "audio": "talk.wav", "model": "tiny.en", "language": "en", "duration": 4.0, "text": " A dog barks. Yes.",
    "segments": [
        {"id": 0, "start": 0.0, "end": 1.5, "text": " A dog barks.", "words": [
            {"word": " A", "start": 0.0, "end": 0.2, "probability": 0.9},
            {"word": " dog", "start": 0.2, "end": 0.8, "probability": 0.3},
            {"word": " barks.", "start": 0.8, "end": 1.5, "probability": 0.9}]},
        {"id": 1, "start": 2.5, "end": 3.0, "text": " Yes."},
    ],
    "tags": [
        {"start": 0.0, "end": 2.0, "labels": [label("dog", 0.8), label("rain", 0.2)]},
        {"start": 2.0, "end": 4.0, "labels": [label("sea_waves", 0.4), label("rain", 0.4)]},
    ],
    "events": [{"start": 0.0, "end": 2.0, "label": "dog", "probability": 0.8}],
    "head": {"head": "tl-tr", "backbone": "tiny.en", "class_names": ["dog", "rain", "sea_waves"]}, "settings": {},
}  # fmt: skip


def numbers(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype=dtype).tolist()


def test_the_timeline_holds_every_tag_and_event():
    data = timeline_data(RESULT)
    assert data["duration"] == 4000
    assert data["classes"] == ["dog", "rain", "sea_waves"]  # what has events first, then by probability over time
    assert data["counts"] == [1, 2, 1]
    assert numbers(data["windows"], "<u4") == [0, 2000, 2000, 4000]
    assert numbers(data["index"], "<u4") == [0, 0, 1, 1]
    assert numbers(data["value"], "u1") == [204, 51, 102, 102]
    assert data["events"] == [[(0, 2000, 0.8)], [], []]


def test_the_transcript_is_whispers_text_with_the_sounds_where_they_begin():
    found = Elements(render_page(RESULT, None))
    text = " ".join(found.text.split())
    assert "0:00 A dog barks." in text and "0:02Yes." in text
    words = [a for a in found.named("span") if a.get("class", "").startswith("w")]
    assert [(a["data-s"], a["data-e"], "unsure" in a["class"]) for a in words] == [
        ("0", "200", False), ("200", "800", True), ("800", "1500", False),
    ]  # fmt: skip
    assert [a["data-c"] for a in found.named("button") if a.get("class") == "sound"] == ["dog"]


def test_words_that_are_not_the_text_do_not_replace_it():
    segment = RESULT["segments"][0] | {"text": " Something else."}
    found = Elements(render_page(RESULT | {"segments": [segment]}, None))
    assert "Something else." in found.text and "barks" not in found.text


def test_nothing_that_a_user_wrote_gets_out_of_its_place(tmp_path):
    words = [{"word": HOSTILE, "start": 0, "end": 1, "probability": 0.5}]
    hostile = {
        "audio": f"a/{HOSTILE.replace('/', '')}", "model": HOSTILE, "language": HOSTILE, "duration": 2.0,
        "segments": [
            {"start": 0.0, "end": 1.0, "text": HOSTILE, "words": words}, {"start": 1.0, "end": 2.0, "text": HOSTILE},
        ],
        "tags": [{"start": 0.0, "end": 2.0, "labels": [label(HOSTILE, 0.5)]}],
        "events": [{"start": 0.0, "end": 2.0, "label": HOSTILE, "probability": 0.5}],
        "head": {"head": HOSTILE, "backbone": HOSTILE, "class_names": [HOSTILE]},
    }  # fmt: skip
    found = assert_nothing_got_out(render_page(hostile, None))
    assert found.text.count(HOSTILE) >= 5
    assert json.loads(found.scripts[0])["classes"] == [HOSTILE]
    assert any(a.get("data-c") == HOSTILE for a in found.named("button"))


def test_audio_is_part_of_the_page_byte_for_byte(tmp_path):
    audio = write_wav(tmp_path / "talk.wav", noise(0, 0.5))
    source = Elements(render_page(RESULT, audio)).named("audio")[0]["src"]
    assert source.startswith("data:audio/wav;base64,")
    assert base64.b64decode(source.partition(",")[2]) == audio.read_bytes()


@pytest.mark.parametrize("settings", [{"embed": False}, {"limit_mb": 0.001}])
def test_audio_that_is_too_large_or_unwanted_is_linked_from_where_the_page_lies(tmp_path, settings):
    audio = write_wav(tmp_path / "sound files" / "50% #1?.wav", noise(0, 0.5))
    found = Elements(render_page(RESULT, audio, folder=tmp_path / "pages", **settings))
    assert found.named("audio")[0]["src"] == "./../sound%20files/50%25%20%231%3F.wav"
    assert "is not part of this page; it is played from ../sound files/50% #1?.wav" in found.text


def test_a_page_without_audio_says_so_and_one_whose_audio_is_absent_is_refused(tmp_path):
    assert "positions can be followed but not heard" in render_page(RESULT, None)
    with pytest.raises(UsageError, match=r"absent\.wav is not there"):
        render_page(RESULT, tmp_path / "absent.wav")


def test_a_page_is_written_whole(tmp_path):
    path = write_page(RESULT, tmp_path / "new" / "page.html")
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    assert path.read_text(encoding="utf-8").endswith("</html>\n")


def test_a_page_of_nothing_is_still_a_page():
    empty = RESULT | {"segments": [], "tags": [], "events": [], "head": {}}
    found = Elements(render_page(empty, None))
    assert "No speech and no sounds were found." in found.text
    assert "hidden" in next(a for a in found.named("section") if a.get("id") == "sounds")


def test_tags_without_a_transcription_make_a_page():
    tagged = {"path": "a/dogs.wav", "duration": 4.0, "tags": RESULT["tags"], "events": RESULT["events"]}
    found = Elements(render_page(tagged, None))
    assert "dogs.wav" in found.text and len([a for a in found.named("button") if a.get("class") == "sound"]) == 1


def test_a_tag_of_a_long_recording_takes_a_few_bytes():
    windows = [
        {"start": i * 0.4, "end": i * 0.4 + 0.4, "labels": [label(f"class {(i + k) % 527}", 0.5) for k in range(20)]}
        for i in range(2000)
    ]
    small, large = (len(render_page(RESULT | {"tags": windows[:n]}, None)) for n in (1000, 2000))
    assert (large - small) / 20000 < 8


@pytest.mark.parametrize("ms, shown", [(0, "0:00"), (59999, "0:59"), (754000, "12:34"), (3723000, "1:02:03")])
def test_clock(ms, shown):
    assert clock(ms) == shown


def test_every_folder_of_templates_is_packaged():
    root = Path(__file__).resolve().parents[1]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    rooms = {
        "whisper_at_cli." + ".".join(folder.parent.relative_to(root).parts)
        for room in ("extract", "heads", "probe") for folder in (root / room).rglob("templates")
    }  # fmt: skip
    assert rooms and all("templates/*" in data.get(room, ()) for room in rooms)
