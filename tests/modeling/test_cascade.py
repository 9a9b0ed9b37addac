"""CascadeROIHeads as students and teachers, with and without ignore regions."""

import copy

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from helpers.rules import rule
from helpers.small_detectors import cascade_config, make_batch, save_teacher, small_config
from helpers.training_steps import MultilevelPooler, plain_in_channels_last, steps
from hkd_d2.distillation.term import PREDICTIONS
from hkd_d2.modeling import two_stage
from hkd_d2.modeling.checkpoint import StudentCheckpointer
from hkd_d2.modeling.summary import count_flops

TERMS = ["pyramid", "region", "logit"]


@pytest.fixture(scope="module")
def cascade_teacher(tmp_path_factory):
    cfg = cascade_config(channels=32, hidden=40, width=0.5)
    return save_teacher(cfg, tmp_path_factory.mktemp("cascade"))


def distilling(cfg, teacher):
    cfg.MODEL.META_ARCHITECTURE = "HKDDetector"
    cfg.HKD.TEACHER.CONFIG_FILE, cfg.HKD.TEACHER.WEIGHTS = teacher
    cfg.HKD.TERMS = TERMS
    cfg.HKD.LOGIT.PARTS = ["hidden", "predictions", "kl", "deltas", "bounded"]
    return cfg


@rule("Neutrality: with weights 0 a run equals plain Detectron2 bit for bit")
@pytest.mark.parametrize(
    "ignore, pooler, channels_last",
    [(False, "torchvision", False), (True, "torchvision", True), (True, "fused", False)],
)
def test_weights_zero_equal_plain_detectron2_bit_for_bit(
    cascade_teacher, build, ignore, pooler, channels_last
):
    plain_cfg, cfg = cascade_config(), distilling(cascade_config(), cascade_teacher)
    cfg.HKD.POOLER, cfg.HKD.CHANNELS_LAST = pooler, channels_last
    for c in (plain_cfg, cfg):
        c.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO = 2
        if ignore:
            c.MODEL.PROPOSAL_GENERATOR.NAME = "IgnoreAwareRPN"
            c.MODEL.ROI_HEADS.NAME = "IgnoreAwareCascadeROIHeads"
    for name in TERMS:
        cfg.HKD[name.upper()].WEIGHT = 0.0
    batches = [make_batch(ignore, seed=s) for s in range(3)]
    plain, distilled = build(plain_cfg), build(cfg)
    if pooler == "fused":
        plain.roi_heads.box_pooler = MultilevelPooler()
    if channels_last:
        plain_in_channels_last(plain)

    expected, storage0 = steps(plain, batches)
    found, storage = steps(distilled, batches)
    for (losses, grads, state), (losses0, grads0, state0) in zip(found, expected, strict=True):
        assert set(losses) - set(losses0) == {f"loss_hkd_{n}" for n in TERMS}
        assert list(losses)[: len(losses0)] == list(losses0)
        assert "loss_box_reg_stage2" in losses0
        for name, loss in losses0.items():
            assert torch.equal(losses[name], loss), name
        for name, grad in grads0.items():
            assert torch.equal(grads[name], grad), name
        assert torch.equal(state, state0)
    for name in TERMS:
        assert storage.history(f"hkd/{name}_raw").latest() > 1e-6
    for name in ("stage1/roi_head/num_fg_samples", "stage2/fast_rcnn/cls_accuracy"):
        assert storage.latest()[name] == storage0.latest()[name]
    state, state0 = distilled.state_dict(), plain.state_dict()
    assert list(state) == list(state0)
    assert all(torch.equal(state[k], state0[k]) for k in state0)


@rule("A student's checkpoint is a plain checkpoint, without teacher or terms")
def test_distilled_checkpoint_serves_the_plain_config(cascade_teacher, build, tmp_path):
    distilled = build(distilling(cascade_config(), cascade_teacher))
    steps(distilled, [make_batch()], lr=1e-4)
    StudentCheckpointer(distilled, str(tmp_path)).save("model_final")
    plain = build_model(cascade_config())
    DetectionCheckpointer(plain).load(str(tmp_path / "model_final.pth"))
    distilled.eval(), plain.eval()
    with torch.no_grad():
        for ours, theirs in zip(distilled(make_batch()), plain(make_batch()), strict=True):
            assert len(ours["instances"]) > 0
            assert torch.equal(
                ours["instances"].pred_boxes.tensor, theirs["instances"].pred_boxes.tensor
            )


@pytest.mark.parametrize("student, teacher", [("plain", "cascade"), ("cascade", "plain")])
def test_cascade_beside_plain_heads(cascade_teacher, teacher_files, build, student, teacher):
    cfg = small_config() if student == "plain" else cascade_config()
    model = build(distilling(cfg, cascade_teacher if teacher == "cascade" else teacher_files))
    record, _ = steps(model, [make_batch(), make_batch()], lr=1e-4)
    losses, grads, _ = record[-1]
    assert all(torch.isfinite(x) for x in losses.values())
    assert all(losses[f"loss_hkd_{name}"] > 0 for name in TERMS)
    assert all(torch.isfinite(g).all() for g in grads.values())


def boxes_of(batch):
    return [x["instances"].gt_boxes for x in batch]


