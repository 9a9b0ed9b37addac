"""A small folder of everything that the commands read, and the command lines that read it."""

import io
import json
import random
from pathlib import Path

import numpy as np
import onnx
import scipy.io
import torch
from detectron2.config import CfgNode

from helpers.mutations import mutate_annotations, mutate_config, mutate_picture
from helpers.pseudo_labelled import pseudo_labels_of, write_images
from helpers.red_detector import write_video
from helpers.small_datasets import SAMPLES, write_vbb
from helpers.small_detectors import one_stage_config, save_teacher, small_config
from hkd_d2.config import default_config
from hkd_d2.data.pseudo_labels import file_sha256
from hkd_d2.export.formats import Shape, export
from hkd_d2.export.weights import save_safetensors
from hkd_d2.inference.torch_backend import build_detector

DATA = "coco gt.json images"
PICTURES = "images/**/*.png"
PLAIN = "--model plain/model.pth"
# By group: command lines, and patterns of the files that they read, both parted by blanks and
# relative to the folder that write_site makes.
DOORS = {
    "score": [
        ("score gt.json found.json", "gt.json found.json"),
        ("score gt.json found --protocol caltech_new", "gt.json found/set06/V000.txt"),
        ("score gt-All.mat dt-mine.mat --protocol caltech", "gt-All.mat dt-mine.mat"),
        ("score gt.json found.txt --protocol kaist", "gt.json found.txt"),
        ("score gt.json found.odgt --protocol crowdhuman", "gt.json found.odgt"),
        (
            "score caltech_old found_old --protocol caltech",
            "caltech_old/annotations/*/*.vbb found_old/*/*.txt",
        ),
        (
            "analyze gt.json found.json --images images --out new/page.html",
            f"gt.json found.json {PICTURES}",
        ),
    ],
    "data": [
        *(
            (f"data {does} {form} sets/{form} {split}{out}", f"sets/{form}/**/*.*")
            for form, (_, split) in SAMPLES.items()
            for does, out in (("check", ""), ("view", " --out new.png"))
        ),
        (
            f"data view {DATA} --out new.png --config-file train.yaml",
            f"gt.json {PICTURES} train.yaml",
        ),
        ("data split gt.json --by-folder seq --out new.json", "gt.json"),
        (f"data crop --out new --background 0 --train {DATA} --val {DATA}", f"gt.json {PICTURES}"),
        (
            "data crop --out new --background 0 --config-file train.yaml",
            f"gt.json {PICTURES} train.yaml",
        ),
    ],
    "detect": [
        (f"detect {PLAIN} --out new images video.mp4", f"plain/* {PICTURES} video.mp4"),
        ("detect --model model.onnx --out new images", f"model.onnx {PICTURES}"),
        ("detect --model model.ts --out new images", "model.ts"),
        (f"label {PLAIN} --images images --out new.json", f"plain/* {PICTURES}"),
        (f"label {PLAIN} --data {DATA} --out new.json", f"plain/* gt.json {PICTURES}"),
        (f"evaluate {PLAIN} --data {DATA} --out new", f"plain/* gt.json {PICTURES}"),
        (f"export {PLAIN} --format safetensors --out new", "plain/*"),
        (
            "export --model model.safetensors --config-file plain/config.yaml --images images "
            "--format safetensors --out new",
            f"model.safetensors {PICTURES}",
        ),
        (f"serve {PLAIN} --port 0", "plain/*"),
        ("count plain/config.yaml", "plain/config.yaml"),
    ],
    "train": [
        (
            "train --config-file train.yaml --out new",
            f"train.yaml teacher/* gt.json {PICTURES} pseudo.json pseudo/*.png",
        ),
        ("train --config-file train.yaml --out new", "train.yaml teacher/*"),
        (
            "train --config-file plain.yaml --out new MODEL.WEIGHTS plain/model.pth",
            f"plain.yaml plain/model.pth gt.json {PICTURES}",
        ),
        (
            "train --config-file plain.yaml --out run --resume SOLVER.MAX_ITER 2",
            "run/model_final.pth run/last_checkpoint",
        ),
        ("pretrain --config-file pretrain.yaml --out new", "pretrain.yaml crops/**/*.png"),
        ("count train.yaml", "train.yaml"),
    ],
    "quantize": [
        (
            f"quantize --model model.onnx --calibration {DATA} --images 2 --min-sqnr 0",
            f"model.onnx gt.json {PICTURES}",
        ),
        (
            f"benchmark {PLAIN} --model exported=model.onnx --data {DATA} --rounds 1 --batches 1 "
            "--out new",
            f"plain/* model.onnx gt.json {PICTURES}",
        ),
    ],
}


