"""Changes of files at random, for the tests that read damaged and hostile ones."""

import random
import re

import numpy as np

VALUES = (
    *("NaN", "Infinity", "-Infinity", "1e400", "-1", "0", "1e300", "9" * 5000, "9" * 300),
    *("null", "true", "[]", "{}", '"x"', '"\\ud800"', "[[[1]]]", "2.5", "1e18", "-0.0", '""'),
    *("[" * 3000 + "]" * 3000, '{"a":' * 500 + "1" + "}" * 500, "192.0", "0x10", "1_0", "\u0663"),
)
TOKENS = [
    *("\t", "[", "]", "{", "}", ": ", "- ", "*a", "&a ", "|\n", ">", "'", '"', "#", "? ", "%", "@"),
    *("\0", "\xff", "\ufeff", "\r", "---\n", "...\n", "\u2028", "<<: ", "=", "~", "null", "1e999"),
    *(".nan", ".inf", "0o7", "2001-01-01", "1:30", "(1,)", "{}", "{[]: 1}", "9" * 5000),
    *("!!python/object/apply:os.abort []", "!!python/name:os.abort", "!!binary aGk=", "!!set {a}"),
    *("!!float abc", "!!int x", "!!bool maybe", "!!str [a]", "!!seq 3", "!!map [1]", "!!null 3"),
    *("_BASE_: x\n", "_BASE_: []\n", "_BASE_: ''\n", "_BASE_: .\n", "VERSION: 1\n", "VERSION: 0\n"),
    *("HKD: {IMPORTS: [no.such]}\n", "HKD: {IMPORTS: ['a b']}\n", "HKD: {IMPORTS: 3}\n"),
]


def mutate_picture(content: bytes, generator: np.random.Generator) -> bytes:
    """Bytes overwritten, mostly in the header; removed, repeated, or cut off."""
    found = bytearray(content)
    for _ in range(generator.integers(1, 5)):
        reach = min(len(found), 120) if generator.random() < 0.6 else len(found)
        place = int(generator.integers(max(reach, 1)))
        size = int(generator.integers(1, 9))
        kind = generator.integers(6)
        if kind == 0:
            found[place : place + size] = generator.bytes(size)
        elif kind == 1:
            found[place : place + 1] = bytes([generator.choice([0, 1, 0x7F, 0x80, 0xFF])])
        elif kind == 2:
            found[place : place + size] = b"\xff" * size
        elif kind == 3:
            del found[place : place + size]
        elif kind == 4:
            found[place:place] = found[place : place + size * 8]
        else:
            del found[place + len(found) // 4 :]
    return bytes(found)


def mutate_annotations(data: bytes, rng: random.Random) -> bytes:
    """A change of the kinds that happen to files, or that a program of another mind makes."""
    kind = rng.randrange(9)
    at = rng.randrange(len(data) + 1)
    if kind == 0:  # cut short
        return data[:at]
    if kind == 1:  # damaged bytes
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 3, 20))):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if kind == 2:  # a piece is missing, or stands twice
        end = min(len(data), at + rng.randrange(1, 60))
        return data[:at] + data[end:] if rng.random() < 0.5 else data[:end] + data[at:]
    if kind == 3:  # a mark that is none, another encoding
        text = data.decode("latin-1")
        return rng.choice(
            (
                b"\xff\xfe" + data,
                b"\xef\xbb\xbf" * 2 + data,
                text.encode("utf-16"),
                b"\0" * 8 + data,
            )
        )
    if kind == 4:  # bytes from elsewhere
        return data[:at] + rng.randbytes(rng.randrange(1, 30)) + data[at:]
    if kind == 5:  # words of one line in another order
        lines = data.split(b"\n")
        line = rng.randrange(len(lines))
        words = lines[line].split()
        rng.shuffle(words)
        lines[line] = b" ".join(words)
        return b"\n".join(lines)
    # Most often: a number or a value of another kind.
    spans = [m.span() for m in re.finditer(rb'-?\d+(?:\.\d+)?|"[^"]*"', data)]
    if not spans:
        return data + b"\n1"
    for _ in range(rng.choice((1, 1, 2))):
        start, end = rng.choice(spans[:300])
        data = data[:start] + rng.choice(VALUES).encode("utf-8", "surrogatepass") + data[end:]
        spans = spans[: next((i for i, span in enumerate(spans) if span[0] >= start), 0)] or [
            (0, 0)
        ]
    return data


def mutate_config(text: bytes, rng: random.Random) -> bytes:
    """One to four insertions, deletions, other values or repetitions."""
    text = bytearray(text)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(text) + 1)
        token = rng.choice(TOKENS).encode("latin-1" if rng.random() < 0.1 else "utf-8", "replace")
        kind = rng.choice(("insert", "delete", "line", "value", "repeat"))
        if kind == "insert":
            text[place:place] = token
        elif kind == "delete":
            del text[place : place + rng.randint(1, 20)]
        elif kind == "line":
            start = text.rfind(b"\n", 0, place) + 1
            text[start:start] = token
        elif kind == "value":
            start = text.find(b": ", place) + 2
            text[start : text.find(b"\n", start)] = token
        else:
            text[place:place] = text[max(0, place - 40) : place]
    return bytes(text)
