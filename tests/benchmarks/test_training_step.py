"""The step profiler, run in small."""

import json

import pytest

from benchmarks.training_step import __main__ as tool


def test_writes_table_json_picture_and_trace(hkd_cfg, tmp_path, capsys):
    hkd_cfg.MODEL.PROPOSAL_GENERATOR.NAME = "IgnoreAwareRPN"
    hkd_cfg.MODEL.ROI_HEADS.NAME = "IgnoreAwareROIHeads"
    (tmp_path / "hkd.yaml").write_text(hkd_cfg.dump())
    files = {name: tmp_path / f"step.{name}" for name in ("json", "png", "trace")}
    tool.main(
        ["--config-file", str(tmp_path / "hkd.yaml"), "--teacher-precision", "bf16"]
        + ["--height", "64", "--width", "96", "--batch", "2", "--iterations", "2"]
        + ["--json", str(files["json"]), "--plot", str(files["png"])]
        + ["--trace", str(files["trace"]), "HKD.DATA.MIN_HEIGHT", "8"]
    )
    printed = capsys.readouterr().out
    assert "hkd.yaml, 2 x 64x96, teacher bf16" in printed
    assert "| ms | stock | reference | fused |" in printed
    content = json.loads(files["json"].read_text())
    step, plain = (content["ledger"][n]["seconds"]["step"] for n in ("fused", "stock"))
    ratios = sorted(a / b for a, b in zip(step, plain, strict=True))
    assert content["figures"]["fused"]["whole_step"] == pytest.approx(sum(ratios) / 2)
    assert f"step / stock step {sum(ratios) / 2:.3f}" in printed
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "teacher.backbone" in files["trace"].read_text()