def write_site(root: Path) -> Path:
    """Write the folder, in which every command line of :data:`DOORS` ends well; returns it."""
    _write_ground_truth(root)
    _write_results(root)
    for form, (write, _) in SAMPLES.items():
        write(root / "sets" / form)
    write_video(root / "video.mp4", frames=3)
    for part in ("train", "val"):
        for name in ("background", "pedestrian"):
            write_images(root / "crops" / part / name, 2)
    _write_detectors(root)
    teacher = file_sha256(str(root / "teacher/teacher.pth"))
    content = json.dumps(pseudo_labels_of(write_images(root / "pseudo", 2), sha256=teacher))
    (root / "pseudo.json").write_text(content.replace(f"{root}/", ""))
    return root


def _write_ground_truth(root):
    images, rows = [], []
    for i, record in enumerate(write_images(root / "images" / "seq", 4)):
        name = f"seq/set06_V000_I{30 * i + 29:05d}.png"
        Path(record["file_name"]).rename(root / "images" / name)
        images.append({"id": i + 1, "file_name": name, "height": 64, "width": 96})
        row = {"image_id": i + 1, "category_id": 1, "iscrowd": 0, "ignore": 0, "vis_ratio": 0.75}
        row |= {"occlusion": 0, "bbox": [8, 6, 20.5, 56], "height": 56, "vis_bbox": [8, 6, 20, 42]}
        rows.append(row | {"id": 2 * i + 1})
        rows.append(row | {"id": 2 * i + 2, "bbox": [60, 4, 20, 50], "ignore": 1})
    categories = [{"id": 1, "name": "pedestrian"}]
    content = {"images": images, "annotations": rows, "categories": categories}
    (root / "gt.json").write_text(json.dumps(content))
    _write_cells(root / "gt-All.mat", "gt", [[9, 7, 20.5, 56, 0], [61, 5, 20, 50, 1]])
    for number in range(6, 11):
        person = {30: [(1, [20, 30, 30, 60], [0, 0, 0, 0])]}
        path = root / f"caltech_old/annotations/set{number:02d}/V000.vbb"
        write_vbb(path, 30, ["person"], person)


def _write_results(root):
    """The same detections in every form, and those of the frames of caltech_old."""
    boxes = [([8, 6, 20.5, 56], 0.9), ([30, 4, 20, 52], 0.4)]
    rows = [
        {"image_id": i, "category_id": 1, "bbox": box, "score": score}
        for i in range(1, 5)
        for box, score in boxes
    ]
    (root / "found.json").write_text(json.dumps(rows))
    lines = [(r["image_id"], *r["bbox"], r["score"]) for r in rows]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    (root / "found.txt").write_text(text)
    (root / "found/set06").mkdir(parents=True)
    frames = ((30 * i, *values) for i, *values in lines)
    text = "".join(",".join(map(str, line)) + "\n" for line in frames)
    (root / "found/set06/V000.txt").write_text(text)
    for number in range(6, 11):
        path = root / f"found_old/set{number:02d}/V000.txt"
        path.parent.mkdir(parents=True)
        path.write_text("30,20,30,30,60,0.9\n")
    image = {"width": 96, "height": 64, "dtboxes": [{"box": b, "score": s} for b, s in boxes]}
    named = [image | {"ID": f"set06_V000_I{30 * i + 29:05d}"} for i in range(4)]
    (root / "found.odgt").write_text("".join(json.dumps(line) + "\n" for line in named))
    _write_cells(root / "dt-mine.mat", "dt", [[9, 7, 20.5, 56, 0.9]])


def _write_cells(path, variable, rows):
    cells = np.empty((1, 4), dtype=object)
    cells[0, :] = [np.array(rows, dtype=float) for _ in range(4)]
    scipy.io.savemat(path, {variable: cells})


def _write_detectors(root):
    plain = one_stage_config("IgnoreAwareRetinaNet")
    _use_data(plain)
    (root / "plain").mkdir()
    config, _ = save_teacher(plain, root / "plain", "model")
    Path(config).unlink()
    _write_config(root / "plain.yaml", plain)
    _write_config(root / "plain/config.yaml", plain)
    teacher = small_config(channels=24, hidden=32)
    (root / "teacher").mkdir()
    config, _ = save_teacher(teacher, root / "teacher", "teacher")
    _write_config(Path(config), teacher)
    train = small_config()
    _use_data(train)
    train.MODEL.PROPOSAL_GENERATOR.NAME = "IgnoreAwareRPN"
    train.MODEL.ROI_HEADS.NAME = "IgnoreAwareROIHeads"
    train.MODEL.META_ARCHITECTURE = "HKDDetector"
    train.HKD.TERMS = ["pyramid", "region", "logit"]
    train.HKD.TEACHER.CONFIG_FILE = "teacher/teacher.yaml"
    train.HKD.TEACHER.WEIGHTS = "teacher/teacher.pth"
    train.HKD.DATA.PSEUDO = ["pseudo.json"]
    _write_config(root / "train.yaml", train)
    pretrain = default_config()
    pretrain.MODEL.DEVICE = "cpu"
    pretrain.DATALOADER.NUM_WORKERS = 0
    node = pretrain.HKD.PRETRAINING
    node.TEACHER, node.STUDENT, node.ROOT = "resnet18-0.25", "resnet18-0.25", "crops"
    node.IMAGE_SIZE, node.BATCH_SIZE, node.EPOCHS, node.DROPS = 32, 2, 1, []
    _write_config(root / "pretrain.yaml", pretrain)
    model, metadata = build_detector(root / "plain/model.pth", class_names=["pedestrian"])
    for form, suffix in (("onnx", "onnx"), ("torchscript", "ts")):
        export(model, metadata, root / f"model.{suffix}", form, Shape((64, 96)))
    save_safetensors(model, metadata, root / "model.safetensors")


