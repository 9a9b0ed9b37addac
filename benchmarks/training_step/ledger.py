"""The ledger of a training step: time and memory by stage, plain and distilled, side by side.

A plain Detectron2 student, the distilled one in plain PyTorch, and the distilled one as it trains
take their steps in turn on the same batch, so that whatever else the machine does meets all three.
"""

import copy
import dataclasses
import os
import statistics
import tempfile
import time
from bisect import bisect_right
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from hkd_d2.config import load_config, student_config
from hkd_d2.data.datasets.citypersons import load_citypersons
from hkd_d2.data.mapper import PedestrianMapper
from hkd_d2.data.streets import Difficulty, generate_streets
from hkd_d2.distillation import build_terms, find_terms
from hkd_d2.engine.solver import build_optimizer
from hkd_d2.modeling.families import detector_spec
from hkd_d2.modeling.ignore import split_ignore
from hkd_d2.modeling.meta_arch import HKDDetector
from hkd_d2.modeling.teacher import Teacher, load_teacher_config
from hkd_d2.ops import _library

# Plain Detectron2's student; the distilled step by the operators' definitions, Detectron2's pooler
# and NCHW; the distilled step as the config trains it.
PROVIDERS = ("stock", "reference", "fused")
STEP = "step"
_STAGES = ("student", "teacher", "term")


