"""Changed files end every command in one sentence that names the file, and soon.

In each case one file of a command line is changed at random, in a fresh copy of a small folder.
"""

import contextlib
import faulthandler
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from helpers.command import environment, forget_loggers
from helpers.fuzz_site import DOORS, mutate_file, write_site
from helpers.rules import rule
from hkd_d2.cli.dispatch import main
from hkd_d2.engine.run_folder import unlock

SECONDS = 120  # a case that takes longer hangs; alone on a machine none takes more than a few
# Cases of a group, in the suite and in the slow test.
FEW = {"score": 16, "data": 10, "detect": 8, "train": 4, "quantize": 2}
MANY = {"score": 300, "data": 250, "detect": 230, "train": 200, "quantize": 20}


class Hang(BaseException):
    """Not an Exception, so that no command takes it for an error of its own."""


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    root = write_site(tmp_path_factory.mktemp("site"))
    with contextlib.chdir(root):
        outcome = run("train --config-file plain.yaml --out run".split())
    assert outcome.code == 0, outcome.err
    return root


@pytest.fixture(autouse=True)
def no_service(monkeypatch):
    """hkd serve ends where it would begin to serve."""
    monkeypatch.setattr("uvicorn.run", lambda *args, **options: None)


def run(words: list[str]) -> Outcome:
    """Run a command in this process, which afterwards has nothing left of it."""

    def hang(*_):
        raise Hang

    known = set(DatasetCatalog.list())
    out = io.StringIO()
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # of one that Python cannot end
    try:
        with (
            contextlib.redirect_stdout(out),
            whole_stderr() as err,
            warnings.catch_warnings(record=True) as warned,
        ):
            warnings.simplefilter("ignore", DeprecationWarning)
            code = main(words)
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
        for name in set(DatasetCatalog.list()) - known:
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name, None)
        for folder in ("new", "run"):
            unlock(folder)
        forget_loggers()
    return Outcome(code, out.getvalue(), "".join(f"{w}\n" for w in warned) + "".join(err))


@contextlib.contextmanager
def whole_stderr():
    """A list that at the end has what went to stderr, from Python and from libraries below it."""
    said = []
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stderr(file):
                yield said
        finally:
            file.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.append(file.read())


def run_process(words: list[str]) -> Outcome:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "hkd_d2", *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, env=environment()
        )
    except subprocess.TimeoutExpired:
        raise Hang from None
    return Outcome(done.returncode, done.stdout, done.stderr)


def case(group: str, seed: int) -> tuple[str, Path]:
    """Change a file of the working directory; returns the command line and the file."""
    rng = random.Random(f"{group} {seed}")
    command, patterns = DOORS[group][seed % len(DOORS[group])]
    pattern = rng.choice(patterns.split())
    path = rng.choice(sorted(p for p in Path().glob(pattern) if p.is_file()))
    mutate_file(path, rng)
    return command, path


def problem(outcome: Outcome, command: str, path: Path) -> str | None:
    """What is wrong with an outcome."""
    said = outcome.out + outcome.err
    if "Traceback" in said:
        return "a traceback"
    if outcome.code not in (0, 1, 2):
        return f"exit code {outcome.code}"
    if outcome.code == 0:
        return None
    # A key stands for the config that has it.
    key = path.suffix == ".yaml" and re.search(r"[A-Z]\w+\.[A-Z]\w+|[A-Z_]{4,}", outcome.err)
    if str(path) not in said and path.stem not in said and not key:
        return f"names neither {path} nor a key"
    if outcome.code == 1:
        return None
    lines = outcome.err.splitlines()
    *before, last = lines
    if any("Warning" in line or line.startswith("hkd") for line in before):
        return "more than one sentence"
    prog = " ".join(["hkd", *command.split()[: 1 + command.startswith("data ")]])
    if not last.startswith(f"{prog}: ") or not last.endswith((".", "?", "--help.")):
        return "no sentence of the command"
    return "too long" if len(last) > 1500 else None


def fuzz(site: Path, tmp_path: Path, monkeypatch, group: str, seeds, runner=run) -> None:
    monkeypatch.setenv("HKD_D2_CACHE", str(tmp_path / "work/cache"))
    work = tmp_path / "work"
    problems, codes = [], []
    for seed in seeds:
        shutil.copytree(site, work)
        with contextlib.chdir(work):
            command, path = case(group, seed)
            outcome = Outcome(-1, "", "")
            try:
                outcome = runner(command.split())
                wrong = problem(outcome, command, path)
            except Hang:
                wrong = f"no end after {SECONDS} s"
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
        codes.append(outcome.code)
        if wrong:
            problems.append(f"{group} {seed}: {command}  [{path}]\n  {wrong}\n  {outcome.err}")
        shutil.rmtree(work)
    assert not problems, f"{len(problems)} of {len(codes)}\n" + "\n".join(problems)
    assert 2 in codes


@pytest.mark.slow
def test_unchanged_files(site, tmp_path, monkeypatch):
    """Every command line of the cases ends well, so that a refusal is of the change."""
    monkeypatch.setenv("HKD_D2_CACHE", str(tmp_path / "work/cache"))
    for command, _ in [door for doors in DOORS.values() for door in doors]:
        shutil.copytree(site, tmp_path / "work")
        with contextlib.chdir(tmp_path / "work"):
            outcome = run(command.split())
        assert outcome.code == 0, (command, outcome)
        shutil.rmtree(tmp_path / "work")


@pytest.mark.long
@rule("A damaged file ends a command in one sentence that names it")
@pytest.mark.parametrize("group", DOORS)
def test_some_changed_files(site, tmp_path, monkeypatch, group):
    fuzz(site, tmp_path, monkeypatch, group, range(FEW[group]))


@pytest.mark.slow
@pytest.mark.parametrize("group", DOORS)
def test_a_thousand_changed_files(site, tmp_path, monkeypatch, group):
    fuzz(site, tmp_path, monkeypatch, group, range(1000, 1000 + MANY[group]))


@pytest.mark.slow
@pytest.mark.parametrize("group", DOORS)
def test_changed_files_in_processes(site, tmp_path, monkeypatch, group):
    fuzz(site, tmp_path, monkeypatch, group, range(2000, 2008), run_process)
