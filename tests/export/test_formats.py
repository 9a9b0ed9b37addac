"""Every kind of detector leaves as every format and finds what Detectron2 finds."""

import json
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

import hkd_d2
from helpers.command import run_code
from helpers.rules import rule
from helpers.small_detectors import cascade_config, one_stage_config, save_teacher, small_config
from hkd_d2.config import add_hkd_config
from hkd_d2.export.formats import SUFFIXES, Shape, detector_graph, export
from hkd_d2.export.verification import verify
from hkd_d2.inference.program_backend import METADATA_FILE, ProgramDetector
from hkd_d2.inference.torch_backend import TorchDetector, build_detector, describe

pytestmark = rule("An exported file finds what Detectron2 finds, or is not written")

ROOT = Path(__file__).resolve().parents[2]


def two_classes():
    """A box for every class, and thresholds that cut."""
    cfg = small_config()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = False
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.3
    cfg.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO = 2
    cfg.INPUT.FORMAT = "RGB"
    return cfg


def fcos_two_classes():
    cfg = one_stage_config("FCOS")
    cfg.MODEL.RETINANET.NUM_CLASSES = 2
    cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 50
    return cfg


CONFIGS = {
    "two-stage": small_config,
    "two classes": two_classes,
    "cascade": cascade_config,
    "retinanet": lambda: one_stage_config("RetinaNet"),
    "fcos": fcos_two_classes,
}


