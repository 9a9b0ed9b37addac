"""Rules of the project as marks on the tests that prove them, and the list that is made of them.

    from helpers.rules import rule

    @rule("The student's box branch runs once")
    def test_...

    pytestmark = rule("Pictures are decoded within bounds")     # every test of the file

One rule may stand on several tests. ``python tests/helpers/rules.py`` writes the list into
docs/architecture.md.
"""

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

rule = pytest.mark.rule

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "architecture.md"
BEGIN, END = "<!-- rules: from the marks on the tests -->\n", "<!-- end of rules -->\n"
# Folders of tests in the order of a batch's journey; any other folder follows.
ORDER = ("modeling", "distillation", "engine", "data", "evaluation", "ops", "cuda_emulator", "csrc")
WIDTH = 100


def marks(file: Path) -> Iterator[tuple[str, str | None]]:
    """Yield each (rule, test) of a file, read and not imported; test None for all of its tests."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            name, values = node.name, node.decorator_list
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            value = node.value
            name, values = None, value.elts if isinstance(value, ast.List) else [value]
        else:
            continue
        for value in values:
            if isinstance(value, ast.Call) and ast.unparse(value.func) == "rule":
                (text,) = value.args
                yield ast.literal_eval(text), name


def rules(tests: Path = TESTS) -> dict[str, list[tuple[str, list[str]]]]:
    """Collect {rule: [(file, its tests or none for all)]}, both in order."""

    def place(file: Path) -> tuple[int, str]:
        folder = file.relative_to(tests).parts[0]
        return (ORDER.index(folder) if folder in ORDER else len(ORDER), str(file))

    found: dict[str, list[tuple[str, list[str]]]] = {}
    for file in sorted(tests.rglob("test_*.py"), key=place):
        name = file.relative_to(tests).as_posix()
        for text, test in marks(file):
            places = found.setdefault(text, [])
            if not places or places[-1][0] != name:
                places.append((name, []))
            places[-1][1].extend([test] if test else [])
    return found


def as_list(found: dict[str, list[tuple[str, list[str]]]]) -> str:
    """The rules as a Markdown list, each under the folder of its first test."""
    lines, heading = [], None
    for text, places in found.items():
        folder = places[0][0].rpartition("/")[0] or "the whole"
        if folder != heading:
            heading = folder
            lines.append(f"\n### {folder}\n\n")
        proofs = [
            f"`{file}`" + (": " + ", ".join(f"`{test}`" for test in tests) if tests else "")
            for file, tests in places
        ]
        wrapped = textwrap.fill(
            "; ".join(proofs),
            WIDTH,
            initial_indent="  ",
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines.append(f"- {text}.\n{wrapped}\n")
    return "".join(lines)


def with_rules(page: str) -> str:
    """The page with its list of rules made anew."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + as_list(rules()) + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(with_rules(PAGE.read_text()))