class StageClock:
    """Times named stages, by CUDA events on a GPU; each is a range in profiles and NVTX as well.

    ``with clock("student.rpn"): ...``; the times of stages of one name add up.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self._spans = []

    @contextmanager
    def __call__(self, name: str):
        nvtx = torch.cuda.nvtx.range(name) if self.on_gpu else nullcontext()
        with record_function(name), nvtx:
            start = self._now()
            yield
            self._spans.append((name, start, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds of each stage since the last call."""
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds = {}
        for name, start, end in self._spans:
            span = start.elapsed_time(end) / 1000 if self.on_gpu else end - start
            seconds[name] = seconds.get(name, 0.0) + span
        self._spans.clear()
        return seconds

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class TrainingStep:
    """A model with its optimizer, stepping under a :class:`StageClock`.

    The learning rate is 0: the work is that of training, and every step starts from one state.

    Args:
        cfg: solver settings; ``SOLVER.AMP.ENABLED`` as in training.
        model: a detector in training mode; an :class:`HKDDetector` tells its stages.
        reference: run the operators' definitions instead of the compiled kernels.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, *, reference: bool = False):
        self.model, self.reference = model, reference
        self.clock = StageClock(model.device)
        self.optimizer = build_optimizer(cfg, model)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        # In the middle of a run, behind first phases; odd, where nothing is logged, as mostly.
        self.iteration = cfg.SOLVER.MAX_ITER // 2 | 1
        self.amp = cfg.SOLVER.AMP.ENABLED
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=self.amp)
        self.staged = isinstance(model, HKDDetector)
        if self.staged:
            model.stage = self.clock

    def __call__(self, batch: list[dict]) -> dict[str, float]:
        """Take one step; returns the seconds of each stage and of the whole :data:`STEP`."""
        clock, device = self.clock, self.model.device
        implementation = _library.reference_only() if self.reference else nullcontext()
        with EventStorage(self.iteration), implementation, clock(STEP):
            autocast = torch.autocast(device.type, dtype=torch.float16, enabled=self.amp)
            with nullcontext() if self.staged else clock("student"), autocast:
                losses = sum(self.model(batch).values())
            with clock("backward"):
                self.optimizer.zero_grad()
                self.scaler.scale(losses).backward()
            with clock("optimizer"):
                self.scaler.step(self.optimizer)
                self.scaler.update()
        return clock.take()


def training_steps(
    cfg: CfgNode, batch: list[dict], weights: str = "", proposals=None, providers=PROVIDERS
) -> dict[str, TrainingStep]:
    """Build the steps that are compared, all from one student and one teacher.

    Args:
        cfg: of a distilled run. Where ``HKD.TEACHER.WEIGHTS`` is no file, the teacher's
            weights are random, which costs the same time.
        batch: what the steps will be given.
        weights: checkpoint of a trained student; without one its weights are random.
        proposals (list[Instances]): per image, what a two-stage student's heads get in place of the
            RPN's own, which does its work none the less. Without them and without ``weights``,
            whose RPN would propose anchors, they are :func:`street_proposals`.
        providers: of :data:`PROVIDERS`.
    """
    cfg = student_config(cfg)
    cfg.HKD.BACKBONE.PRETRAINED = False
    student = build_model(cfg).train()
    if weights:
        DetectionCheckpointer(student).load(weights)
    elif proposals is None and hasattr(student, "proposal_generator"):
        proposals = street_proposals(cfg, batch, student.device)

    teacher = None
    if set(providers) - {"stock"} and any(term.needs for term in find_terms(cfg).values()):
        node = cfg.HKD.TEACHER
        if os.path.isfile(node.WEIGHTS):
            teacher = Teacher.from_config(cfg)
        else:
            teacher_cfg = load_teacher_config(node.CONFIG_FILE)
            teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
            teacher_cfg.HKD.BACKBONE.PRETRAINED = False
            teacher = Teacher(
                build_model(teacher_cfg),
                input_format=teacher_cfg.INPUT.FORMAT,
                student_format=cfg.INPUT.FORMAT,
                precision=node.PRECISION,
            )

    steps = {}
    for provider in providers:
        detector = copy.deepcopy(student)
        if proposals is not None:
            _propose(detector.proposal_generator, proposals)
        model = detector
        if provider != "stock":
            fused = provider == "fused"
            model = HKDDetector(
                student=detector,
                teacher=teacher,
                terms=build_terms(cfg, detector_spec(detector), teacher and teacher.spec),
                pooler=cfg.HKD.POOLER if fused else "torchvision",
                channels_last=cfg.HKD.CHANNELS_LAST and fused,
                loss_weights=cfg.HKD.STUDENT.LOSS_WEIGHTS,
            ).train()
        steps[provider] = TrainingStep(cfg, model, reference=provider == "reference")
    return steps


def street_batch(cfg: CfgNode, height: int, width: int, size: int, seed: int = 0) -> list[dict]:
    """Drawn streets with their pedestrians, as the training loader would give them."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (height,), max(height, width)
    cfg.INPUT.RANDOM_FLIP = "none"
    mapper = PedestrianMapper(cfg, True)
    with tempfile.TemporaryDirectory() as root:
        generate_streets(
            Path(root) / "streets",
            num_train=size,
            num_val=0,
            height=height,
            width=width,
            seed=seed,
            workers=1,
            difficulty=Difficulty(empty=0.0),
        )
        return [mapper(r) for r in load_citypersons(str(Path(root) / "streets"), "train")]


