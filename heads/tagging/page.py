"""A transcription with its sounds as one HTML file that loads nothing: player, transcript and timeline of the tags."""

from __future__ import annotations

import base64
import os
from collections import defaultdict
from pathlib import Path
from urllib.parse import quote

import numpy as np

from whisper_at_cli import __version__
from whisper_at_cli.extract.cache.store import LocalStore
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.html import data_block, document, escape, fill, template
from whisper_at_cli.heads.tagging.cues import audio_path

EMBED_MB = 20  # of audio; a page grows by four thirds of it
UNSURE = 0.5  # words less probable are marked
MIME_TYPES = {
    ".wav": "audio/wav", ".mp3": "audio/mpeg", ".flac": "audio/flac", ".ogg": "audio/ogg", ".oga": "audio/ogg",
    ".opus": "audio/ogg", ".m4a": "audio/mp4", ".mp4": "audio/mp4", ".aac": "audio/aac", ".webm": "audio/webm",
}  # fmt: skip
HERE = "whisper_at_cli.heads.tagging"


def write_page(result: dict, out: str | Path, audio: str | Path | None = None, *, embed: bool = True) -> Path:
    """Write the page of a transcription to `out`, whole or not at all, and return its path. See `render_page`."""
    out = Path(out)
    page = render_page(result, audio, embed=embed, folder=out.parent)
    LocalStore(out.parent).write_whole(out.name, [page.encode()])
    return out


def render_page(
    result: dict, audio: str | Path | None, *, embed: bool = True, folder: str | Path = ".", limit_mb: float = EMBED_MB
) -> str:
    """The page as text.

    With `embed`, audio of up to `limit_mb` MB is part of the page; other audio is linked, relative to the `folder` in
    which the page will lie. Without audio (None) positions can be followed but not heard. Raises UsageError where the
    audio is not there.
    """
    player, note = _player(audio, embed, Path(folder), limit_mb)
    timeline = timeline_data(result)
    body = fill(
        template(HERE, "page.html"),
        {
            "name": escape(_name(result)),
            "about": escape(_about(result)),
            "player": player,
            "note": f'<p class="note">{escape(note)}</p>' if note else "",
            "sounds_hidden": "" if timeline["classes"] else "hidden",
            "transcript": _transcript(result) or '<p class="soft">No speech and no sounds were found.</p>',
            "made": f"Made by whisper-at-cli {escape(__version__)}. This page is complete in itself and loads nothing.",
            "data": data_block("timeline-data", timeline),
        },
    )
    style = template("whisper_at_cli.extract", "base.css") + template(HERE, "page.css")
    script = template("whisper_at_cli.extract", "base.js") + template(HERE, "page.js")
    return document(title=_name(result), body=body, style=style, script=script, media=audio is not None)


def timeline_data(result: dict) -> dict:
    """What the page's script draws: for each class its windows (numbers, and probabilities in 255ths) and its events.

    Classes that have events come first, then those with the most probability over time. Times are milliseconds; long
    arrays are little-endian and in base64, a twentieth of the size of the tags as JSON.
    """
    windows, tags = _windows(result)
    events = defaultdict(list)
    for event in result.get("events", []):
        span = (_ms(event["start"]), _ms(event["end"]))
        events[event["label"]].append((*span, round(float(event.get("probability") or 0), 4)))
    weight = {name: sum(value for _, value in pairs) for name, pairs in tags.items()}
    names = sorted({*tags, *events}, key=lambda name: (name not in events, -weight.get(name, 0), name))
    pairs = [pair for name in names for pair in tags.get(name, ())]
    return {
        "duration": _duration(result),
        "classes": names,
        "counts": [len(tags.get(name, ())) for name in names],
        "windows": _packed([time for window in windows for time in window], "<u4"),
        "index": _packed([number for number, _ in pairs], "<u4"),
        "value": _packed([round(255 * min(1, max(0, value))) for _, value in pairs], "u1"),
        "events": [sorted(events.get(name, ())) for name in names],
    }


def _windows(result: dict) -> tuple[list[tuple[int, int]], dict[str, list[tuple[int, float]]]]:
    """Start and end of every tag window, in order, and by class the windows' numbers with its probability there."""
    windows, tags = [], defaultdict(list)
    for number, window in enumerate(sorted(result.get("tags", []), key=lambda window: window["start"])):
        windows.append((_ms(window["start"]), _ms(window["end"])))
        for label in window["labels"]:
            tags[label["name"]].append((number, float(label["probability"])))
    return windows, tags


def _packed(values: list, dtype: str) -> str:
    return base64.b64encode(np.asarray(values, dtype=dtype).tobytes()).decode()


