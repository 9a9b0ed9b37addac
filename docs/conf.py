"""The site, which `make docs` builds in docs/_build/html; a warning or dead link is an error."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import config_keys  # noqa: E402
import public_api  # noqa: E402

import hkd_d2  # noqa: E402

project = "hkd_d2"
release = hkd_d2.__version__
copyright = "the hkd_d2 authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["attrs_block", "colon_fence", "dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
html_theme = "furo"
html_title = f"hkd_d2 {release}"
html_static_path = []


def setup(app):
    """Write the pages that come from the code before Sphinx looks for pages."""
    config_keys.write(DOCS / "config.md")
    public_api.write(DOCS / "api.md")
