"""Text and JSON files, read by one rule: UTF-8, or whatever a byte order mark says.

Programs on Windows begin files with a byte order mark; with one, UTF-16 and UTF-32 are read too.
Needs nothing but Python.
"""

import codecs
import json
import os
from typing import Any

__all__ = [
    "numbered_lines",
    "parse_json",
    "read_json",
    "read_lines",
    "read_text",
    "shown",
    "shown_path",
]

# UTF-32's mark begins with UTF-16's, so it is tried first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ARCHIVES = ((b"\x1f\x8b", "gzip"), (b"PK\x03\x04", "zip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"))


def read_text(path: str | os.PathLike, hint: str = "check the path.") -> str:
    r"""Read a text file; its lines end in ``\n``, whatever they end in on disk.

    Args:
        path: the file.
        hint: what to do where the file is missing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not text; the message names it and the line.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist or is not a file; {hint}")
    with open(path, "rb") as file:
        content = file.read()
    for start, archive in _ARCHIVES:
        if content.startswith(start):
            raise ValueError(f"{path} is compressed ({archive}); unpack it first.")
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is no text file: line {line} is not {encoding.upper()} ({error.reason}); it "
            "is damaged or in another encoding, save it as UTF-8."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | os.PathLike, hint: str = "check the path.") -> list[str]:
    """Lines of a text file without their ends; arguments and errors as of :func:`read_text`.

    Only line ends part lines: a name may hold a form feed or a line separator of Unicode.
    """
    lines = read_text(path, hint).split("\n")
    return lines if lines[-1] else lines[:-1]


def numbered_lines(path: str | os.PathLike, hint: str = "check the path.") -> list[tuple[int, str]]:
    """The lines that are not blank, each with its number from 1; as :func:`read_lines`."""
    return [(i, line) for i, line in enumerate(read_lines(path, hint), 1) if line.strip()]


def read_json(path: str | os.PathLike, hint: str = "check the path.") -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        hint: what to do where the file is missing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON; the message names it and the line.
    """
    return parse_json(read_text(path, hint), path)


def parse_json(text: str, source: str | os.PathLike) -> Any:
    """Parse JSON; ``source`` names it in the message.

    Raises:
        ValueError: the text is not JSON, for example because it is cut short.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = f"line {error.lineno}, column {error.colno}: {error.msg}"
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nesting
        found = str(error)
    raise ValueError(
        f"{source} is not valid JSON ({found}); the file is truncated or of another format, fetch "
        "or export it again."
    ) from None


def shown(value: Any) -> str:
    """Text of a file, on one line and short enough for a sentence."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; nesting
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def shown_path(path: str) -> str:
    """A path that a file names, as it is where it is of one line and of a usual length."""
    if path.isprintable() and len(path) <= 300:
        return path
    return repr(path) if len(path) <= 300 else f"{path[:297]!r}..."
