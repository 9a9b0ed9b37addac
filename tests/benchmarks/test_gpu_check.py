"""The GPU report: what it refuses, what it writes of a run."""

import json
import os
import sys

import pytest
import torch

from benchmarks import gpu_check as tool


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        tool.main([])
    assert "PyTorch sees no GPU" in capsys.readouterr().err


def program(text, code=0):
    return [sys.executable, "-c", f"print({text!r}); raise SystemExit({code})"]


def test_a_failure_does_not_stop_later_steps(tmp_path, monkeypatch):
    table = "| case | fused, ms |\n|---|---:|\n| adl | {} |"
    found = {
        "build": [program("built")],
        "tests": [program("=== 3 passed in 1s ==="), program("=== 1 failed in 2s ===", 1), ["no"]],
        "benchmark": [program(f"x\n{table.format(1)}\ny"), program(table.format(2))],
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tool, "commands", lambda args, out: found)
    facts = {"device": "A GPU", "date": "2026-01-02", "compute_capability": "9.0"}
    monkeypatch.setattr(tool, "facts", lambda: facts)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    header = "mode,case,layout,median_ms"
    for plan, times in (("gather", (2, 3)), ("scatter", (4, 1.5))):
        rows = [
            f"backward,roi_align,{x},{ms}" for x, ms in zip(("nchw", "nhwc"), times, strict=True)
        ]
        (tmp_path / f"roi_{plan}.csv").write_text(
            "\n".join([header, *rows, "forward,a,b,9"]) + "\n"
        )
    found["plans"] = [program("timed")]
    steps = ["--steps", "build", "tests", "memcheck", "plans", "benchmark"]
    assert tool.main([*steps, "--out", str(tmp_path)]) == 1

    results = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert {step: r["result"] for step, r in results.items()} == {
        "build": "passed",
        "tests": "failed",
        "memcheck": "left out",
        "plans": "passed",
        "benchmark": "passed",
    }
    text = (tmp_path / "README.md").read_text()
    assert "| tests | failed | 0 | 1 failed in 2s |" in text
    assert "| roi_align | nchw | 2 | 4 | gather, 2.00x |" in text
    assert "| roi_align | nhwc | 3 | 1.5 | scatter, 2.00x |" in text
    assert table.format(1) in text and table.format(2) in text
    assert "3 passed" in (tmp_path / "tests.log").read_text()
