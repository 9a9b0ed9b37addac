"""Every configuration key that hkd_d2 adds to Detectron2's, and the registrations they need.

Importing this module registers the meta-architecture, the backbones, the ignore-aware heads, the
distillation terms and the built-in datasets, so a tool needs nothing but::

    from detectron2.config import get_cfg
    from hkd_d2.config import add_hkd_config

    cfg = get_cfg()
    add_hkd_config(cfg)
    cfg.merge_from_file("configs/hkd_citypersons.yaml")
"""

import hkd_d2._requirements  # noqa: F401  isort: skip
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from hkd_d2.config_files import find_config


def load_config(file: str | Path, options: Sequence = ()) -> CN:
    """Read a config file that the user names.

    Args:
        file: YAML, with a ``_BASE_`` or without; see :func:`find_config` for where it may lie.
        options: keys and values by turns, applied last.

    Returns:
        Detectron2's defaults, this package's, the file's values and the options.

    Raises:
        FileNotFoundError: there is no such file.
    """
    file = find_config(file)
    cfg = get_cfg()
    add_hkd_config(cfg)
    cfg.merge_from_file(str(file))
    cfg.merge_from_list(list(options))
    return cfg


def student_config(cfg: CN) -> CN:
    """The student alone: a copy of ``cfg`` without teacher and terms' meta-architecture.

    A config of a plain detector comes back as it is, as a copy.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.META_ARCHITECTURE == "HKDDetector":
        cfg.MODEL.META_ARCHITECTURE = cfg.HKD.STUDENT.META_ARCHITECTURE
    return cfg


def add_hkd_config(cfg: CN) -> None:
    """Add the ``HKD`` node, with its defaults, to ``cfg`` in place.

    Changes one default of Detectron2: ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` becomes False.

    Args:
        cfg (CfgNode): a config from :func:`detectron2.config.get_cfg`.
    """
    # Images without pedestrians are training images too: they teach what is background.
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False

    cfg.HKD = CN()

    # Terms to distil with, by registered name and in this order; [] trains the student alone.
    cfg.HKD.TERMS = []
    # Log every loss's share of the gradient norm at the student's FPN maps once in this many
    # iterations; such an iteration runs the heads' backward pass once more a loss. 0: never.
    cfg.HKD.GRADIENT_SHARE_PERIOD = 0
    # How both networks pool boxes in training: fused (hkd_d2.ops.multilevel_roi_align) |
    # torchvision (Detectron2's own pooler, for poolers other than ROIAlignV2 and for comparing with
    # plain Detectron2 bit for bit). Inference always runs Detectron2's.
    cfg.HKD.POOLER = "fused"
    # Run both networks in torch.channels_last in training, which is faster on a CPU; False for the
    # bits of plain Detectron2. Parameters and checkpoints keep their format.
    cfg.HKD.CHANNELS_LAST = True

    # ------------------------------------------------------------------ student
    cfg.HKD.STUDENT = CN()
    # Detectron2 meta-architecture of the student: GeneralizedRCNN, RetinaNet, FCOS, or, with ignore
    # regions, IgnoreAwareRetinaNet, IgnoreAwareFCOS.
    cfg.HKD.STUDENT.META_ARCHITECTURE = "GeneralizedRCNN"
    # Factors on the student's own losses, by name, for example {loss_cls: 0.5}; 1 for the others.
    cfg.HKD.STUDENT.LOSS_WEIGHTS = CN(new_allowed=True)
    # Train the student under INT8's rounding (hkd_d2/modeling/fake_quantization.py): fine-tuning
    # before hkd quantize, where quantisation alone costs miss rate.
    cfg.HKD.STUDENT.FAKE_QUANTIZATION = False

    # ------------------------------------------------------------------ teacher
    cfg.HKD.TEACHER = CN()
    # The teacher's own config file. tools/train_net.py looks beside the config file that names it
    # first; then the working directory counts, then configs/ of this repository.
    cfg.HKD.TEACHER.CONFIG_FILE = ""
    # The teacher's checkpoint; replaces MODEL.WEIGHTS of the teacher's config file.
    cfg.HKD.TEACHER.WEIGHTS = ""
    # Precision of the teacher's forward pass: fp32 | fp16 | bf16.
    cfg.HKD.TEACHER.PRECISION = "fp32"
    # For each student class the index of the teacher's class that means the same, for example [0]
    # for a pedestrian student under a COCO teacher. [] says that the class lists are the same.
    cfg.HKD.TEACHER.CLASS_MAP = []

    # ------------------------------------------------------------------ FCOS
    cfg.HKD.FCOS = CN()
    # Half the side, in strides, of the square about an object's centre whose points are positive.
    # The other settings of FCOS are those of MODEL.RETINANET.
    cfg.HKD.FCOS.CENTER_SAMPLING_RADIUS = 1.5

    # ------------------------------------------------------------------ pyramid term
    cfg.HKD.PYRAMID = CN()
    # Weight of the term.
    cfg.HKD.PYRAMID.WEIGHT = 0.5
    # Student's FPN levels that are distilled; the teacher's are found by stride.
    cfg.HKD.PYRAMID.LEVELS = ["p2", "p3", "p4", "p5"]
    # Distance of two feature vectors: mse | l1 | smooth_l1 | cosine, or of two whole maps: pkd
    # (correlation of the channels) | cwd (divergence of each channel's softmax over the cells).
    cfg.HKD.PYRAMID.DISTANCE = "mse"
    # Temperature of cwd.
    cfg.HKD.PYRAMID.TEMPERATURE = 1.0
    # Cells that count: none (the whole map) | boxes (cells under ground truth) | split (both, in
    # one weighted mean) | decoupled (both, each in a mean of its own; DeFeat). Cells under ignore
    # boxes count only where MASK is none.
    cfg.HKD.PYRAMID.MASK = "none"
    # Weight of the cells under the boxes where MASK is split or decoupled.
    cfg.HKD.PYRAMID.FOREGROUND_WEIGHT = 1.0
    # Weight of the cells outside the boxes where MASK is split or decoupled.
    cfg.HKD.PYRAMID.BACKGROUND_WEIGHT = 0.25
    # Which cells a box covers: cells (all that it touches) | defeat (as DeFeat rounds it) | fgfi
    # (those with an anchor close to it).
    cfg.HKD.PYRAMID.RASTERIZE = "cells"
    # Of fgfi: an anchor is close if its IoU with the box is above this share of the best anchor's.
    cfg.HKD.PYRAMID.ANCHOR_THRESHOLD = 0.5
    # Divide a level's distance by a statistic of the teacher's map: none | teacher_variance.
    cfg.HKD.PYRAMID.NORMALIZE = "none"
    # What is summed over what: mean (over counted elements, then over levels) | half_mean (half of
    # it; DeFeat) | cells (half the sum over channels, mean over counted cells and levels; FGFI) |
    # level_sum (the sum of the levels' means; PKD, CWD).
    cfg.HKD.PYRAMID.REDUCTION = "mean"
    # Adapters: 1x1, auto (where channel counts differ) | always; or on the whole map conv3x3
    # (DeFeat) | conv3x3_relu (FGFI).
    cfg.HKD.PYRAMID.ADAPTER = "auto"

    # ------------------------------------------------------------------ region term
    cfg.HKD.REGION = CN()
    # Weight of the term.
    cfg.HKD.REGION.WEIGHT = 30.0
    # Boxes that both networks pool on: sampled (a two-stage student's sampled proposals) | teacher
    # (the teacher's proposals, or a one-stage teacher's detections) | gt (ground truth).
    cfg.HKD.REGION.BOXES = "sampled"
    # Teacher's boxes an image, best first, where BOXES is teacher.
    cfg.HKD.REGION.TEACHER_TOPK = 256
    # Bins a side for a one-stage student, which has no pooler of its own.
    cfg.HKD.REGION.POOLER_RESOLUTION = 7
    # Samples a bin and axis wherever the term pools: not with BOXES sampled of two two-stage
    # detectors. 0: adaptive.
    cfg.HKD.REGION.POOLER_SAMPLING_RATIO = 0
    # Distance of two pooled features: mse | l1 | smooth_l1 | cosine.
    cfg.HKD.REGION.DISTANCE = "mse"
    # How the distances become one number: mean | half_mean (half of it, as Mimic has it).
    cfg.HKD.REGION.REDUCTION = "mean"
    # Divide the distance by a statistic of the teacher's features: none | teacher_variance.
    cfg.HKD.REGION.NORMALIZE = "none"
    # 1x1 adapter: auto (where channel counts differ) | always.
    cfg.HKD.REGION.ADAPTER = "auto"

    # ------------------------------------------------------------------ logit term
    cfg.HKD.LOGIT = CN()
    # Weight of the term.
    cfg.HKD.LOGIT.WEIGHT = 30.0
    # Parts that are added up. On the sampled boxes: hidden (MSE of the last hidden box features),
    # predictions (half the MSE of class logits plus that of deltas), kl (temperature KL of the
    # class logits), kl_foreground and kl_background (DeFeat), tckd and nckd (DKD), cross_entropy
    # (Chen 2017, of soft classes), deltas (smooth L1 of the deltas of foreground boxes), bounded
    # (Chen 2017 regression, upper-bounded by the teacher). On the RPN's sampled anchors:
    # rpn_cross_entropy, rpn_bounded. One-stage detectors have kl, deltas and bounded.
    cfg.HKD.LOGIT.PARTS = ["hidden", "predictions"]
    # Weight of each part, in the order of PARTS; [] for 1 each.
    cfg.HKD.LOGIT.PART_WEIGHTS = []
    # Temperature of the softmax or sigmoid of every part with class logits but predictions.
    cfg.HKD.LOGIT.TEMPERATURE = 1.0
    # Weight of the background's class in cross_entropy and rpn_cross_entropy (Chen 2017).
    cfg.HKD.LOGIT.BACKGROUND_WEIGHT = 1.5
    # Margin m of bounded and rpn_bounded: they act while the student's squared error plus m exceeds
    # the teacher's.
    cfg.HKD.LOGIT.BOUND_MARGIN = 0.01

    # ------------------------------------------------------------------ ADL term
    cfg.HKD.ADL = CN()
    # Weight of the term.
    cfg.HKD.ADL.WEIGHT = 1.0
    # Exponent of the focus on what the student gets wrong and what is hard.
    cfg.HKD.ADL.GAMMA = 2.0
    # Balance of the two halves of the cross-entropy where OUTER is bce.
    cfg.HKD.ADL.ALPHA = 0.5
    # Share of the teacher's entropy that is taken off the focus; the paper's beta is 1 - BETA_C.
    cfg.HKD.ADL.BETA_C = 0.0
    # Exponent of the normaliser, the sum of the teacher's probabilities to this power.
    cfg.HKD.ADL.THETA = 1.8
    # What the focus weighs: bce (cross-entropy, the released code) | kl (the paper's form).
    cfg.HKD.ADL.OUTER = "bce"

    # ------------------------------------------------------------------ CrossKD term
    cfg.HKD.CROSSKD = CN()
    # Weight of the term.
    cfg.HKD.CROSSKD.WEIGHT = 1.0
    # Last convolutions of the teacher's towers that the student's features pass through.
    cfg.HKD.CROSSKD.REUSED_CONVS = 1
    # Weight of the class logits.
    cfg.HKD.CROSSKD.CLASS_WEIGHT = 1.0
    # Exponent of the distance in probability that weighs an anchor's cross-entropy.
    cfg.HKD.CROSSKD.BETA = 1.0
    # Weight of the boxes.
    cfg.HKD.CROSSKD.BOX_WEIGHT = 1.0
    # Distance of two boxes: giou (1 - GIoU) | iou (- ln IoU).
    cfg.HKD.CROSSKD.BOX_LOSS = "giou"
    # 1x1 adapters, one a tower: auto (where the towers' widths differ) | always.
    cfg.HKD.CROSSKD.ADAPTER = "auto"

    # ------------------------------------------------------------------ OSAKD term
    cfg.HKD.OSAKD = CN()
    # Weight of the term, the paper's lambda.
    cfg.HKD.OSAKD.WEIGHT = 1.0
    # Nearest neighbours that vote for the classes of a region.
    cfg.HKD.OSAKD.K = 10
    # Embeddings of earlier regions that are kept, the same number of every class.
    cfg.HKD.OSAKD.BANK_SIZE = 4096
    # Embeddings in the bank from which on the term acts.
    cfg.HKD.OSAKD.READY_AT = 1024
    # Votes that every class has beforehand.
    cfg.HKD.OSAKD.SMOOTHING = 0.1
    # Distance of the student's class probabilities from the neighbours': kl | mse.
    cfg.HKD.OSAKD.LOSS = "kl"

    # ------------------------------------------------------------------ LW-KD term
    cfg.HKD.LWKD = CN()
    # Weight of the term.
    cfg.HKD.LWKD.WEIGHT = 1.0
    # Temperature of both sides' class probabilities.
    cfg.HKD.LWKD.TEMPERATURE = 4.0
    # Weight of the student's adversarial loss beside the divergence.
    cfg.HKD.LWKD.ADVERSARIAL_WEIGHT = 0.1
    # Learning rate of the discriminator, at the height of SOLVER's schedule.
    cfg.HKD.LWKD.DISCRIMINATOR_LR = 0.001

    # ------------------------------------------------------------------ HSAKD term
    cfg.HKD.HSAKD = CN()
    # Weight of the term, in both of its phases.
    cfg.HKD.HSAKD.WEIGHT = 1.0
    # Student's FPN levels with an auxiliary head; the teacher's are found by stride.
    cfg.HKD.HSAKD.LEVELS = ["p2", "p3", "p4", "p5"]
    # Temperature of both sides' joint probabilities.
    cfg.HKD.HSAKD.TEMPERATURE = 3.0
    # Turned images a step beside the upright one, drawn of 90, 180 and 270 degrees: 0 to 3.
    cfg.HKD.HSAKD.TURNED = 1
    # Iterations at the start in which the teacher's heads learn, and the student nothing of them.
    cfg.HKD.HSAKD.TEACHER_ITERS = 1488
    # Factor on SOLVER.BASE_LR for the teacher's heads, which lack momentum; 1 under AdamW.
    cfg.HKD.HSAKD.TEACHER_LR_FACTOR = 5.0
    # Whether both networks' heads learn all the time, from labels and each other (HSSAKD), instead.
    cfg.HKD.HSAKD.MUTUAL = False

    # ------------------------------------------------------------------ FGD term
    cfg.HKD.FGD = CN()
    # Weight of the term, on top of those of its parts.
    cfg.HKD.FGD.WEIGHT = 1.0
    # Student's FPN levels that are distilled; the teacher's are found by stride.
    cfg.HKD.FGD.LEVELS = ["p2", "p3", "p4", "p5"]
    # Temperature of the attention.
    cfg.HKD.FGD.TEMPERATURE = 0.5
    # Weight of the objects' cells, alpha.
    cfg.HKD.FGD.FOREGROUND_WEIGHT = 5e-5
    # Weight of the other cells, beta.
    cfg.HKD.FGD.BACKGROUND_WEIGHT = 2.5e-5
    # Weight of the difference of both networks' attention, gamma.
    cfg.HKD.FGD.ATTENTION_WEIGHT = 5e-5
    # Weight of the relation between cells, lambda.
    cfg.HKD.FGD.RELATION_WEIGHT = 5e-7

    # ------------------------------------------------------------------ MGD term
    cfg.HKD.MGD = CN()
    # Weight of the term.
    cfg.HKD.MGD.WEIGHT = 5e-7
    # Student's FPN levels that are distilled; the teacher's are found by stride.
    cfg.HKD.MGD.LEVELS = ["p2", "p3", "p4", "p5"]
    # Share of the student's cells that are masked.
    cfg.HKD.MGD.MASK_RATIO = 0.45

    # ------------------------------------------------------------------ ReviewKD term
    cfg.HKD.REVIEWKD = CN()
    # Weight of the term.
    cfg.HKD.REVIEWKD.WEIGHT = 1.2
    # Student's FPN levels that are fused and distilled, finest first; the teacher's are found by
    # stride.
    cfg.HKD.REVIEWKD.LEVELS = ["p2", "p3", "p4", "p5", "p6"]

    for node in list(cfg.HKD.values()):
        if isinstance(node, CN) and "WEIGHT" in node:
            add_schedule(node)

    # ------------------------------------------------------------------ backbones
    cfg.HKD.BACKBONE = CN()
    # Slim ResNets: factor on every channel count of the stem and the stages, rounded to a multiple
    # of 8.
    cfg.HKD.BACKBONE.WIDTH_MULTIPLIER = 1.0
    # Blocks of the four stages; [] for those of MODEL.RESNETS.DEPTH.
    cfg.HKD.BACKBONE.BLOCKS = []
    # Library bodies: torchvision/<model> or timm/<model>; MODEL.RESNETS.NORM (BN, SyncBN or
    # FrozenBN) says what becomes of their batch norms.
    cfg.HKD.BACKBONE.BODY = "torchvision/mobilenet_v3_large"
    # Initialise the body with the library's ImageNet weights (needs a network or the library's
    # cache) where MODEL.WEIGHTS is empty. A slim ResNet is cut from the full-width one of its depth
    # by channel slices.
    cfg.HKD.BACKBONE.PRETRAINED = False

    # ------------------------------------------------------------------ pre-training of backbones
    cfg.HKD.PRETRAINING = CN()
    # How hkd pretrain trains: hsakd | kd (teacher, then student) | hssakd (two peers,
    # each from the other) | labels (the student alone).
    cfg.HKD.PRETRAINING.METHOD = "hsakd"
    # Teacher or peer: resnet18, resnet34, resnet50, with -0.5 for half the width, or wrn-40-2.
    cfg.HKD.PRETRAINING.TEACHER = "resnet34"
    # Student, named as TEACHER.
    cfg.HKD.PRETRAINING.STUDENT = "resnet18"
    # joint (body and branches at once) | frozen (the body first, then the branches on it).
    cfg.HKD.PRETRAINING.TEACHER_TRAINING = "joint"
    # Images: folder (train and val, one folder a class in each) | cifar10 | cifar100.
    cfg.HKD.PRETRAINING.DATASET = "folder"
    # Where they are; nothing is downloaded.
    cfg.HKD.PRETRAINING.ROOT = ""
    # Side length, pixels; images are squares, so that their turns fit into one batch.
    cfg.HKD.PRETRAINING.IMAGE_SIZE = 224
    # Images a step; each is seen in its four turns.
    cfg.HKD.PRETRAINING.BATCH_SIZE = 256
    # Passes over the images of every training: the teacher's, its branches' and the student's.
    cfg.HKD.PRETRAINING.EPOCHS = 100
    # Learning rate.
    cfg.HKD.PRETRAINING.LR = 0.1
    # Epochs after which it is a tenth of what it was.
    cfg.HKD.PRETRAINING.DROPS = [30, 60, 90]
    # Weight decay of every parameter.
    cfg.HKD.PRETRAINING.WEIGHT_DECAY = 1e-4

    # ------------------------------------------------------------------ data
    cfg.HKD.DATA = CN()
    # Data sets to register, one list each: [name, "coco", annotation file, image root], or [name,
    # format, root, split] with a format and a split of docs/data.md, as "citypersons" and "val".
    cfg.HKD.DATA.REGISTER = []
    # Pedestrians under this height (pixels of the original image) are ignored in training.
    cfg.HKD.DATA.MIN_HEIGHT = 50
    # Pedestrians with a smaller visible share are ignored in training.
    cfg.HKD.DATA.MIN_VISIBILITY = 0.0
    # Share of the images of each training set whose labels are used, the same ones in every run;
    # the others are not trained on, unless a pool has them.
    cfg.HKD.DATA.LABELED_SHARE = 1.0
    # Pools of pseudo-labels, files of hkd label, to train on beside labelled images.
    cfg.HKD.DATA.PSEUDO = []
    # Images of the pools for each labelled image, in every batch.
    cfg.HKD.DATA.PSEUDO_RATIO = 1.0

    # ------------------------------------------------------------------ evaluation
    cfg.HKD.EVALUATION = CN()
    # Whose rules score: citypersons | caltech | caltech_new | caltech_new_no_border | eurocity |
    # eurocity_ignore_riders | kaist | crowdhuman.
    cfg.HKD.EVALUATION.PROTOCOL = "citypersons"
    # Recall at a reference point that the curve never reaches: official (the published code's
    # wrap-around to the last operating point) | matlab (0). "": the protocol's.
    cfg.HKD.EVALUATION.MISSING_POINT = ""
    # Of resized images: their height over that of the benchmark's, by which the setups' heights
    # are multiplied.
    cfg.HKD.EVALUATION.HEIGHT_SCALE = 1.0
    # Evaluate the teacher beside the student wherever the student is: with --eval-only, every
    # TEST.EVAL_PERIOD iterations, and when training ends.
    cfg.HKD.EVALUATION.TEACHER = False

    # ------------------------------------------------------------------ solver
    cfg.HKD.SOLVER = CN()
    # Optimizer: sgd (Detectron2's) | adamw.
    cfg.HKD.SOLVER.OPTIMIZER = "sgd"


def add_schedule(term: CN) -> None:
    """Add the ``SCHEDULE`` of a term's weight, with its defaults, to the term's node in place."""
    # Weight over time; iterations of this run.
    term.SCHEDULE = CN()
    # Iterations over which the weight rises linearly from 0.
    term.SCHEDULE.WARMUP_ITERS = 0
    # Shape after the warm-up: constant | linear | cosine (both fall to END_FACTOR at MAX_ITER).
    term.SCHEDULE.DECAY = "constant"
    # Share of the weight that is left at the end of a decay.
    term.SCHEDULE.END_FACTOR = 0.0
    # Iteration from which the term is off; 0 for never.
    term.SCHEDULE.STOP_ITER = 0


# Registrations: importing these modules is all they need.
import hkd_d2.data.datasets  # noqa: E402, F401
import hkd_d2.distillation.adl  # noqa: E402, F401
import hkd_d2.distillation.crosskd  # noqa: E402, F401
import hkd_d2.distillation.fgd  # noqa: E402, F401
import hkd_d2.distillation.hsakd  # noqa: E402, F401
import hkd_d2.distillation.logit  # noqa: E402, F401
import hkd_d2.distillation.lwkd  # noqa: E402, F401
import hkd_d2.distillation.mgd  # noqa: E402, F401
import hkd_d2.distillation.osakd  # noqa: E402, F401
import hkd_d2.distillation.pyramid  # noqa: E402, F401
import hkd_d2.distillation.region  # noqa: E402, F401
import hkd_d2.distillation.reviewkd  # noqa: E402, F401
import hkd_d2.modeling.backbones  # noqa: E402, F401
import hkd_d2.modeling.fcos  # noqa: E402, F401
import hkd_d2.modeling.ignore  # noqa: E402, F401
import hkd_d2.modeling.meta_arch  # noqa: E402, F401
