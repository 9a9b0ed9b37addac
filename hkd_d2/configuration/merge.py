"""Config files and options, merged into a config with the place of every mistake."""

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.config.compat import downgrade_config, guess_version, upgrade_config

from hkd_d2.configuration.files import find_config
from hkd_d2.configuration.safe_yaml import Section, read_yaml

BASE_KEY = "_BASE_"
MAX_BASES = 64
COMMAND_LINE = "on the command line"


def read_config_file(file: str | Path, *, may_import: bool = False) -> Section:
    """Read a config file with the files that its ``_BASE_`` names. Nothing in them is run.

    Args:
        file: YAML; see :func:`hkd_d2.configuration.safe_yaml.read_yaml` for what it may hold.
        may_import: the user named this very file, so its ``HKD.IMPORTS`` may be followed. Those of
            its bases may not.

    Returns:
        The values, those of the bases below those of the file.

    Raises:
        FileNotFoundError: the file or a base does not exist.
        OSError: a file cannot be read.
        ValueError: a file that is no config, bases that form a circle, or imports where none count.
    """
    return _read(str(file), [], [], may_import)


def _read(file: str, below: list[str], done: list[str], may_import: bool) -> Section:
    """
    Args:
        below: the files whose bases led here.
        done: every file read so far; their number is bounded.
    """
    if os.path.realpath(file) in map(os.path.realpath, below):
        raise ValueError(
            f"The config file '{file}' is its own base ({' -> '.join([*below, file])}); remove "
            f"one {BASE_KEY}."
        )
    done.append(file)
    if len(done) > MAX_BASES:
        raise ValueError(f"'{(below or [file])[0]}' has more than {MAX_BASES} bases; merge some.")
    section = read_yaml(file)
    imports = imports_of(section)
    if imports and not may_import:
        raise ValueError(
            f"{section['HKD'].places['IMPORTS']}: HKD.IMPORTS ({', '.join(map(str, imports))}) "
            "counts only in the file that you name with --config-file and on the command line; "
            "read the modules, move the key there and remove it here."
        )
    place = section.places.pop(BASE_KEY, "")
    bases = section.pop(BASE_KEY, [])
    result = Section()
    for base in [bases] if isinstance(bases, str) else _base_list(bases, place):
        result = _merged(result, _read(_base_path(base, file, place), [*below, file], done, False))
    return _merged(result, section)


def _base_list(bases: object, place: str) -> list[str]:
    if isinstance(bases, list) and all(isinstance(base, str) for base in bases):
        return bases
    raise ValueError(f"{place}: {BASE_KEY} is {bases!r}; name a file or a list of files.")


def _base_path(base: str, file: str, place: str) -> str:
    if "://" in base:
        raise ValueError(f"{place}: {BASE_KEY} is the address {base}; fetch it and name the file.")
    try:
        return str(find_config(os.path.expanduser(base), beside=file))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{place}: {BASE_KEY} names '{base}', and there is no file of that name in the folder "
            f"of '{file}', in the working directory or among the packaged configs; correct it."
        ) from None


def _merged(base: Section, over: Section) -> Section:
    """``over`` on top of ``base``, as a new section."""
    result = Section(base)
    for key, value in over.items():
        if isinstance(value, Section) and key in base:
            if not isinstance(base[key], Section):
                raise ValueError(
                    f"{over.places[key]}: '{key}' has keys of its own here and a single value in "
                    f"{base.places[key]}; correct one of them."
                )
            value = _merged(base[key], value)
        result[key] = value
        result.places[key] = over.places[key]
    return result


def imports_of(section: Section) -> list[str]:
    """The modules under ``HKD.IMPORTS``; [] where there are none.

    Raises:
        ValueError: something else than a list of names.
    """
    node = section.get("HKD")
    if not isinstance(node, Section) or "IMPORTS" not in node:
        return []
    return module_names(node["IMPORTS"], node.places["IMPORTS"])


def module_names(value: object, place: str) -> list[str]:
    """A list of module names out of a file or an option.

    Raises:
        ValueError: something else than a list of names.
    """
    names = _decoded(value)
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
        return list(names)
    raise ValueError(
        f"HKD.IMPORTS is {value!r} ({place}); give a list of modules, such as [my_team.my_term]."
    )


def merge_section(cfg: CfgNode, section: Section, file: str | Path) -> None:
    """Merge the values of a file into ``cfg``, in place.

    Files of Detectron2's older config versions are upgraded, as Detectron2 does.

    Raises:
        ValueError: an unknown key or a value of another type; the sentence names file and line.
    """
    version = section.get("VERSION")
    if version is None:
        version = guess_version(CfgNode(section), str(file))
    if version not in range(1, cfg.VERSION + 1) or isinstance(version, bool):
        raise ValueError(
            f"{section.places['VERSION']}: VERSION is {version!r}, and the installed Detectron2 "
            f"reads configs of version 1 to {cfg.VERSION}; correct it."
        )
    if version == cfg.VERSION:
        _merge(cfg, section, "", cfg)
        return
    old = downgrade_config(cfg, to_version=version)
    _merge(old, section, "", old)
    new = upgrade_config(old)
    cfg.clear()
    cfg.update(new)


