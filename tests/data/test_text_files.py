"""The reader of text files, against Python's own codecs."""

import codecs
import gzip
import json

import pytest

from hkd_d2.data.text_files import (
    numbered_lines,
    parse_json,
    read_json,
    read_lines,
    read_text,
)

TEXT = 'première\n\nzweite "Straße" 人\u2028\x0c end\nlast'
LINES = ["première", "", 'zweite "Straße" 人\u2028\x0c end', "last"]
ENCODINGS = {
    "utf-8": TEXT.encode(),
    "utf-8-sig": codecs.BOM_UTF8 + TEXT.encode(),
    "utf-16-le": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "utf-16-be": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "utf-32-le": codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
    "utf-32-be": codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_reads_as_the_same_text(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(ENCODINGS[encoding])
    assert read_text(tmp_path / "a.txt") == TEXT
    assert read_lines(tmp_path / "a.txt") == LINES


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", ["", "end"])
def test_every_line_end_parts_lines(tmp_path, end, last):
    text = "\n".join(LINES) + ("\n" if last else "")
    (tmp_path / "a.txt").write_bytes(text.replace("\n", end).encode())
    assert read_lines(tmp_path / "a.txt") == LINES
    assert numbered_lines(tmp_path / "a.txt") == [(1, LINES[0]), (3, LINES[2]), (4, LINES[3])]


def test_an_empty_file_has_no_lines(tmp_path):
    for content in (b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE):
        (tmp_path / "a.txt").write_bytes(content)
        assert read_text(tmp_path / "a.txt") == ""
        assert read_lines(tmp_path / "a.txt") == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_json_in_every_encoding(tmp_path, encoding, end):
    content = {"name": "Straße 人", "rows": [1, 2.5, None]}
    text = json.dumps(content, ensure_ascii=False, indent=1).replace("\n", end)
    (tmp_path / "a.json").write_bytes(text.encode(encoding))
    assert read_json(tmp_path / "a.json") == content


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"ok\ncaf\xe9 au lait", "line 2 is not UTF-8"),
        (codecs.BOM_UTF16_LE + b"a", "line 1 is not UTF-16"),
        (gzip.compress(b"text", mtime=0), r"compressed \(gzip\); unpack"),
    ],
)
def test_what_is_no_text_is_refused_with_what_to_do(tmp_path, content, error):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=error) as caught:
        read_text(tmp_path / "a.txt")
    assert str(caught.value).startswith(str(tmp_path / "a.txt"))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.txt does not exist .*; unpack it there"):
        read_text(tmp_path / "none.txt", "unpack it there.")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_json(tmp_path)


@pytest.mark.parametrize("text", ["", '{"a": [1, 2', "[" * 100_000, "9" * 5000, "<html>"])
def test_what_is_no_json_is_one_sentence(text):
    with pytest.raises(ValueError, match="^list.odgt: line 3 is not valid JSON") as caught:
        parse_json(text, "list.odgt: line 3")
    assert len(str(caught.value)) < 300