def _use_data(cfg):
    cfg.HKD.DATA.REGISTER = [["mine", "coco", "gt.json", "images"]]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("mine",)
    cfg.SOLVER.MAX_ITER = 1


def _write_config(path, cfg):
    """Only what differs from the defaults, so that a change meets a value that counts."""
    found = {"VERSION": 2} | _differing(cfg, default_config())
    path.write_text(CfgNode(found).dump())


def _differing(cfg, default):
    found = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            if inner := _differing(value, default[key]):
                found[key] = inner
        elif value != default[key]:
            found[key] = list(value) if isinstance(value, tuple) else value
    return found


def mutate_file(path: Path, rng: random.Random) -> None:
    """Change a file at random, by the kind that its suffix tells."""
    content = path.read_bytes()
    if path.suffix == ".yaml":
        content = mutate_config(content, rng)
    elif path.suffix in (".pth", ".onnx") and rng.random() < 0.6:
        content = (_mutate_checkpoint if path.suffix == ".pth" else _mutate_onnx)(content, rng)
    elif path.suffix in (".png", ".jpg", ".mp4", ".pth", ".onnx", ".ts", ".safetensors"):
        content = mutate_picture(content, np.random.default_rng(rng.randrange(2**32)))
    else:
        content = mutate_annotations(content, rng)
    path.write_bytes(content)


STRANGE = (
    *(None, True, -1, 10**30, float("nan"), "text", [], {}, (1,), torch.tensor(1), b"\xff"),
    *({"model": 3}, torch.zeros(0), torch.zeros(3, 3), torch.tensor([1j]), "\ud800", 2.5),
    *(torch.tensor([float("nan")]), torch.eye(3).to_sparse(), torch.zeros(2, dtype=torch.bool)),
)


def _mutate_checkpoint(content, rng):
    """A whole file of PyTorch with another value somewhere in it."""
    tree = torch.load(io.BytesIO(content), weights_only=True)
    node = tree
    while True:
        keys = range(len(node)) if isinstance(node, list) else sorted(node, key=str)
        if not keys:
            break
        key = rng.choice(keys)
        inner = node[key]
        if isinstance(inner, (dict, list)) and len(inner) and rng.random() < 0.8:
            node = inner
            continue
        kind = rng.randrange(5)
        if kind == 0 and isinstance(inner, torch.Tensor) and inner.is_floating_point():
            node[key] = inner.clone()
            node[key].view(-1)[:1] = rng.choice((float("nan"), float("inf"), 1e30))
        elif kind == 1 and isinstance(inner, torch.Tensor):
            to = (torch.float64, torch.float16, torch.int64, torch.complex64, torch.bool)
            node[key] = inner.to(rng.choice(to))
        elif kind == 2 and isinstance(inner, torch.Tensor):
            node[key] = rng.choice((inner[None], inner.flatten(), inner[..., :0], inner.T))
        elif kind == 3 and isinstance(node, dict):
            node[rng.choice((f"{key}x", 3, "", "model", "a.b.c", "\n"))] = node.pop(key)
        else:
            node[key] = rng.choice(STRANGE)
        break
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


METADATA = ("", "null", "3", "-1", "0", "[]", '["a"]', "[1e999]", "{}", '"x"', "NaN", "[" * 9999)


def _mutate_onnx(content, rng):
    """A whole ONNX file with other metadata, another name, weight or connection."""
    model = onnx.load_from_string(content)
    graph, kind = model.graph, rng.randrange(5)
    if kind <= 1:
        entry = rng.choice(model.metadata_props)
        if rng.random() < 0.2:
            model.metadata_props.remove(entry)
        else:
            entry.value = rng.choice(METADATA)
    elif kind == 2:
        weight = rng.choice(graph.initializer)
        weight.raw_data = mutate_picture(weight.raw_data, np.random.default_rng(rng.randrange(99)))
    elif kind == 3:
        node = rng.choice(graph.node)
        node.op_type = rng.choice(("Identity", "Relu", "Nothing", "Add", "Shape"))
    else:
        value = rng.choice([*graph.input, *graph.output])
        value.name = rng.choice(("images", "x", "boxes", ""))
    return model.SerializeToString()
