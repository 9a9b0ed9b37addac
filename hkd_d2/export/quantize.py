"""INT8 for an exported detector: onnxruntime's static quantisation, and what stays in float.

Weights are symmetric int8 with a scale for each output channel, activations uint8 with one scale
for each tensor, from its extremes on calibration images. Nothing but convolutions and fully
connected layers is quantised.
"""

import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_static,
)
from onnxruntime.quantization.quant_utils import DEQUANT_OUTPUT_SUFFIX
from tqdm import tqdm

from hkd_d2.data.images import as_array
from hkd_d2.export.formats import INPUT
from hkd_d2.files import written_beside
from hkd_d2.inference.onnx_backend import OnnxDetector, write_metadata
from hkd_d2.modeling.fake_quantization import is_predictor

# Ours. A layer whose quantisation alone leaves less signal over noise than this stays float.
MIN_SQNR = 20.0
# Images on which layers are measured one by one.
NUM_MEASURED = 4
_WEIGHTED = ("Conv", "Gemm")


def quantize(
    path: str | Path,
    images: Sequence,
    out: str | Path,
    *,
    data: str,
    min_sqnr: float = MIN_SQNR,
) -> dict:
    """Write the INT8 version of an exported detector.

    Two kinds of layers stay float32: those that predict, see
    :data:`hkd_d2.modeling.fake_quantization.PREDICTORS`, and those whose output, when nothing but
    they is quantised, has less than ``min_sqnr`` dB of signal over quantisation noise on
    calibration images, 20 log10(|float| / |float - int8|). A layer is a weight: where levels share
    it they share its fate.

    Args:
        path: an ``.onnx`` of ``hkd export``, in float.
        images: paths or uint8 RGB arrays to calibrate on; of the training data, never of the test.
        out: file to write.
        data: what the images are, for the metadata.
        min_sqnr: dB; the higher, the more layers stay float.

    Returns:
        dict: as it stands in the metadata under ``quantization``: ``data``, ``images`` (their
            number), ``min_sqnr``, ``int8`` (dB by layer) and ``float`` (dB by layer that stays,
            None for a predictor).

    Raises:
        FileNotFoundError: no such file.
        ValueError: no images; a file that is no export of this project, or is quantised already; an
            image that it does not take; no layer is left to quantise.
    """
    path, out = Path(path), Path(out)
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist; give an existing file.")
    if not images:
        raise ValueError("There are no images to calibrate on; give a data set that has some.")
    detector = OnnxDetector(path)
    if "quantization" in detector.metadata:
        raise ValueError(f"'{path}' is quantised already; give the float file it was made from.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="part-") as folder:
        # Normalisation that merely scales joins its convolution, as it would at run time.
        prepared, written = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        layers = find_layers(onnx.load(prepared).graph)
        sqnr = dict.fromkeys(layers)
        sample = images[:: max(len(images) // NUM_MEASURED, 1)][:NUM_MEASURED]
        for name in tqdm(layers, unit="layer", disable=None, desc="quantisation noise"):
            if not is_predictor(name):
                _quantize(prepared, written, _batches(detector, sample), layers, [name])
                sqnr[name] = _sqnr(
                    prepared, written, _batches(detector, sample), layers[name].outputs
                )
        chosen = [name for name in layers if sqnr[name] is not None and sqnr[name] >= min_sqnr]
        if not chosen:
            raise ValueError(
                f"No layer of '{path}' reaches {min_sqnr} dB; lower the bound or stay in float."
            )
        progress = tqdm(images, unit="image", disable=None, desc="calibration")
        _quantize(prepared, written, _batches(detector, progress), layers, chosen)
        record = {
            "data": data,
            "images": len(images),
            "min_sqnr": min_sqnr,
            "int8": {name: sqnr[name] for name in chosen},
            "float": {name: sqnr[name] for name in layers if name not in chosen},
        }
        model = onnx.load(written)
        metadata = write_metadata(detector.metadata | {"quantization": record})
        onnx.helper.set_model_props(model, metadata)
        onnx.save(model, written)
        OnnxDetector(written).detect(sample[:1])  # it loads and runs before it gets its name
        with written_beside(out) as part:
            os.replace(written, part)
    return record


@dataclass
class Layer:
    """A convolution or fully connected layer: all nodes of one weight.

    Attributes:
        nodes: names, one for each level that shares the weight.
        outputs: what each gives, after its ReLU where one follows.
    """

    nodes: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def find_layers(graph: onnx.GraphProto) -> dict[str, Layer]:
    """The layers by the name of their weight, in the graph's order."""
    weights, layers = {i.name for i in graph.initializer}, {}
    rectified = {node.input[0]: node.output[0] for node in graph.node if node.op_type == "Relu"}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm") and node.input[1] in weights:
            layer = layers.setdefault(node.input[1], Layer())
            layer.nodes.append(node.name)
            layer.outputs.append(rectified.get(node.output[0], node.output[0]))
    return layers


class _Reader(CalibrationDataReader):
    def __init__(self, batches: Iterable[np.ndarray]):
        self.batches = iter(batches)

    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch}


def _batches(detector, images):
    """Each image as the graph takes it."""
    for image in images:
        batch = detector.prepare(as_array(image))[None]
        yield np.ascontiguousarray(np.repeat(batch, detector.metadata["batch"] or 1, axis=0))


def _quantize(source, target, batches, layers, chosen):
    """INT8 for the layers ``chosen`` and for the ReLU that follows one."""
    quantize_static(
        source,
        target,
        _Reader(batches),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "Gemm", "Relu"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=[
            node for name, layer in layers.items() if name not in chosen for node in layer.nodes
        ],
    )


def _sqnr(source, target, batches, outputs):
    """Signal over noise in dB, over all outputs and all images."""
    reference = _session(source, outputs)
    quantized = _session(target, [name + DEQUANT_OUTPUT_SUFFIX for name in outputs])
    signal = noise = 0.0
    for batch in batches:
        for wanted, found in zip(reference(batch), quantized(batch), strict=True):
            signal += float(np.square(wanted, dtype=np.float64).sum())
            noise += float(np.square(wanted - found, dtype=np.float64).sum())
    return 10 * math.log10(max(signal, 1e-30) / max(noise, 1e-30))


def _session(path, names):
    """A graph as a function from a batch to tensors inside of it."""
    model = onnx.load(path)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return lambda batch: session.run(names, {INPUT: batch})
