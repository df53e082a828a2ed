"""Captions: nothing that was said or heard is lost, nothing overlaps, and each format is what its readers expect."""

import json
import re

import numpy as np
import pytest

from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.heads.tagging.captions import FORMATS, write_captions
from whisper_at_cli.heads.tagging.cues import LINE_WIDTH, SHORTEST_MS, fitting_sounds, plan_cues, width

SENTENCE = " The rain in Spain stays mainly in the plain, they say, but not on every single day of the year."
WORDS = (
    "the of rain dog, quickly understanding a I'm no. What? extraordinarily well; then — (aside) 42% really!".split()
)


def segment(start, end, text, words=None):
    return {"id": 0, "start": start, "end": end, "text": text} | ({"words": words} if words else {})


def event(start, end, label, probability=0.9):
    return {"start": start, "end": end, "label": label, "probability": probability}


def result(segments=(), events=(), **more):
    text = "".join(segment["text"] for segment in segments)
    head = {"head": "tl-tr", "backbone": "tiny.en", "class_names": []}
    return {
        "audio": "a/talk one.wav", "model": "tiny.en", "language": "en", "duration": 60.0, "text": text,
        "segments": list(segments), "tags": [], "events": list(events), "head": head, "settings": {},
    } | more  # fmt: skip


def timed(text, start, seconds):
    """Words of a text, evenly spoken."""
    pieces = re.findall(r"\s*\S+", text)
    return [
        {"word": piece, "start": start + seconds * i / len(pieces), "end": start + seconds * (i + 1) / len(pieces),
         "probability": 0.9}
        for i, piece in enumerate(pieces)
    ]  # fmt: skip


def random_result(seed, *, words):
    """Speech and sounds as messy as they come: overlaps, empty and immediate segments, sounds across everything."""
    rng = np.random.default_rng(seed)
    segments, events, now = [], [], 0.0
    for _ in range(rng.integers(0, 12)):
        now += rng.choice([0, 0, 0.3, 1.5, 6, -0.5])
        now = max(now, 0)
        length = float(rng.choice([0, 0.2, 1, 4, 15]))
        text = " " + " ".join(rng.choice(WORDS, rng.integers(0, 40)))
        spoken = timed(text, now, length) if words else None
        segments.append(segment(now, now + length, text, spoken))
        now += length
    for _ in range(rng.integers(0, 15)):
        start = float(rng.uniform(0, max(now, 5)))
        label = str(rng.choice(["dog", "sea_waves", "Speech", "Vehicle horn, car horn, honking", "x" * 60]))
        events.append(event(start, start + float(rng.choice([0.1, 0.4, 3, 30])), label, float(rng.uniform(0.2, 1))))
    return result(segments, events)


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_no_cue_overlaps_no_line_is_too_long_and_no_word_is_lost(seed, words):
    given = random_result(seed, words=words)
    cues = plan_cues(given)
    for cue, following in zip(cues, cues[1:], strict=False):
        assert cue.start < cue.end <= following.start
    for cue in cues:
        named, _ = fitting_sounds(cue)
        assert len(cue.speech) <= 2 and len(named) <= (1 if cue.speech else 2) and len(cue.speech) + len(named) > 0
        assert all(0 < width(line) <= LINE_WIDTH for line in [*cue.speech, *named])
        assert cue.speech or cue.end - cue.start >= SHORTEST_MS
    said = " ".join(line for cue in cues for line in cue.speech).split()
    in_order = sorted(given["segments"], key=lambda segment: segment["start"])
    assert sorted(said) == sorted(" ".join(segment["text"] for segment in in_order).split())
    named = {label for cue in cues for label in (s.label for s in cue.sounds)}
    heard = {e["label"].replace("_", " ") for e in given["events"]} - {"Speech"}
    assert heard <= named <= heard | {"Speech"}


def test_text_without_sounds_is_whispers_text_in_every_format_that_has_text():
    spoken = result([segment(0, 5, SENTENCE), segment(5.5, 7, " Quite so.")], [event(2, 3, "dog"), event(8, 9, "rain")])
    for format in ("txt", "srt", "vtt"):
        text = re.sub(r"<[^>]*>|\[[^]]*\]", "", write_captions(spoken, format))
        lines = [line for line in text.splitlines() if line and "-->" not in line and not line.isdecimal()]
        if format == "vtt":
            lines = lines[lines.index("}") + 1 :]
        assert " ".join(" ".join(lines).split()) == " ".join((SENTENCE + " Quite so.").split())


