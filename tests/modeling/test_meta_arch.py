"""HKDDetector: neutrality, the teacher as a guest, aligned boxes and anchors."""

import copy

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from helpers.rules import rule
from helpers.small_detectors import make_batch, save_teacher, small_config
from helpers.training_steps import MultilevelPooler, plain_in_channels_last, steps
from hkd_d2.distillation.term import DENSE, PREDICTIONS, PROPOSALS
from hkd_d2.engine.solver import build_optimizer
from hkd_d2.modeling import two_stage
from hkd_d2.modeling.checkpoint import StudentCheckpointer


@rule("Neutrality: with weights 0 a run equals plain Detectron2 bit for bit")
@pytest.mark.parametrize(
    "ignore, pooler, channels_last",
    [
        (False, "torchvision", False),
        (True, "torchvision", False),
        (False, "torchvision", True),
        (True, "fused", False),
        (False, "fused", True),
    ],
)
def test_weights_zero_equal_plain_detectron2_bit_for_bit(
    student_cfg, hkd_cfg, build, ignore, pooler, channels_last
):
    hkd_cfg.HKD.POOLER, hkd_cfg.HKD.CHANNELS_LAST = pooler, channels_last
    for cfg in (student_cfg, hkd_cfg):
        cfg.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO = 2
        if ignore:
            cfg.MODEL.PROPOSAL_GENERATOR.NAME = "IgnoreAwareRPN"
            cfg.MODEL.ROI_HEADS.NAME = "IgnoreAwareROIHeads"
    hkd_cfg.HKD.TERMS = ["pyramid", "region", "logit", "adl"]
    for name in ("PYRAMID", "REGION", "LOGIT", "ADL"):
        hkd_cfg.HKD[name].WEIGHT = 0.0
    batches = [make_batch(ignore, seed=s) for s in range(3)]
    plain, distilled = build(student_cfg), build(hkd_cfg)
    after_build = torch.get_rng_state()
    build(student_cfg)
    assert torch.equal(after_build, torch.get_rng_state())
    if pooler == "fused":
        plain.roi_heads.box_pooler = MultilevelPooler()
    if channels_last:
        plain_in_channels_last(plain)

    expected, _ = steps(plain, batches)
    found, storage = steps(distilled, batches)
    for (losses, grads, state), (losses0, grads0, state0) in zip(found, expected, strict=True):
        assert set(losses) - set(losses0) == {f"loss_hkd_{n}" for n in hkd_cfg.HKD.TERMS}
        for name, loss in losses0.items():
            assert torch.equal(losses[name], loss), name
        for name, grad in grads0.items():
            assert torch.equal(grads[name], grad), name
        assert torch.equal(state, state0)
    # The terms did run: weight 0 is not an excuse to skip them.
    for name in hkd_cfg.HKD.TERMS:
        assert storage.history(f"hkd/{name}_raw").latest() > 1e-6
        assert storage.history(f"hkd/{name}_weight").latest() == 0
    state, state0 = distilled.state_dict(), plain.state_dict()
    assert list(state) == list(state0)
    assert all(torch.equal(state[k], state0[k]) for k in state0)


@rule("A student's checkpoint is a plain checkpoint, without teacher or terms")
def test_distilled_checkpoint_serves_the_plain_config(student_cfg, hkd_cfg, build, tmp_path):
    distilled = build(hkd_cfg)
    steps(distilled, [make_batch(seed=s) for s in range(2)], lr=1e-4)
    StudentCheckpointer(distilled, str(tmp_path)).save("model_final")
    file = torch.load(tmp_path / "model_final.pth", weights_only=True)
    plain = build_model(student_cfg)
    assert list(file["model"]) == list(plain.state_dict())
    assert {k.split(".")[0] for k in file["hkd"]} == {"pyramid", "region", "logit"}

    DetectionCheckpointer(plain).load(str(tmp_path / "model_final.pth"))
    distilled.eval()
    plain.eval()
    with torch.no_grad():
        for ours, theirs in zip(distilled(make_batch()), plain(make_batch()), strict=True):
            ours, theirs = ours["instances"], theirs["instances"]
            assert len(ours) > 0
            assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
            assert torch.equal(ours.scores, theirs.scores)


