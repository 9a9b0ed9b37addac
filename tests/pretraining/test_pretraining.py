"""Pre-training: turns and labels by hand, losses in float64, a small run that a detector loads."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from PIL import Image

from helpers.rules import rule
from helpers.small_detectors import make_batch, small_config
from helpers.training_steps import steps
from hkd_d2.config import add_hkd_config
from hkd_d2.modeling.backbones.pretrained import IMAGENET_MEAN, IMAGENET_STD
from hkd_d2.modeling.checkpoint import StudentCheckpointer
from hkd_d2.pretraining import losses, training
from hkd_d2.pretraining.images import open_images
from hkd_d2.pretraining.networks import build_classifier


def test_rows_are_interleaved_and_labelled():
    images = torch.arange(2.0 * 3 * 4 * 4).view(2, 3, 4, 4)
    rows = losses.turned(images)
    assert rows.shape == (8, 3, 4, 4)
    for i in range(2):
        for j in range(4):
            expected = np.rot90(images[i].numpy(), j, (1, 2))
            assert np.array_equal(rows[4 * i + j].numpy(), expected)
    assert losses.joint_labels(torch.tensor([2, 0])).tolist() == [8, 9, 10, 11, 0, 1, 2, 3]


def outputs(seed, requires_grad=True):
    """Class logits and two branches' joint logits of 2 images and 3 classes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(columns):
        return torch.randn(8, columns, generator=generator).requires_grad_(requires_grad)

    return draw(3), [draw(12), draw(12)]


def divergence(student, teacher):
    p, q = ((x.detach().double() / 3).softmax(1) for x in (student, teacher))
    return 9 * (q * (q / p).log()).sum(1).mean().item()


def cross_entropy(logits, rows, labels):
    return -logits.detach().double().log_softmax(1)[rows, labels].mean().item()


CLASSES = [2, 1]
JOINT = [8, 9, 10, 11, 4, 5, 6, 7]