@rule("A cascade's class logits are the scores of its inference")
def test_a_cascade_teacher_scores_as_at_inference(cascade_teacher, build):
    """Class logits are the averaged scores that Detectron2's own inference gives the same boxes."""
    teacher = build(distilling(small_config(), cascade_teacher)).teacher
    heads = teacher.model.roi_heads
    batch = make_batch(sizes=((64, 96), (64, 96)))
    found = teacher.features(batch, (64, 96))
    teacher.advance(found, boxes_of(batch), frozenset({PREDICTIONS}))

    proposals = []
    for boxes in boxes_of(batch):
        one = Instances((64, 96), proposal_boxes=boxes, objectness_logits=torch.zeros(len(boxes)))
        proposals.append(one)
    seen = []
    for predictor in heads.box_predictor:
        predictor.register_forward_hook(lambda _m, _i, out: seen.append(out[0].softmax(1)))
        predictor.test_nms_thresh = 1.0
    with torch.no_grad():
        detections = heads._forward_box(found.features, proposals)
    average = torch.stack(seen).mean(0)
    assert torch.allclose(found.regions.class_logits.exp(), average, atol=1e-6)
    scores = torch.cat([x.scores for x in detections]).sort().values
    assert torch.allclose(found.regions.class_logits.exp()[:, 0].sort().values, scores, atol=1e-6)
    # Hidden features and deltas are of the first stage, on the boxes themselves.
    pooled = heads.box_pooler([found.features[n] for n in heads.box_in_features], boxes_of(batch))
    with torch.no_grad():
        hidden = heads.box_head[0](pooled)
        assert torch.allclose(found.regions.hidden, hidden, atol=1e-5)
        assert torch.allclose(found.regions.deltas, heads.box_predictor[0](hidden)[1], atol=1e-5)


@rule("A cascade's row keeps its box where stages drop some")
def test_rows_keep_their_boxes_when_stages_drop_some(build):
    """A box that leaves the image after the first stage averages over the first stage alone."""
    model = build(cascade_config())
    heads = model.roi_heads
    batch = make_batch(sizes=((64, 96), (64, 96)))
    instances = [x["instances"] for x in batch]
    features = model.backbone(model.preprocess_image(batch).tensor)
    sampled = []
    for x in instances:
        one = Instances(x.image_size, proposal_boxes=x.gt_boxes, gt_boxes=x.gt_boxes)
        one.gt_classes = x.gt_classes
        sampled.append(one)
    regions = two_stage.region_stage(
        heads, features, [x.proposal_boxes for x in sampled], two_stage.WHOLE_BOX_BRANCH
    )
    with torch.no_grad():
        regions.deltas[1, 0] = 1000.0  # dx: far out of the image
    first = regions.class_logits
    with EventStorage(0):
        two_stage.cascade_stages(heads, features, regions, sampled, gt_instances=instances)
    assert [len(x) for x in regions.stages[1][1]] == [1, 2]
    assert [x.row.tolist() for x in regions.stages[1][1]] == [[0], [2, 3]]
    probs = regions.class_logits.exp()
    assert torch.allclose(probs.sum(1), torch.ones(4), atol=1e-6)
    assert torch.allclose(probs[1], first[1].softmax(0), atol=1e-6)
    later = [p[0].softmax(1) for p, _ in regions.stages[1:]]
    expected = (first.softmax(1)[[0, 2, 3]] + later[0] + later[1]) / 3
    assert torch.allclose(probs[[0, 2, 3]], expected, atol=1e-6)
    # Every stage's classifier learns from the average.
    regions.class_logits[:, 0].sum().backward()
    assert all(p.cls_score.weight.grad.abs().sum() > 0 for p in heads.box_predictor)


@rule("Ignore: half of a box's own area in one ignore box leaves it out, and positives stay")
def test_ignore_regions_at_every_stage(build):
    cfg = cascade_config()
    cfg.MODEL.ROI_HEADS.NAME = "IgnoreAwareCascadeROIHeads"
    heads = build(cfg).roi_heads
    truth = Instances((64, 64))
    truth.gt_boxes = Boxes(torch.tensor([[0.0, 0, 10, 20], [0, 0, 30, 30]]))
    truth.gt_classes, truth.gt_ignore = torch.tensor([0, -1]), torch.tensor([False, True])
    boxes = torch.tensor([[0.0, 0, 10, 20], [20, 0, 30, 20], [40, 40, 50, 60], [25, 0, 45, 20]])
    for stage in range(3):
        given = Instances((64, 64), proposal_boxes=Boxes(boxes))
        with EventStorage(0):
            (found,) = heads._match_and_label_boxes([given], stage, [truth])
        # The second lies in the region and on no object; the last only a quarter inside.
        assert found.proposal_boxes.tensor.tolist() == boxes[[0, 2, 3]].tolist()
        assert found.gt_classes.tolist() == [0, 1, 1]


def test_without_ignore_rows_equal_to_stock(build):
    stock = build(cascade_config())
    cfg = cascade_config()
    cfg.MODEL.ROI_HEADS.NAME = "IgnoreAwareCascadeROIHeads"
    aware = build(cfg)
    assert isinstance(aware.roi_heads, CascadeROIHeads)
    (losses, grads, state), (losses0, grads0, state0) = (
        steps(m, [make_batch()])[0][0] for m in (aware, stock)
    )
    assert all(torch.equal(losses[k], v) for k, v in losses0.items())
    assert all(torch.equal(grads[k], v) for k, v in grads0.items())
    assert torch.equal(state, state0)


def test_every_stage_of_the_box_head_counts():
    one, three = (
        count_flops(build_model(cfg).eval(), (64, 96)) for cfg in (small_config(), cascade_config())
    )
    assert three["box head"] == pytest.approx(3 * one["box head"])


def test_images_without_boxes_train(cascade_teacher, build):
    model = build(distilling(cascade_config(), cascade_teacher))
    batch = copy.deepcopy(make_batch())
    for record in batch:
        record["instances"] = record["instances"][:0]
    record, _ = steps(model, [batch])
    assert all(torch.isfinite(loss) for loss in record[0][0].values())
