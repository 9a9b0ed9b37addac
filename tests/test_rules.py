"""The rules that docs/architecture.md lists are those on the tests."""

from helpers import rules


def test_the_page_lists_the_rules_of_the_tests():
    page = rules.PAGE.read_text()
    assert rules.with_rules(page) == page, "run python tests/helpers/rules.py"


def test_rules_are_short_and_stand_once():
    texts = list(rules.rules())
    assert len(texts) > 70
    assert not [text for text in texts if len(text) > 100 or text.endswith(".")]
    assert len({text.casefold() for text in texts}) == len(texts)


def test_marks_are_read_from_functions_and_files(tmp_path):
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "test_b.py").write_text(
        '@rule("One")\n@pytest.mark.gpu\ndef test_x(): ...\n@rule("One")\ndef test_y(): ...\n'
        '@rule("None")\ndef helper(): ...\n'
    )
    (tmp_path / "test_a.py").write_text('pytestmark = [pytest.mark.slow, rule("Two")]\n')
    assert rules.rules(tmp_path) == {
        "One": [("ops/test_b.py", ["test_x", "test_y"])],
        "Two": [("test_a.py", [])],
    }


def test_a_page_that_is_not_current_differs():
    page = rules.PAGE.read_text()
    rule = next(iter(rules.rules()))
    assert rules.with_rules(page.replace(rule, "Another rule")) == page
