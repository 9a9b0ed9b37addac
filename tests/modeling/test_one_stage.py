"""One-stage students and teachers: neutrality, ignore regions, labels and anchor order."""

import copy

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import RetinaNet, build_model
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from helpers.rules import rule
from helpers.small_detectors import make_batch, one_stage_config, save_teacher, small_config
from helpers.training_steps import plain_in_channels_last, steps
from hkd_d2.distillation.term import DENSE, PROPOSALS
from hkd_d2.modeling import one_stage
from hkd_d2.modeling.checkpoint import StudentCheckpointer
from hkd_d2.modeling.families import check_detector

ARCHITECTURES = ["RetinaNet", "FCOS"]
TERMS = ["pyramid", "region", "logit", "adl", "crosskd"]


@pytest.fixture(scope="module")
def one_stage_teachers(tmp_path_factory):
    """Config file and weights of a wider teacher of each architecture."""
    return {
        name: save_teacher(
            one_stage_config(name, channels=32, width=0.5), tmp_path_factory.mktemp(name)
        )
        for name in ARCHITECTURES
    }


@pytest.fixture(scope="module", autouse=True)
def compiled_focal_loss():
    """TorchScript compiles Detectron2's focal loss after two runs, which changes its last bits."""
    model = build_model(one_stage_config("RetinaNet")).train()
    steps(model, [make_batch()] * 4)


def distilling(cfg, teacher, terms=TERMS):
    cfg.MODEL.META_ARCHITECTURE = "HKDDetector"
    cfg.HKD.TEACHER.CONFIG_FILE, cfg.HKD.TEACHER.WEIGHTS = teacher
    cfg.HKD.TERMS = terms
    return cfg


@rule("Neutrality: with weights 0 a run equals plain Detectron2 bit for bit")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "ignore, boxes, channels_last",
    [(False, "gt", False), (True, "gt", True), (True, "teacher", False)],
)
def test_weights_zero_equal_plain_detectron2_bit_for_bit(
    one_stage_teachers, build, architecture, ignore, boxes, channels_last
):
    architecture_aware = f"IgnoreAware{architecture}" if ignore else architecture
    plain_cfg = one_stage_config(architecture_aware)
    cfg = distilling(one_stage_config(architecture_aware), one_stage_teachers[architecture])
    cfg.HKD.CHANNELS_LAST, cfg.HKD.REGION.BOXES = channels_last, boxes
    cfg.HKD.CROSSKD.REUSED_CONVS = int(ignore)  # after the tower's convolution, and before it
    for name in TERMS:
        cfg.HKD[name.upper()].WEIGHT = 0.0
    batches = [make_batch(ignore, seed=s) for s in range(3)]
    plain, distilled = build(plain_cfg), build(cfg)
    after_build = torch.get_rng_state()
    build(plain_cfg)
    assert torch.equal(after_build, torch.get_rng_state())
    if channels_last:
        plain_in_channels_last(plain)

    expected, _ = steps(plain, batches)
    found, storage = steps(distilled, batches)
    for (losses, grads, state), (losses0, grads0, state0) in zip(found, expected, strict=True):
        assert set(losses) - set(losses0) == {f"loss_hkd_{n}" for n in TERMS}
        assert list(losses)[: len(losses0)] == list(losses0)
        for name, loss in losses0.items():
            assert torch.equal(losses[name], loss), name
        for name, grad in grads0.items():
            assert torch.equal(grads[name], grad), name
        assert torch.equal(state, state0)
    for name in TERMS:
        assert storage.history(f"hkd/{name}_raw").latest() > 1e-6
        assert storage.history(f"hkd/{name}_weight").latest() == 0
    state, state0 = distilled.state_dict(), plain.state_dict()
    assert list(state) == list(state0)
    assert all(torch.equal(state[k], state0[k]) for k in state0)


