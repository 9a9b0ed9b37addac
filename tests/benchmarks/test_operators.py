"""The operator benchmark: its floors and figures by hand, what it records, what it refuses."""

import csv
from types import SimpleNamespace

import pytest
import torch

from benchmarks.operators import __main__ as tool
from benchmarks.operators import cases, measure, report, run
from benchmarks.operators.cases import CASES, SCALES, Problem, Setting, Traffic
from helpers.command import run_python
from hkd_d2.ops import _library, assign_boxes_to_levels, reference

CPU, FLOAT = torch.device("cpu"), torch.float32
# P2 to P6 of 64x128 pixels: 16x32 + 8x16 + 4x8 + 2x4 + 1x2.
TINY_CELLS = 682


def build(name, layout=None, dtype=torch.float32):
    case = CASES[name]
    return case.build(Setting(SCALES["tiny"], layout or case.layouts[0], CPU, dtype))


# ------------------------------------------------------------------------------------------ floors


def test_half_precision_moves_half_the_bytes():
    full, half = (build("imitation_masked", dtype=d) for d in (FLOAT, torch.bfloat16))
    assert half.forward.read * 2 == full.forward.read
    assert half.backward.write * 2 == full.backward.write
    assert {x.dtype for x in half.leaves} == {torch.bfloat16}


def test_floor_is_read_and_write_time_by_hand():
    # 6 GB at 3 GB/s and 5 GB at 2 GB/s.
    assert Traffic(6, 5).seconds(Traffic(3, 2)) == 4.5
    assert Traffic(1, 2) + Traffic(3, 4) == Traffic(4, 6)


@pytest.mark.parametrize(
    "name, element_count, reads",
    [
        ("imitation_mse", 256 * TINY_CELLS, 2),
        ("imitation_pkd", 256 * TINY_CELLS, 2),
        ("adl", 2 * 9 * TINY_CELLS, 2),
        ("kl", 1024 * 2, 2),
        ("kl_dense", 2 * 3 * TINY_CELLS * 2, 2),
        ("bounded_regression", 2 * 3 * TINY_CELLS * 4, 3),
    ],
)
def test_dense_cases_read_every_input_twice_and_write_one_gradient(name, element_count, reads):
    problem = build(name)
    assert problem.forward == Traffic(4 * element_count * reads, 0)
    assert problem.backward == Traffic(4 * element_count * reads, 4 * element_count)


def test_masked_imitation_counts_the_cells_under_the_boxes():
    boxes, covered = cases.boxes_covering(0.05, SCALES["tiny"])
    cells = set()
    for (x1, y1, x2, y2), level in zip(
        boxes.tolist(), assign_boxes_to_levels(boxes, cases.PYRAMID_STRIDES).tolist(), strict=True
    ):
        before = len(cells)
        stride = cases.PYRAMID_STRIDES[level]
        for i in range(64 // stride):
            for j in range(128 // stride):
                # A box covers a cell when it reaches into it.
                if x1 < (j + 1) * stride and x2 > j * stride:
                    if y1 < (i + 1) * stride and y2 > i * stride:
                        cells.add((level, i, j))
    assert covered == len(cells)
    assert before < 0.05 * TINY_CELLS <= covered
    problem = build("imitation_masked")
    # Student and teacher, 256 channels of 4 bytes; the gradient is dense.
    assert problem.forward == Traffic(2 * covered * 256 * 4, 0)
    assert problem.backward == Traffic(2 * covered * 256 * 4, TINY_CELLS * 256 * 4)


@pytest.mark.parametrize(
    "box, cells",
    [
        ([0.0, 0.0, 28.0, 28.0], 49),  # samples on the centres of cells 0 to 6
        ([2.0, 2.0, 30.0, 30.0], 64),  # samples between two of cells 0 to 7
        ([2.0, 0.0, 30.0, 28.0], 56),
        ([-400.0, 0.0, -372.0, 28.0], 0),
    ],
)
def test_cells_that_roi_align_touches_by_hand(box, cells):
    boxes = torch.tensor([box, box])  # the second adds nothing
    assert cases.touched_cells([boxes], [(9, 9)], (4,), sampling_ratio=1) == cells


def test_roi_cases_read_touched_cells_and_write_dense_gradients():
    align, loss = build("roi_align"), build("roi_distillation")
    pooled = 512 * 256 * 49 * 4
    dense = (TINY_CELLS - 2) * 256 * 4  # without P6
    assert align.forward.write == align.backward.read == pooled
    assert align.backward.write == loss.backward.write == dense
    assert loss.forward == Traffic(2 * align.forward.read, 0)
    assert loss.backward.read == loss.forward.read
    assert 0 < align.forward.read <= dense


# ------------------------------------------------------------------------------------------ inputs


def test_boxes_look_like_pedestrians_and_are_the_same_every_time():
    boxes = cases.sampled_proposals()
    assert boxes.shape == (512, 4) and torch.equal(boxes, cases.sampled_proposals())
    assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
    assert (boxes >= 0).all() and (boxes <= torch.tensor([2048, 1024, 2048, 1024])).all()
    sides = cases.pedestrians(4000, seed=0)
    height = sides[:, 3] - sides[:, 1]
    assert height.median().item() == pytest.approx(95, rel=0.05)
    assert ((sides[:, 2] - sides[:, 0]) / height).median().item() == pytest.approx(0.41, rel=0.05)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case.layouts) > 1])
