"""Finds the command that is named and runs it under the error rule."""

import argparse
import difflib
import importlib
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial

from hkd_d2 import __version__
from hkd_d2.cli.errors import guard

# By name; "data check" is hkd_d2/cli/data/check.py.
COMMANDS = {
    "train": "train a detector, plain or beside its teacher",
    "evaluate": "score a trained detector on a data set, under Detectron2",
    "score": "miss rate of a file of detections; needs NumPy alone",
    "analyze": "what detectors get wrong, as a page",
    "label": "pseudo-labels: a teacher's detections as labels",
    "pretrain": "pre-train a backbone by distillation",
    "export": "write ONNX, torch.export, TorchScript or safetensors, verified",
    "quantize": "INT8 of an exported detector",
    "detect": "find pedestrians in pictures, folders, videos or before a camera",
    "serve": "a detector as an HTTP service",
    "count": "parameters and multiply-adds of configs",
    "benchmark": "trained detectors side by side: size, speed, memory, miss rate",
    "data check": "check and prepare a download of a data set",
    "data view": "draw samples with their boxes",
    "data crop": "crops of objects and background, to pre-train on",
    "data split": "the part of a COCO file that lies in given folders",
    "data streets": "draw a data set of synthetic streets",
    "info": "versions, what is compiled, for which device",
}
WIDTH = 100


class Parser(argparse.ArgumentParser):
    """Mistakes are one sentence; help is at most :data:`WIDTH` columns wide."""

    def __init__(self, **options):
        width = min(WIDTH, shutil.get_terminal_size((WIDTH, 40)).columns)
        formatter = partial(argparse.RawDescriptionHelpFormatter, width=width, max_help_position=30)
        super().__init__(formatter_class=formatter, **options)

    def error(self, message):
        raise ValueError(f"{message.rstrip('.')}; see {self.prog} --help.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``hkd`` with ``argv``, by default that of the process; returns the exit code."""
    if "_ARGCOMPLETE" in os.environ:
        complete()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(overview(""))
        return 0
    if words[0] == "--version":
        print(f"hkd_d2 {__version__}")
        return 0
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    number = 2 if words[0] in groups else 1
    if number == 2 and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(overview(words[0]))
        return 0
    name = " ".join(words[:number])
    if name in COMMANDS:
        return run_command(name, words[number:])
    close = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    print(f"hkd: there is no command '{name}'; {hint}'hkd --help' lists them.", file=sys.stderr)
    return 2


def run_command(
    name: str,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    aliases: dict[str, str | None] | None = None,
) -> int:
    """Run one command.

    Args:
        name: of :data:`COMMANDS`.
        argv: the words after it; None for those of the process.
        prog: what messages call it.
        aliases: other spellings of its options, by the spelling; None drops the word.

    Returns:
        the exit code, see :func:`hkd_d2.cli.errors.guard`.
    """
    import hkd_d2._quiet  # noqa: F401

    prog = prog or f"hkd {name}"
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        option, sign, value = word.partition("=")
        own = (aliases or {}).get(option, option)
        words += [own + sign + value] if own is not None else []

    def command() -> int:
        module = command_module(name)
        parser = Parser(prog=prog, description=module.__doc__)
        module.add_arguments(parser)
        return module.run(parser.parse_args(words)) or 0

    return guard(command, prog)


def command_module(name: str):
    """The module of a command."""
    return importlib.import_module(f"hkd_d2.cli.{name.replace(' ', '.')}")


def overview(group: str) -> str:
    """The commands, one a line, of a group (``data``) or all of them."""
    commands = {n: text for n, text in COMMANDS.items() if n.startswith(group)}
    lines = [
        f"usage: hkd {group} COMMAND ...".replace("  ", " "),
        "",
        "Distillation of pedestrian detectors in Detectron2.",
        "",
        *(f"  {name:<14}{text}" for name, text in commands.items()),
        "",
        "'hkd COMMAND --help' says what a command takes. A model is [NAME=]FILE; data are FORMAT",
        "SOURCE PART, or the name of a registered data set; output goes to --out; config options,",
        "KEY VALUE, come last.",
        "Exit codes: 0 done, 1 done in part, 2 something to change, which one sentence says;",
        "HKD_TRACEBACK=1 shows the traceback as well.",
    ]
    return "\n".join(lines)


def complete() -> None:
    """Answer a shell's request for completions and exit; needs the extra [completion]."""
    try:
        import argcomplete
    except ImportError:
        sys.exit(1)
    words = os.environ.get("COMP_LINE", "").split()[1:]
    argcomplete.autocomplete(whole_parser(words))


def whole_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """A parser of every command, with the arguments of the one that ``words`` begin with."""
    parser = argparse.ArgumentParser(prog="hkd")
    root = parser.add_subparsers()
    groups = {}
    for name in COMMANDS:
        *group, last = name.split()
        if group and group[0] not in groups:
            groups[group[0]] = root.add_parser(group[0]).add_subparsers()
        command = (groups[group[0]] if group else root).add_parser(last)
        if list(words[: len(group) + 1]) == [*group, last]:
            command_module(name).add_arguments(command)
    return parser
