"""The one reader of tables: whatever wrote a table, the same rows come back, or a line is named."""

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_at_cli.extract.cells import as_fold, as_name, as_seconds, as_whole
from whisper_at_cli.extract.errors import UsageError
from whisper_at_cli.extract.tables import JsonLines, Table, plain_rows, text_lines, whole_json

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252")
ENDS = ("\n", "\r\n", "\r")
COLUMNS = ("audio", "label", "fold", "comment", "start")
LATIN = st.characters(min_codepoint=32, max_codepoint=0x17E, categories=("L", "N", "P", "S", "Zs"))
CELL = st.text(LATIN, max_size=12).map(str.strip)


@st.composite
def tables(draw):
    """A header, rows of cells, of which none is blank as a whole, and how the table is written."""
    columns = list(draw(st.permutations(COLUMNS)))[: draw(st.integers(2, len(COLUMNS)))]
    first = st.from_regex(r"[a-z]{1,6}[0-9]{0,3}\.wav", fullmatch=True)
    rows = draw(st.lists(st.tuples(first, *[CELL] * (len(columns) - 1)), min_size=1, max_size=8))
    return columns, [list(row) for row in rows], {
        "separator": draw(st.sampled_from(",;\t")),
        "end": draw(st.sampled_from(ENDS)),
        "quoting": draw(st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC))),
        "blanks": draw(st.lists(st.integers(0, len(rows)), max_size=3)),
        "spaces": draw(st.booleans()),
        "capitals": draw(st.booleans()),
        "last_end": draw(st.booleans()),
        "trailing": draw(st.booleans()),
    }  # fmt: skip


def written(columns, rows, *, separator, end, quoting, blanks, spaces, capitals, last_end, trailing) -> str:
    """The table as one of the many programs writes it."""
    names = [name.upper() if capitals else name for name in columns]
    lines = []
    for cells in [names, *rows]:
        line = io.StringIO()
        csv.writer(line, delimiter=separator, quoting=quoting, lineterminator="").writerow(cells)
        lines.append(line.getvalue())
    for at in sorted(blanks, reverse=True):
        lines.insert(at + 1, separator * (len(columns) - 1) if at % 2 else "")
    if spaces and quoting == csv.QUOTE_ALL:  # also behind a closing quote
        lines = [line.replace(f'"{separator}"', f'" {separator} "') for line in lines]
    if trailing:
        lines = [line + separator for line in lines]
    return end.join(lines) + (end if last_end else "")


@settings(max_examples=400, deadline=None)
@given(tables(), st.sampled_from(ENCODINGS))
def test_a_table_comes_back_whatever_wrote_it(tmp_path_factory, table, encoding):
    columns, rows, dialect = table
    if dialect["spaces"] and any('"' in cell for row in rows for cell in row):
        dialect["spaces"] = False  # the writer above puts spaces between quotes, and these quotes are data
    path = tmp_path_factory.mktemp("table") / "clips.csv"
    text = written(columns, rows, **dialect)
    try:
        data = text.encode(encoding)
    except UnicodeEncodeError:
        encoding, data = "utf-8", text.encode()
    if encoding.startswith("utf-16-") and sum(ord(character) < 256 for character in text) < 0.8 * len(text):
        data = text.encode("utf-16")  # nothing but a mark tells mostly other letters
    path.write_bytes(data)
    found = Table(path)
    assert found.names[: len(columns)] == tuple(columns) and found.separator == dialect["separator"]
    read = list(found.rows())
    assert [[row[name] for name in columns] for _, row in read] == rows
    assert len({place for place, _ in read}) == len(rows)
    guessed = any("not UTF-8" in note for note in found.notes)
    assert guessed == (encoding == "cp1252" and not data.isascii() and not is_utf8(data))


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@settings(max_examples=200, deadline=None)
@given(tables(), st.data())
def test_an_unclosed_quote_or_one_field_too_many_is_refused_with_its_line(tmp_path_factory, table, data):
    columns, rows, dialect = table
    rows = [[cell.replace('"', "'") for cell in row] for row in rows]
    at, column = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(0, len(columns) - 1))
    separator = dialect["separator"]
    lines = [columns, *([f"x{cell.replace(separator, '.')}" for cell in row] for row in rows)]
    broken = [list(line) for line in lines]
    too_many = data.draw(st.booleans())
    broken[at + 1][column] = f"{broken[at + 1][column]}{separator}y" if too_many else f'"{broken[at + 1][column]}'
    path = tmp_path_factory.mktemp("table") / "clips.csv"
    path.write_text("\n".join(separator.join(line) for line in broken) + "\n")
    with pytest.raises(UsageError, match=rf"line {at + 2} of .*clips.csv (has more fields|opens a quote)"):
        list(Table(path).rows())
    path.write_text("\n".join(separator.join(line) for line in lines) + "\n")
    assert len(list(Table(path).rows())) == len(rows), "it is the fault that is refused"


def table_of(tmp_path, text: str | bytes) -> Table:
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return Table(path)


def rows_of(tmp_path, text) -> list[dict]:
    return [row for _, row in table_of(tmp_path, text).rows()]


