"""Configs with mutations end as configs or as one sentence that names the file."""

import random
import shutil
from pathlib import Path

import pytest

from hkd_d2.config import default_config, load_config

CONFIGS = Path(__file__).parents[1] / "configs"
TOKENS = [
    *("\t", "[", "]", "{", "}", ": ", "- ", "*a", "&a ", "|\n", ">", "'", '"', "#", "? ", "%", "@"),
    *("\0", "\xff", "\ufeff", "\r", "---\n", "...\n", "\u2028", "<<: ", "=", "~", "null", "1e999"),
    *(".nan", ".inf", "0o7", "2001-01-01", "1:30", "(1,)", "{}", "{[]: 1}", "9" * 5000),
    *("!!python/object/apply:os.abort []", "!!python/name:os.abort", "!!binary aGk=", "!!set {a}"),
    *("!!float abc", "!!int x", "!!bool maybe", "!!str [a]", "!!seq 3", "!!map [1]", "!!null 3"),
    *("_BASE_: x\n", "_BASE_: []\n", "_BASE_: ''\n", "_BASE_: .\n", "VERSION: 1\n", "VERSION: 0\n"),
    *("HKD: {IMPORTS: [no.such]}\n", "HKD: {IMPORTS: ['a b']}\n", "HKD: {IMPORTS: 3}\n"),
]


def mutate(text: bytes, rng: random.Random) -> bytes:
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


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_mutated_configs(tmp_path, seed):
    for file in CONFIGS.glob("*.yaml"):
        shutil.copy(file, tmp_path)
    texts = [file.read_bytes() for file in sorted(CONFIGS.rglob("*.yaml"))]
    texts.append(default_config().dump().encode())
    rng, path, refused = random.Random(seed), tmp_path / "mutated.yaml", 0
    for _ in range(250):
        path.write_bytes(mutate(rng.choice(texts), rng))
        try:
            load_config(path)
        except (ValueError, OSError, ImportError) as error:
            refused += 1
            sentence = str(error)
            assert "\n" not in sentence and len(sentence) < 1000, sentence
            assert ".yaml" in sentence or "HKD.IMPORTS" in sentence, sentence
            assert not isinstance(error, UnicodeError), sentence
    assert 50 < refused < 250