def _ms(seconds: float) -> int:
    return max(0, round(1000 * seconds))


def _duration(result: dict) -> int:
    timed = (*result.get("segments", []), *result.get("tags", []), *result.get("events", []))
    return _ms(max([result.get("duration") or 0, *(item["end"] for item in timed)]))


def _name(result: dict) -> str:
    path = audio_path(result)
    return path.name if path else "transcription"


def _about(result: dict) -> str:
    """Length, models and language, in one line."""
    head = result.get("head") or {}
    parts = [clock(_duration(result))]
    if result.get("model"):
        parts.append(f"Whisper {result['model']}" + (f" ({result['language']})" if result.get("language") else ""))
    if head.get("head"):
        on = f" on {head['backbone']}" if head.get("backbone") else ""
        count = head.get("classes") or len(head.get("class_names") or ())
        parts.append(f"sounds: {head['head']}{on}" + (f", {count} classes" if count else ""))
    return " · ".join(parts)


def clock(milliseconds: int) -> str:
    """1:02:03, or 2:03 below an hour."""
    seconds = milliseconds // 1000
    minutes = f"{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return f"{seconds // 3600}:{minutes}" if seconds >= 3600 else minutes.removeprefix("0")


def _player(audio: str | Path | None, embed: bool, folder: Path, limit_mb: float) -> tuple[str, str]:
    """The audio element, or a button that lets time run without sound; and what a reader should know about it."""
    if audio is None:
        return (
            '<button class="button" id="silent" type="button">Play</button><output id="clock" class="clock"></output>',
            "No audio in this page: positions can be followed but not heard.",
        )
    audio = Path(audio)
    if not audio.is_file():
        raise UsageError(f"the audio {audio} is not there; give its path, or make the page without audio")
    size = audio.stat().st_size / 1e6
    if embed and size <= limit_mb:
        mime = MIME_TYPES.get(audio.suffix.lower(), "application/octet-stream")
        source, note = f"data:{mime};base64,{base64.b64encode(audio.read_bytes()).decode()}", ""
    else:
        source, shown = _link(audio, folder)
        note = f"The audio ({size:.0f} MB) is not part of this page; it is played from {shown}."
    return f'<audio id="audio" controls preload="metadata" src="{escape(source)}"></audio>', note


def _link(audio: Path, folder: Path) -> tuple[str, str]:
    """Address of the audio as seen from the page's folder, and how to show it."""
    try:
        shown = Path(os.path.relpath(audio, folder)).as_posix()
    except ValueError:  # another drive
        return audio.resolve().as_uri(), str(audio)
    return f"./{quote(shown)}", shown


def _transcript(result: dict) -> str:
    """Segments and sounds in order of their beginning."""
    parts = [(_ms(segment["start"]), 1, _segment(segment)) for segment in result.get("segments", [])]
    parts += [(_ms(event["start"]), 0, _sound(event)) for event in result.get("events", [])]
    lines, row = [], []
    for _, kind, part in sorted(parts, key=lambda part: part[:2]):
        if kind == 0:
            row.append(part)
            continue
        lines += [_row(row), part] if row else [part]
        row = []
    return "\n".join(lines + ([_row(row)] if row else []))


def _row(sounds: list[str]) -> str:
    return f'<div class="sounds"><div class="list">{"".join(sounds)}</div></div>'


def _segment(segment: dict) -> str:
    words = segment.get("words") or []
    text = segment["text"]
    if words and "".join(word["word"] for word in words).split() == text.split():
        said = "".join(map(_word, words))
    else:
        said = escape(text.strip())
    start = _ms(segment["start"])
    return (
        f'<div class="segment" data-s="{start}" data-e="{_ms(segment["end"])}">'
        f'<button class="time" type="button" tabindex="-1">{clock(start)}</button><p class="said">{said}</p></div>'
    )


def _word(word: dict) -> str:
    text = word["word"]
    space = " " if text[:1].isspace() else ""
    probability = word.get("probability")
    unsure = " unsure" if probability is not None and probability < UNSURE else ""
    times = f'data-s="{_ms(word["start"])}" data-e="{_ms(word["end"])}"'
    return f'{space}<span class="w{unsure}" {times}>{escape(text.strip())}</span>'


def _sound(event: dict) -> str:
    start, end = _ms(event["start"]), _ms(event["end"])
    probability = f", probability {event['probability']:.2f}" if event.get("probability") is not None else ""
    label = escape(event["label"])
    return (
        f'<button class="sound" type="button" data-s="{start}" data-e="{end}" data-c="{label}" '
        f'title="{clock(start)} to {clock(end)}{probability}">{escape(event["label"].replace("_", " "))} '
        f'<span class="length">{clock(start)}</span></button>'
    )
