"""Manifests read many rows at a time say what they say row by row: the same values, notes and errors."""

import csv
import io
import json
import math
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from whisper_at_cli.extract import tables
from whisper_at_cli.extract.datasets import base, entries, ids, open_dataset, plain
from whisper_at_cli.extract.datasets.base import Clip, Dataset
from whisper_at_cli.extract.datasets.clips import Clips
from whisper_at_cli.extract.datasets.entries import read_rows
from whisper_at_cli.extract.datasets.locate import located
from whisper_at_cli.extract.datasets.rows import Entry, RowsBuilder
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.sparse import SparseLabels
from whisper_at_cli.extract.texts import TextColumn, first_repeated, first_rows, mapped, text_column

COLUMNS = (
    "audio",
    "start",
    "end",
    "labels",
    "label",
    "category",
    "fold",
    "split",
    "id",
    "text",
    "Comment",
    "File Name",
    "slice_file_name",
    "onset",
)
PLAIN = {
    "audio": st.from_regex(r"[a-c]{1,2}/[a-d]{1,3}\.wav", fullmatch=True),
    "start": st.sampled_from(("", "0", "0.5", "1e0", " 2")),
    "end": st.sampled_from(("", "3", "4.25", "nan")),
    "labels": st.sampled_from(("dog", "dog;rain", " cat ; dog;dog", "", "nan", "['a', 'b']", "1.0;2", "1", ";",
                               "a|b", "a||b|a", "a,b", "a, b", "a;nan|b", "1.0", "1.0|2", "[", "|", "e\u0301", "é")),
    "fold": st.sampled_from(("", "1", "2.0", "fold_3", "0")),
    "split": st.sampled_from(("train", "", "test ", "NaN")),
    "id": st.from_regex(r"[a-z]{6}", fullmatch=True),
    "text": st.sampled_from(("", "so, it goes", 'a "quote"', "größe")),
}  # fmt: skip
ODD = st.sampled_from(
    ("-nan", "inf", "1_0", "-1", "a\nb", "\ta", "x" * 70, "ä", '"', "\u2028", "[1, None]", "true", "-0.0", "99999",
     "\x0b", " ")
)  # fmt: skip
JSON_ODD = st.sampled_from(
    (None, True, False, 0, 1, 1.0, -0.0, math.nan, math.inf, [], [1, "a"], ["dog", "dog", ""], ["nan"], {"a": 1}, "\0",
     "a\nb", "\ud800", 10**400, "nan ", [[1]], [True], "[]")
)  # fmt: skip


def cell(name: str) -> st.SearchStrategy:
    usual = PLAIN.get({"label": "labels", "category": "labels", "File Name": "audio"}.get(name, name), PLAIN["text"])
    return st.one_of(usual, usual, usual, usual, usual, ODD)


@st.composite
def rows_of_cells(draw, json_cells: bool):
    names = draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=7, unique=True))
    names = names if draw(st.booleans()) else ["audio", *(name for name in names if name != "audio")]
    clean = draw(st.booleans())
    few = st.sampled_from(draw(st.lists(PLAIN["labels"], min_size=1, max_size=3)))  # so that all cells are of one kind
    labels = draw(st.sampled_from((few, PLAIN["labels"])))
    rows = []
    for _ in range(draw(st.integers(0, 12))):
        row = {}
        for name in names:
            usual = labels if name in ("label", "labels", "category") else PLAIN.get(name, PLAIN["labels"])
            row[name] = draw(usual if clean else cell(name))
            if json_cells and draw(st.integers(0, 0 if clean else 9)) == 9:
                row[name] = draw(JSON_ODD)
        rows.append(row)
    return names, rows


