"""Write docs/config.md: every config key of the project, from the comments above its definition.

python docs/config_keys.py
"""

import inspect
import io
import tokenize
from functools import cache
from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from hkd_d2.config import add_hkd_config

HEAD = """# Configuration keys

Every key that this package adds to Detectron2's, with its default. They stand under `HKD` in a
config file, and follow a command as `KEY VALUE`, for example `HKD.PYRAMID.WEIGHT 0.5`. The
descriptions are the comments in the code; this page is written from them by
`python docs/config_keys.py`."""


@cache
def comments(file: str) -> dict[int, str]:
    """Comments that have a line to themselves, by line number."""
    tokens = tokenize.generate_tokens(io.StringIO(Path(file).read_text()).readline)
    return {
        token.start[0]: token.string.lstrip("# ").rstrip()
        for token in tokens
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
    }


def described(file: str, line: int) -> str:
    """The comment that ends on the line above."""
    lines = []
    while (line := line - 1) in comments(file):
        text = comments(file)[line]
        if set(text.split()[0]) == {"-"}:  # a ruled heading
            break
        lines.append(text)
    return " ".join(reversed(lines))


def definitions() -> tuple[CfgNode, dict[tuple[int, str], tuple[str, int]]]:
    """The default config, and file and line of each assignment, by node and key."""
    places = {}
    plain = CfgNode.__setattr__

    def recording(node, name, value):
        frame = inspect.currentframe().f_back
        places[id(node), name] = (frame.f_code.co_filename, frame.f_lineno)
        plain(node, name, value)

    cfg = get_cfg()
    CfgNode.__setattr__ = recording
    try:
        add_hkd_config(cfg)
    finally:
        del CfgNode.__setattr__
        if CfgNode.__setattr__ is not plain:  # it was the class's own
            CfgNode.__setattr__ = plain
    return cfg, places


def keys(node: CfgNode, places: dict) -> dict[str, tuple[object, str]]:
    """Default and description by key, of a node and the nodes in it.

    Raises:
        ValueError: a key without a comment above its default.
    """
    found = {}
    for key, value in node.items():
        if isinstance(value, CfgNode) and value:
            found |= {f"{key}.{name}": row for name, row in keys(value, places).items()}
            continue
        place = places.get((id(node), key))
        text = described(*place) if place else ""
        if not text:
            raise ValueError(f"{key} has no comment above its default{place}; write one there.")
        found[key] = {} if isinstance(value, CfgNode) else value, text
    return found


def table(found: dict[str, tuple[object, str]]) -> str:
    """A Markdown table of keys, defaults and descriptions."""
    lines = ["| key | default | |", "|---|---|---|"]
    for key, (default, text) in found.items():
        text = text.replace("|", "\\|")
        lines.append(f"| `{key}` | `{default!r}` | {text} |")
    return "\n".join(lines)


def page() -> str:
    """The page as Markdown."""
    cfg, places = definitions()
    nodes = {k: v for k, v in cfg.HKD.items() if isinstance(v, CfgNode) and v}
    single = CfgNode({k: v for k, v in cfg.HKD.items() if k not in nodes})
    places |= {(id(single), k): places.get((id(cfg.HKD), k)) for k in single}
    text = [HEAD, f"## HKD\n\n{table(keys(single, places))}"]
    schedule = {}
    for name, node in nodes.items():
        found = keys(node, places)
        own = {k: v for k, v in found.items() if not k.startswith("SCHEDULE.")}
        text.append(f"## HKD.{name}\n\n{table(own)}")
        if own != found:
            text.append("And a [schedule](#schedules) of its weight.")
            schedule = {k: v for k, v in found.items() if k not in own}
    text.append(f"## Schedules\n\nEvery term's node has these:\n\n{table(schedule)}")
    return "\n\n".join(text) + "\n"


def write(file: Path) -> None:
    """Write the page where it differs from what is there."""
    text = page()
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


if __name__ == "__main__":
    write(Path(__file__).with_name("config.md"))