def street_proposals(
    cfg: CfgNode, batch: list[dict], device: torch.device, seed: int = 0
) -> list[Instances]:
    """Boxes as a trained RPN proposes them on a street, ``RPN.POST_NMS_TOPK_TRAIN`` an image.

    Three in ten surround the objects (shifted by a tenth of their size, scaled by 15 %), enough to
    fill the share of foreground boxes; the others are as high as pedestrians of CityPersons (median
    95 pixels of 1024) and stand in the middle third of the picture's height.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    proposals = []
    for record in batch:
        image_size = height, width = record["image"].shape[-2:]
        objects = split_ignore(record["instances"])[0].gt_boxes.tensor
        count = cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN
        near = count * 3 // 10 if len(objects) else 0

        chosen = objects[torch.randint(max(len(objects), 1), (near,), generator=generator)]
        size = chosen[:, 2:] - chosen[:, :2]
        centre = chosen[:, :2] + size / 2 + 0.1 * size * normal(near, 2)
        size = size * (0.15 * normal(near, 1)).exp()

        far = count - near
        tall = height * 95 / 1024 * (0.6 * normal(far)).exp()
        size = torch.cat([size, torch.stack([0.41 * tall, tall], 1)])
        place = torch.rand(far, 2, generator=generator)
        place[:, 1] = (1 + place[:, 1]) / 3
        centre = torch.cat([centre, place * torch.tensor([width, height])])

        boxes = Boxes(torch.cat([centre - size / 2, centre + size / 2], 1))
        boxes.clip(image_size)
        boxes = boxes[boxes.nonempty()]
        boxes = boxes[torch.randperm(len(boxes), generator=generator)]
        logits = torch.linspace(5, -5, len(boxes))
        found = Instances(image_size, proposal_boxes=boxes, objectness_logits=logits)
        proposals.append(found.to(device))
    return proposals


def trained_proposals(
    cfg: CfgNode, batch: list[dict], config_file: str, weights: str
) -> list[Instances]:
    """Boxes that another, trained two-stage detector proposes on a batch.

    Args:
        cfg: of the run that gets them: as many boxes as it trains with.
        batch: images in the config's format.
        config_file, weights: of the detector, as ``train_net.py`` leaves them.

    Raises:
        ValueError: the detector has no RPN or takes another image format.
    """
    own = student_config(load_config(config_file))
    own.MODEL.DEVICE, own.HKD.BACKBONE.PRETRAINED = cfg.MODEL.DEVICE, False
    for when in ("PRE", "POST"):
        own.MODEL.RPN[f"{when}_NMS_TOPK_TEST"] = cfg.MODEL.RPN[f"{when}_NMS_TOPK_TRAIN"]
    if own.INPUT.FORMAT != cfg.INPUT.FORMAT:
        raise ValueError(
            f"{config_file} has INPUT.FORMAT {own.INPUT.FORMAT}, the run {cfg.INPUT.FORMAT}; name "
            "a detector of the same format."
        )
    detector = build_model(own).eval()
    if not hasattr(detector, "proposal_generator"):
        raise ValueError(f"{config_file} has no RPN; name a two-stage detector.")
    DetectionCheckpointer(detector).load(weights)
    with torch.no_grad():
        images = detector.preprocess_image(batch)
        return detector.proposal_generator(images, detector.backbone(images.tensor))[0]


def _propose(rpn: nn.Module, proposals: list[Instances]) -> None:
    """Let ``rpn`` do its work and return copies of ``proposals`` instead of its own."""
    predict = rpn.predict_proposals

    def predict_proposals(*args):
        predict(*args)
        return [copy.deepcopy(p) for p in proposals]

    rpn.predict_proposals = predict_proposals


@dataclasses.dataclass
class Entry:
    """A provider's page of the ledger.

    Attributes:
        seconds: by stage, and of the whole :data:`STEP`, one a round.
        peak_bytes: most bytes of tensors at a time in a stage, above those held
            before the step.
    """

    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int]

    def parts(self) -> dict[str, list[float]]:
        """Seconds of ``teacher``, ``student``, each term, ``backward``, ``optimizer``, ``rest``.

        What was not there, as a plain student's teacher, is left out.
        """
        parts = {"teacher": [], "student": []}
        rest = self.seconds[STEP]
        for stage, seconds in self.seconds.items():
            if stage != STEP:
                head, _, tail = stage.partition(".")
                part = tail if head == "term" else head
                parts[part] = _added(parts[part], seconds) if parts.get(part) else seconds
                rest = _added(rest, seconds, -1)
        parts["rest"] = rest
        return {part: seconds for part, seconds in parts.items() if seconds}


def _added(a, b, sign=1):
    return [x + sign * y for x, y in zip(a, b, strict=True)]


def keep_ledger(
    steps: dict[str, TrainingStep], batch: list[dict], iterations: int, trace: str = ""
) -> dict[str, Entry]:
    """Take steps in turn, one of each provider a round, and enter medians and peaks.

    Every round starts all providers from one random state, so that they sample the same boxes. The
    first two rounds are not counted.

    Args:
        trace: file to write a Chrome trace of one more step of each provider to.
    """
    rounds = {name: [] for name in steps}
    for number in range(iterations + 2):
        for name, step in steps.items():
            torch.manual_seed(number)
            rounds[name].append(step(batch))
    peaks = _peak_memory(steps, batch, trace)
    return {
        name: Entry({stage: [s[stage] for s in times[2:]] for stage in times[0]}, peaks[name])
        for name, times in rounds.items()
    }


def overhead(ledger: dict[str, Entry], provider: str = "fused") -> dict[str, float]:
    """Cost of a provider beside stock Detectron2's student: medians over the rounds.

    Returns:
        dict[str, float]: ``overhead``, (t - t_student - t_teacher) / t_student, where t_student is
        the stock step of the same round and t_teacher what the teacher's stages took within the
        provider's step; ``whole_step``, t / t_student.
    """
    whole, plain = (ledger[name].seconds[STEP] for name in (provider, "stock"))
    teacher = ledger[provider].parts().get("teacher", [0.0] * len(whole))
    rounds = list(zip(whole, plain, teacher, strict=True))
    return {
        "overhead": statistics.median((w - p - t) / p for w, p, t in rounds),
        "whole_step": statistics.median(w / p for w, p, _ in rounds),
    }


def _peak_memory(steps, batch, trace):
    """Profile one step of each; returns by provider and stage the peak of allocated bytes."""
    on_gpu = next(iter(steps.values())).clock.on_gpu
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, profile_memory=True) as profiler:
        for name, step in steps.items():
            torch.manual_seed(0)
            with record_function(name):
                step(batch)
    if trace:
        profiler.export_chrome_trace(trace)
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = profiler.profiler.kineto_results.events()
    allocations = sorted(
        (e.start_ns(), e.nbytes())
        for e in events
        if e.name() == "[memory]" and e.device_type() == device
    )
    ranges = [
        (e.name(), e.start_ns(), e.end_ns())
        for e in events
        if e.device_type() == torch.autograd.DeviceType.CPU
    ]
    peaks = {}
    for name in steps:
        first, last = next((start, end) for n, start, end in ranges if n == name)
        times, levels = [first], [0]
        for at, size in allocations:
            if first <= at <= last:
                times.append(at)
                levels.append(levels[-1] + size)
        peaks[name] = {}
        for stage, start, end in ranges:
            known = stage in (STEP, "backward", "optimizer")
            if first <= start <= last and (known or stage.split(".")[0] in _STAGES):
                within = slice(bisect_right(times, start) - 1, bisect_right(times, end))
                peaks[name][stage] = max(peaks[name].get(stage, 0), *levels[within], 0)
    return peaks


def table(ledger: dict[str, Entry]) -> str:
    """The ledger as a Markdown table: milliseconds by part, then peak memory."""
    parts = medians(ledger)
    rows = max(parts.values(), key=len)
    lines = [f"| {' | '.join(['ms', *ledger])} |", f"|---|{'---:|' * len(ledger)}"]

    def line(title, values):
        lines.append(f"| {' | '.join([title, *values])} |")

    for part in rows:
        line(part, [f"{p[part] * 1e3:.1f}" if part in p else "" for p in parts.values()])
    whole = [entry.seconds[STEP] for entry in ledger.values()]
    line("**step**", [f"**{statistics.median(seconds) * 1e3:.1f}**" for seconds in whole])
    line("fastest step", [f"{min(seconds) * 1e3:.1f}" for seconds in whole])
    line("peak memory, MB", [f"{e.peak_bytes[STEP] / 1e6:.0f}" for e in ledger.values()])
    return "\n".join(lines)


def medians(ledger: dict[str, Entry]) -> dict[str, dict[str, float]]:
    """Median seconds of each part of a step, by provider."""
    return {
        name: {part: statistics.median(s) for part, s in entry.parts().items()}
        for name, entry in ledger.items()
    }