def images(sizes=((64, 96), (70, 50), (128, 192), (64, 96), (90, 60))):
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def trained(kind, folder):
    """A detector, its metadata, weights and config file; predictors as if trained."""
    config_file, weights = save_teacher(CONFIGS[kind](), folder, "model")
    return *build_detector(weights, config_file), weights, config_file


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    """An ONNX of any size and batch, beside the detector in PyTorch; each kind is written once."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("exported")
            model, metadata, *_ = trained(kind, folder)
            path = folder / "model.onnx"
            export(model, metadata, path, "onnx", Shape())
            made[kind] = path, TorchDetector(model, metadata)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_graph_finds_what_detectron2_finds(kind, tmp_path):
    model, metadata, *_ = trained(kind, tmp_path)
    reference = TorchDetector(model, metadata)
    metadata = metadata | {"height": None, "width": None, "batch": None}
    graph = ProgramDetector("graph", detector_graph(model), metadata)
    result = verify(reference, graph, images())
    assert result["detections"] > 20 and result["images"] == 5


@pytest.mark.parametrize("kind", ["two classes", "cascade", "retinanet", "fcos"])
def test_onnx_of_any_size_and_batch(kind, onnx_file):
    path, reference = onnx_file(kind)
    for batch_size in (1, 8):  # two of the images have one size
        exported = hkd_d2.load_detector(path, batch_size=batch_size)
        assert verify(reference, exported, images())["detections"] > 20


@pytest.mark.parametrize("form", ["torch_export", "torchscript"])
@pytest.mark.parametrize("kind", ["two classes", "fcos"])
def test_programs_of_any_size_and_batch(form, kind, tmp_path):
    model, metadata, *_ = trained(kind, tmp_path)
    path = tmp_path / f"model{SUFFIXES[form]}"
    written = export(model, metadata, path, form, Shape())
    found = {METADATA_FILE: ""}
    if form == "torch_export":
        torch.export.load(path, extra_files=found)
    else:
        torch.jit.load(str(path), _extra_files=found)
    assert json.loads(found[METADATA_FILE]) == written
    exported = hkd_d2.load_detector(path, "torch")
    assert exported.metadata == written
    if form == "torch_export":  # the coarsest map has more than one cell
        assert written["smallest"] == (65 if kind == "two classes" else 129)
        with pytest.raises(ValueError, match="takes images from 65|takes images from 129"):
            exported.detect(images(((64, 96),)))
        for each in (metadata, exported.metadata):
            each.update(min_size=130, max_size=200)
    assert verify(TorchDetector(model, metadata), exported, images())["detections"] > 20


@pytest.mark.parametrize("form", ["onnx", "torch_export"])
def test_fixed_size_and_batch(form, tmp_path):
    model, metadata, *_ = trained("two-stage", tmp_path)
    metadata["min_size"], metadata["max_size"] = 60, 90
    path = tmp_path / f"model{SUFFIXES[form]}"
    written = export(model, metadata, path, form, Shape((60, 90), 2))
    assert (written["height"], written["width"], written["batch"]) == (60, 90, 2)
    if form == "onnx":
        exported = hkd_d2.load_detector(path)
        assert exported.batch_size == 2
        assert exported.session.get_inputs()[0].shape == [2, 3, 60, 90]
    else:
        exported = hkd_d2.load_detector(path, "torch")
        assert exported.batch_size == 2
    assert len(exported.detect(images(((90, 60),)))[0]) > 5  # filled up
    three = images(((60, 90), (120, 180), (64, 96)))  # the second batch is filled up
    assert verify(TorchDetector(model, metadata), exported, three)["detections"] > 20


def test_metadata_is_in_the_file(onnx_file):
    path, reference = onnx_file("two classes")
    wanted = dict(
        reference.metadata, input_layout="NCHW uint8", height=None, width=None, batch=None
    )
    assert hkd_d2.load_detector(path).metadata == wanted
    properties = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert properties["class_names"] == '["class_0", "class_1"]'
    assert properties["input_format"] == "RGB" and properties["version"] == hkd_d2.__version__
    assert properties["pixel_mean"] == "[103.53, 116.28, 123.675]"
    graph = onnx.load(path).graph
    named = [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
    assert named == ["batch", 3, "height", "width"]
    assert [o.name for o in graph.output] == ["boxes", "scores", "classes", "counts"]


def test_rows_after_the_count_are_zero(onnx_file):
    path, reference = onnx_file("two classes")
    session = onnxruntime.InferenceSession(path)
    batch = np.stack([image.transpose(2, 0, 1) for image in images(((64, 96), (64, 96)))])
    boxes, scores, classes, counts = session.run(None, {"images": batch})
    assert boxes.shape == (2, 100, 4) and 0 < counts[0] < 100
    for values in (boxes, scores, classes):
        assert not values[0, counts[0] :].any()
    assert (scores[0, : counts[0]] > 0.3).all()


def test_no_object_is_no_detection(tmp_path):
    cfg = small_config()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 1.0
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    graph = detector_graph(model)
    with torch.no_grad():
        boxes, scores, _, counts = graph(torch.zeros(2, 3, 64, 96, dtype=torch.uint8))
    assert counts.tolist() == [0, 0] and not boxes.any() and not scores.any()


def test_a_changed_weight_is_found(onnx_file, tmp_path):
    path, _ = onnx_file("two classes")
    model, metadata, *_ = trained("two classes", tmp_path)
    with torch.no_grad():
        model.roi_heads.box_predictor.bbox_pred.bias += 0.02
    with pytest.raises(ValueError, match=r"^Image 0: detection \d+ .*"):
        verify(TorchDetector(model, metadata), hkd_d2.load_detector(path), images())


def test_thresholds_of_a_file(onnx_file):
    path, reference = onnx_file("two classes")
    every = reference.detect(images())
    middle = float(np.median(every[0].scores))
    high = hkd_d2.load_detector(path, score_threshold=middle).detect(images())
    assert [len(x) for x in high] == [len(x.above(middle)) for x in every]
    with pytest.raises(ValueError, match="exported with the score threshold 0.3"):
        hkd_d2.load_detector(path, score_threshold=0.1)
    with pytest.raises(ValueError, match="nms_threshold is fixed"):
        hkd_d2.load_detector(path, nms_threshold=0.5)


def test_what_is_no_export(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no protocol buffer")
    with pytest.raises(ValueError, match="cannot be read as ONNX"):
        hkd_d2.load_detector(path)
    node = onnx.helper.make_node("Identity", ["images"], ["boxes"])
    value = [onnx.helper.make_tensor_value_info(n, 1, [1, 3, 8, 8]) for n in ("images", "boxes")]
    graph = onnx.helper.make_graph([node], "g", value[:1], value[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.save(model, path)
    with pytest.raises(ValueError, match="does not say how it wants its images"):
        hkd_d2.load_detector(path)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A TorchScript file, which is quicker to write, beside the detector in PyTorch."""
    folder = tmp_path_factory.mktemp("program")
    model, metadata, *_ = trained("two classes", folder)
    export(model, metadata, folder / "model.ts", "torchscript", Shape())
    return folder / "model.ts", TorchDetector(model, metadata)