def test_layouts_hold_the_same_numbers(name):
    one, other = (build(name, layout) for layout in cases.LAYOUTS)
    assert all(a.is_contiguous() for a in one.leaves)
    assert all(
        b.is_contiguous(memory_format=torch.channels_last)
        for b in other.leaves
        if min(b.shape[1:]) > 1
    )
    assert all(map(torch.equal, one.leaves, other.leaves))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.usual])
def test_what_is_usually_written_computes_the_same(name):
    if name.startswith("roi_"):
        pytest.importorskip("torchvision")
    problem = build(name, "channels_last")
    results = measure.evaluate(problem, run.provide("usual", CASES[name], CPU))
    expected = measure.evaluate(problem, getattr(reference, CASES[name].operator))
    assert measure.difference(results, expected) < 1e-5


# ------------------------------------------------------------------------------------- measurement


def make_problem(calls=None, temporary=0, size=1000):
    leaf, other = torch.zeros(size, requires_grad=True), torch.ones(size)

    def call(operator):
        if calls is not None:
            calls.append(operator)
        scratch = torch.ones(temporary, dtype=torch.uint8)
        return torch.dot(leaf, other) + 0 * scratch[:1].sum()

    return Problem([leaf], call, Traffic(4 * size, 0), Traffic(0, 4 * size))


def test_variants_take_turns_and_the_first_round_is_dropped():
    calls = []
    variants = {key: (make_problem(calls), key) for key in "abc"}
    samples, bandwidth = measure.measure(variants, 1e-9, CPU, stream_bytes=1 << 16)
    rounds = measure.MIN_ROUNDS
    assert calls == ["a", "b", "c"] * (rounds + 1)
    assert {key: len(pairs) for key, pairs in samples.items()} == dict.fromkeys("abc", rounds)
    assert all(f > 0 and b > 0 for pairs in samples.values() for f, b in pairs)
    assert all(b > 0 for b in bandwidth)


def test_extra_memory_is_what_is_held_beyond_the_results():
    megabyte = 1 << 20
    small, large = (
        measure.extra_memory(make_problem(temporary=n * megabyte), None, CPU) for n in (0, 96)
    )
    if small is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert large - small == pytest.approx(96 * megabyte, rel=0.1)
    # The gradient, of 64 MB, does not count.
    assert measure.extra_memory(make_problem(size=16 * megabyte), None, CPU) < 8 * megabyte


def rows_of(monkeypatch, samples, bandwidth):
    """Rows of a case whose measurement is given."""
    monkeypatch.setattr(run.measure, "measure", lambda *_: (samples, bandwidth))
    monkeypatch.setattr(run.measure, "extra_memory", lambda *_: 3_000_000)
    rows = run.run_case("imitation_mse", "tiny", CPU, FLOAT, ["eager"], 1, print)
    return {(r["provider"], r["layout"], r["mode"]): r for r in rows}


def test_figures_of_a_row_by_hand(monkeypatch):
    samples = {
        ("eager", "nchw"): [(4.0, 6.0)] * 3,
        # Medians 3, 5 and, of the sums 5, 8, 11, 8.
        ("eager", "channels_last"): [(2.0, 3.0), (3.0, 5.0), (4.0, 7.0)],
    }
    rows = rows_of(monkeypatch, samples, bandwidth=(1e6, 2e6))
    assert len(rows) == 6
    slow = rows["eager", "nchw", "full"]
    assert slow["median_ms"] == 10_000 and slow["rounds"] == 3
    assert slow["ratio_to_eager"] == 0.8 and slow["ratio_to_usual"] == ""
    assert slow["extra_mb"] == 3 and rows["eager", "nchw", "forward"]["extra_mb"] == ""
    fast = rows["eager", "channels_last", "full"]
    assert fast["ratio_to_eager"] == 1
    # Linear between 5, 8 and 11: a fifth of the way is 0.4 of the first gap.
    assert fast["p20_ms"] == pytest.approx(6200) and fast["p80_ms"] == pytest.approx(9800)
    megabytes = 256 * TINY_CELLS * 4 / 1e6
    assert fast["gb_per_s"] == pytest.approx(5 * megabytes / 8 / 1e3)
    # Four maps read at 1 MB/s, one written at 2 MB/s.
    assert fast["percent_of_floor"] == pytest.approx(100 * 4.5 * megabytes / 8)
    backward = rows["eager", "channels_last", "backward"]
    assert backward["percent_of_floor"] == pytest.approx(100 * 2.5 * megabytes / 5)
    assert backward["ratio_to_eager"] == 1
    assert rows["eager", "nchw", "backward"]["ratio_to_eager"] == pytest.approx(5 / 6)


