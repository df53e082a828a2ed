"""How an input is changed: bytes, numbers within bytes, JSON values by type, fields and rows of a CSV file.

Each function takes a `random.Random` and returns something new; the same generator gives the same result.
"""

from __future__ import annotations

import itertools
import json
import random
import struct

EXTREME = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1,
           2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1)  # fmt: skip
WIDTHS = {1: "B", 2: "H", 4: "I", 8: "Q"}
VALUES = (
    None, True, False, 0, 1, -1, 2, 25, 255, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.0, 0.5, -0.0, 1e-320, 1e308,
    float("nan"), float("inf"), -float("inf"), "", " ", "0", "-1", "nan", "a", "1e999", "ä\u2028\x00", "\ud800",
    "a" * 2000, [], [[]], [None], [0], [-1], [2**40, 2**40], ["a", "a"], {}, {"": None},
    {"name": "a", "configuration": {}},
)  # fmt: skip
FIELDS = (
    "", " ", "0", "-1", "1", "1e9", "1e-9", "nan", "inf", "-inf", "1e999", "0x10", "1_0", "٣", "²", "32768", "9" * 40,
    "9" * 5000, "a;b;a", ";;", '"', '""', '"a', "a\nb", "a\r", "\0", "\ufeff", "..", "/", "/dev/null", "a" * 1025,
    "a,b", "=1+1", "True", "null", "[]", "-0.0", "audio", "label", "ä", "\u2028", "\U0001f414" * 300,
)  # fmt: skip
MOST_PLACES = 5000  # of a document, among which one is chosen
LONGEST = 1 << 18  # bytes of an input; a larger one is cut


def change_bytes(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """One to four changes; `other` is what a piece may be taken from."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(_BYTE_CHANGES)(changed, rng, other or data)
    return bytes(changed[:LONGEST])


def _place(data: bytearray, rng: random.Random) -> int:
    """Anywhere, half the time near the beginning, where headers are."""
    end = len(data)
    return rng.randrange(min(end, rng.choice((16, 64, 256)))) if end and rng.random() < 0.5 else rng.randrange(end + 1)


def _flip(data: bytearray, rng: random.Random, other: bytes) -> None:
    if data:
        data[_place(data, rng) % len(data)] ^= 1 << rng.randrange(8)


def _set(data: bytearray, rng: random.Random, other: bytes) -> None:
    if data:
        data[_place(data, rng) % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _number(data: bytearray, rng: random.Random, other: bytes) -> None:
    """A whole number of 1, 2, 4 or 8 bytes becomes an extreme one, or a little more or less."""
    width = rng.choice((1, 2, 4, 8))
    if len(data) < width:
        return
    at = min(_place(data, rng), len(data) - width)
    at -= at % rng.choice((1, width))
    form = rng.choice("<<>") + WIDTHS[width]
    found = struct.unpack_from(form, data, at)[0]
    value = rng.choice((*EXTREME, found + 1, found - 1, found * 2, found // 2, -found, len(data)))
    struct.pack_into(form, data, at, value % 2 ** (8 * width))


def _cut(data: bytearray, rng: random.Random, other: bytes) -> None:
    at = _place(data, rng)
    del data[at : at + rng.choice((1, 2, 4, 16, 256, len(data)))]


def _repeat(data: bytearray, rng: random.Random, other: bytes) -> None:
    at = _place(data, rng)
    piece = data[at : at + rng.choice((1, 4, 16, 64, 512))]
    data[at:at] = piece * rng.choice((1, 1, 2, 50))


def _insert(data: bytearray, rng: random.Random, other: bytes) -> None:
    at = _place(data, rng)
    data[at:at] = rng.choice((b"\0", b"\xff", rng.randbytes(4))) * rng.choice((1, 2, 8, 100))


def _splice(data: bytearray, rng: random.Random, other: bytes) -> None:
    at, start = _place(data, rng), rng.randrange(len(other) + 1)
    length = rng.choice((4, 16, 64, 1024))
    data[at : at + rng.choice((0, length))] = other[start : start + length]


_BYTE_CHANGES = (_flip, _flip, _set, _number, _number, _number, _cut, _repeat, _insert, _splice)


def change_json(data: bytes, rng: random.Random) -> bytes:
    """One to three values of a JSON document replaced, removed, repeated or renamed; else its bytes."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return change_bytes(data, rng)
    if rng.random() < 0.1:
        return change_bytes(data, rng)
    try:
        for _ in range(rng.choice((1, 1, 2, 3))):
            document = _change_value(document, rng)
        return json.dumps(document).encode("utf-8", "surrogatepass")[:LONGEST]
    except (ValueError, RecursionError):
        return data


def _change_value(document: object, rng: random.Random) -> object:
    places = list(itertools.islice(_places(document), MOST_PLACES))
    if not places or rng.random() < 0.02:
        return _copied(rng.choice(VALUES))
    holder, key = rng.choice(places)
    value, act = holder[key], rng.random()
    if act < 0.12:
        del holder[key]
    elif act < 0.2 and isinstance(holder, list):
        times = rng.choice((1, 2, 2, 2, 100))
        holder[key:key] = [_copied(value) for _ in range(times if times < 9 or len(json.dumps(value)) < 99 else 1)]
    elif act < 0.2:
        holder[rng.choice((f"{key}_", "name", "shape", "audio", ""))] = holder.pop(key)
    elif act < 0.3:  # something that is elsewhere in the document
        other, at = rng.choice(places)
        if at in other if isinstance(other, dict) else at < len(other):
            holder[key] = _copied(other[at])
    elif act < 0.6 and isinstance(value, int | float) and not isinstance(value, bool):
        holder[key] = rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, value / 2, *EXTREME))
    elif act < 0.4 and isinstance(value, str):
        text = rng.choice(("a", "\0", value, "9")) * rng.choice((1, 3, 3, 5000))
        holder[key] = rng.choice((value + text, text, value[:-1], value.upper()))
    elif act < 0.65:
        for _ in range(rng.choice((1, 1, 1, 1, 20, 2000))):
            value = [value]
        holder[key] = value
    else:
        holder[key] = _copied(rng.choice(VALUES))
    return document


