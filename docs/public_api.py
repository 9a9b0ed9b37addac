"""Write docs/api.md: the public names of the package and of hkd_d2.ops, for Sphinx's autodoc."""

import inspect
from pathlib import Path

import hkd_d2
import hkd_d2.ops


def directive(module, name: str) -> str:
    """The autodoc directive of one public name."""
    value = getattr(module, name)
    kind = "autodata"
    if inspect.isclass(value):
        kind = "autoclass"
    elif callable(value):
        kind = "autofunction"
    elif inspect.ismodule(value):
        kind = "automodule"
    members = "   :members:\n" if kind == "autoclass" else ""
    return f".. {kind}:: {module.__name__}.{name}\n{members}"


def page() -> str:
    """The page as Markdown."""
    parts = ["# Python API\n"]
    for module in (hkd_d2, hkd_d2.ops):
        names = sorted(n for n in module.__all__ if not inspect.ismodule(getattr(module, n)))
        body = "\n".join(directive(module, n) for n in names)
        parts.append(f"## {module.__name__}\n\n```{{eval-rst}}\n{body}```\n")
    return "\n".join(parts)


def write(file: Path) -> None:
    """Write the page where it differs from what is there."""
    text = page()
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
