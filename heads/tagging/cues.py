"""Cues: what a caption shows and when, planned from a transcription and its sound events.

Speech is cut into cues of at most two lines, at sentence ends, commas and pauses where it can be. A sound is named
once, where it begins: in a cue of its own between the words, or on a line above the words that it falls on. Times are
whole milliseconds, and no two cues overlap.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path

LINE_WIDTH = 42  # characters; a Chinese or Japanese one counts as two
SHORTEST_MS, LONGEST_MS = 1000, 7000  # that a cue stays, where there is room
STEP_MS = 100  # between the beginnings of two cues, whatever the transcription says
PAUSE_MS = 1200  # a silence that a cue should not span
SPEAKING = frozenset(  # sounds that are captioned by what is said, in AudioSet's names
    "speech;male speech, man speaking;female speech, woman speaking;child speech, kid speaking;conversation;"
    "narration, monologue;human voice".split(";")
)


@dataclass(frozen=True)
class Token:
    """A piece of text that no line break divides, with the space before it, and when it is said."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Sound:
    """A sound event as it is captioned."""

    start: int
    end: int
    label: str
    probability: float


@dataclass(frozen=True)
class Cue:
    """What is shown from `start` to `end`: up to two lines of speech, and the sounds that begin there."""

    start: int
    end: int
    speech: tuple[str, ...] = ()
    sounds: tuple[Sound, ...] = ()


def plan_cues(result: dict) -> list[Cue]:
    """The cues of a transcription, in order and without overlap."""
    speech = _settled([cue for segment in result.get("segments", []) for cue in _speech_cues(segment)])
    return _with_sounds(speech, captioned_sounds(result))


def captioned_sounds(result: dict) -> list[Sound]:
    """The sound events by their beginning: those of one label that touch are one, and those that only say that someone
    speaks are left out where the text says what."""
    spoken = [_span(segment) for segment in result.get("segments", []) if segment["text"].strip()]
    sounds: dict[str, list[Sound]] = {}
    for event in sorted(result.get("events", []), key=lambda event: event["start"]):
        (start, end), label = _span(event), clean_label(event["label"])
        if label.casefold() in SPEAKING and any(start < last and first < end for first, last in spoken):
            continue
        same = sounds.setdefault(label, [])
        probability = event.get("probability") or 0.0
        if same and start <= same[-1].end:
            last = same[-1]
            same[-1] = Sound(last.start, max(last.end, end), label, max(last.probability, probability))
        else:
            same.append(Sound(start, end, label, probability))
    return sorted(itertools.chain(*sounds.values()), key=lambda sound: (sound.start, -sound.probability, sound.label))


def audio_path(result: dict) -> Path | None:
    """Of the file that was transcribed or tagged, as far as the result knows."""
    path = result.get("audio") or result.get("path")
    return Path(str(path)) if path else None


def clean_label(label: str) -> str:
    """A class name as a person would write it, on one line and without brackets of its own."""
    return " ".join(re.sub(r"[_\[\]\s]+", " ", label).split()) or "sound"


def fitting_sounds(cue: Cue) -> tuple[list[str], list[Sound]]:
    """The line or two that name the cue's sounds, and the sounds for which there was no room, the least probable."""
    lines = 1 if cue.speech else 2
    kept = sorted(cue.sounds, key=lambda sound: -sound.probability)
    while True:
        wrapped = _packed([_bracketed(sound.label) for sound in cue.sounds if sound in kept])
        if len(wrapped) <= lines:
            return wrapped, [sound for sound in cue.sounds if sound not in kept]
        kept.pop()


def width(text: str) -> int:
    """Of a line in characters, as a caption's box has it."""
    if text.isascii():
        return len(text)
    return sum(_character_width(character) for character in text)


def _character_width(character: str) -> int:
    if unicodedata.category(character)[0] == "M":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _bracketed(label: str) -> str:
    if width(label) <= LINE_WIDTH - 2:
        return f"[{label}]"
    while width(label) > LINE_WIDTH - 3:
        label = label[:-1].rstrip()
    return f"[{label}…]"