def test_a_sound_between_words_has_a_cue_of_its_own_and_one_over_words_a_line_above_them():
    spoken = result(
        [segment(0, 3, " Good morning."), segment(10, 13, " Good night.")],
        [event(4, 6.5, "dog"), event(10.5, 12, "sea_waves")],
    )
    assert write_captions(spoken, "srt") == (
        "1\n00:00:00,000 --> 00:00:03,000\nGood morning.\n\n"
        "2\n00:00:04,000 --> 00:00:06,500\n[dog]\n\n"
        "3\n00:00:10,000 --> 00:00:13,000\n[sea waves]\nGood night.\n"
    )


def test_a_sound_too_short_to_read_stays_a_second_and_a_long_one_leaves_again():
    cues = plan_cues(result(events=[event(1, 1.4, "dog"), event(10, 3000, "rain")]))
    assert [(cue.start, cue.end) for cue in cues] == [(1000, 2000), (10000, 17000)]


def test_a_sound_just_before_words_stands_above_them():
    cues = plan_cues(result([segment(3, 5, " Hello.")], [event(2.6, 4, "dog")]))
    assert [(cue.start, cue.speech, [s.label for s in cue.sounds]) for cue in cues] == [(3000, ("Hello.",), ["dog"])]


def test_a_sound_that_begins_at_the_end_of_words_and_goes_on_comes_after_them():
    cues = plan_cues(result([segment(0, 4, " Hello.")], [event(3.8, 9, "dog")]))
    assert [(cue.start, cue.end, len(cue.sounds)) for cue in cues] == [(0, 4000, 0), (4000, 9000, 1)]


def test_events_of_one_label_that_touch_are_named_once():
    events = [event(0, 2, "dog", 0.5), event(2, 4, "dog", 0.8), event(20, 21, "dog")]
    cues = plan_cues(result(events=events))
    assert [(cue.start, cue.end, cue.sounds[0].probability) for cue in cues] == [(0, 4000, 0.8), (20000, 21000, 0.9)]


def test_that_someone_speaks_is_not_named_beside_what_is_said():
    spoken = result([segment(0, 3, " Hello.")], [event(1, 2, "Speech"), event(8, 9, "Speech"), event(1, 2, "Singing")])
    assert write_captions(spoken, "txt") == "Hello. [Singing]\n[Speech]\n"


def test_sounds_without_room_are_the_least_probable_and_vtt_says_how_many():
    names = ["Vehicle horn, car horn, honking", "Domestic animals, pets", "Subway, metro, underground"]
    events = [event(0, 3, name, 0.5 + i / 10) for i, name in enumerate(names)]
    cue = plan_cues(result([segment(0, 3, " Hello.")], events))[0]
    lines, unnamed = fitting_sounds(cue)
    assert lines == ["[Subway, metro, underground]"]
    assert {sound.label for sound in unnamed} == set(names[:2])
    vtt = write_captions(result([segment(0, 3, " Hello.")], events), "vtt")
    assert "NOTE 2 sounds found no room beside more probable ones" in vtt


def test_words_time_the_cues_of_a_long_segment():
    words = timed(SENTENCE, 10, 8)
    cues = plan_cues(result([segment(10, 30, SENTENCE, words)]))
    assert len(cues) == 2 and cues[0].start == 10000 and cues[1].end == 18000
    assert cues[0].speech == ("The rain in Spain stays", "mainly in the plain,")
    assert cues[0].end == round(1000 * next(word for word in words if "plain," in word["word"])["end"])


def test_a_cue_ends_where_the_speaker_pauses():
    words = [*timed(" Wait. No,", 0, 1), *timed(" not here.", 2.2, 1)]
    cues = plan_cues(result([segment(0, 3.2, " Wait. No, not here.", words)]))
    assert [(cue.start, cue.end, cue.speech) for cue in cues] == [
        (0, 1000, ("Wait. No,",)), (2200, 3200, ("not here.",)),
    ]  # fmt: skip


def test_words_that_are_not_the_text_do_not_replace_it():
    cues = plan_cues(result([segment(0, 4, " What was said.", timed(" something else", 0, 4))]))
    assert cues[0].speech == ("What was said.",)