def compared(path, monkeypatch, block: int) -> str:
    """What reading gives both ways, which must be the same: rows and notes, or an error."""
    monkeypatch.setattr(tables, "BLOCK_CHARACTERS", block)

    def outcome(**options) -> object:
        said: list[str] = []
        try:
            return read_rows(path, said, **options), said
        except UsageError as error:
            return str(error)

    slow, fast = outcome(one_by_one=True), outcome()
    if isinstance(slow, str) or isinstance(fast, str):
        assert fast == slow
        return "error"
    (ours, our_notes), (theirs, their_notes) = fast, slow
    assert our_notes == their_notes and ours.names == theirs.names and ours.tables == theirs.tables
    for name in ("table", "numbers", "audio", "start", "end", "counts", "labels", "fold", "split", "id", "text"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert mine.dtype == other.dtype and len(mine) == len(other), name
        assert np.array_equal(mine, other, equal_nan=mine.dtype.kind == "f"), name
    assert [ours.place(row) for row in range(len(ours))] == [theirs.place(row) for row in range(len(theirs))]
    return "rows"


@examples(300)
@given(rows_of_cells(False), st.sampled_from(",;\t"), st.sampled_from(("\n", "\r\n", "\r")), st.data())
def test_csv_read_many_rows_at_a_time_is_csv_read_row_by_row(tmp_path_factory, table, separator, end, data):
    names, rows = table
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator="\n", quoting=data.draw(st.sampled_from((0, 1))))
    writer.writerow(names)
    for row in rows:
        writer.writerow(list(row.values())[: data.draw(st.sampled_from((99, 99, 99, 1)))])
    lines = out.getvalue()
    if data.draw(st.integers(0, 4)) == 0:  # a fault anywhere: an open quote, a field too many, an empty line, a NUL
        at = data.draw(st.integers(0, len(lines)))
        lines = (
            lines[:at] + data.draw(st.sampled_from(('"', f"{separator}x", "\n", "\n\n", "\0", ' "x" '))) + lines[at:]
        )
    path = tmp_path_factory.mktemp("rows") / "m.csv"
    path.write_bytes(lines.replace("\n", end).encode(data.draw(st.sampled_from(("utf-8", "utf-8-sig", "utf-16")))))
    with pytest.MonkeyPatch.context() as patch:
        compared(path, patch, data.draw(st.sampled_from((7, 60, 1 << 18))))


@examples(300)
@given(rows_of_cells(True), st.data())
def test_jsonl_read_many_rows_at_a_time_is_jsonl_read_row_by_row(tmp_path_factory, table, data):
    lines = [json.dumps(row, ensure_ascii=data.draw(st.booleans()) or "\ud800" in str(row)) for row in table[1]]
    if data.draw(st.integers(0, 4)) == 0:
        at = data.draw(st.integers(0, len(lines)))
        odd = ("", " ", "{", "[1]", '{"AUDIO": "x.wav"}', '{"audio": "a", "audio": "b"}', '{"wav": "b.wav"} ', "{}{}")
        lines.insert(at, data.draw(st.sampled_from(odd)))
    path = tmp_path_factory.mktemp("rows") / "m.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        compared(path, patch, data.draw(st.sampled_from((7, 60, 1 << 18))))


@pytest.mark.parametrize(
    "text",
    [
        "audio,labels,fold\n" + "".join(f"{n}.wav,dog;rain,{n % 3}\n" for n in range(500)),
        "audio,label,start,end\n" + "".join(f'{n}.wav,"a, b",{n},{n + 1}\n' for n in range(500)),
        "audio,labels\n" + "".join(f"{n}.wav,dog|rain|{n % 3}\n" for n in range(500)),
        "slice_file_name,class,start,end\n" + "".join(f"{n}.wav,a|b,{n},{n + 1}\n" for n in range(500)),
        'audio,text\na.wav,"x ""y"""\n\n,\nb.wav\n',
        "client_id\tpath\tsentence\n1\ta.mp3\t\"Stop.\n\n2\tb.mp3\tGo.\n",
        "sep=;\naudio;label\na.wav;dog\n",
    ],
)  # fmt: skip
def test_plain_tables_are_read_many_rows_at_a_time(tmp_path, monkeypatch, text):
    """And not row by row after all, which would be as right and ten times as slow."""
    (tmp_path / "m.csv").write_text(text)
    said: list[str] = []
    slow = read_rows(tmp_path / "m.csv", said, one_by_one=True)
    monkeypatch.setattr(tables.Table, "rows", lambda self: pytest.fail("row by row"))
    monkeypatch.setattr(plain, "entry_of", lambda *_: pytest.fail("row by row"))
    if "label" not in text:
        monkeypatch.setattr("whisper_at_cli.extract.datasets.columns._refuse_one_hot", lambda *_: None)
    again: list[str] = []
    assert len(read_rows(tmp_path / "m.csv", again)) == len(slow) > 0 and again == said


def test_jsonl_of_text_numbers_and_lists_is_read_many_rows_at_a_time(tmp_path, monkeypatch):
    row = {"id": "a", "audio": "ä b.wav", "start": 0.5, "end": 2, "labels": ["dog", "rain"], "fold": 1, "split": None}
    lines = [json.dumps(row | {"id": f"a{number}"}) for number in range(300)]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(tables.JsonLines, "rows", lambda self: pytest.fail("row by row"))
    monkeypatch.setattr(plain, "entry_of", lambda *_: pytest.fail("row by row"))
    dataset = open_dataset(tmp_path / "m.jsonl")
    assert dataset.clips[299] == Clip("a299", "ä b.wav", (0, 1), 1, "", 0.5, 2.0) and len(dataset) == 300