@rule("The teacher is a guest: in no parameters(), modules(), state_dict() or optimizer")
@rule("The teacher is a guest: in no parameters(), modules(), state_dict() or optimizer")
def test_teacher_is_a_guest(hkd_cfg, build):
    model = build(hkd_cfg)
    teacher = model.teacher.model
    theirs = {id(p) for p in [*teacher.parameters(), *teacher.buffers()]}
    assert not theirs & {id(p) for p in [*model.parameters(), *model.buffers()]}
    assert not any(id(m) in {id(x) for x in model.modules()} for m in teacher.modules())
    held = {id(p) for g in build_optimizer(hkd_cfg, model).param_groups for p in g["params"]}
    assert not theirs & held and held == {id(p) for p in model.parameters()}
    assert set(model.state_dict()) == set(model.student.state_dict())

    model.train()
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    steps(model, [make_batch()])
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())

    assert copy.deepcopy(model).teacher is model.teacher
    model.double()
    assert next(teacher.parameters()).dtype == torch.float64


@rule("The teacher sees its own normalisation and channel order, padded as the student")
def test_teacher_sees_its_own_normalisation_and_channel_order(hkd_cfg, build, tmp_path):
    cfg = small_config(channels=32, hidden=40, width=0.5)
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = [120.0, 110.0, 100.0]
    cfg.MODEL.PIXEL_STD = [60.0, 57.0, 55.0]
    hkd_cfg.HKD.TEACHER.CONFIG_FILE, hkd_cfg.HKD.TEACHER.WEIGHTS = save_teacher(cfg, tmp_path)
    model = build(hkd_cfg)  # BGR, std 1
    batch = make_batch(sizes=((64, 96), (50, 70)))
    padded = model.student.preprocess_image(batch).tensor.shape[-2:]
    found = model.teacher.features(batch, tuple(padded))

    alone = model.teacher.model
    own = [{**x, "image": x["image"].flip(0)} for x in batch]  # what its own loader would give
    images = alone.preprocess_image(own)
    assert torch.equal(found.images.tensor, images.tensor)
    assert found.images.image_sizes == images.image_sizes
    with torch.no_grad():
        expected = alone.backbone(images.tensor)
    assert all(torch.equal(found.features[k], v) for k, v in expected.items())


@rule("Dense outputs and labels run in anchor order on both sides")
def test_dense_outputs_and_labels_share_the_anchor_order(hkd_cfg, build):
    """Write a distinct value into every (image, level, y, x, anchor) and read it back by anchor."""
    model = build(hkd_cfg)
    batch = make_batch()
    student = model.student
    images = student.preprocess_image(batch)
    padded = tuple(images.tensor.shape[-2:])
    teacher_pass = model.teacher.features(batch, padded)
    for detector, features in [
        (student, student.backbone(images.tensor)),
        (model.teacher.model, teacher_pass.features),
    ]:
        rpn = detector.proposal_generator
        num_anchors = rpn.anchor_generator.num_anchors[0]
        assert num_anchors > 1

        class NumberedHead(torch.nn.Module):
            def forward(self, maps, num_anchors=num_anchors):
                logits, deltas = [], []
                for level, x in enumerate(maps):
                    n, _, height, width = x.shape
                    grid = torch.stack(
                        torch.meshgrid(
                            torch.arange(n),
                            torch.arange(num_anchors),
                            torch.arange(height),
                            torch.arange(width),
                            indexing="ij",
                        )
                    ).double()
                    image, anchor, y, x = grid
                    value = (((level * 10 + image) * 100 + y) * 100 + x) * 10 + anchor
                    logits.append(value)  # (N, A, H, W)
                    four = torch.stack([value * 4 + k for k in range(4)], dim=2)
                    deltas.append(four.flatten(1, 2))  # (N, A * 4, H, W)
                return logits, deltas

        rpn.rpn_head = NumberedHead()
        dense = two_stage.dense_stage(rpn, features)
        generator = rpn.anchor_generator
        for level, (logits, deltas, anchors) in enumerate(
            zip(dense.logits, dense.deltas, dense.anchors, strict=True)
        ):
            assert len(logits) == 2 and logits.shape[1] == len(anchors)
            stride = generator.strides[level]
            centres = anchors.get_centers()
            shapes = anchors.tensor[:, 2:] - anchors.tensor[:, :2]
            cell = list(generator.cell_anchors)[level]
            cells = cell[:, 2:] - cell[:, :2]
            for image in range(2):
                for i in range(len(anchors)):
                    x, y = (centres[i] / stride).round().int().tolist()
                    a = int((cells - shapes[i]).abs().sum(1).argmin())
                    value = (((level * 10 + image) * 100 + y) * 100 + x) * 10 + a
                    assert logits[image, i] == value
                    assert deltas[image, i].tolist() == [value * 4 + k for k in range(4)]