@rule("Pre-training's losses equal their formulas in float64")
def test_the_students_loss_in_float64():
    student, teacher = outputs(0), outputs(1)
    loss = losses.student_loss(student, teacher, torch.tensor(CLASSES))
    expected = cross_entropy(student[0], [0, 4], CLASSES) + divergence(student[0], teacher[0])
    expected += sum(divergence(s, t) for s, t in zip(student[1], teacher[1], strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert teacher[0].grad is None and all(x.grad is None for x in teacher[1])
    assert student[0].grad.any() and all(x.grad.any() for x in student[1])


def test_the_plain_loss_in_float64():
    student, teacher = outputs(0)[0], outputs(1)[0]
    labels = [2, 1, 0, 0, 1, 2, 2, 0]
    loss = losses.plain_loss(student, teacher, torch.tensor(labels))
    expected = cross_entropy(student, range(8), labels) + divergence(student, teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert teacher.grad is None and student.grad.any()


@rule("Pre-training's losses equal their formulas in float64")
def test_the_mutual_loss_in_float64():
    pair = outputs(0), outputs(1)
    loss = losses.mutual_loss(*pair, torch.tensor(CLASSES))
    expected = 0.0
    for own, other in (pair, pair[::-1]):
        expected += cross_entropy(own[0], [0, 4], CLASSES) + divergence(own[0], other[0])
        for s, t in zip(own[1], other[1], strict=True):
            expected += cross_entropy(s, range(8), JOINT) + divergence(s, t)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    # Each learns from the other as from a constant.
    (found,) = torch.autograd.grad(loss, pair[0][0])
    own = losses.class_loss(pair[0][0], torch.tensor(CLASSES))
    own = own + losses.imitation_loss(pair[0], pair[1])
    (expected,) = torch.autograd.grad(own, pair[0][0])
    torch.testing.assert_close(found, expected)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_the_published_pair_has_its_published_sizes():
    """WRN-40-2 has 2.26 million parameters and WRN-16-2 0.70 with the 100 classes of CIFAR."""
    for name, millions in (("wrn-40-2", 2.26), ("wrn-16-2", 0.70)):
        network = build_classifier(name, 100)
        found = parameters(network.body) + parameters(network.classifier)
        assert found / 1e6 == pytest.approx(millions, abs=0.006)
    logits, joint = network.eval()(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 100) and [x.shape for x in joint] == [(2, 400)] * 3


def test_branches_have_the_remaining_stages_and_weights_of_their_own():
    network = build_classifier("resnet18-0.25", 5)
    stages = [parameters(s) for s in network.body.stages]
    linear = 128 * 20 + 20
    sizes = [parameters(b) - linear for b in network.branches]
    assert sizes[:3] == [sum(stages[1:]), sum(stages[2:]), stages[3]]
    # The last one more: 2 blocks of 2 convolutions of 128 x 128 x 9, and their norms; no shortcut.
    assert sizes[3] == 4 * (128 * 128 * 9 + 2 * 128)
    ours = network.branches[2][0][0].conv1.weight
    assert not torch.equal(ours, network.body.stages[3][0].conv1.weight)
    logits, joint = network.eval()(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 5) and [x.shape for x in joint] == [(2, 20)] * 4


def test_detached_branches_leave_the_body_alone():
    network = build_classifier("wrn-10-1", 3)
    sum(x.sum() for x in network(torch.randn(2, 3, 16, 16), detach=True)[1]).backward()
    assert all(p.grad is None for p in network.body.parameters())
    assert all(p.grad is not None for p in network.branches.parameters())


@pytest.mark.parametrize("name", ["vgg16", "wrn-17-2", "resnet101", "resnet18-"])
def test_other_networks_are_refused(name):
    with pytest.raises(ValueError, match="no network for pre-training|cannot be built"):
        build_classifier(name, 3)


@pytest.fixture
def cfg(tmp_path):
    """Two classes, bright above or below; 8 and 4 images of each."""
    generator = np.random.default_rng(0)
    for split, number in (("train", 8), ("val", 4)):
        for label, rows in (("above", slice(0, 16)), ("below", slice(16, 32))):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = generator.integers(0, 80, (32, 32, 3), dtype=np.uint8)
                pixels[rows] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    cfg = get_cfg()
    add_hkd_config(cfg)
    cfg.MODEL.DEVICE, cfg.SEED, cfg.DATALOADER.NUM_WORKERS = "cpu", 1, 0
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.HKD.PRETRAINING.update(
        TEACHER="wrn-10-1",
        STUDENT="wrn-10-1",
        ROOT=str(tmp_path / "images"),
        IMAGE_SIZE=16,
        BATCH_SIZE=8,
        EPOCHS=20,
        LR=0.05,
        DROPS=[15],
    )
    return cfg


@pytest.mark.parametrize(
    "method, teacher",
    [
        ("labels", "joint"),
        ("kd", "frozen"),
        ("hsakd", "joint"),
        ("hsakd", "frozen"),
        ("hssakd", ""),
    ],
)
def test_every_method_learns_the_classes(cfg, method, teacher, tmp_path):
    cfg.HKD.PRETRAINING.METHOD = method
    cfg.HKD.PRETRAINING.TEACHER_TRAINING = teacher or "joint"
    found = training.pretrain(cfg)
    other = {"labels": set(), "hssakd": {"peer"}}.get(method, {"teacher"})
    assert set(found) == {"student", *other}
    assert found["student"] >= 0.75
    file = torch.load(tmp_path / "output" / "classifiers.pth", weights_only=True)
    assert set(file) == set(found)


@rule("Methods of pre-training share a seed's start, order of images and teacher")
def test_methods_start_alike_and_share_a_teacher(cfg, monkeypatch):
    """The student's weights and images by the first step; the frozen teacher's body at the end."""
    starts, bodies = {}, {}

    def fit(networks, loader, node, loss):
        state = torch.get_rng_state()
        first = next(iter(loader))[0]
        torch.set_rng_state(state)
        parameters = [p.detach().clone() for p in networks[0].parameters()]
        starts[method] = [first, *parameters]  # the last training is the student's
        return fit_as_it_is(networks, loader, node, loss)

    fit_as_it_is = training.fit
    monkeypatch.setattr(training, "fit", fit)
    cfg.HKD.PRETRAINING.update(EPOCHS=1, TEACHER_TRAINING="frozen")
    for method in training.METHODS:
        cfg.HKD.PRETRAINING.METHOD = method
        training.pretrain(cfg)
        file = torch.load(f"{cfg.OUTPUT_DIR}/classifiers.pth", weights_only=True)
        bodies[method] = {k: v for k, v in file.get("teacher", {}).items() if "branches" not in k}
    for method in training.METHODS[1:]:
        assert all(map(torch.equal, starts[method], starts["labels"])), method
    assert bodies["kd"].keys() == bodies["hsakd"].keys() != set()
    assert all(torch.equal(v, bodies["hsakd"][k]) for k, v in bodies["kd"].items())


def test_class_logits_need_no_branch():
    network = build_classifier("wrn-10-1", 3).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(network.classify(images), network(images)[0])


def test_a_frozen_teachers_body_does_not_move_with_its_branches(cfg):
    network = build_classifier("wrn-10-1", 2)
    seen = []

    def fit(networks, loader, node, loss):
        seen.append({k: v.clone() for k, v in network.state_dict().items()})
        return fit_as_it_is(networks, loader, node, loss)

    fit_as_it_is, training.fit = training.fit, fit
    try:
        cfg.HKD.PRETRAINING.TEACHER_TRAINING = "frozen"
        loader = torch.utils.data.DataLoader(
            training.open_images("folder", cfg.HKD.PRETRAINING.ROOT, 32, True), 8
        )
        training.fit_teacher(network, loader, cfg.HKD.PRETRAINING)
    finally:
        training.fit = fit_as_it_is
    moved = {k for k, v in network.state_dict().items() if not torch.equal(v, seen[1][k])}
    assert moved and {k.split(".")[0] for k in moved} == {"branches"}


@rule("A pre-trained body loads into a detector to the last weight")
def test_a_detector_starts_from_the_backbone(cfg, tmp_path):
    cfg.HKD.PRETRAINING.update(METHOD="labels", STUDENT="resnet18-0.25", EPOCHS=1)
    training.pretrain(cfg)
    detector_cfg = small_config()
    detector_cfg.HKD.BACKBONE.BLOCKS = []
    detector_cfg.MODEL.RESNETS.NORM = "BN"
    detector = build_model(detector_cfg)
    StudentCheckpointer(detector).load(str(tmp_path / "output" / "backbone.pth"))
    file = torch.load(tmp_path / "output" / "classifiers.pth", weights_only=True)["student"]
    body = detector.backbone.bottom_up.state_dict()
    assert len(body) > 50
    assert all(torch.equal(v, file[f"body.resnet.{k}"]) for k, v in body.items())


def test_hkd_trains_from_a_backbone_of_hsakd(cfg, hkd_cfg, build, tmp_path):
    """One step of HKD's three terms, from the pre-trained body into a checkpoint of the student."""
    cfg.HKD.PRETRAINING.update(STUDENT="resnet18-0.25", TEACHER="resnet18-0.25", EPOCHS=1)
    cfg.HKD.PRETRAINING.IMAGE_SIZE = 32
    training.pretrain(cfg)
    hkd_cfg.HKD.BACKBONE.BLOCKS = []
    hkd_cfg.MODEL.RESNETS.NORM = "BN"
    model = build(hkd_cfg)
    StudentCheckpointer(model, str(tmp_path)).load(str(tmp_path / "output" / "backbone.pth"))
    file = torch.load(tmp_path / "output" / "backbone.pth", weights_only=True)["model"]
    name = "backbone.bottom_up.res3.0.conv1.weight"
    assert torch.equal(model.student.state_dict()[name], file[name])
    ((losses, gradients, _),), _ = steps(model, [make_batch()])
    assert {f"loss_hkd_{term}" for term in ("pyramid", "region", "logit")} <= losses.keys()
    assert all(x.isfinite().all() for x in [*losses.values(), *gradients.values()])
    assert not torch.equal(model.student.state_dict()[name], file[name])


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"METHOD": "crd"}, "HKD.PRETRAINING.METHOD is 'crd'; choose from labels"),
        ({"DATASET": "svhn"}, "HKD.PRETRAINING.DATASET is 'svhn'"),
        ({"ROOT": "nowhere"}, "'nowhere/train' does not exist"),
        ({"DATASET": "cifar10", "ROOT": "nowhere"}, "'nowhere' does not hold cifar10"),
        ({"STUDENT": "vgg16"}, "'vgg16' is no network"),
    ],
)
def test_what_is_refused(cfg, options, sentence):
    cfg.HKD.PRETRAINING.update(options)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        training.pretrain(cfg)


def test_a_folder_is_read_by_the_reader_of_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("HKD_D2_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data" / "val"
    for name in ("person/a.png", "background/b.png"):
        (folder / name).parent.mkdir(parents=True)
        deep = np.full((16, 16), 0x40FF, np.uint16)
        Image.fromarray(deep).save(folder / name)
    pixels, _ = open_images("folder", str(tmp_path / "data"), 16, train=False)[0]
    wanted = (torch.full((3,), 0x40) - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    assert torch.allclose(pixels, wanted[:, None, None].expand(3, 16, 16), atol=1e-5)
    content = (folder / "person/a.png").read_bytes()
    (folder / "person/a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="a.png' cannot be read"):
        open_images("folder", str(tmp_path / "data"), 16, train=False)