def test_difference_is_of_the_output_and_of_all_gradients_together():
    def of(*values):
        return [torch.tensor([v]) for v in values]

    # 0.5 in a gradient whose norm is 5, and 0.4 of an output of 2.
    assert measure.difference(of(2.0, 3.0, 4.5), of(2.0, 3.0, 4.0)) == pytest.approx(0.1)
    assert measure.difference(of(2.4, 3.0, 4.0), of(2.0, 3.0, 4.0)) == pytest.approx(0.2)
    for results in (of(float("nan"), 1.0), of(1.0, float("nan"))):
        assert not measure.difference(results, of(1.0, 1.0)) < 1


def test_a_provider_that_computes_something_else_is_not_timed(monkeypatch):
    def wrong(*args, **kwargs):
        return 1.01 * reference.kl_distillation_loss(*args, **kwargs)

    monkeypatch.setattr(run, "provide", lambda *_: wrong)
    with pytest.raises(run.Differs, match="kl_distillation_loss by fused .* 1.0e-02"):
        list(run.run_case("kl", "tiny", CPU, FLOAT, ["fused"], 1, print))


def test_what_is_missing_is_said_in_a_line(monkeypatch):
    def without_torchvision(*_, **options):
        raise ModuleNotFoundError("No module named 'torchvision'")

    providers = {"usual": without_torchvision, "fused": None}
    monkeypatch.setattr(run, "provide", lambda provider, *_: providers[provider])
    said = []
    assert not list(run.run_case("kl", "tiny", CPU, FLOAT, list(providers), 1e-9, said.append))
    assert [line.strip() for line in said] == [
        "usual: left out (No module named 'torchvision')",
        "fused: kl_distillation_loss is not compiled for cpu",
    ]


def test_fused_is_the_compiled_operator_alone(monkeypatch):
    assert run.provide("fused", CASES["kl"], CPU).keywords == {"impl": "fused"}
    monkeypatch.setattr(_library, "COMPILED", frozenset())
    assert run.provide("fused", CASES["kl"], CPU) is None


# ------------------------------------------------------------------------------------------ record


def make_rows(malloc, case, layout, provider, milliseconds, eager, usual):
    facts = dict.fromkeys(report.COLUMNS, "")
    facts |= {"date": "d", "device": "CPU", "torch": "2", "commit": "c", "threads": 2}
    facts |= {"instruction_set": "avx2", "dtype": "float32"}
    return facts | {
        **{"malloc": malloc, "case": case, "layout": layout, "provider": provider},
        **{"mode": "full", "median_ms": milliseconds, "percent_of_floor": 50.0, "rounds": 5},
        **{"ratio_to_eager": eager, "ratio_to_usual": usual, "extra_mb": 0.25},
    }


def test_table_and_picture_of_a_run(tmp_path):
    path = tmp_path / "ops.csv"
    rows = [
        make_rows("tuned", "roi_align", "nchw", "eager", 300.0, 0.2, 1.0),
        make_rows("tuned", "roi_align", "channels_last", "eager", 60.0, 1.0, 5.0),
        make_rows("tuned", "roi_align", "nchw", "usual", 300.0, 0.2, 1.0),
        make_rows("tuned", "roi_align", "nchw", "fused", 40.0, 1.5, 7.5),
        make_rows("tuned", "roi_align", "channels_last", "fused", 20.0, 3.0, 15.0),
        make_rows("default", "roi_align", "channels_last", "fused", 30.0, 2.5, 12.0),
        make_rows("tuned", "imitation_masked", "nchw", "eager", 30.0, 1.0, ""),
        make_rows("tuned", "imitation_masked", "nchw", "fused", 3.0, 2.0, 10.0),
        make_rows("tuned", "adl", "contiguous", "eager", 9.0, 1.0, ""),
    ]
    report.append(path, rows)
    read = report.read(path, "d")
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.table(read).splitlines()
    ]
    assert tuple(table[0]) == report.HEADINGS
    found = {(row[0], row[1]): row[2:] for row in table[2:]}
    assert found["roi_align", "nchw"] == [
        *("60", "300", "", "40", "1.5", "7.5", "10x usual missed", "", "50", "0.2")
    ]
    assert found["roi_align", "channels_last"] == [
        *("60", "300", "", "20", "3", "15", "15x usual met", "12", "50", "0.2")
    ]
    assert found["imitation_masked", "nchw"][6] == "8x usual met, 80 % missed"
    assert found["adl", "contiguous"][:4] == ["9", "", "", "not compiled"]

    # A GPU has targets of its own, and half precision others than float32.
    on_gpu = [row | {"instruction_set": "", "malloc": "default"} for row in read]
    for dtype, verdict in (("float32", "8x usual met"), ("bfloat16", "20x usual missed")):
        lines = report.table([row | {"dtype": dtype} for row in on_gpu]).splitlines()
        assert verdict in next(line for line in lines if "imitation_masked" in line)

    pytest.importorskip("matplotlib")
    report.plot(read, tmp_path / "ops.png")
    assert 5_000 < (tmp_path / "ops.png").stat().st_size < 100_000


