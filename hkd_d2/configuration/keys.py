"""Every configuration key that hkd_d2 adds to Detectron2's.

The comment above an assignment describes its key. Terms bring keys of their own: each class's
``add_config`` stands in its file, inside the package or outside.
"""

import hkd_d2._requirements  # noqa: F401  isort: skip

from pathlib import Path

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from hkd_d2.configuration.merge import merge_section, read_config_file
from hkd_d2.distillation import add_term_configs


def default_config() -> CN:
    """Detectron2's defaults with this package's."""
    cfg = get_cfg()
    add_hkd_config(cfg)
    return cfg


def load_mentioned_config(file: str | Path) -> CN:
    """Read a config file that the user did not name, but another file or a folder did.

    Examples are a teacher's config and the config.yaml next to a checkpoint. Nothing is imported
    for them.

    Raises:
        FileNotFoundError: the file or one of its bases does not exist.
        OSError: a file cannot be read.
        ValueError: a mistake in the file, or a module under ``HKD.IMPORTS``.
    """
    cfg = default_config()
    merge_section(cfg, read_config_file(file), file)
    return cfg


def add_hkd_config(cfg: CN) -> None:
    """Add the ``HKD`` node, with its defaults, to ``cfg`` in place.

    Changes one default of Detectron2: ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` becomes False.

    Args:
        cfg: a config from :func:`detectron2.config.get_cfg`.

    Raises:
        ValueError: a term's name is that of another node.
    """
    # Images without pedestrians are training images too: they teach what is background.
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False

    cfg.HKD = CN()
    _add_common(cfg)
    _add_student(cfg)
    _add_teacher(cfg)
    _add_fcos(cfg)
    _add_backbone(cfg)
    _add_pretraining(cfg)
    _add_data(cfg)
    _add_evaluation(cfg)
    _add_solver(cfg)
    add_term_configs(cfg.HKD)


def _add_common(cfg: CN) -> None:
    node = cfg.HKD
    # Modules to import before the rest of the config is read, such as [my_team.my_term]: they may
    # register terms, data sets and detectors. Only the file named by --config-file and the command
    # line may set it; it is refused in bases, teachers' and exported configs.
    node.IMPORTS = []
    # Terms to distil with, by registered name and in this order; [] trains the student alone.
    node.TERMS = []
    # Log every loss's share of the gradient norm at the student's FPN maps once in this many
    # iterations; such an iteration runs the heads' backward pass once more a loss. 0: never.
    node.GRADIENT_SHARE_PERIOD = 0
    # How both networks pool boxes in training: fused (hkd_d2.ops.multilevel_roi_align) |
    # torchvision (Detectron2's own pooler, for poolers other than ROIAlignV2 and for comparing with
    # plain Detectron2 bit for bit). Inference always runs Detectron2's.
    node.POOLER = "fused"
    # Run both networks in torch.channels_last in training, which is faster on a CPU; False for the
    # bits of plain Detectron2. Parameters and checkpoints keep their format.
    node.CHANNELS_LAST = True


def _add_student(cfg: CN) -> None:
    node = cfg.HKD.STUDENT = CN()
    # Detectron2 meta-architecture of the student: GeneralizedRCNN, RetinaNet, FCOS, or, with ignore
    # regions, IgnoreAwareRetinaNet, IgnoreAwareFCOS.
    node.META_ARCHITECTURE = "GeneralizedRCNN"
    # Factors on the student's own losses, by name, for example {loss_cls: 0.5}; 1 for the others.
    node.LOSS_WEIGHTS = CN(new_allowed=True)
    # Train the student under INT8's rounding (hkd_d2/modeling/fake_quantization.py): fine-tuning
    # before hkd quantize, where quantisation alone costs miss rate.
    node.FAKE_QUANTIZATION = False


def _add_teacher(cfg: CN) -> None:
    node = cfg.HKD.TEACHER = CN()
    # The teacher's own config file. It is looked for next to the config file that names it, then
    # in the working directory, then among the configs of the package.
    node.CONFIG_FILE = ""
    # The teacher's checkpoint; replaces MODEL.WEIGHTS of the teacher's config file.
    node.WEIGHTS = ""
    # Precision of the teacher's forward pass: fp32 | fp16 | bf16.
    node.PRECISION = "fp32"
    # For each student class the index of the teacher's class that means the same, for example [0]
    # for a pedestrian student under a COCO teacher. [] says that the class lists are the same.
    node.CLASS_MAP = []


