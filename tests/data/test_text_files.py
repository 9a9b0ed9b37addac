"""Text and JSON files: marks of byte order, line ends, and what is refused."""

import codecs
import json

import pytest

from hkd_d2.data.text_files import read_json, read_text

MARKS = {
    "utf-8": b"",
    "utf-8-sig": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("encoding", MARKS)
def test_marks_of_byte_order(tmp_path, encoding):
    path = tmp_path / "a.json"
    text = json.dumps({"name": "Zürich"}, ensure_ascii=False)
    path.write_bytes(MARKS[encoding] + text.encode(encoding.removesuffix("-sig")))
    assert read_text(path) == text
    assert read_json(path) == {"name": "Zürich"}


def test_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\n\n")
    assert read_text(tmp_path / "a.txt") == "a\nb\nc\n\n"


def test_what_is_refused_names_file_and_line(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError, match="a.json does not exist"):
        read_json(path)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_text(tmp_path)
    path.write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(ValueError, match="a.json is no text file: line 2 is not UTF-8"):
        read_text(path)
    for content, message in (
        ('{"a":\n 1,\n', "a.json is not valid JSON .line 3, column 1: .* truncated"),
        ("[" * 100_000, "a.json is not valid JSON .*recursion"),
        ("1" * 10_000, "a.json is not valid JSON .*digits"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_json(path)