def test_a_whole_run_is_added_to_an_earlier_one(tmp_path):
    path = tmp_path / "ops.csv"
    report.append(path, [make_rows("tuned", "adl", "contiguous", "eager", 9.0, 1.0, "")])
    earlier = path.read_bytes()
    arguments = ["--scale", "tiny", "--seconds", "0.01", "--threads", "1"]
    arguments += ["--providers", "eager", "fused", "--case", "kl", "imitation_masked"]
    arguments += ["--csv", path]
    result = run_python("-m", "benchmarks.operators", *arguments)
    assert path.read_bytes().startswith(earlier)
    with open(path, newline="") as file:
        _, *rows = csv.DictReader(file)
    assert tuple(rows[0]) == report.COLUMNS
    # The KL loss is compiled wherever the suite runs.
    expected = {
        (malloc, "kl", "contiguous", provider, mode)
        for malloc in ("tuned", "default")
        for provider in ("eager", "fused")
        for mode in ("forward", "backward", "full")
    }
    found = {tuple(r[k] for k in ("malloc", "case", "layout", "provider", "mode")) for r in rows}
    assert {key for key in found if key[1] == "kl"} == expected
    assert {key[2] for key in found if key[1] == "imitation_masked"} == {"nchw", "channels_last"}
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["gb_per_s"]) > 0 and float(row["read_gb_per_s"]) > 0
        assert row["device"] and row["torch"] == torch.__version__ and row["threads"] == "1"
        assert row["instruction_set"] in ("baseline", "avx2", "avx512")
    table = result.stdout.split("|", 1)[1]
    assert "| imitation_masked | channels_last |" in table and "adl" not in table
    pytest.importorskip("matplotlib")
    assert (tmp_path / "ops_cpu_tiny.png").exists()


def test_every_malloc_setting_has_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")  # the user's own is no part of the default
    started = []

    def start(command, env):
        settings = {k: v for k, v in env.items() if k in tool.MALLOC["tuned"]}
        started.append((tool.parse_args(command[2:]), settings, env["OMP_NUM_THREADS"]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(tool.subprocess, "run", start)
    arguments = ["--csv", str(tmp_path / "ops.csv"), "--threads", "3"]
    assert tool.main(arguments) == 1  # the children have written nothing
    assert "none of these providers" in capsys.readouterr().err
    (tuned, tuned_malloc, threads), (default, default_malloc, _) = started
    assert (tuned.malloc, default.malloc) == ("tuned", "default")
    assert tuned_malloc == tool.MALLOC["tuned"] and default_malloc == {} and threads == "3"
    assert tuned.providers == list(run.PROVIDERS) and "compile" not in default.providers
    assert tuned.child == default.child


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--case", "nope"], "--case nope: unknown; choose from roi_distillation, "),
        (["--providers", "jax"], "--providers jax: unknown; choose from eager, "),
        (["--threads", "0"], "--threads 0: give at least 1."),
        (["--seconds", "0"], "--seconds 0: give more than 0."),
        (["--csv", "{}/nowhere/ops.csv"], "nowhere is no folder; make it, or "),
        (["--csv", "{}/other.csv"], "other.csv has other columns than this benchmark writes; "),
        (["--csv", "{}/ops.csv", "--plot", "{}/no/ops.png"], "its folder is missing; make it"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: PyTorch sees no GPU; leave it out",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(
    tmp_path, capsys, monkeypatch, arguments, sentence
):
    monkeypatch.setattr(tool, "run_parent", lambda *_: 0)
    (tmp_path / "other.csv").write_text("date,milliseconds\n")
    with pytest.raises(SystemExit) as refused:
        tool.main([argument.format(tmp_path) for argument in arguments])
    assert refused.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "other.csv").read_text() == "date,milliseconds\n"


def test_list_names_every_case(capsys):
    assert tool.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CASES)