def test_fcos_of_a_config_is_detectron2s(build):
    ours = build(one_stage_config("FCOS"))
    stock = fcos.FCOS(
        backbone=copy.deepcopy(ours.backbone),
        head=copy.deepcopy(ours.head),
        head_in_features=["p3", "p4", "p5", "p6", "p7"],
        num_classes=1,
        test_score_thresh=0.0,
        test_nms_thresh=0.5,
        pixel_mean=[103.530, 116.280, 123.675],
        pixel_std=[1.0, 1.0, 1.0],
    ).train()
    (losses, grads, _), (losses0, grads0, _) = (
        steps(model, [make_batch()])[0][0] for model in (ours, stock)
    )
    assert list(losses) == ["loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"]
    assert all(torch.equal(losses[k], v) for k, v in losses0.items())
    assert all(torch.equal(grads[k], v) for k, v in grads0.items())
    ours.eval(), stock.eval()
    with torch.no_grad():
        for a, b in zip(ours(make_batch()), stock(make_batch()), strict=True):
            assert len(a["instances"]) > 0
            assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
            assert torch.equal(a["instances"].scores, b["instances"].scores)


@rule("A student's checkpoint is a plain checkpoint, without teacher or terms")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_distilled_checkpoint_serves_the_plain_config(
    one_stage_teachers, build, architecture, tmp_path
):
    cfg = distilling(one_stage_config(architecture), one_stage_teachers[architecture])
    distilled = build(cfg)
    steps(distilled, [make_batch(seed=s) for s in range(2)], lr=1e-4)
    StudentCheckpointer(distilled, str(tmp_path)).save("model_final")
    file = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert {k.split(".")[0] for k in file["hkd"]} == {"pyramid", "region", "crosskd"}
    plain = build_model(one_stage_config(architecture))
    assert list(file["model"]) == list(plain.state_dict())
    DetectionCheckpointer(plain).load(str(tmp_path / "model_final.pth"))
    distilled.eval(), plain.eval()
    with torch.no_grad():
        for ours, theirs in zip(distilled(make_batch()), plain(make_batch()), strict=True):
            ours, theirs = ours["instances"], theirs["instances"]
            assert len(ours) > 0
            assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
            assert torch.equal(ours.scores, theirs.scores)


def test_weights_of_a_deeper_head_are_refused(one_stage_teachers, build, tmp_path):
    deeper = one_stage_config("RetinaNet", channels=32, width=0.5)
    deeper.MODEL.RETINANET.NUM_CONVS = 2
    _, weights = save_teacher(deeper, tmp_path)
    cfg = distilling(one_stage_config("RetinaNet"), one_stage_teachers["RetinaNet"])
    cfg.HKD.TEACHER.WEIGHTS = weights
    with pytest.raises(ValueError, match="the model has no 'head.(cls|bbox)_subnet.2"):
        build(cfg)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_and_masks(one_stage_teachers, build, architecture, precision):
    """Teacher in its own precision, student in autocast, pyramid under the objects."""
    cfg = distilling(one_stage_config(architecture), one_stage_teachers[architecture])
    cfg.HKD.TEACHER.PRECISION, cfg.HKD.PYRAMID.MASK = precision, "split"
    cfg.HKD.REGION.BOXES = "teacher"
    model = build(cfg)
    found = []
    for student_dtype in (torch.float32, torch.bfloat16):
        with EventStorage(0), torch.autocast("cpu", student_dtype, student_dtype != torch.float32):
            losses = model(make_batch())
        sum(losses.values()).backward()
        assert all(torch.isfinite(loss) for loss in losses.values())
        found.append({k: v.item() for k, v in losses.items() if "hkd" in k})
    for name in ("loss_hkd_pyramid", "loss_hkd_adl", "loss_hkd_logit"):
        assert found[1][name] == pytest.approx(found[0][name], rel=0.1), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_teacher_is_a_guest(one_stage_teachers, build, architecture):
    model = build(distilling(one_stage_config(architecture), one_stage_teachers[architecture]))
    teacher = model.teacher.model
    theirs = {id(p) for p in [*teacher.parameters(), *teacher.buffers()]}
    assert not theirs & {id(p) for p in [*model.parameters(), *model.buffers()]}
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    attributes = set(vars(teacher))
    steps(model, [make_batch()])
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert set(vars(teacher)) == attributes  # no running mean of a loss either
    assert not any(m.training for m in teacher.modules())
    assert copy.deepcopy(model).teacher is model.teacher