def _add_fcos(cfg: CN) -> None:
    node = cfg.HKD.FCOS = CN()
    # Half the side, in strides, of the square about an object's centre whose points are positive.
    # The other settings of FCOS are those of MODEL.RETINANET.
    node.CENTER_SAMPLING_RADIUS = 1.5


def _add_backbone(cfg: CN) -> None:
    node = cfg.HKD.BACKBONE = CN()
    # Slim ResNets: factor on every channel count of the stem and the stages, rounded to a multiple
    # of 8.
    node.WIDTH_MULTIPLIER = 1.0
    # Blocks of the four stages; [] for those of MODEL.RESNETS.DEPTH.
    node.BLOCKS = []
    # Library bodies: torchvision/<model> or timm/<model>; MODEL.RESNETS.NORM (BN, SyncBN or
    # FrozenBN) says what becomes of their batch norms.
    node.BODY = "torchvision/mobilenet_v3_large"
    # Initialise the body with the library's ImageNet weights (needs a network or the library's
    # cache) where MODEL.WEIGHTS is empty. A slim ResNet is cut from the full-width one of its depth
    # by channel slices.
    node.PRETRAINED = False


def _add_pretraining(cfg: CN) -> None:
    node = cfg.HKD.PRETRAINING = CN()
    # How hkd pretrain trains: hsakd | kd (teacher, then student) | hssakd (two peers,
    # each from the other) | labels (the student alone).
    node.METHOD = "hsakd"
    # Teacher or peer: resnet18, resnet34, resnet50, with -0.5 for half the width, or wrn-40-2.
    node.TEACHER = "resnet34"
    # Student, named as TEACHER.
    node.STUDENT = "resnet18"
    # joint (body and branches at once) | frozen (the body first, then the branches on it).
    node.TEACHER_TRAINING = "joint"
    # Images: folder (train and val, one folder a class in each) | cifar10 | cifar100.
    node.DATASET = "folder"
    # Where they are; nothing is downloaded.
    node.ROOT = ""
    # Side length, pixels; images are squares, so that their turns fit into one batch.
    node.IMAGE_SIZE = 224
    # Images a step; each is seen in its four turns.
    node.BATCH_SIZE = 256
    # Passes over the images of every training: the teacher's, its branches' and the student's.
    node.EPOCHS = 100
    # Learning rate.
    node.LR = 0.1
    # Epochs after which it is a tenth of what it was.
    node.DROPS = [30, 60, 90]
    # Weight decay of every parameter.
    node.WEIGHT_DECAY = 1e-4


def _add_data(cfg: CN) -> None:
    node = cfg.HKD.DATA = CN()
    # Data sets to register, one list each: [name, "coco", annotation file, image root], or [name,
    # format, root, split] with a format and a split of docs/data.md, as "citypersons" and "val".
    node.REGISTER = []
    # Pedestrians under this height (pixels of the original image) are ignored in training.
    node.MIN_HEIGHT = 50
    # Pedestrians with a smaller visible share are ignored in training.
    node.MIN_VISIBILITY = 0.0
    # Share of the images of each training set whose labels are used, the same ones in every run;
    # the others are not trained on, unless they have pseudo-labels.
    node.LABELED_SHARE = 1.0
    # Files of pseudo-labels, written by hkd label, to train on in addition to labelled images.
    node.PSEUDO = []
    # Pseudo-labelled images for each labelled image, in every batch.
    node.PSEUDO_RATIO = 1.0


def _add_evaluation(cfg: CN) -> None:
    node = cfg.HKD.EVALUATION = CN()
    # Whose rules score: citypersons | caltech | caltech_new | caltech_new_no_border | eurocity |
    # eurocity_ignore_riders | kaist | crowdhuman.
    node.PROTOCOL = "citypersons"
    # Recall at a reference point that the curve never reaches: official (the published code's
    # wrap-around to the last operating point) | matlab (0). "": the protocol's.
    node.MISSING_POINT = ""
    # Of resized images: their height over that of the benchmark's, by which the setups' heights
    # are multiplied.
    node.HEIGHT_SCALE = 1.0
    # Evaluate the teacher too wherever the student is evaluated: with --eval-only, every
    # TEST.EVAL_PERIOD iterations, and when training ends.
    node.TEACHER = False


def _add_solver(cfg: CN) -> None:
    node = cfg.HKD.SOLVER = CN()
    # Optimizer: sgd (Detectron2's) | adamw.
    node.OPTIMIZER = "sgd"
    # Checkpoints of single iterations that stay, the last ones, beside model_final.pth; 0: all.
    node.KEEP_CHECKPOINTS = 3