@rule("Region and logit terms compare the same boxes in the same order")
def test_both_networks_look_at_the_students_sampled_boxes(hkd_cfg, build):
    """Teacher = student and same boxes: every region-level difference is 0."""
    model = build(hkd_cfg)
    twin = copy.deepcopy(model.student).eval()
    model.teacher.model = twin
    seen = {}
    original = model.terms["logit"].forward

    def spy(student, teacher, targets):
        seen["student"], seen["teacher"] = student, teacher
        return student.regions.hidden.sum() * 0

    model.terms["logit"].forward = spy
    model.terms["region"].forward = lambda *a: torch.zeros(())
    model.terms["pyramid"].forward = lambda *a: torch.zeros(())
    with EventStorage(0):
        model(make_batch())
    student, teacher = seen["student"].regions, seen["teacher"].regions
    assert len(student.pooled) == sum(len(x) for x in seen["student"].sampled) > 8
    assert torch.equal(student.pooled, teacher.pooled)
    assert torch.equal(student.class_logits, teacher.class_logits)
    assert torch.equal(student.deltas, teacher.deltas)
    assert original is not spy


@rule("The teacher goes only as deep as the terms need")
def test_the_teacher_goes_only_as_deep_as_the_terms_need(hkd_cfg, build):
    hkd_cfg.HKD.TERMS = ["pyramid"]
    model = build(hkd_cfg)
    teacher = model.teacher.model
    ran = []
    for name, module in [
        ("rpn", teacher.proposal_generator.rpn_head),
        ("pooler", teacher.roi_heads.box_pooler),
        ("head", teacher.roi_heads.box_head),
    ]:
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with EventStorage(0):
        model(make_batch())
    assert ran == []
    assert model.fused_pooler  # in training; below, the hooked one

    batch = make_batch()
    padded = tuple(model.student.preprocess_image(batch).tensor.shape[-2:])
    boxes = [x["instances"].gt_boxes for x in batch]
    teacher_pass = model.teacher.features(batch, padded)
    model.teacher.advance(teacher_pass, boxes, frozenset({DENSE}))
    assert ran == ["rpn"] and teacher_pass.proposals is None
    model.teacher.advance(teacher_pass, boxes, frozenset({PROPOSALS, PREDICTIONS}))
    assert ran[1:] == ["rpn", "pooler", "head"]
    assert len(teacher_pass.proposals) == 2
    assert teacher_pass.regions.deltas.shape == (4, 4)


@rule("The student's box branch runs once")
def test_the_students_box_branch_runs_once(hkd_cfg, build):
    hkd_cfg.HKD.POOLER = "torchvision"
    model = build(hkd_cfg)
    ran = []
    heads = model.student.roi_heads
    for module in (heads.box_pooler, heads.box_head, heads.box_predictor):
        module.register_forward_hook(lambda m, *_: ran.append(type(m).__name__))
    with EventStorage(0):
        model(make_batch())
    assert ran == ["ROIPooler", "FastRCNNConvFCHead", "FastRCNNOutputLayers"]


