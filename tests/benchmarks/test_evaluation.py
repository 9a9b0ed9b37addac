"""The command line benchmarks.evaluation."""

from helpers.command import run_python


def test_a_tiny_run_compares_and_prints_a_row_a_size():
    options = ["--detections", 300, 1000, "--repeats", 1]
    done = run_python("-m", "benchmarks.evaluation", *options)
    first, second = (line.split() for line in done.stdout.splitlines()[-2:])
    assert first[:2] == ["300", "3"] and second[:2] == ["1,000", "10"]
    assert "-" not in first and second.count("-") == 2  # plain Python on the first set alone