def _packed(labels: list[str]) -> list[str]:
    """Labels side by side, as many to a line as fit; each once."""
    lines: list[str] = []
    for label in dict.fromkeys(labels):
        if lines and width(lines[-1]) + 1 + width(label) <= LINE_WIDTH:
            lines[-1] += f" {label}"
        else:
            lines.append(label)
    return lines


def _span(item: dict) -> tuple[int, int]:
    start = max(0, round(1000 * item["start"]))
    return start, max(start, round(1000 * item["end"]))


# Speech


def segment_tokens(segment: dict) -> list[Token]:
    """The segment's text in pieces, timed by its words where they make up the text, else by its characters."""
    words = segment.get("words") or []
    if words and "".join(word["word"] for word in words).split() == segment["text"].split():
        return [Token(re.sub(r"\s+", " ", word["word"]), *_span(word)) for word in words if word["word"].strip()]
    start, end = _span(segment)
    pieces = [re.sub(r"\s+", " ", piece) for piece in re.findall(r"\s*\S+", segment["text"])]
    return _spread(pieces, start, end)


def _spread(pieces: list[str], start: int, end: int) -> list[Token]:
    """Pieces said one after the other at an even pace."""
    total = sum(map(len, pieces))
    tokens, said = [], 0
    for piece in pieces:
        first, said = said, said + len(piece)
        tokens.append(Token(piece, start + (end - start) * first // total, start + (end - start) * said // total))
    return tokens


def _divided(token: Token) -> list[Token]:
    """A token that no line can hold, as of a script without spaces, character by character."""
    if width(token.text.strip()) <= LINE_WIDTH:
        return [token]
    pieces: list[str] = []
    for character in token.text:
        if pieces and (pieces[-1].isspace() or unicodedata.category(character) in ("Mn", "Mc", "Me", "Pe", "Pf", "Po")):
            pieces[-1] += character  # marks, and what may not begin a line
        else:
            pieces.append(character)
    return _spread(pieces, token.start, token.end)


def _speech_cues(segment: dict) -> list[Cue]:
    """The segment's text in cues: the cheapest way to cut it, found over all ways."""
    tokens = [piece for token in segment_tokens(segment) for piece in _divided(token)]
    text = _Text(tokens)
    best: list[tuple[float, int, int]] = [(0.0, 0, 0)]  # up to a token: cost, where its cue begins and where it breaks
    for last in range(1, len(tokens) + 1):
        ways = []
        for first in range(last - 1, -1, -1):
            broken = text.line_break(first, last)
            if broken is None:
                break
            ways.append((best[first][0] + text.cost(first, last), first, broken))
        best.append(min(ways))
    cues, last = [], len(tokens)
    while last:
        _, first, broken = best[last]
        parts = (tokens[first:broken], tokens[broken:last])
        lines = tuple("".join(token.text for token in part).strip() for part in parts if part)
        cues.append(Cue(tokens[first].start, tokens[last - 1].end, lines))
        last = first
    return cues[::-1]


class _Text:
    """Tokens in a row, with what the search for cues asks about them again and again."""

    def __init__(self, tokens: list[Token]):
        self.tokens = tokens
        self.ends = [0, *itertools.accumulate(width(token.text) for token in tokens)]
        self.space = [len(token.text) - len(token.text.lstrip()) for token in tokens]
        self.break_cost = [_break_cost(token.text) for token in tokens]
        gaps = [b.start - a.end >= PAUSE_MS for a, b in itertools.pairwise(tokens)]
        self.pauses = [0, *itertools.accumulate(gaps)]

    def width(self, first: int, last: int) -> int:
        return self.ends[last] - self.ends[first] - self.space[first]

    def line_break(self, first: int, last: int) -> int | None:
        """Where a second line begins, `last` if all fit on one; None if two lines cannot hold them."""
        whole = self.width(first, last)
        if whole <= LINE_WIDTH or last - first == 1:
            return last
        if whole > 2 * LINE_WIDTH + 1:
            return None
        ways = []
        for middle in range(first + 1, last):
            above, below = self.width(first, middle), self.width(middle, last)
            if max(above, below) <= LINE_WIDTH:
                ways.append((abs(above - below) + self.break_cost[middle - 1] / 3, middle))
        return min(ways)[1] if ways else None

    def cost(self, first: int, last: int) -> float:
        """How far the cue of these tokens is from a good one."""
        tokens = self.tokens
        spoken = tokens[last - 1].end - tokens[first].start
        pause_after = last < len(tokens) and self.pauses[last] > self.pauses[last - 1]
        cost = 100.0 + (0 if last == len(tokens) or pause_after else self.break_cost[last - 1])
        cost += 40 * (spoken > LONGEST_MS) + 40 * (spoken < SHORTEST_MS) + 20 * (self.width(first, last) < 15)
        return cost + 300 * (self.pauses[last - 1] - self.pauses[first])


def _break_cost(text: str) -> float:
    """How much a break after this text disturbs."""
    text = text.rstrip("\"'”’」』)")
    if text.endswith((".", "?", "!", "。", "？", "！", "…")):
        return 0
    return 10 if text.endswith((",", ";", ":", "–", "—", "、", "，")) else 40


def _settled(cues: list[Cue]) -> list[Cue]:
    """In order, each over before the next begins, and none shorter than it need be."""
    cues = sorted(cues, key=lambda cue: cue.start)
    settled: list[Cue] = []
    for cue in cues:
        start = max(cue.start, settled[-1].start + STEP_MS) if settled else cue.start
        settled.append(replace(cue, start=start, end=max(cue.end, start + SHORTEST_MS)))
    for i in range(len(settled) - 1):
        settled[i] = replace(settled[i], end=min(settled[i].end, settled[i + 1].start))
    return settled


# Sounds


def _with_sounds(speech: list[Cue], sounds: list[Sound]) -> list[Cue]:
    """Cues of speech and of sounds, in order. `speech` is in order and without overlap."""
    starts = [cue.start for cue in speech]
    above: dict[int, list[Sound]] = {}  # number of a cue of speech -> sounds on a line above it
    alone: list[Cue] = []
    for sound in sounds:
        onset, at = sound.start, bisect_right(starts, sound.start) - 1
        if at >= 0 and onset < speech[at].end:
            late = onset - speech[at].start > speech[at].end - onset
            if not late or sound.end - speech[at].end < SHORTEST_MS:
                above.setdefault(at, []).append(sound)
                continue
            onset = speech[at].end  # it is heard for longer after these words than during them
        room = speech[at + 1].start - onset if at + 1 < len(speech) else LONGEST_MS
        if room < SHORTEST_MS:
            above.setdefault(at + 1, []).append(sound)
        else:
            stays = min(max(sound.end - onset, SHORTEST_MS), LONGEST_MS, room)
            alone.append(Cue(onset, onset + stays, sounds=(sound,)))
    spoken = [replace(cue, sounds=tuple(above.get(i, ()))) for i, cue in enumerate(speech)]
    return sorted(spoken + _joined(alone), key=lambda cue: cue.start)


def _joined(cues: list[Cue]) -> list[Cue]:
    """Cues of sounds without overlap: what begins within a second is one cue, what begins later ends the one before."""
    joined: list[Cue] = []
    for cue in sorted(cues, key=lambda cue: cue.start):
        before = joined[-1] if joined else None
        if before and cue.start < before.end and cue.start - before.start < SHORTEST_MS:
            joined[-1] = replace(before, end=max(before.end, cue.end), sounds=before.sounds + cue.sounds)
            continue
        if before and cue.start < before.end:
            joined[-1] = replace(before, end=cue.start)
        joined.append(cue)
    return joined
