"""Arguments shared by all commands: models, data, output and config options."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Za-z0-9_]+)*")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Config options, the last of the words; read them with :func:`config_options`."""
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config options, last"
    )


def config_options(args: argparse.Namespace) -> list[str]:
    """The config options of a command line.

    Raises:
        ValueError: a key without a value, or an option of the command among them.
    """
    options = [*getattr(args, "more_options", []), *args.opts]
    if options[:1] == ["--"]:
        del options[0]
    for word in options[::2]:
        if not _KEY.fullmatch(word):
            raise ValueError(
                f"'{word}' stands where a config key belongs; config options are KEY VALUE, and "
                "follow everything else."
            )
    if len(options) % 2:
        raise ValueError(f"The config option '{options[-1]}' has no value; give KEY VALUE.")
    return options


def split_configs(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide words into config files, which come first, and config options."""
    number = next((i for i, word in enumerate(words) if not _is_config(word)), len(words))
    # A name that is no file is reported as one; only a key begins the options.
    while number < len(words) and not _KEY.fullmatch(words[number]):
        number += 1
    return list(words[:number]), list(words[number:])


def _is_config(word):
    return word.endswith((".yaml", ".yml")) or os.path.isfile(word)


def add_models(parser: argparse.ArgumentParser) -> None:
    """Several models; read them with :func:`named_files` and :func:`named_configs`."""
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]FILE",
        help=".pth, .safetensors, .onnx, .pt2 or .ts; several times for several side by side",
    )
    parser.add_argument(
        "--config-file",
        action="append",
        metavar="[NAME=]FILE",
        help="config of a model [config.yaml beside it]; NAME where there are several",
    )


def add_config_file(parser: argparse.ArgumentParser, text: str) -> None:
    """Config of the one model."""
    parser.add_argument(
        "--config-file", metavar="FILE", help=f"{text} [config.yaml beside the model]"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda or cuda:N [cpu]")


def add_missing_point(parser: argparse.ArgumentParser) -> None:
    """Rule of the miss rate."""
    from hkd_d2.evaluation import MISSING_POINTS

    parser.add_argument(
        "--missing-point",
        choices=list(MISSING_POINTS),
        default="official",
        help="of the miss rate, as in hkd score [%(default)s]",
    )


def add_data(parser: argparse.ArgumentParser, flag: str, text: str, **options) -> None:
    """A data set: FORMAT SOURCE PART, or the name of a registered one; see :func:`data_name`."""
    parser.add_argument(
        flag,
        nargs="+",
        action=_Data,
        metavar=("FORMAT", "SOURCE PART"),
        help=f"{text}: FORMAT SOURCE PART, or the name of a registered data set",
        **options,
    )


class _Data(argparse.Action):
    """Keeps the words of a data set and leaves the config options that follow them."""

    def __call__(self, parser, namespace, words, option_string=None):
        number = 1 if len(words) == 1 or self.is_name(words) else 3
        if number > len(words):
            parser.error(
                f"{option_string} takes the name of a registered data set or FORMAT SOURCE PART, "
                f"not {' '.join(words)}"
            )
        setattr(namespace, self.dest, words[:number])
        namespace.more_options = [*getattr(namespace, "more_options", []), *words[number:]]

    @staticmethod
    def is_name(words: Sequence[str]) -> bool:
        """Whether the first of several words is a name, before config options."""
        from hkd_d2.data.datasets.register import FOLDERS

        return words[0] not in ("coco", *FOLDERS) and _KEY.fullmatch(words[1]) is not None


def data_name(words: Sequence[str]) -> str:
    """Register a data set that is given as FORMAT SOURCE PART; returns its name.

    Raises:
        ValueError: an unknown format.
    """
    from hkd_d2.data.datasets import register_unnamed

    return words[0] if len(words) == 1 else register_unnamed(*words)


def named_files(texts: Sequence[str], kind: str = "model") -> dict[str, str]:
    """Files by name; one without NAME is named as the file without its suffix.

    Args:
        texts: [NAME=]FILE each.
        kind: what the files are, for messages.

    Raises:
        ValueError: an empty name or file, a '/' in a name, two of one name.
    """
    files = {}
    for text in texts:
        name, sign, file = text.partition("=")
        if not sign or os.path.exists(text):  # a file whose own name has the sign
            name, file = Path(text).stem, text
        if not name or not file or "/" in name:
            raise ValueError(f"{text}: give a {kind} as NAME=FILE with a name without '/'.")
        if name in files:
            raise ValueError(f"Two {kind}s are named '{name}'; name them by NAME=FILE.")
        files[name] = file
    return files


def named_configs(texts: Sequence[str], models: Sequence[str]) -> dict[str, str]:
    """Config files by the model's name; with a single model NAME may be left out.

    Raises:
        ValueError: the name of no model.
    """
    configs = {}
    for text in texts:
        name, sign, file = text.partition("=")
        if not sign and len(models) == 1:
            name, file = models[0], text
        if name not in models:
            raise ValueError(
                f"--config-file {text}: give NAME=FILE with the name of a model: "
                f"{', '.join(models)}."
            )
        configs[name] = file
    return configs


def named_backend(file: str) -> str | None:
    """The backend of a file; who names a program on a command line wants it to run."""
    from hkd_d2.inference.detector import PROGRAMS

    return "torch" if Path(file).suffix in PROGRAMS else None
