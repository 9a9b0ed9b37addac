"""The ledger of a step: its sums by hand, its memory, and what each provider runs."""

import json

import pytest
import torch
from torch.profiler import record_function

from benchmarks.training_step import ledger
from benchmarks.training_step.ledger import Entry, StageClock, keep_ledger, overhead, table
from helpers.small_detectors import small_config
from hkd_d2.ops import _library


def test_times_of_one_name_add_up(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 3.5, 10.0, 14.0])
    monkeypatch.setattr(ledger.time, "perf_counter", lambda: next(now))
    clock = StageClock(torch.device("cpu"))
    with clock("whole"):
        with clock("part"):
            pass
        # 0 [1 .. 3] 3.5: nested stages count in both
    with clock("part"):
        pass
    assert clock.take() == {"part": 2.0 + 4.0, "whole": 3.5}
    assert clock.take() == {}


@pytest.fixture
def pages():
    stock = Entry(
        {"student": [2.0, 3.0, 2.0], "backward": [3.0, 4.0, 3.0], "step": [5.0, 8.0, 6.0]},
        {"step": 7_000_000},
    )
    fused = Entry(
        {
            "student.backbone": [1.0, 2.0, 1.0],
            "teacher.backbone": [1.0, 1.0, 3.0],
            "student.rpn": [0.5, 0.5, 0.5],
            "teacher.branches": [0.5, 1.0, 1.0],
            "term.pyramid": [0.25, 0.5, 0.25],
            "backward": [2.0, 3.0, 4.0],
            "step": [5.5, 8.0, 10.0],
        },
        {"step": 9_000_000, "backward": 8_000_000},
    )
    return {"stock": stock, "fused": fused}


def test_overhead_by_hand(pages):
    # Rounds: (5.5 - 5 - 1.5) / 5 = -0.2, (8 - 8 - 2) / 8 = -0.25, (10 - 6 - 4) / 6 = 0.
    assert overhead(pages) == pytest.approx({"overhead": -0.2, "whole_step": 1.1})


def test_parts_and_table_by_hand(pages):
    assert pages["fused"].parts() == {
        "teacher": [1.5, 2.0, 4.0],
        "student": [1.5, 2.5, 1.5],
        "pyramid": [0.25, 0.5, 0.25],
        "backward": [2.0, 3.0, 4.0],
        "rest": [0.25, 0.0, 0.25],
    }
    assert table(pages).splitlines() == [
        "| ms | stock | fused |",
        "|---|---:|---:|",
        "| teacher |  | 2000.0 |",
        "| student | 2000.0 | 1500.0 |",
        "| pyramid |  | 250.0 |",
        "| backward | 3000.0 | 3000.0 |",
        "| rest | 1000.0 | 250.0 |",
        "| **step** | **6000.0** | **8000.0** |",
        "| fastest step | 5000.0 | 5500.0 |",
        "| peak memory, MB | 7 | 9 |",
    ]


class Allocations:
    """Stands for a training step: stages that hold and free a known number of bytes."""

    def __init__(self, megabytes):
        self.clock = StageClock(torch.device("cpu"))
        self.megabytes = megabytes
        self.left = []

    def __call__(self, batch):
        def tensor(share):
            return torch.empty(int(share * self.megabytes * 1_000_000), dtype=torch.uint8)

        with self.clock("step"):
            with self.clock("student.backbone"):
                kept = tensor(1)
                tensor(3)  # freed at once
            with self.clock("term.pyramid"), record_function("something else"):
                tensor(2)
            with self.clock("backward"):
                del kept
                self.left.append(tensor(0.5))
        return self.clock.take()


def test_memory_is_the_peak_above_what_was_held(tmp_path):
    held = torch.empty(50_000_000, dtype=torch.uint8)
    steps = {"stock": Allocations(4), "fused": Allocations(8)}
    found = keep_ledger(steps, None, 3, str(tmp_path / "trace.json"))
    assert len(held) and list(found) == ["stock", "fused"]
    for name, megabytes in (("stock", 4), ("fused", 8)):
        assert len(found[name].seconds["step"]) == 3
        peaks = {stage: b / 1e6 / megabytes for stage, b in found[name].peak_bytes.items()}
        expected = {"step": 4, "student.backbone": 4, "term.pyramid": 3, "backward": 1}
        assert peaks == pytest.approx(expected, abs=0.01)
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert {"stock", "fused", "student.backbone", "term.pyramid"} <= set(names)