def test_a_few_bytes_do_not_become_gigabytes_of_cells(tmp_path, monkeypatch):
    """A table of a wide header and short rows, or of as many keys as rows, is read row by row."""
    monkeypatch.setattr(tables, "BLOCK_CELLS", 100)
    (tmp_path / "wide.csv").write_text("audio," + ",".join("abcdefghij") + "\n" + "a.wav\n" * 50)
    (tmp_path / "keys.jsonl").write_text("".join(f'{{"audio": "{n}.wav", "k{n}": 1}}\n' for n in range(50)))
    for name in ("wide.csv", "keys.jsonl"):
        assert len(read_rows(tmp_path / name, [])) == 50
        with pytest.raises(tables.NotPlainError, match="more cells than text"):
            table = tables.Table(tmp_path / name) if name.endswith("csv") else tables.JsonLines(tmp_path / name)
            list(table.plain_blocks("audio") if isinstance(table, tables.Table) else table.plain_blocks())


# Ids, as they were made of lists: the obvious way that the columns are held to.


def unique_ids(paths):
    for shorten in (base.stem_of, base.without_suffix):
        found = [base.as_text(shorten(path)) for path in paths]
        if len(set(found)) == len(found):
            return found
    return [base.as_text(path) for path in paths]


def ids_one_by_one(paths, spans):
    distinct = list(dict.fromkeys(paths))
    for names in (unique_ids(distinct), [base.as_text(base.without_suffix(path)) for path in distinct], distinct):
        name_of = dict(zip(distinct, names, strict=True))
        for with_end in (False, True):
            found = [
                name_of[path] + (base.seconds_suffix(*span, with_end=with_end) if paths.count(path) > 1 else "")
                for path, span in zip(paths, spans, strict=True)
            ]
            if len(set(found)) == len(found):
                return found
    return found


SPANS = st.tuples(st.sampled_from((None, 0.0, 1.5, 2.0)), st.sampled_from((None, 2.5, 3.0)))
PATHS = st.from_regex(r"([ab./]{0,3}/)?[ab.]{1,2}(\.wav|\.mp3|\.)?", fullmatch=True)


@examples(300)
@given(st.lists(st.tuples(PATHS, SPANS), max_size=9))
def test_ids_of_columns_are_ids_of_lists(rows):
    paths, spans = [path for path, _ in rows], [span for _, span in rows]
    start, end = (
        np.array([math.nan if span[at] is None else span[at] for span in spans], dtype=np.float64) for at in (0, 1)
    )
    found, repeated = ids.clip_ids(text_column(paths), start, end)
    assert found.tolist() == ids_one_by_one(paths, spans) and repeated == first_repeated(found)


@examples(300)
@given(st.text(st.sampled_from("ab./ "), max_size=8))
def test_stems_are_those_of_pathlib(path):
    there = Path(path)
    assert base.stem_of(path) == there.stem
    try:
        expected = there.with_suffix("").as_posix() if there.name else there.as_posix()
    except ValueError:
        return
    assert base.without_suffix(path) == expected


# Columns


@examples(100)
@given(st.lists(st.text(max_size=3), max_size=20), st.booleans())
def test_first_rows_are_where_a_text_stands_first(texts, collide):
    column = text_column(texts)
    with pytest.MonkeyPatch.context() as patch:
        if collide:
            patch.setattr("whisper_at_cli.extract.texts.hash", lambda text: len(text) % 2, raising=False)
        assert first_rows(column).tolist() == [texts.index(text) for text in texts]
        repeated = next((row for row, text in enumerate(texts) if text in texts[:row]), None)
        assert first_repeated(column) == (None if repeated is None else (repeated, texts.index(texts[repeated])))
    assert mapped(lambda part: [text.upper() for text in part], column).tolist() == [text.upper() for text in texts]
    assert TextColumn(column) == tuple(texts) and list(TextColumn(column)[1:]) == texts[1:]


