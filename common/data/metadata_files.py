"""metadata.jsonl and metadata.csv -> rows, strictly: what could be read in two ways is refused by line and cure."""

import csv
import io
import json
import re
from pathlib import Path

from common.errors import UserError

DELIMITERS = ",;\t"
# The start of a row within a quoted text: then the quote was never meant to reach that far.
_ROW_IN_TEXT = re.compile(r"\n[^\n,;\t]+\.[a-zA-Z0-9]{2,4}[,;\t]")


def read_rows(path: Path, caption_column: str) -> list[tuple[str, str | None]]:
    """(file name, caption) of every row of a metadata file; a caption may be None.

    Raises:
        UserError: naming the file, the line, what is wrong and the cure.
    """
    rows = _jsonl_rows(path) if path.suffix == ".jsonl" else _csv_rows(path, caption_column)
    return [_checked(path, number, row, caption_column) for number, row in rows]


def read_text(path: Path) -> str:
    """A UTF-8 file as text, with or without a byte order mark.

    Raises:
        UserError: the file is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _checked(path, number, row, caption_column):
    if not isinstance(row, dict):
        raise UserError(f"{path}: line {number} is not an object with file_name and {caption_column}")
    for column in ("file_name", caption_column):
        if column not in row:
            columns = ", ".join(map(str, row))
            raise UserError(f"{path}: line {number} has no {column!r} (it has {columns}); see --caption_column")
        value = row[column]
        if not isinstance(value, (str, type(None))) or (column == "file_name" and not value):
            raise UserError(f"{path}: line {number}: {column} is {value!r}, not a text; see --caption_column")
    return row["file_name"], row[caption_column]


def _jsonl_rows(path):
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines() would cut captions at U+2028 too
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number} is not JSON ({error.msg})") from None
    return rows


def _csv_rows(path, caption_column):
    text = read_text(path)
    delimiter = _delimiter(text, caption_column)
    records = _csv_records(path, text, delimiter)
    if not records:
        return []
    columns = [name.strip() for name in records[0][1]]
    for number, fields in records[1:]:
        _check_fields(path, number, fields, columns, delimiter)
    return [(number, dict(zip(columns, fields))) for number, fields in records[1:]]


def _delimiter(text, caption_column):
    """The delimiter that splits the heading into most of file_name and the caption column; the comma before others."""
    heading = text.partition("\n")[0]
    wanted = {"file_name", caption_column}
    return max(DELIMITERS, key=lambda delimiter: len(wanted & {name.strip(' "') for name in heading.split(delimiter)}))


def _csv_records(path, text, delimiter):
    """[(number of its first line, fields)] of every row that is not blank, the heading included."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True, skipinitialspace=True)
    records = []
    number = 1
    try:
        for fields in reader:
            if any(_ROW_IN_TEXT.search(field) for field in fields):
                raise csv.Error("a quote is opened and the rows after it are read as its text")
            if fields:
                records.append((number, fields))
            number = reader.line_num + 1
    except csv.Error as error:
        cure = 'close every quote, and write a quote within quotes twice ("")'
        raise UserError(f"{path}: line {number} cannot be read ({error}); {cure}") from None
    return records


def _check_fields(path, number, fields, columns, delimiter):
    shown = {",": "commas", ";": "semicolons", "\t": "tabs"}[delimiter]
    counted = f"{path}: line {number} has {len(fields)} fields where the heading has {len(columns)}"
    if len(fields) > len(columns):
        raise UserError(f'{counted}; put a caption that holds {shown} between double quotes ("...")')
    if len(fields) < len(columns):
        raise UserError(f"{counted} (delimiter: {shown}); write every field, an empty one too")
