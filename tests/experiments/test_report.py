"""The table of methods: means, paired differences and costs by hand."""

import csv

import pytest

from experiments.report import format_tables, summarise, write_csv
from helpers.rules import rule

pytestmark = rule(
    "Finished runs are used again, changed ones start over, and differences are paired by seed"
)


def row(method, seed, miss, plain=False, section="two-stage", **terms):
    return {
        "method": method,
        "section": section,
        "plain": plain,
        "seed": seed,
        "Reasonable": miss,
        "Heavy": miss + 10,
        "All": miss + 5,
        "AP": 100 - miss,
        "seconds": 60.0,
        "raw": {name: (2.0, 1.0) for name in terms},
        "share": {name: (share, share / 2) for name, share in terms.items()},
    }


ROWS = [
    row("student", 0, 80.0, plain=True),
    row("student", 1, 86.0, plain=True),
    row("student", 2, 83.0, plain=True),
    row("pkd", 2, 81.0, pyramid=0.5),
    row("pkd", 0, 77.0, pyramid=0.3),
    row("pkd", 1, 80.0, pyramid=0.4),
    row("adl", 0, 90.0, section="RetinaNet", adl=0.1),
]
COSTS = {"pkd": {"step": 1.5, "memory": 1.25, "plain_ms": 60.0, "config": ""}}


def test_differences_are_paired_by_seed():
    plain, pkd, adl = summarise(ROWS)
    assert plain["gain"] is None and plain["scores"]["Reasonable"] == [80.0, 86.0, 83.0]
    assert pkd["seeds"] == [0, 1, 2] and pkd["scores"]["AP"] == [23.0, 20.0, 19.0]
    # Gains 3, 6, 2: mean 11/3, deviations squared 78/9, halved 13/3, root over the root of 3.
    assert pkd["gain"] == pytest.approx((11 / 3, (13 / 9) ** 0.5))
    assert pkd["raw"] == {"pyramid": [2.0, 1.0]}
    assert pkd["share"]["pyramid"] == pytest.approx([0.4, 0.2])
    assert adl["gain"] is None  # the section has no plain student


def test_only_common_seeds_are_paired():
    _, pkd, _ = summarise([r for r in ROWS if (r["method"], r["seed"]) != ("student", 1)])
    assert pkd["gain"][0] == pytest.approx(2.5) and len(pkd["seeds"]) == 3


def test_table_and_csv(tmp_path):
    scores = {"Reasonable": 41.0, "Heavy": 70.0, "All": 60.0, "AP": 30.0}
    text = format_tables(summarise(ROWS), {"two-stage": scores, "RetinaNet": scores}, COSTS)
    lines = text.splitlines()
    assert "## Two-stage" in lines and "## RetinaNet" in lines
    table = [[c.strip() for c in x.strip("|").split("|")] for x in lines if x.startswith("| ")]
    assert {len(cells) for cells in table} == {11}
    assert table[1][:4] == ["teacher", "", "41.00", ""] and table[1][6] == "30.00"
    assert table[3] == [
        "pkd",
        "0, 1, 2",
        "79.33 (77.0 to 81.0)",
        "+3.67 ± 1.20",
        "89.33",
        "84.33",
        "20.67",
        "pyramid 2 → 1",
        "pyramid 40 % → 20 %",
        "1.50 x",
        "1.25 x",
    ]
    write_csv(ROWS, COSTS, tmp_path / "methods.csv")
    read = list(csv.DictReader((tmp_path / "methods.csv").open()))
    assert len(read) == len(ROWS)
    assert read[4]["method"] == "pkd" and read[4]["seed"] == "0" and read[4]["Heavy"] == "87.0"
    assert read[4]["raw_first"] == "pyramid=2" and read[4]["share_last"] == "pyramid=0.15"
    assert read[4]["step_ratio"] == "1.5" and read[0]["step_ratio"] == ""