def test_a_quote_that_closes_lines_later_is_refused_and_a_text_of_several_lines_is_read(tmp_path):
    swallowed = 'audio,label,comment\na.wav,dog,"12 inch\nb.wav,rain,ok\nc.wav,rain,ok"\nd.wav,dog,ok\n'
    with pytest.raises(
        UsageError, match="line 2 of .* opens a quote .* that line 4 closes, and line 3 looks like a row"
    ):
        rows_of(tmp_path, swallowed)
    text = 'audio,label,comment\na.wav,dog,"first line\nsecond, and last"\nb.wav,rain,\n'
    assert [row["comment"] for row in rows_of(tmp_path, text)] == ["first line\nsecond, and last", ""]
    with pytest.raises(UsageError, match="line 1 of .* opens a quote"):
        rows_of(tmp_path, 'audio,"label\na.wav,dog\n')


def test_quotes_within_fields_are_text_and_text_behind_them_is_refused(tmp_path):
    assert rows_of(tmp_path, 'audio,label\na.wav,12" record\n')[0]["label"] == '12" record'
    assert rows_of(tmp_path, 'audio,label\n "a.wav" , "x, ""y""" \n')[0] == {"audio": "a.wav", "label": 'x, "y"'}
    with pytest.raises(UsageError, match="line 3 of .* has text behind a closing quote"):
        rows_of(tmp_path, 'audio,label\na.wav,dog\nb.wav,"dog" big\n')


def test_common_voices_quotes_are_text(tmp_path):
    text = 'client_id\tpath\tsentence\n1\ta.mp3\t"Stop, he said.\n2\tb.mp3\tGo.\n'
    assert [row["sentence"] for row in rows_of(tmp_path, text)] == ['"Stop, he said.', "Go."]
    with pytest.raises(UsageError, match="line 2 of"):
        rows_of(tmp_path, text.replace("client_id", "speaker"))


def test_excels_hint_and_its_trailing_separators_are_no_data(tmp_path):
    assert rows_of(tmp_path, "sep=;\naudio;label;\na.wav;a,b;\n;;\n\n") == [{"audio": "a.wav", "label": "a,b", "": ""}]


def test_rows_with_too_few_fields_are_counted(tmp_path):
    table = table_of(tmp_path, "audio,label,fold\na.wav\nb.wav,dog,1\nc.wav,rain\n")
    assert [row["label"] for _, row in table.rows()] == ["", "dog", "rain"]
    assert ["2 rows of t.csv have fewer fields" in note and "line 2" in note for note in table.notes] == [True]


def test_a_column_twice_is_refused_only_if_it_is_needed(tmp_path):
    table = table_of(tmp_path, "audio,x,x,Label,label\na,1,2,3,4\n")
    assert table.column("audio") == "audio"
    with pytest.raises(UsageError, match="names the column 'label' twice"):
        table.column("label")


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"audio\n\x00\n", "line 2 holds the control character"),
        (b"audio\n\x81\x8d\n", "neither UTF-8 nor Windows-1252"),
        (b"audio\n" + b"a" * 2_000_000, "a line is longer than a megabyte"),
        (b"audio\n" + b"a" * 200_000, "field larger than field limit"),
        (b"\xff\xfea", "neither UTF-8"),
        (bytes(range(256)) * 9, "CSV"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, data, reason):
    with pytest.raises(UsageError, match=reason):
        rows_of(tmp_path, data)


def test_files_that_cannot_be_opened_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent.csv", tmp_path / "a\0b.csv"):
        with pytest.raises(UsageError, match="not a readable CSV file"):
            Table(path)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_kind_of_list_is_read_in_every_encoding(tmp_path, encoding):
    path, said = tmp_path / "list", []
    path.write_bytes("Geräusch\r\n\r\n Vogel \r\n".encode(encoding))
    assert list(text_lines(path, said)) == ["Geräusch", "Vogel"]
    assert said == [] or (encoding == "cp1252" and "'Geräusch'" in said[0])
    path.write_bytes('# YTID\nabc, 1, "/m/ä, /m/b"\n'.encode(encoding))
    assert list(plain_rows(path)) == [(f"line 2 of {path}", ["abc", "1", "/m/ä, /m/b"])]
    path.write_bytes((json.dumps({"Audio File": "ä.wav"}, ensure_ascii=False) + "\n\n").encode(encoding))
    assert [row for _, row in JsonLines(path).rows()] == [{"audio_file": "ä.wav"}]
    path.write_bytes(json.dumps(["ä" * 3], ensure_ascii=False, indent=1).encode(encoding))
    assert whole_json(path) == ["äää"]


def test_cells_mean_what_pandas_wrote():
    assert [as_fold(value, "here") for value in ("1", "1.0", 1.0, " 3 ", "fold_4", "nan", float("nan"), None, "")] == [
        1, 1, 1, 3, 4, None, None, None, None
    ]  # fmt: skip
    assert [as_whole(value, "target", "here") for value in ("0.0", "7", 7.0)] == [0, 7, 7]
    assert [as_seconds(value, "start", "here") for value in ("nan", "NaN", "None", "<NA>", "1.5", 2)] == [
        None, None, None, None, 1.5, 2
    ]  # fmt: skip
    assert as_name(7.0, "a label", "here") == "7" and as_name(0.5, "a label", "here") == "0.5"
    for value in ("-1", "1.5", "99999", "one", True, [1], "1e0", 10**5000):
        with pytest.raises(UsageError, match="^here: fold is"):
            as_fold(value, "here")
