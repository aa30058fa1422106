"""metadata.csv and metadata.jsonl: what could be read in two ways is refused by line and cure, never read wrongly."""

import pytest

from common.data.metadata_files import read_rows
from common.errors import UserError


def rows_of(tmp_path, text, name="metadata.csv"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_rows(tmp_path / name, "text")


REFUSED = {  # a CSV file -> parts of its refusal
    "file_name,text\n0.png,ink style, a girl with red hair\n1.png,a house\n": [
        "line 2 has 3 fields",
        "2",
        "double quotes",
    ],
    "file_name,text\n0.png,a\n1.png\n": ["line 3 has 1 field", "write every field"],
    'file_name,text\n0.png,"a 24 inch wheel\n1.png,a boy\n2.png,a fox\n': ["line 2", "close every quote"],
    'file_name,text\n0.png,a\n1.png,"a wheel\n2.png,"a boy"\n': ["line 3", "close every quote"],
    'file_name,text\n0.png,"a wheel\n1.png,a boy"\n2.png,a fox\n': [
        "line 2",
        "close every quote",
    ],  # would swallow a row
    "file_name;text\n0.png;a girl; blue eyes\n": ["line 2 has 3 fields", "semicolons"],
    "file_name|text\n0.png|a girl\n": ["line 2", "file_name|text", "--caption_column"],
    "file_name,text\n,a girl\n": ["line 2", "file_name"],
    'file_name,text\n0.png,"a ""quoted"" one"\n1.png,"open" end\n': ["line 3", "close every quote"],
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_csv_that_can_be_read_in_two_ways_is_refused_by_line_and_cure(tmp_path, text):
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path, text)
    message = str(caught.value)
    assert str(tmp_path / "metadata.csv") in message and "\n" not in message
    assert all(part in message for part in REFUSED[text]), message


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_delimiter_is_that_of_the_heading(tmp_path, delimiter):
    text = f'file_name{delimiter}text\n0.png{delimiter}"a girl{delimiter} red hair"\n'
    assert rows_of(tmp_path, text) == [("0.png", f"a girl{delimiter} red hair")]


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ('file_name,text\n0.png,"a ""red"" house, at sea"\n', 'a "red" house, at sea'),
        ('file_name, text\n0.png, "a girl, red hair"\n', "a girl, red hair"),  # spaces after the comma
        ("\ufefffile_name,text\r\n0.png,a house\r\n\r\n", "a house"),  # as Excel writes it, with a blank line
        ('file_name,text\n0.png,"a house\nby the sea"\n', "a house\nby the sea"),
        ('id,file_name,text\n7,0.png,24" wheel\n', '24" wheel'),
        ("file_name,text\n0.png,\n", ""),
    ],
)
def test_what_is_clear_is_read(tmp_path, text, caption):
    assert rows_of(tmp_path, text) == [("0.png", caption)]


@pytest.mark.parametrize("value", ['["a", "b"]', "5", "{}", "true"])
def test_a_caption_in_json_that_is_no_text_is_refused_and_null_is_none(tmp_path, value):
    line = f'\n{{"file_name": "0.png", "text": {value}}}\n'
    with pytest.raises(UserError, match=r"line 2: text is .*not a text; see --caption_column"):
        rows_of(tmp_path, line, "metadata.jsonl")
    assert rows_of(tmp_path, '{"file_name": "0.png", "text": null}', "metadata.jsonl") == [("0.png", None)]