def _copied(value: object) -> object:
    """A value that shares nothing: one that is within itself several times would grow with every change."""
    return json.loads(json.dumps(value))


def _places(document: object):
    """Every value within a document, as its holder and its key."""
    waiting = [document]
    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ():
            yield holder, key
            waiting.append(holder[key])


def change_jsonl(data: bytes, rng: random.Random) -> bytes:
    """One line's JSON changed; or lines repeated, left out or exchanged."""
    lines = data.split(b"\n")
    at, act = rng.randrange(len(lines)), rng.random()
    if act < 0.7:
        lines[at] = change_json(lines[at], rng).replace(b"\n", b"")
    elif act < 0.8:
        lines[at:at] = [lines[at]] * min(LONGEST // (1 + len(lines[at])), rng.choice((1, 3, 3, 300)))
    elif act < 0.9:
        lines.pop(at)
    else:
        return change_bytes(data, rng)
    return b"\n".join(lines)[:LONGEST]


def change_csv(data: bytes, rng: random.Random) -> bytes:
    """One to three fields, columns or rows of a CSV file; sometimes its bytes."""
    if rng.random() < 0.15:
        return change_bytes(data, rng)
    rows = [row.split(",") for row in data.decode("utf-8", "replace").split("\n")]
    for _ in range(rng.choice((1, 1, 2, 3))):
        _change_table(rows, rng)
    newline = rng.choice(("\n", "\n", "\n", "\r\n", "\r"))
    return newline.join(",".join(row) for row in rows).encode("utf-8", "surrogatepass")[:LONGEST]


def _change_table(rows: list[list[str]], rng: random.Random) -> None:
    row = rng.choice(rows) if rows else []
    size = sum(map(len, row)) + len(row)
    room = max(1, LONGEST // (1 + max(size, len(rows))))  # how often a row may be repeated, at most
    act = rng.random()
    if act < 0.6 and row:
        value = rng.choice((*FIELDS, *rng.choice(rows), str(rng.choice(EXTREME))))
        row[rng.randrange(len(row))] = value
    elif act < 0.7:
        row.insert(rng.randrange(len(row) + 1), rng.choice(FIELDS) * rng.choice((1, 1, 1, 20)))
    elif act < 0.75:
        row.extend([rng.choice(FIELDS[:24])] * min(room, rng.choice((1, 5, 5, 2000))))
    elif act < 0.8 and row:
        row.pop(rng.randrange(len(row)))
    elif act < 0.9:
        rows.extend([list(row) for _ in range(min(room, rng.choice((1, 2, 2, 300))))])
    elif rows:
        rows.pop(rng.randrange(len(rows)))