@pytest.fixture
def on_streets(hkd_cfg):
    cfg = hkd_cfg
    cfg.HKD.DATA.MIN_HEIGHT = 8
    cfg.HKD.TEACHER.WEIGHTS = ""
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 200
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "IgnoreAwareRPN"
    cfg.MODEL.ROI_HEADS.NAME = "IgnoreAwareROIHeads"
    return cfg, ledger.street_batch(cfg, 96, 160, 2)


def test_providers_step_on_the_same_boxes_in_their_own_way(on_streets, monkeypatch):
    cfg, batch = on_streets
    cfg.HKD.CHANNELS_LAST = True
    steps = ledger.training_steps(cfg, batch)
    before = {
        name: [p.detach().clone() for p in step.model.parameters()] for name, step in steps.items()
    }
    sampled, compiled = {name: [] for name in steps}, {name: set() for name in steps}
    resolve = _library.use_fused
    for name, step in steps.items():
        detector = getattr(step.model, "student", step.model)
        label = detector.roi_heads.label_and_sample_proposals

        def spy(*args, name=name, label=label):
            sampled[name].append(label(*args))
            return sampled[name][-1]

        detector.roi_heads.label_and_sample_proposals = spy

        def use_fused(impl, operator, device, name=name):
            fused = resolve(impl, operator, device)
            compiled[name] |= {operator} if fused else set()
            return fused

        def call(batch, step=step, use_fused=use_fused):
            monkeypatch.setattr(_library, "use_fused", use_fused)
            return step(batch)

        call.clock = step.clock
        steps[name] = call
        call.model = step.model
    found = keep_ledger(steps, batch, 1)

    for rounds in zip(*sampled.values(), strict=True):
        stock, *others = [[x.proposal_boxes.tensor for x in batch] for batch in rounds]
        assert [len(boxes) for boxes in stock] == [32, 32]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(stock, other, strict=True))
    # As many foreground boxes as the heads may sample: the proposals surround the objects.
    assert all((x.gt_classes == 0).sum() == 8 for x in sampled["stock"][0])
    assert compiled["stock"] == compiled["reference"] == set()
    assert compiled["fused"] >= {"kl_distillation_loss"}
    fused, reference = steps["fused"].model, steps["reference"].model
    assert fused.fused_pooler and fused.memory_format == torch.channels_last
    assert not reference.fused_pooler and reference.memory_format == torch.contiguous_format

    assert set(found["stock"].parts()) == {"student", "backward", "optimizer", "rest"}
    distilled = {"teacher", "pyramid", "region", "logit", *found["stock"].parts()}
    assert set(found["fused"].parts()) == set(found["reference"].parts()) == distilled
    for name, step in steps.items():
        now = list(step.model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before[name], now, strict=True))


def test_weights_of_a_student_bring_its_own_proposals(on_streets, tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    cfg, batch = on_streets
    trained = build_model(small_config())
    DetectionCheckpointer(trained, str(tmp_path)).save("student")
    steps = ledger.training_steps(cfg, batch, str(tmp_path / "student.pth"), providers=["stock"])
    model = steps["stock"].model
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True)
    )
    assert "predict_proposals" not in vars(model.proposal_generator)


def test_proposals_of_another_detector(on_streets, tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    cfg, batch = on_streets
    config, weights = tmp_path / "config.yaml", str(tmp_path / "trained.pth")
    other = small_config(width=0.5)
    torch.manual_seed(3)
    trained = build_model(other)
    DetectionCheckpointer(trained, str(tmp_path)).save("trained")
    # A distilled run's config: the detector is the student's.
    other.MODEL.META_ARCHITECTURE = "HKDDetector"
    config.write_text(other.dump())
    proposals = ledger.trained_proposals(cfg, batch, str(config), weights)
    assert [len(p) for p in proposals] == [cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN] * len(batch)

    # In training mode the detector itself proposes the same boxes.
    trained.proposal_generator.pre_nms_topk[True] = cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN
    trained.proposal_generator.post_nms_topk[True] = cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN
    with torch.no_grad(), EventStorage():
        images = trained.preprocess_image(batch)
        features = trained.backbone(images.tensor)
        targets = [x["instances"] for x in batch]
        own, _ = trained.proposal_generator(images, features, targets)
    for a, b in zip(own, proposals, strict=True):
        torch.testing.assert_close(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
    steps = ledger.training_steps(cfg, batch, proposals=proposals, providers=["stock"])
    assert "predict_proposals" in vars(steps["stock"].model.proposal_generator)

    other.INPUT.FORMAT = "RGB"
    config.write_text(other.dump())
    with pytest.raises(ValueError, match="INPUT.FORMAT RGB"):
        ledger.trained_proposals(cfg, batch, str(config), weights)