@examples(100)
@given(st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=8), st.data())
def test_sparse_labels_are_the_table_that_they_stand_for(rows, data):
    dense = np.zeros((len(rows), 5), dtype=np.uint8)
    for row, labels in enumerate(rows):
        dense[row, labels] = 1
    counts, flat = (
        np.array([len(row) for row in rows], dtype=np.int64),
        np.array([*chain.from_iterable(rows)], dtype=np.int64),
    )
    sparse = SparseLabels.ordered(counts, flat, 5)
    assert sparse == SparseLabels.of([sorted(set(row)) for row in rows], 5) and sparse.shape == dense.shape
    assert np.array_equal(np.asarray(sparse), dense) and sparse.counts.tolist() == dense.sum(axis=1).tolist()
    some = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=5)) if rows else []
    assert np.array_equal(sparse[np.array(some, dtype=np.int64)], dense[some])
    assert np.array_equal(sparse[1:3], dense[1:3]) and [sparse.row(row) for row in some] == [
        tuple(np.flatnonzero(dense[row]).tolist()) for row in some
    ]


def test_several_labels_of_one_cell_are_each_counted_once():
    builder = RowsBuilder()
    for number, labels in enumerate((("a|b",), (), ("b|b|",), ("|",), ("b|a",)), start=1):
        builder.add(Entry(f"entry {number} of m.json", "a.wav", None, None, labels, None, "", "", ""))
    rows = builder.rows(Path("m.json"))
    split = rows.with_labels({"a|b": ("a", "b"), "b|b|": ("b", "b"), "|": (), "b|a": ("b", "a")})
    assert split.names == ("a", "b") and split.counts.tolist() == [2, 0, 1, 0, 2]
    assert split.labels.tolist() == [0, 1, 1, 1, 0] and split.place(2) == "entry 3 of m.json"


def test_a_dataset_of_clips_is_one_of_columns(tmp_path):
    clips = (Clip("a", "a\udcff.wav", (0, 2), 1, "train", 0.5), Clip("b", "b.wav"), Clip("c", "c.wav", (1,), end=2.0))
    dataset = Dataset("d", tmp_path, clips, ("x", "y", "z"))
    assert dataset.clips == clips and dataset.clips != clips[:2] and dataset.clips[-1] == clips[2]
    assert dataset.clips[1:] == clips[1:] and isinstance(dataset.clips, Clips) and list(dataset.clips) == list(clips)
    with pytest.raises(IndexError):
        dataset.clips[3]
    table = dataset.table()
    assert table.ids.tolist() == ["a", "b", "c"] and table.paths[0] == "a\\udcff.wav"
    assert table.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]] and table.fold.tolist() == [1, 0, 0]
    assert np.array_equal(np.asarray(dataset.table(sparse=True).labels), table.labels)
    turned, rows = dataset.table(sparse=True).take(np.array([2, 0])), table.take(np.array([2, 0]))
    assert isinstance(turned.labels, SparseLabels) and np.array_equal(turned.labels[:], rows.labels)
    assert turned.ids.tolist() == rows.ids.tolist() == ["c", "a"] and isinstance(rows.labels, np.ndarray)
    part = dataset.part([2, 0])
    assert part.clips == (clips[2], clips[0]) and part.source_rows == (2, 0)


@examples(60)
@given(st.data())
def test_files_that_are_looked_for_fast_are_found_as_one_by_one(tmp_path_factory, data):
    """`located` skips names that no file can have: what it finds is what looking for each name would find."""
    from whisper_at_cli.extract.datasets import locate

    root = tmp_path_factory.mktemp("files")
    name = st.sampled_from(("a.wav", "A.WAV", "b.flac", "b", "ä.wav", "c.d.wav", "x/a.wav", "x/y/b.wav", ".h.wav"))
    for path in data.draw(st.lists(name, max_size=4)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    odd = st.sampled_from(
        ("x\\a.wav", "./a.wav", " a.wav", "z/a.wav", "q.wav", "../a.wav", "a.wav/", "x", "", "no/q", "b.mp3")
    )
    listed = data.draw(st.lists(st.one_of(name, odd), min_size=1, max_size=6))
    published = data.draw(st.booleans())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locate, "ROWS_AT_ONCE", data.draw(st.integers(1, 3)))
        fast = located(root, text_column(listed), published=published)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locate._Files, "are_plainly_missing", lambda *_: False)
        slow = located(root, listed, published=published)
    assert (fast[0].tolist(), fast[1]) == slow


def test_unreadable_rows_of_a_long_table_are_refused_with_their_line(tmp_path):
    """The first fault of the table is named, though a later one is found earlier."""
    lines = [f"{number}.wav,{number % 7 + 1}" for number in range(30_000)]
    lines[25_000] = "25000.wav,x"
    lines[27_000] = '"open'
    (tmp_path / "m.csv").write_text("audio,fold\n" + "\n".join(lines))
    with pytest.raises(UsageError, match="line 25002 of .*m.csv: fold is 'x'"):
        entries.read_rows(tmp_path / "m.csv", [])