@rule("HKD.POOLER and HKD.CHANNELS_LAST act on both networks, in training alone")
def test_both_networks_train_in_channels_last_and_with_the_fused_pooler(hkd_cfg, build):
    hkd_cfg.HKD.CHANNELS_LAST = True
    model = build(hkd_cfg)
    plain = build(small_config())
    seen = {}
    model.terms["region"].forward = lambda student, teacher, targets: (
        seen.update(student=student, teacher=teacher) or torch.zeros(())
    )
    poolers = []
    for detector in (model.student, model.teacher.model):
        detector.roi_heads.box_pooler.register_forward_hook(lambda *_: poolers.append(1))
    with EventStorage(0):
        model(make_batch())
    for detector_pass in seen.values():
        for level in ("p2", "p3", "p4"):  # larger than one cell, so that the format shows
            feature = detector_pass.features[level]
            assert feature.is_contiguous(memory_format=torch.channels_last)
            assert not feature.is_contiguous()
    assert not poolers
    # Parameters stay as plain Detectron2 has them, and inference is Detectron2's.
    strides = {name: p.stride() for name, p in plain.named_parameters()}
    assert {n: p.stride() for n, p in model.student.named_parameters()} == strides
    model.eval()
    with torch.no_grad():
        model(make_batch())
    assert poolers == [1]


@rule("A pooler that the fused one cannot replace is refused")
@pytest.mark.parametrize("network", ["student", "teacher"])
def test_poolers_that_the_fused_one_does_not_replace(hkd_cfg, build, tmp_path, network):
    cfg = hkd_cfg
    if network == "teacher":
        cfg = small_config(channels=32, hidden=40, width=0.5)
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlign"
    if network == "teacher":
        hkd_cfg.HKD.TEACHER.CONFIG_FILE, hkd_cfg.HKD.TEACHER.WEIGHTS = save_teacher(cfg, tmp_path)
    with pytest.raises(ValueError, match=f"{network} pools .* ROIAlignV2; set HKD.POOLER to torch"):
        build_model(hkd_cfg)
    hkd_cfg.HKD.POOLER = "torchvision"
    model = build(hkd_cfg)
    with EventStorage(0):
        assert torch.isfinite(model(make_batch())["loss_hkd_region"])
    hkd_cfg.HKD.POOLER = "fast"
    with pytest.raises(ValueError, match="HKD.POOLER is 'fast'; choose from fused, torchvision"):
        build_model(hkd_cfg)


def test_levels_of_another_canonical_size_are_not_pooled_by_the_fused_one(student_cfg):
    model = build_model(student_cfg)
    two_stage.check_fused_pooler(model, "student")
    model.roi_heads.box_pooler.canonical_box_size = 112
    with pytest.raises(ValueError, match="boxes of 112 pixels to level 4 and not boxes of 224"):
        two_stage.check_fused_pooler(model, "student")


def test_gradient_shares_add_up(hkd_cfg, build):
    hkd_cfg.HKD.GRADIENT_SHARE_PERIOD = 1
    model = build(hkd_cfg)
    _, storage = steps(model, [make_batch()])
    shares = {
        k.split("/")[1]: v[0]
        for k, v in storage.latest().items()
        if k.startswith("hkd_gradient_share/")
    }
    assert set(shares) >= {"loss_cls", "loss_rpn_cls", "loss_hkd_pyramid", "loss_hkd_logit"}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["loss_hkd_pyramid"] > 0


def test_images_without_boxes_train(hkd_cfg, build):
    model = build(hkd_cfg)
    batch = make_batch()
    for record in batch:
        record["instances"] = record["instances"][:0]
    record, _ = steps(model, [batch])
    assert all(torch.isfinite(loss) for loss in record[0][0].values())


def test_unsupported_students_are_refused(hkd_cfg):
    for name in ("HKDDetector", "NoSuchDetector"):
        hkd_cfg.HKD.STUDENT.META_ARCHITECTURE = name
        with pytest.raises(ValueError, match=f"HKD.STUDENT.META_ARCHITECTURE is '{name}'"):
            build_model(hkd_cfg)
    hkd_cfg.HKD.STUDENT.META_ARCHITECTURE = "GeneralizedRCNN"
    hkd_cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    hkd_cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p4"]
    with pytest.raises(ValueError, match="student has Res5ROIHeads"):
        build_model(hkd_cfg)