@rule("Dense outputs and labels run in anchor order on both sides")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_outputs_and_labels_share_the_anchor_order(build, architecture):
    """Write a distinct value into every (image, level, y, x, anchor) and read it back by anchor."""
    model = build(one_stage_config(architecture))
    size = model.anchor_generator.num_cell_anchors[0]
    assert size == (2 if architecture == "RetinaNet" else 1)

    class NumberedHead(torch.nn.Module):
        def forward(self, maps):
            logits, deltas, centerness = [], [], []
            for level, x in enumerate(maps):
                n, _, height, width = x.shape
                axes = [torch.arange(k) for k in (n, size, height, width)]
                image, anchor, y, x = torch.stack(torch.meshgrid(*axes, indexing="ij")).double()
                value = (((level * 10 + image) * 100 + y) * 100 + x) * 10 + anchor
                logits.append(value)
                deltas.append(torch.stack([value * 4 + k for k in range(4)], 2).flatten(1, 2))
                centerness.append(-value[:, :1])
            return (logits, deltas, centerness) if architecture == "FCOS" else (logits, deltas)

    batch = make_batch()
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(batch).tensor)
    model.head = NumberedHead()
    dense = one_stage.dense_stage(model, features)
    generator = model.anchor_generator
    for level, (logits, deltas, anchors) in enumerate(
        zip(dense.logits, dense.deltas, dense.anchors, strict=True)
    ):
        assert logits.shape == (2, len(anchors), 1)
        centres = anchors.get_centers()
        shapes = anchors.tensor[:, 2:] - anchors.tensor[:, :2]
        cell = list(generator.cell_anchors)[level]
        cells = cell[:, 2:] - cell[:, :2]
        for i in range(len(anchors)):
            x, y = (centres[i] / generator.strides[level] - generator.offset).round().int().tolist()
            a = int((cells - shapes[i]).abs().sum(1).argmin())
            for image in range(2):
                value = (((level * 10 + image) * 100 + y) * 100 + x) * 10 + a
                assert logits[image, i, 0] == value
                assert deltas[image, i].tolist() == [value * 4 + k for k in range(4)]
                if architecture == "FCOS":
                    assert dense.centerness[level][image, i, 0] == -value
    # Detectron2 labels the anchors in the same order: those labelled lie about an object.
    labels, matched = model.label_anchors(dense.anchors, [x["instances"] for x in batch])
    every = Boxes.cat(dense.anchors).get_centers()
    for label, boxes in zip(labels, matched, strict=True):
        objects = label == 0
        assert objects.sum() > 0
        inside = (every >= boxes[:, :2] - 8).all(1) & (every <= boxes[:, 2:] + 8).all(1)
        assert inside[objects].all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_ignore_rows_equal_to_stock(build, architecture):
    stock = build(one_stage_config(architecture))
    aware = build(one_stage_config(f"IgnoreAware{architecture}"))
    (losses, grads, _), (losses0, grads0, _) = (
        steps(m, [make_batch()])[0][0] for m in (aware, stock)
    )
    assert all(torch.equal(losses[k], v) for k, v in losses0.items())
    assert all(torch.equal(grads[k], v) for k, v in grads0.items())


