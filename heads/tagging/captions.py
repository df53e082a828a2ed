"""What `transcribe` found, as text: with sounds in brackets, as subtitles, as a list of sound events, or as JSON."""

from __future__ import annotations

from collections import deque

from whisper_at_cli import __version__
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.html import to_json
from whisper_at_cli.heads.tagging.cues import (
    Sound,
    audio_path,
    captioned_sounds,
    fitting_sounds,
    plan_cues,
    segment_tokens,
)

VTT_STYLE = "STYLE\n::cue(.sound) {\n  font-style: italic;\n}"


def write_captions(result: dict, format: str) -> str:
    """The result of `transcribe` in one of FORMATS, ending in a newline. Raises UsageError for another format."""
    if format not in _WRITERS:
        raise UsageError(f"format {format!r} is not known; choose from {', '.join(FORMATS)}")
    return _WRITERS[format](result)


def _txt(result: dict) -> str:
    """A line per segment, each sound in brackets where it begins; between segments on a line of its own."""
    sounds = deque(captioned_sounds(result))
    lines = []
    for segment in sorted(result.get("segments", []), key=lambda segment: segment["start"]):
        tokens = segment_tokens(segment)
        if not tokens:
            continue
        lines += [f"[{sound.label}]" for sound in _taken(sounds, tokens[0].start)]
        line = ""
        for token in tokens:
            line += "".join(f" [{sound.label}]" for sound in _taken(sounds, token.start)) + token.text
        lines.append(" ".join(line.split()))
        lines[-1] += "".join(f" [{sound.label}]" for sound in _taken(sounds, tokens[-1].end - 1))
    lines += [f"[{sound.label}]" for sound in sounds]
    return "".join(f"{line}\n" for line in lines)


def _taken(sounds: deque[Sound], time: float) -> list[Sound]:
    """Removes and returns the sounds that have begun by a time."""
    taken = []
    while sounds and sounds[0].start <= time:
        taken.append(sounds.popleft())
    return taken


def _srt(result: dict) -> str:
    """SubRip. It has no way to escape: an arrow in the text, which would read as a time line, loses a dash."""
    blocks = []
    for number, cue in enumerate(plan_cues(result), 1):
        lines = [*fitting_sounds(cue)[0], *cue.speech]
        text = "\n".join(line.replace("-->", "->") for line in lines)
        blocks.append(f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{text}\n")
    return "\n".join(blocks)


def _vtt(result: dict) -> str:
    """WebVTT. Notes say what made it and what was left out; sounds are of the class `sound`, in italics."""
    blocks, left_out = [], 0
    for cue in plan_cues(result):
        sounds, unnamed = fitting_sounds(cue)
        left_out += len(unnamed)
        lines = [f"<c.sound>{_vtt_text(line)}</c>" for line in sounds] + [_vtt_text(line) for line in cue.speech]
        blocks.append(f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n" + "\n".join(lines))
    notes = [_vtt_text(f"NOTE {note}") for note in _notes(result, left_out)]
    return "\n\n".join(["WEBVTT", *notes, VTT_STYLE, *blocks]) + "\n"


def _notes(result: dict, left_out: int) -> list[str]:
    """What made the captions, a line each."""
    head = result.get("head") or {}
    audio = audio_path(result)
    notes = [f"made by whisper-at-cli {__version__}" + (f" from {audio.name}" if audio else "")]
    if result.get("segments"):
        notes.append(f"text: Whisper {result.get('model')}, language {result.get('language')}")
    if head:
        notes.append(f"sounds in brackets: head {head.get('head')} on {head.get('backbone')}")
    if left_out:
        notes.append(f"{left_out} sounds found no room beside more probable ones")
    return [" ".join(note.split()) for note in notes]


def _vtt_text(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _clock(milliseconds: int, point: str) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{point}{milliseconds:03d}"


def _rttm(result: dict) -> str:
    """NIST's RTTM, a line per sound event: SPEAKER file 1 onset duration <NA> <NA> label probability <NA>."""
    audio = audio_path(result)
    name = _rttm_field(audio.stem if audio else "audio")
    return "".join(
        f"SPEAKER {name} 1 {event['start']:.3f} {event['end'] - event['start']:.3f} <NA> <NA> "
        f"{_rttm_field(event['label'])} {event['probability']:.4f} <NA>\n"
        for event in result.get("events", [])
    )


def _rttm_field(text: str) -> str:
    """RTTM divides at white space and has no quotes."""
    return "_".join(text.split()) or "<NA>"


def _tsv(result: dict) -> str:
    """A table of the sound events; seconds."""
    rows = [
        f"{event['start']:.3f}\t{event['end']:.3f}\t{' '.join(event['label'].split())}\t{event['probability']:.4f}\n"
        for event in result.get("events", [])
    ]
    return "".join(["start\tend\tlabel\tprobability\n", *rows])


def _json(result: dict) -> str:
    return to_json(result, indent=1) + "\n"


_WRITERS = {"txt": _txt, "srt": _srt, "vtt": _vtt, "rttm": _rttm, "tsv": _tsv, "json": _json}
FORMATS = tuple(_WRITERS)
