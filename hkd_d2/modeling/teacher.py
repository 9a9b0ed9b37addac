"""The teacher: frozen, outside the student's module tree, in its own format and precision."""

from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.structures import ImageList

from hkd_d2.configuration.files import find_config
from hkd_d2.configuration.keys import load_mentioned_config
from hkd_d2.distillation.detector_pass import DenseOutputs, DetectorPass
from hkd_d2.distillation.term import reused_convs
from hkd_d2.modeling import one_stage
from hkd_d2.modeling.build import build_from_config
from hkd_d2.modeling.checkpoint import StudentCheckpointer
from hkd_d2.modeling.families import check_detector, detector_spec, family_of

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Teacher:
    """A frozen detector beside the student.

    It is no ``nn.Module``, so its parameters and state stay out of the module that holds it; a deep
    copy shares it.

    Args:
        model: a GeneralizedRCNN, RetinaNet or FCOS, as the student may be; put into
            eval mode, its parameters frozen.
        input_format: channel order that the teacher was trained with, ``INPUT.FORMAT``.
        student_format: channel order of the images that it will be given.
        precision: fp32 | fp16 | bf16, by autocast.

    Raises:
        ValueError: an unsupported model, precision or pair of channel orders.
    """

    def __init__(self, model, *, input_format="BGR", student_format="BGR", precision="fp32"):
        check_detector(model, "teacher")
        if precision not in PRECISIONS:
            raise ValueError(
                f"HKD.TEACHER.PRECISION is '{precision}'; choose from {', '.join(PRECISIONS)}."
            )
        if input_format != student_format and {input_format, student_format} != {"RGB", "BGR"}:
            raise ValueError(
                f"The student reads {student_format} images and the teacher {input_format}; only "
                "RGB and BGR can be turned into each other."
            )
        self.model = model.eval().requires_grad_(False)
        self.flip_channels = input_format != student_format
        self.precision = PRECISIONS[precision]

    def __deepcopy__(self, memo):
        return self

    @property
    def spec(self):
        """Its :class:`DetectorSpec`."""
        return detector_spec(self.model)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Teacher":
        """Build the teacher that ``cfg.HKD.TEACHER`` names and load its weights.

        Raises:
            FileNotFoundError: missing config file or weights.
            ValueError: weights that do not fill every parameter of the teacher's architecture.
        """
        node = cfg.HKD.TEACHER
        teacher_cfg = load_teacher_config(node.CONFIG_FILE)
        teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
        # Named before building, so that no ImageNet weights are fetched for a trained teacher.
        teacher_cfg.MODEL.WEIGHTS = node.WEIGHTS
        model = build_from_config(teacher_cfg, f"the teacher, '{node.CONFIG_FILE}',")
        load_teacher_weights(model, node.WEIGHTS, node.CONFIG_FILE)
        return cls(
            model,
            input_format=teacher_cfg.INPUT.FORMAT,
            student_format=cfg.INPUT.FORMAT,
            precision=node.PRECISION,
        )

    def preprocess(
        self,
        batched_inputs: list[dict],
        padded_size: tuple[int, int],
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> ImageList:
        """Normalise the student's images the teacher's way, padded to the student's (H, W)."""
        model = self.model
        images, sizes = [], []
        for record in batched_inputs:
            image = record["image"].to(model.device)
            if self.flip_channels:
                image = image.flip(0)
            image = (image - model.pixel_mean) / model.pixel_std
            height, width = image.shape[-2:]
            sizes.append((height, width))
            images.append(
                torch.nn.functional.pad(
                    image, (0, padded_size[1] - width, 0, padded_size[0] - height)
                )
            )
        return ImageList(torch.stack(images).contiguous(memory_format=memory_format), sizes)

    @torch.no_grad()
    def features(
        self,
        batched_inputs: list[dict],
        padded_size: tuple[int, int],
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> DetectorPass:
        """Run the backbone: the pass with its first stage filled.

        Convolutions give their maps in the memory format of the images.
        """
        images = self.preprocess(batched_inputs, padded_size, memory_format)
        run_backbone = partial(self.run_backbone, memory_format=memory_format)
        return DetectorPass(
            images=images,
            features=run_backbone(images.tensor),
            strides={name: s.stride for name, s in self.model.backbone.output_shape().items()},
            run_backbone=run_backbone,
        )

    @torch.no_grad()
    def run_backbone(
        self, pixels: torch.Tensor, memory_format: torch.memory_format = torch.contiguous_format
    ) -> dict[str, torch.Tensor]:
        """Features of normalised (N, 3, H, W) pixels."""
        with self._autocast():
            return self.model.backbone(pixels.contiguous(memory_format=memory_format))

    @torch.no_grad()
    def advance(
        self,
        teacher_pass: DetectorPass,
        boxes: list | None,
        needs: frozenset,
        fused_pooler: bool = False,
    ) -> None:
        """Fill the later stages as far as ``needs`` asks, on the student's ``boxes``.

        Args:
            boxes: None for a one-stage student, beside which no term reads
                the box branch.
        """
        with self._autocast():
            family_of(self.model).advance_teacher(
                self.model, teacher_pass, boxes, needs, fused_pooler
            )
        dense = teacher_pass.dense
        if dense is not None and dense.taps is not None:
            dense.resume = partial(self.resume_head, dense, reused_convs(needs))

    def resume_head(self, dense: DenseOutputs, reused: int, taps: list[tuple]) -> DenseOutputs:
        """Run the rest of a one-stage teacher's head; differentiable w.r.t. ``taps``."""
        with self._autocast():
            return one_stage.resume_head(self.model, dense, taps, reused)

    def _autocast(self):
        device = self.model.device.type
        # enabled=False also ends the student's autocast, for a teacher that stays in fp32
        return torch.autocast(
            device,
            dtype=self.precision if self.precision != torch.float32 else None,
            enabled=self.precision != torch.float32,
        )


def load_teacher_config(path: str) -> CfgNode:
    """Read the teacher's config file.

    Raises:
        FileNotFoundError: an empty path or no such file.
    """
    if not path:
        raise FileNotFoundError(
            "HKD.TEACHER.CONFIG_FILE is empty; name the config file the teacher was trained with."
        )
    try:
        found = find_config(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"HKD.TEACHER.CONFIG_FILE: {error}") from error
    return load_mentioned_config(found)


def load_teacher_weights(model, path: str, config_file: str) -> None:
    """Load ``path`` into ``model``; every parameter has to be found.

    Raises:
        FileNotFoundError: no such file.
        ValueError: keys missing or of another shape.
    """
    if not path:
        raise FileNotFoundError(
            "HKD.TEACHER.WEIGHTS is empty; train the teacher first "
            f"(hkd train --config-file {config_file}) and give its model_final.pth."
        )
    StudentCheckpointer(model).load_complete(path, f"the teacher of {config_file}")
