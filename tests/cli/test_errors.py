"""The error rule: one sentence for what the user can change, a traceback for the rest."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from torch.utils.data import DataLoader, Dataset

from hkd_d2.cli.errors import guard, user_sentence


def failing(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    "error, sentence",
    [
        (ValueError("The size is 0; give 1."), "The size is 0; give 1."),
        (ValueError("In two\n  lines."), "In two lines."),
        (FileNotFoundError("'a' does not exist."), "'a' does not exist."),
        (PermissionError(13, "Permission denied", "/x"), "'/x': Permission denied."),
        (ImportError("install it"), "install it"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "'utf-8' codec can't decode"),
        (ValueError(), "ValueError"),
    ],
)
def test_what_the_user_can_change(error, sentence, capsys, monkeypatch):
    monkeypatch.delenv("HKD_TRACEBACK", raising=False)
    assert guard(failing(error), "hkd x") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"hkd x: {sentence}") and said.count("\n") == 1
    monkeypatch.setenv("HKD_TRACEBACK", "1")
    assert guard(failing(error), "hkd x") == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.splitlines()[-1].startswith(f"hkd x: {sentence}")


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("b"), AssertionError(), TypeError()])
def test_everything_else_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        guard(failing(error), "hkd x")


def test_the_commands_exit_code():
    assert guard(lambda: 1, "hkd x") == 1


# ------------------------------------------------------------------------------ worker processes
def fail_in_process(rank, error):
    raise error


@pytest.mark.parametrize(
    "error, sentence",
    [
        (ValueError("Of the\nuser."), "Of the user."),
        (FileNotFoundError("'a' is gone."), "'a' is gone."),
        (RuntimeError("ours"), None),
        (KeyError("ours"), None),
    ],
)
def test_an_error_of_a_spawned_process(error, sentence):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException) as raised:
        torch.multiprocessing.spawn(fail_in_process, (error,), nprocs=1)
    assert user_sentence(raised.value) == sentence


def stop_process(rank):
    raise SystemExit(143)


def test_a_spawned_process_that_was_stopped():
    assert guard(lambda: torch.multiprocessing.spawn(stop_process, nprocs=1), "hkd x") == 143


class Failing(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        if self.error == "undecodable":
            b"\xff".decode("utf-8")
        raise self.error


@pytest.mark.parametrize(
    "error, sentence",
    [
        (ValueError("Image 7 is cut short."), "Image 7 is cut short."),
        (FileNotFoundError("'a.png' is gone."), "'a.png' is gone."),
        # Cannot be raised again with a message alone, so it arrives as a RuntimeError.
        ("undecodable", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (KeyError("ours"), None),
        (RuntimeError("ours"), None),
    ],
)
def test_an_error_of_a_data_loaders_worker(error, sentence):
    with pytest.raises(Exception) as raised:
        next(iter(DataLoader(Failing(error), num_workers=1)))
    assert "Original Traceback" in str(raised.value)
    assert user_sentence(raised.value) == sentence


def load_in_process(rank, error):
    next(iter(DataLoader(Failing(error), num_workers=1)))


def test_an_error_of_a_worker_of_a_process():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException) as raised:
        torch.multiprocessing.spawn(load_in_process, (ValueError("Image 7."),), nprocs=1)
    assert user_sentence(raised.value) == "Image 7."


def test_types_by_their_full_name():
    text = "Original Traceback (most recent call last):\n  File 'a'\n"
    assert user_sentence(RuntimeError(f"{text}json.decoder.JSONDecodeError: bad")) == "bad"
    assert user_sentence(RuntimeError(f"{text}yaml.scanner.ScannerError: bad")) is None
    assert issubclass(yaml.scanner.ScannerError, yaml.YAMLError)
    assert user_sentence(RuntimeError(f"{text}nowhere.Error: bad")) is None


# --------------------------------------------------------------------------------------- signals
@pytest.mark.slow  # on a busy machine the child has outlived SIGTERM once
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(number, code, tmp_path):
    program = (
        "import multiprocessing, sys, time\n"
        "from hkd_d2.cli.errors import guard\n"
        "def command():\n"
        "    child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        "    child.start()\n"
        "    try:\n"
        "        print(child.pid, flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        f"        open({str(tmp_path / 'cleaned')!r}, 'w')\n"
        "sys.exit(guard(command, 'hkd x'))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        child = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(20) == code
        said = process.stderr.read().splitlines()[-1]
    assert said.startswith("hkd x: ") and (tmp_path / "cleaned").exists()
    time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_reader_that_is_gone():
    program = (
        "import sys\nfrom hkd_d2.cli.errors import guard\n"
        "def command():\n"
        "    while True: print('x' * 1000, flush=True)\n"
        "sys.exit(guard(command, 'hkd x'))"
    )
    line = f'"{sys.executable}" -c "$0" | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line, program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")
