"""The documents: links that lead somewhere, config keys and commands that exist."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += [p for p in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in p.parts]
PAGES = [p for p in PAGES if p != ROOT / "docs" / "api.md"]  # built with the site
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
KEY = re.compile(r"\bHKD(?:\.[A-Z][A-Z0-9_]+)+\b")


def prose(page):
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def anchors(page):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", h.replace("`", "").lower()) for h in headings)
    return {h.strip().replace(" ", "-") for h in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    dead = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


@pytest.fixture(scope="module")
def keys():
    """Every key of the project and the nodes they stand in."""
    from detectron2.config import CfgNode, get_cfg

    from hkd_d2.config import add_hkd_config

    def names(node, prefix):
        for key, value in node.items():
            yield f"{prefix}.{key}"
            if isinstance(value, CfgNode):
                yield from names(value, f"{prefix}.{key}")

    cfg = get_cfg()
    add_hkd_config(cfg)
    return set(names(cfg.HKD, "HKD"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_keys_exist(page, keys):
    if page.name == "adding_a_term.md":
        pytest.skip("its example makes keys of its own")
    assert set(KEY.findall(page.read_text())) <= keys


def test_defaults_in_the_methods_page_are_the_codes(keys):
    """A row of docs/methods.md that begins with one key and a number or list."""
    from detectron2.config import get_cfg

    from hkd_d2.config import add_hkd_config

    cfg = get_cfg()
    add_hkd_config(cfg)
    row = re.compile(r"^\| `([A-Z]+)\.([A-Z_]+)` \| `?(\[[^\]]*\]|[\d.e-]+)`?(?=[ ,;|])", re.M)
    found = row.findall((ROOT / "docs" / "methods.md").read_text())
    assert len(found) > 25
    for term, key, text in found:
        default = cfg.HKD[term][key]
        if text.startswith("["):
            stated = re.findall(r"[\w.]+", text)
            assert [str(v) for v in default] == stated, f"{term}.{key}"
        else:
            assert default == ast.literal_eval(text), f"{term}.{key}"


def test_page_of_keys_is_current(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import config_keys

    try:
        written = (ROOT / "docs" / "config.md").read_text()
        assert written == config_keys.page(), "run: python docs/config_keys.py"
    finally:
        sys.modules.pop("config_keys")


def test_readme_fits_its_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