@rule("A program runs only when it is asked for, and one of another's making is refused unread")
def test_a_program_runs_for_those_who_ask_for_it(program):
    path, reference = program
    with pytest.raises(ValueError, match="is a program, which may do anything; take an .onnx"):
        hkd_d2.load_detector(path)
    middle = float(np.median(reference.detect(images())[0].scores))
    high = hkd_d2.load_detector(path, "torch", score_threshold=middle)
    assert high.metadata["score_threshold"] == middle
    wanted = [len(x.above(middle)) for x in reference.detect(images())]
    assert [len(x) for x in high.detect(images())] == wanted and max(wanted) > 5
    for options, sentence in (
        ({"score_threshold": 0.1}, "exported with the score threshold 0.3"),
        ({"nms_threshold": 0.5}, "nms_threshold is fixed"),
        ({"class_names": ["a", "b"]}, "class_names is fixed"),
        ({"threads": 1}, "threads is for .onnx files"),
        ({"device": "cuda"}, "runs on the CPU; use 'cpu'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            hkd_d2.load_detector(path, "torch", **options)


@rule("A program runs only when it is asked for, and one of another's making is refused unread")
@pytest.mark.parametrize("suffix", [".pt2", ".ts"])
def test_no_program_of_ours_is_not_run(program, tmp_path, suffix, monkeypatch):
    def run(*arguments, **options):
        pytest.fail("the file was run")  # no Exception, which would be told as damage

    monkeypatch.setattr(torch.jit, "load", run)
    monkeypatch.setattr(torch.export, "load", run)
    whole, path = program[0].read_bytes(), tmp_path / f"model{suffix}"
    weights = whole.index(b"data/5") + 200  # inside a tensor
    for content in (
        b"no archive",
        whole[:-3000],
        whole[:weights] + bytes([whole[weights] ^ 255]) + whole[weights + 1 :],
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read as a program of PyTorch \(.*\); exp"):
            hkd_d2.load_detector(path, "torch")
    for name, text in (("other.json", "{}"), (METADATA_FILE, "[]"), (METADATA_FILE, '{"a": 1}')):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"model/extra/{name}", text)
        with pytest.raises(ValueError, match="does not say how it wants its images"):
            hkd_d2.load_detector(path, "torch")


@pytest.mark.parametrize("suffix", [".pt2", ".ts"])
def test_an_archive_that_is_no_program(program, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    with zipfile.ZipFile(program[0]) as whole, zipfile.ZipFile(path, "w") as archive:
        name = next(n for n in whole.namelist() if n.endswith(METADATA_FILE))
        archive.writestr(name, whole.read(name))
    with pytest.raises(ValueError, match="cannot be read as a program of PyTorch") as error:
        hkd_d2.load_detector(path, "torch")
    assert "\n" not in str(error.value)


def test_several_threads(onnx_file):
    from concurrent.futures import ThreadPoolExecutor

    detector = hkd_d2.load_detector(onnx_file("two classes")[0], threads=1)
    alone = [detector.detect([image])[0] for image in images()]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: detector.detect([images()[i % 5]])[0], range(20)))
    for i, one in enumerate(found):
        np.testing.assert_array_equal(one.boxes, alone[i % 5].boxes)


def test_an_onnx_file_needs_neither_torch_nor_detectron2(onnx_file):
    path, reference = onnx_file("two classes")
    code = (
        "import sys; sys.modules.update(torch=None, torchvision=None, detectron2=None)\n"
        "import numpy, hkd_d2\n"
        f"detector = hkd_d2.load_detector({str(path)!r})\n"
        "image = numpy.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=numpy.uint8)\n"
        "print(len(detector.detect([image])[0]))"
    )
    assert int(run_code(code).stdout) == len(reference.detect(images()[:1])[0])


@pytest.mark.parametrize("kind", ["two classes", "retinanet"])
def test_no_cap_on_the_detections(kind, tmp_path):
    """Detectron2's word for all is a negative number, in two-stage detectors alone."""
    model, metadata, *_ = trained(kind, tmp_path)
    metadata["max_detections"] = -1
    if kind == "retinanet":
        model.max_detections_per_image = -1
        with pytest.raises(ValueError, match="TEST.DETECTIONS_PER_IMAGE is -1"):
            detector_graph(model)
        return
    model.roi_heads.box_predictor.test_topk_per_image = -1
    model.roi_heads.box_predictor.test_score_thresh = metadata["score_threshold"] = 0.0
    export(model, metadata, tmp_path / "model.ts", "torchscript", Shape())
    exported = hkd_d2.load_detector(tmp_path / "model.ts", "torch")
    found = verify(TorchDetector(model, metadata), exported, images())
    assert found["detections"] > 30 * 5  # more than there are proposals: both classes of each


@pytest.mark.parametrize(
    "key, part, name",
    [
        ("MODEL.RPN.PRE_NMS_TOPK_TEST", "proposal_generator", "pre_nms_topk"),
        ("MODEL.RPN.POST_NMS_TOPK_TEST", "proposal_generator", "post_nms_topk"),
    ],
)
def test_numbers_that_a_file_cannot_have(key, part, name, tmp_path):
    model, *_ = trained("two-stage", tmp_path)
    getattr(getattr(model, part), name)[False] = 0
    with pytest.raises(ValueError, match=f"{key} is 0"):
        detector_graph(model)


@pytest.mark.parametrize("form", ["onnx", "torch_export", "torchscript"])
def test_what_cannot_be_traced_is_one_sentence(form, tmp_path):
    model, metadata, *_ = trained("two-stage", tmp_path)

    def forward(images):
        raise RuntimeError("no such operator\nand a long story")

    model.backbone.forward = forward
    with pytest.raises(ValueError, match=f"cannot be written as {form}") as refused:
        export(model, metadata, tmp_path / "x", form, Shape())
    assert "\n" not in str(refused.value) and not (tmp_path / "x").exists()


def test_parts_without_a_counterpart_are_refused():
    cfg = small_config()
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIPool"
    with pytest.raises(ValueError, match="pooler is a RoIPool and export knows ROIAlign"):
        detector_graph(build_model(cfg))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["student_citypersons", "student_mobilenetv3_citypersons"])
def test_the_large_configs_leave_as_onnx(name, tmp_path):
    """At half of their resolution, with random weights."""
    cfg = get_cfg()
    add_hkd_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / f"{name}.yaml"))
    cfg.MODEL.DEVICE, cfg.HKD.BACKBONE.PRETRAINED, cfg.MODEL.WEIGHTS = "cpu", False, ""
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 512, 1024
    torch.manual_seed(11)
    model = build_model(cfg).eval().requires_grad_(False)
    for parameter in model.roi_heads.box_predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.03)
    metadata = describe(cfg, model)
    export(model, metadata, tmp_path / "model.onnx", "onnx", Shape())
    exported = hkd_d2.load_detector(tmp_path / "model.onnx")
    result = verify(TorchDetector(model, metadata), exported, images(((512, 1024), (400, 640))))
    assert result["detections"] > 20
