"""Write a detector as a file that runs without this package: ONNX, torch.export, TorchScript.

All take ``images``, uint8 (N, 3, H, W) in the config's channel order, resized by the caller. They
give ``boxes`` (N, K, 4) float32 XYXY pixels, ``scores`` (N, K) float32, ``classes`` (N, K) int64
and ``counts`` (N,) int64: the first ``counts`` rows of an image are detections, by falling score.
Normalisation, padding, thresholds and non-maximum suppression are inside.
"""

import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn

from hkd_d2.export.one_stage import OneStageGraph
from hkd_d2.export.postprocess import KeepByNms, keep_by_nms
from hkd_d2.export.two_stage import TwoStageGraph
from hkd_d2.files import written_beside
from hkd_d2.inference.program_backend import METADATA_FILE
from hkd_d2.modeling.families import check_detector

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2", "torchscript": ".ts"}
INPUT = "images"
OUTPUTS = ("boxes", "scores", "classes", "counts")
LAYOUT = "NCHW uint8"
# Operators of this set are in onnxruntime since 1.14; RoiAlign's half pixels came with 16.
OPSET = 18

# What torch.export, torch.jit and torch.onnx raise of a model.
_UNTRANSLATABLE = (RuntimeError, AssertionError, NotImplementedError, TypeError)


@dataclass(frozen=True)
class Shape:
    """Inputs that an exported detector takes.

    Attributes:
        size: height and width; None for any.
        batch: number of images; None for any.
    """

    size: tuple[int, int] | None = None
    batch: int | None = None

    def example(self, divisibility: int) -> torch.Tensor:
        """An input to trace with; where sizes are free, one that no special case fits."""
        height, width = self.size or (5 * divisibility + 3, 7 * divisibility + 5)
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch or 2, 3, height, width)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def detector_graph(model: nn.Module, keep: KeepByNms = keep_by_nms) -> nn.Module:
    """A detector from uint8 images to padded detections, with shapes known beforehand.

    Args:
        model: GeneralizedRCNN, RetinaNet or FCOS; its modules are shared.
        keep: non-maximum suppression.

    Raises:
        ValueError: a detector, or a part of one, that cannot be exported.
    """
    check_detector(model, "detector")
    square = model.backbone.padding_constraints.get("square_size", 0)
    if square:
        raise ValueError(f"The backbone pads to squares of {square} pixels; export does not.")
    graph = OneStageGraph if isinstance(model, DenseDetector) else TwoStageGraph
    return graph(model, keep).eval()


def export(model: nn.Module, metadata: dict, path: Path, form: str, shape: Shape) -> dict:
    """Write ``model`` to ``path`` with ``metadata`` inside.

    Args:
        model: in eval mode, on the CPU.
        metadata: see :class:`hkd_d2.inference.Detector`.
        form: a key of :data:`SUFFIXES`.
        shape: which inputs it takes.

    Returns:
        dict: the metadata as it stands in the file: besides, ``input_layout``; ``height``,
            ``width`` and ``batch``, None where they are free; of a torch_export of any size
            ``smallest``, the shortest side that it takes.

    Raises:
        ValueError: an unknown form, or a detector that cannot be exported.
    """
    if form not in SUFFIXES:
        raise ValueError(f"The form is '{form}'; choose from {', '.join(SUFFIXES)}.")
    metadata = metadata | {
        "input_layout": LAYOUT,
        "height": shape.size[0] if shape.size else None,
        "width": shape.size[1] if shape.size else None,
        "batch": shape.batch,
    }
    write = {"onnx": _onnx, "torch_export": _torch_export, "torchscript": _torchscript}[form]
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as part, torch.no_grad(), warnings.catch_warnings():
        # Tracing warns of Python's branches in Detectron2, of which the verification would know.
        warnings.simplefilter("ignore")
        try:
            return write(model, metadata, part, shape)
        except torch.OutOfMemoryError:
            raise
        except _UNTRANSLATABLE as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"This detector cannot be written as {form} ({reason}); take another format, or "
                "leave out of its config what PyTorch cannot trace."
            ) from error


def _dynamic(shape: Shape):
    dynamic = torch.export.Dim.DYNAMIC
    dims = {} if shape.batch else {0: dynamic}
    return (dims if shape.size else dims | {2: dynamic, 3: dynamic},)


def _program(graph, metadata, shape):
    example = shape.example(metadata["size_divisibility"])
    return torch.export.export(graph, (example,), dynamic_shapes=_dynamic(shape), strict=False)


def _torch_export(model, metadata, path, shape):
    program = _program(detector_graph(model), metadata, shape)
    if shape.size is None:
        metadata["smallest"] = _smallest_side(program)
    torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata)})
    return metadata


def _smallest_side(program):
    """torch.export takes no free dimension that may be 1, those of the coarsest map among them."""
    images = next(n for n in program.graph.nodes if n.name == INPUT).meta["val"]
    ranges = [program.range_constraints[side.node.expr] for side in images.shape[2:]]
    return max(int(r.lower) for r in ranges)


def _torchscript(model, metadata, path, shape):
    example = shape.example(metadata["size_divisibility"])
    traced = torch.jit.trace(detector_graph(model), example, check_trace=False)
    torch.jit.save(traced, str(path), _extra_files={METADATA_FILE: json.dumps(metadata)})
    return metadata


def _onnx(model, metadata, path, shape):
    import onnx

    from hkd_d2.export.onnx_operators import TRANSLATIONS, keep_by_nms_operator
    from hkd_d2.inference.onnx_backend import write_metadata

    program = _program(detector_graph(model, keep_by_nms_operator), metadata, shape)
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        written = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            opset_version=OPSET,
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        ).model_proto
    finally:
        quiet.setLevel(level)
    _name_dimensions(written.graph)
    written.producer_name, written.producer_version = "hkd_d2", metadata["version"]
    onnx.helper.set_model_props(written, write_metadata(metadata))
    onnx.checker.check_model(written, full_check=True)
    onnx.save(written, path)
    return metadata


def _name_dimensions(graph):
    """Call free dimensions by their names, where the exporter numbers them."""
    dimensions = graph.input[0].type.tensor_type.shape.dim
    names = {
        d.dim_param: name
        for d, name in zip(dimensions, ("batch", "", "height", "width"), strict=True)
        if d.dim_param
    }
    for value in (*graph.input, *graph.output):
        for d in value.type.tensor_type.shape.dim:
            if d.dim_param in names:
                d.dim_param = names[d.dim_param]
    del graph.value_info[:]  # shapes in between, under the old names; runtimes infer them