@rule("Ignore: half of a box's own area in one ignore box leaves it out, and positives stay")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ignored_anchors_take_part_in_no_loss(build, architecture):
    """Logits of ignored anchors get no gradient; the others' as if the regions were not there."""
    model = build(one_stage_config(f"IgnoreAware{architecture}"))
    batch = make_batch(ignore=True)
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(batch).tensor)
        dense = one_stage.dense_stage(model, features)
    instances = [x["instances"] for x in batch]
    for x in instances:  # over the first object and beside it
        x.gt_boxes.tensor[2] = torch.tensor([0.0, 0, 48, 64])
    objects = [x[~x.gt_ignore] for x in instances]

    def gradient(rows):
        model.__dict__.pop("loss_normalizer", None)
        leaves = [x.detach().clone().requires_grad_() for x in dense.logits]
        labels, matched = model.label_anchors(dense.anchors, rows)
        extra = [] if dense.centerness is None else [dense.centerness]
        with EventStorage(0):
            losses = model.losses(dense.anchors, leaves, labels, dense.deltas, matched, *extra)
        sum(losses.values()).backward()
        return torch.stack(labels), torch.cat([x.grad for x in leaves], 1)[..., 0], losses

    labels, grads, losses = gradient(instances)
    labels0, grads0, losses0 = gradient(objects)
    # An anchor is ignored by hand: background, and half of its own area in the image's one region.
    every = Boxes.cat(dense.anchors).tensor
    for image in range(2):
        region = instances[image].gt_boxes.tensor[2]
        low, high = torch.max(every[:, :2], region[:2]), torch.min(every[:, 2:], region[2:])
        area = (every[:, 2:] - every[:, :2]).prod(1)
        covered = (high - low).clamp(min=0).prod(1) / area >= 0.5
        background = labels0[image] == model.num_classes
        assert (covered & background).any() and (~covered & background).any()
        assert (covered & (labels0[image] == 0)).any()  # an object in there stays one
        assert (labels[image][covered & background] == -1).all()
        kept = ~(covered & background)
        assert torch.equal(labels[image][kept], labels0[image][kept])
    ignored = (labels < 0) & (labels0 >= 0)
    assert (grads[ignored] == 0).all() and (grads0[ignored] != 0).all()
    assert torch.allclose(grads[~ignored], grads0[~ignored], rtol=1e-5, atol=0)
    box_losses = [k for k in losses if k not in ("loss_cls", "loss_fcos_cls")]
    assert all(torch.equal(losses[k], losses0[k]) for k in box_losses)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_images_of_ignore_regions_alone_train(one_stage_teachers, build, architecture):
    cfg = one_stage_config(f"IgnoreAware{architecture}")
    model = build(distilling(cfg, one_stage_teachers[architecture]))
    batch = make_batch(ignore=True)
    batch[0]["instances"] = batch[0]["instances"][batch[0]["instances"].gt_ignore]
    batch[1]["instances"] = batch[1]["instances"][:0]
    record, _ = steps(model, [batch])
    assert all(torch.isfinite(loss) for loss in record[0][0].values())
    assert all(torch.isfinite(grad).all() for grad in record[0][1].values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_teachers_boxes_are_its_detections(one_stage_teachers, build, architecture):
    cfg = distilling(one_stage_config(architecture), one_stage_teachers[architecture])
    teacher = build(cfg).teacher
    batch = make_batch()
    found = teacher.features(batch, (64, 96))
    teacher.advance(found, None, frozenset({DENSE}))
    logits = found.dense.logits
    teacher.advance(found, None, frozenset({DENSE, PROPOSALS}))
    # Decoding leaves the logits to the terms as they were.
    assert all(torch.equal(a, b) for a, b in zip(logits, found.dense.logits, strict=True))
    with torch.no_grad():
        detected = teacher.model([{**x, "image": x["image"]} for x in batch])
    for proposals, x in zip(found.proposals, detected, strict=True):
        expected = x["instances"]
        assert len(proposals) == len(expected) > 10
        assert torch.equal(proposals.proposal_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(proposals.scores, expected.scores)
        assert (proposals.scores.diff() <= 0).all()


def test_the_teacher_goes_only_as_deep_as_the_terms_need(one_stage_teachers, build):
    cfg = distilling(
        one_stage_config("RetinaNet"), one_stage_teachers["RetinaNet"], ["pyramid", "region"]
    )
    model = build(cfg)
    ran = []
    model.teacher.model.head.register_forward_hook(lambda *_: ran.append("head"))
    with EventStorage(0):
        model(make_batch())
    assert ran == []


def two_stage_student():
    cfg = small_config()
    cfg.HKD.PYRAMID.LEVELS = ["p3", "p4", "p5", "p6"]
    return cfg


@pytest.mark.parametrize("boxes", ["sampled", "gt", "teacher"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_stage_student_beside_a_one_stage_teacher(
    one_stage_teachers, build, architecture, boxes
):
    cfg = distilling(two_stage_student(), one_stage_teachers[architecture], ["pyramid", "region"])
    cfg.HKD.REGION.BOXES = boxes
    model = build(cfg)
    assert model.terms["region"].strides == [8, 16, 32]
    assert model.terms["pyramid"].strides == [8, 16, 32, 64]
    record, _ = steps(model, [make_batch()])
    losses, grads, _ = record[0]
    assert losses["loss_hkd_region"] > 0 and losses["loss_hkd_pyramid"] > 0


@pytest.mark.parametrize("boxes", ["gt", "teacher"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_stage_student_beside_a_two_stage_teacher(teacher_files, build, architecture, boxes):
    cfg = distilling(one_stage_config(architecture), teacher_files, ["pyramid", "region"])
    cfg.HKD.PYRAMID.LEVELS = ["p3", "p4", "p5", "p6"]
    cfg.HKD.REGION.BOXES = boxes
    model = build(cfg)
    assert model.terms["region"].strides == [8, 16, 32]
    record, _ = steps(model, [make_batch()])
    losses, grads, _ = record[0]
    assert losses["loss_hkd_region"] > 0 and losses["loss_hkd_pyramid"] > 0
    cfg.HKD.PYRAMID.LEVELS = ["p7"]
    with pytest.raises(ValueError, match="level 'p7' has stride 128, which no level of the teach"):
        build(cfg)


@rule("Dense heads are compared on the same anchors or refused")
@pytest.mark.parametrize(
    "student, teacher, term, sentence",
    [
        ("RetinaNet", "two", "logit", "one of the two networks is one-stage; drop 'logit'"),
        ("two", "RetinaNet", "logit", "one of the two networks is one-stage; drop 'logit'"),
        ("RetinaNet", "two", "adl", "one of RetinaNet, the teacher one of RPN"),
        ("two", "FCOS", "adl", "one of RPN, the teacher one of FCOS"),
        ("FCOS", "RetinaNet", "logit", "one of FCOS, the teacher one of RetinaNet"),
        ("FCOS", "RetinaNet", "adl", "one of FCOS, the teacher one of RetinaNet"),
    ],
)
def test_pairs_that_are_refused(
    one_stage_teachers, teacher_files, build, student, teacher, term, sentence
):
    cfg = two_stage_student() if student == "two" else one_stage_config(student)
    files = teacher_files if teacher == "two" else one_stage_teachers[teacher]
    with pytest.raises(ValueError, match=sentence):
        build(distilling(cfg, files, [term]))


def test_options_that_are_refused(one_stage_teachers, build):
    def refused(sentence, term, **options):
        cfg = distilling(one_stage_config("RetinaNet"), one_stage_teachers["RetinaNet"], [term])
        for key, value in options.items():
            cfg.merge_from_list([key.replace("__", "."), value])
        with pytest.raises(ValueError, match=sentence):
            build(cfg)

    refused("a one-stage student samples no boxes", "region", HKD__REGION__BOXES="sampled")
    refused("POOLER_RESOLUTION is 0", "region", HKD__REGION__POOLER_RESOLUTION=0)
    refused(
        "names hidden, predictions, which .* choose from kl, deltas, bounded",
        "logit",
        HKD__LOGIT__PARTS=["hidden", "predictions"],
    )
    refused(
        "student's anchors .* are not the teacher's",
        "logit",
        MODEL__ANCHOR_GENERATOR__SIZES=[[16], [32], [64], [128], [255]],
    )
    refused("names 'p2', which the student's backbone", "pyramid", HKD__PYRAMID__LEVELS=["p2"])


def test_detectors_with_a_forward_of_their_own_are_refused(build):
    class Other(RetinaNet):
        def forward_training(self, *args):
            return {}

    model = build(one_stage_config("RetinaNet"))
    check_detector(model, "student")
    model.__class__ = Other
    with pytest.raises(ValueError, match="student has Other; .* GeneralizedRCNN, RetinaNet or FCO"):
        check_detector(model, "student")