def _merge(node: CfgNode, section: Section, prefix: str, root: CfgNode) -> None:
    for key, value in section.items():
        full, place = prefix + key, section.places[key]
        if not isinstance(node.get(key), CfgNode):
            _assign(node, key, value, full, place, root)
        elif isinstance(value, Section):
            _merge(node[key], value, f"{full}.", root)
        else:
            raise ValueError(_not_a_value(full, value, node[key], place))


def merge_options(cfg: CfgNode, options: Sequence) -> None:
    """Merge keys and values by turns, as a command line has them, into ``cfg``, in place.

    Raises:
        ValueError: an odd number, an unknown key or a value of another type.
    """
    if len(options) % 2:
        raise ValueError(
            f"The option '{options[-1]}' has no value; give options in pairs: KEY VALUE ..."
        )
    for full, value in zip(options[::2], options[1::2], strict=True):
        node, (*path, key) = cfg, str(full).split(".")
        for name in path:
            node = node.get(name) if isinstance(node, CfgNode) else None
        if not isinstance(node, CfgNode):
            raise ValueError(_unknown(str(full), COMMAND_LINE, cfg))
        if isinstance(node.get(key), CfgNode):
            raise ValueError(_not_a_value(str(full), value, node[key], COMMAND_LINE))
        _assign(node, key, value, str(full), COMMAND_LINE, cfg)


def _assign(node: CfgNode, key: str, value: object, full: str, place: str, root: CfgNode) -> None:
    if key in node or node.is_new_allowed():
        if not _lists_are_plain(value if isinstance(value, Section) else _decoded(value)):
            raise ValueError(
                f"{full} is {_shown(value)} ({place}); put only text, numbers, True, False and "
                "lists of these into a list."
            )
    if key in node:
        node[key] = _fitting(value, node[key], full, place)
    elif node.is_new_allowed():
        node[key] = CfgNode(value) if isinstance(value, Section) else _decoded(value)
    elif root.key_is_renamed(full):
        new = root.__dict__[CfgNode.RENAMED_KEYS][full]
        raise ValueError(f"{full} ({place}) is called {new} now; rename it.")
    elif not root.key_is_deprecated(full):
        raise ValueError(_unknown(full, place, root))


def _decoded(value: object) -> object:
    """As yacs reads text: a Python literal if it is one."""
    try:
        return CfgNode._decode_cfg_value(value)
    except (TypeError, RecursionError, MemoryError):
        return value


def _lists_are_plain(value: object) -> bool:
    """Whether a value's lists can be written to a config file and read from it."""
    if isinstance(value, dict):
        return all(map(_lists_are_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(
            isinstance(item, (str, int, float))
            or (isinstance(item, (list, tuple)) and _lists_are_plain(item))
            for item in value
        )
    return True


KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text, in quotes if it looks like something else",
    list: "a list, such as [a, b]",
    tuple: "a list, such as [a, b]",
}


def _fitting(value: object, current: object, full: str, place: str) -> object:
    """``value`` with the type of the value that it replaces.

    yacs' rules, and two of ours: a whole number serves for a float, and text that looks like a
    number, such as a folder named 2024, stays text where text is asked for.
    """
    decoded = _decoded(value)
    if isinstance(current, str) and isinstance(value, str) and not isinstance(decoded, str):
        return value
    kind = type(current)
    if type(decoded) is kind:
        return decoded
    if isinstance(decoded, (list, tuple)) and kind in (list, tuple):
        return kind(decoded)
    if type(decoded) is int and kind is float:
        return float(decoded)
    if decoded is None or (current is None and type(decoded) in KINDS):
        return decoded
    wanted = KINDS.get(kind, "a single value")
    raise ValueError(
        f"{full} is {_shown(value)} ({place}); give {wanted}: it replaces {current!r}."
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _not_a_value(full: str, value: object, node: CfgNode, place: str) -> str:
    inner = f", such as {full}.{next(iter(node))}" if node else ""
    return (
        f"{full} is {_shown(value)} ({place}), but it is a group of keys; set one of them{inner}."
    )


def _unknown(full: str, place: str, root: CfgNode) -> str:
    known = list(_keys(root))
    leaf = full.rpartition(".")[2]
    near = [key for key in known if key.rpartition(".")[2] == leaf] or known
    match = difflib.get_close_matches(full, near, n=1, cutoff=0.6 if near is known else 0.0)
    advice = f"did you mean {match[0]}?" if match else "correct or remove it."
    if full.startswith("HKD.") and full.count(".") == 1 and place != COMMAND_LINE:
        advice = f"{advice.rstrip('.?')}, or is it the term of a module to name in HKD.IMPORTS?"
    return f"{full} ({place}) is no config key; {advice}"


def _keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")