def test_a_script_without_spaces_is_cut_to_lines_and_no_line_begins_with_a_full_stop():
    text = "今日はとても良い天気ですから、公園まで歩いて行きましょう。" * 3
    cues = plan_cues(result([segment(0, 20, text)]))
    assert "".join(line for cue in cues for line in cue.speech) == text
    assert all(width(line) <= LINE_WIDTH and line[0] not in "、。" for cue in cues for line in cue.speech)
    assert cues[0].start == 0 and cues[-1].end == 20000


def test_times_beyond_an_hour_and_beyond_a_hundred():
    spoken = result([segment(3661.5, 3663, " Still here."), segment(360000, 360002, " And on.")])
    assert "01:01:01,500 --> 01:01:03,000" in write_captions(spoken, "srt")
    vtt = write_captions(spoken, "vtt")
    assert "01:01:01.500 --> 01:01:03.000" in vtt and "100:00:00.000 --> 100:00:02.000" in vtt


def test_vtt_escapes_text_and_its_notes_and_srt_has_no_arrow_in_its_text():
    spoken = result([segment(0, 3, " a <b> & --> c")], [event(5, 6, "<i>dog")], audio="x --> y.wav")
    vtt = write_captions(spoken, "vtt")
    assert vtt.startswith("WEBVTT\n\nNOTE made by whisper-at-cli")
    assert "a &lt;b&gt; &amp; --&gt; c" in vtt and "<c.sound>[&lt;i&gt;dog]</c>" in vtt
    assert vtt.count("-->") == 2
    assert write_captions(spoken, "srt").count("-->") == 2


def test_blank_lines_in_a_text_cannot_end_a_cue():
    srt = write_captions(result([segment(0, 3, " one\n\n2\n00:00:09,000 --> 00:00:10,000\nfake")]), "srt")
    assert len(re.split(r"\n\n", srt.strip())) == 1


def test_txt_names_sounds_where_they_begin():
    text = " It rained and the dog came in."
    spoken = result(
        [segment(2, 5.5, text, timed(text, 2, 3.5))], [event(0, 1, "rain"), event(4, 5, "dog"), event(9, 10, "dog")]
    )
    assert write_captions(spoken, "txt") == "[rain]\nIt rained and the [dog] dog came in.\n[dog]\n"


def test_rttm_has_ten_columns_whatever_the_names_are():
    lines = write_captions(result(events=[event(1, 2.5, "sea waves"), event(2, 3, "dog", 0.25)]), "rttm").splitlines()
    assert lines[0] == "SPEAKER talk_one 1 1.000 1.500 <NA> <NA> sea_waves 0.9000 <NA>"
    assert [len(line.split()) for line in lines] == [10, 10]


def test_tsv_is_a_table_of_the_events():
    rows = [line.split("\t") for line in write_captions(result(events=[event(1, 2.5, "a\tb")]), "tsv").splitlines()]
    assert rows == [["start", "end", "label", "probability"], ["1.000", "2.500", "a b", "0.9000"]]


def test_json_is_the_result_and_strict_json():
    spoken = result([segment(0, 1, " Ünï")]) | {
        "settings": {"x": float("nan"), "y": np.float32(0.5), "z": np.arange(2)}
    }
    text = write_captions(spoken, "json")
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read == spoken | {"settings": {"x": None, "y": 0.5, "z": [0, 1]}} and "Ünï" in text


def test_tags_without_a_transcription_are_captioned_too():
    tagged = {"path": "a/dogs.wav", "duration": 9.0, "tags": [], "events": [event(1, 3, "dog"), event(5, 8, "Speech")]}
    assert write_captions(tagged, "txt") == "[dog]\n[Speech]\n"
    assert write_captions(tagged, "rttm").startswith("SPEAKER dogs 1 1.000 2.000 ")
    assert "NOTE made by whisper-at-cli" in write_captions(tagged, "vtt")


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_without_speech_or_sounds_has_no_cues(format):
    text = write_captions(result(), format)
    assert {"txt": text == "", "srt": text == "", "rttm": text == "", "tsv": text.count("\n") == 1}.get(format, True)
    assert "-->" not in text


def test_an_unknown_format_is_refused():
    with pytest.raises(UsageError, match="'doc' is not known; choose from txt, srt, vtt, rttm, tsv, json"):
        write_captions(result(), "doc")
