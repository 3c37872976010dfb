"""ONNX files of a model: a graph that takes log-mel spectrograms, by transformers, and one that takes waveforms."""

import io
import json
import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from packaging.version import Version
from transformers import __version__ as transformers_version
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import CONFIG_NAME, FEATURE_EXTRACTOR_NAME

from ..configuration_asit import HUB_FILES
from ..fbank_asit import PREEMPHASIS, mel_filters, window_and_hop
from ..feature_extraction_asit import ASiTFeatureExtractor
from ..utils.extras import extra

if TYPE_CHECKING:  # of the extra onnx
    from onnx import ModelProto

ONNX_FOLDER = "onnx"
WAVEFORM, WAVEFORM_INT8 = "waveform.onnx", "waveform_int8.onnx"
INT8_FOLDER = "int8"
# The graph and the weights have the names that `ExportedModel.from_pretrained` expects.
_FILES = {
    *(WAVEFORM, WAVEFORM_INT8, "model.onnx", "model.onnx.data", "export.json"),
    *(CONFIG_NAME, FEATURE_EXTRACTOR_NAME, *HUB_FILES, INT8_FOLDER),
}
OPSET = 20  # the first with Gelu; onnxruntime reads it since 1.17
MIN_TRANSFORMERS = "5.23"  # the first with `ExportedModel`
MAX_BYTES = 2**31  # of a protocol buffer
_LOG_MEL_PREFIX = "log_mel/"

# The extractor's computation, step by step. The matrices of the Fourier transform are looked up in one period of the
# cosine, so that the file need not hold them; runtimes compute them once, when they load the file.
_LOG_MEL = """
<ir_version: {ir_version}, opset_import: ["": {opset}]>
log_mel (float[batch, samples] waveform) => (float[batch, frames, {mel_bins}] input_values) {{
    clip_mean = ReduceMean (waveform, last_axis)
    centered = Sub (waveform, clip_mean)
    num_samples = Shape <start = 1, end = 2> (waveform)
    surplus = Sub (window_size, num_samples)
    missing = Max (surplus, zero)
    padding = Concat <axis = 0> (zero, zero, zero, missing)
    padded = Pad (centered, padding)
    padded_samples = Shape <start = 1, end = 2> (padded)
    stop = Sub (padded_samples, before_stop)
    first_sample = Squeeze (zero)
    stop_sample = Squeeze (stop)
    hop_samples = Squeeze (hop)
    starts = Range (first_sample, stop_sample, hop_samples)
    start_column = Unsqueeze (starts, last_axis)
    sample_index = Add (start_column, in_window)
    windows = Gather <axis = 1> (padded, sample_index)
    window_mean = ReduceMean (windows, last_axis)
    frames_of_samples = Sub (windows, window_mean)
    previous = Gather <axis = 2> (frames_of_samples, previous_in_window)
    subtracted = Mul (previous, minus_preemphasis)
    emphasized = Add (subtracted, frames_of_samples)
    weighted = Mul (emphasized, hann)
    window_column = Unsqueeze (in_window, last_axis)
    turns = Mul (window_column, frequency_bins)
    cosine_index = Mod (turns, fft_size)
    shifted_turns = Add (turns, quarter_turn)
    sine_index = Mod (shifted_turns, fft_size)
    cosines = Gather (cosine_period, cosine_index)
    sines = Gather (cosine_period, sine_index)
    real = MatMul (weighted, cosines)
    imaginary = MatMul (weighted, sines)
    real_squares = Mul (real, real)
    imaginary_squares = Mul (imaginary, imaginary)
    power = Add (real_squares, imaginary_squares)
    mel = MatMul (power, filters)
    floored = Max (mel, floor)
    log = Log (floored)
    shifted = Sub (log, mean)
    input_values = Div (shifted, scale)
}}
"""


def log_mel_graph(extractor: ASiTFeatureExtractor, opset: int, ir_version: int) -> "ModelProto":
    """`waveform (batch, samples)` to `input_values (batch, frames, mel)`, in standard operators and float32."""
    from onnx import numpy_helper, parser

    rate, mel_bins = extractor.sampling_rate, extractor.num_mel_bins
    window_size, hop = window_and_hop(rate)
    fft_size = 2 ** math.ceil(math.log2(window_size))
    filters = np.zeros((fft_size // 2, mel_bins), np.float32)
    start = 0
    for bins, half in mel_filters(rate, mel_bins, fft_size):
        filters[bins, start : start + half.shape[1]] = half.numpy()
        start += half.shape[1]
    mean, scale = (extractor.mean, 2 * extractor.std) if extractor.do_normalize else (0, 1)
    in_window = np.arange(window_size)
    integers = {
        **{"zero": [0], "last_axis": [-1], "window_size": [window_size], "hop": [hop], "fft_size": [fft_size]},
        **{"before_stop": [window_size - 1], "quarter_turn": [fft_size // 4], "in_window": in_window},
        **{"previous_in_window": np.maximum(in_window - 1, 0), "frequency_bins": np.arange(fft_size // 2)},
    }
    floats = {
        **{"minus_preemphasis": -PREEMPHASIS, "floor": np.finfo(np.float32).eps, "mean": mean, "scale": scale},
        **{"hann": torch.hann_window(window_size, periodic=False).numpy(), "filters": filters},
        "cosine_period": np.cos(2 * np.pi * np.arange(fft_size) / fft_size),
    }
    model = parser.parse_model(_LOG_MEL.format(ir_version=ir_version, opset=opset, mel_bins=mel_bins))
    values = {name: np.asarray(value, np.int64) for name, value in integers.items()}
    values |= {name: np.asarray(value, np.float32) for name, value in floats.items()}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    return model


def export_onnx(
    model: PreTrainedModel, extractor: ASiTFeatureExtractor, folder: str | os.PathLike, int8: bool = False
) -> None:
    """
    Writes the ONNX files of an encoder, a classifier or a frame classifier, in float32:

    - `model.onnx`, from `input_values` and `attention_mask` to the model's outputs, with the settings that
      `transformers.exporters.ExportedModel.from_pretrained` and a pipeline need beside it;
    - `waveform.onnx`, one file from `waveform`, `(batch, samples)` in [-1, 1] at the extractor's rate, to `logits`
      or, of an encoder, the pooled `embedding`. Its metadata has the rate and the labels, see [`describe`].

    Batch and length are dynamic in both.

    Args:
        model: in evaluation mode, float32, on a CPU.
        extractor: its feature extractor.
        folder: folder to write.
        int8: whether to also write `waveform_int8.onnx`, with the weights of the linear layers in 8 bits, and `int8/`,
            like `model.onnx` and its settings, whose linear layers also compute in 8 bits.

    Raises:
        ImportError: the extra `onnx` is not installed, or transformers is too old.
        ValueError: the weights exceed 2 GB.
    """
    check_requirements()
    import onnx

    if (size := 4 * model.num_parameters()) >= MAX_BYTES:
        raise ValueError(f"expected weights below 2 GB, which one ONNX file can hold, got {size / 1e9:.1f} GB")
    folder, frames = Path(folder), 4 * model.config.patch_size
    inputs = {
        "input_values": torch.zeros(2, frames, model.config.num_mel_bins),
        "attention_mask": torch.ones(2, frames, dtype=torch.long),
    }
    exported = _export(model, inputs)
    exported.save_pretrained(folder)
    extractor.save_pretrained(folder)
    graph = _export(model, {"input_values": inputs["input_values"]}).program
    waveform_graph = _add_log_mel(graph, model, extractor)
    onnx.checker.check_model(waveform_graph, full_check=True)
    onnx.save(waveform_graph, folder / WAVEFORM)
    if int8:
        onnx.save(_quantize_weights(waveform_graph), folder / WAVEFORM_INT8)
        _quantize(exported, inputs).save_pretrained(folder / INT8_FOLDER)
        extractor.save_pretrained(folder / INT8_FOLDER)


def check_requirements() -> None:
    """Raises `ImportError` if the packages that `export_onnx` needs are missing or too old."""
    if Version(transformers_version) < Version(MIN_TRANSFORMERS):
        raise ImportError(f"ONNX needs transformers {MIN_TRANSFORMERS} or later, got {transformers_version}")
    with extra("onnx"):
        for name in ("onnx", "onnxscript", "onnxruntime"):
            import_module(name)


def is_onnx_export(folder: Path) -> bool:
    """Whether `folder` holds what `export_onnx` writes, and nothing else."""
    if not (folder / WAVEFORM).is_file():
        return False
    return all(path.name in _FILES for path in folder.rglob("*"))


def summarize(folder: Path) -> list[str]:
    """A line for every graph in `folder`: its file, size, inputs and outputs."""
    import onnx

    lines = []
    for path in sorted(folder.rglob("*.onnx")):
        graph = onnx.load(path, load_external_data=False).graph
        size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
        inputs, outputs = (", ".join(map(_signature, values)) for values in (graph.input, graph.output))
        lines.append(f"{path}: {size / 1e6:.1f} MB, {inputs} -> {outputs}")
    return lines


def _signature(value: Any) -> str:
    shape = ", ".join(dim.dim_param or str(dim.dim_value) for dim in value.type.tensor_type.shape.dim)
    return f"{value.name} ({shape})"


def describe(model: PreTrainedModel, extractor: ASiTFeatureExtractor) -> dict[str, str]:
    """What a program that has only `waveform.onnx` must know: the metadata in the file."""
    config, facts = model.config, {"sampling_rate": str(extractor.sampling_rate)}
    if not _is_classifier(model):
        return facts | {"output": "embedding (batch, size), the pooled output"}
    by_frame = "Frame" in type(model).__name__
    _, hop = window_and_hop(extractor.sampling_rate)
    single = "regression" if config.num_labels == 1 else "single_label_classification"
    facts |= {
        "output": "logits (batch, time_patches, labels)" if by_frame else "logits (batch, labels)",
        "labels": json.dumps([config.id2label[index] for index in range(config.num_labels)], ensure_ascii=False),
        "problem_type": config.problem_type or single,
    }
    return facts | (
        {"time_patch_seconds": f"{config.patch_size * hop / extractor.sampling_rate:g}"} if by_frame else {}
    )


def _is_classifier(model: PreTrainedModel) -> bool:
    return "Classification" in type(model).__name__


def _export(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Any:
    """An `ExportedModel` of transformers, without half a megabyte of notes on how each node was made."""
    import onnx_ir
    from torch.export import Dim
    from transformers.exporters import OnnxConfig, OnnxExporter

    shapes = dict.fromkeys(inputs, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC})
    with _quiet(), torch.no_grad():
        exported = OnnxExporter().export(model, inputs, OnnxConfig(dynamic_shapes=shapes, opset_version=OPSET))
    graph = exported.program.graph
    for node in graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.outputs):
        second = {"logits": "time_patches", "last_hidden_state": "tokens"}.get(value.name, "frames")
        sizes = zip(value.shape, ("batch", second, ""))
        value.shape = onnx_ir.Shape([size if isinstance(size, int) else name for size, name in sizes])
    return exported


def _quantize(exported: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """An `ExportedModel` whose linear layers compute in int8, by onnxruntime."""
    from transformers.exporters import ExportedModel, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer
    from transformers.exporters.base import ExportedComponent

    ((name, component),) = exported.components.items()
    products = [node.name for node in _products(component.program.graph)]
    config = OnnxRuntimeDynamicConfig(op_types_to_quantize=["MatMul"], nodes_to_quantize=products, per_channel=True)
    with _quiet():
        program = OnnxRuntimeQuantizer(config).quantize(component.program, inputs, exported.export_format)
    components = {name: ExportedComponent(program, component.metadata)}
    return ExportedModel(components, exported.export_format, exported.config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporters' progress and their warnings, which are about their own parts."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _add_log_mel(graph: Any, model: PreTrainedModel, extractor: ASiTFeatureExtractor) -> "ModelProto":
    """A graph from `input_values` to a model's outputs as one from `waveform` to one output, with its metadata."""
    import onnx_ir
    from onnx import compose, helper

    encoded = onnx_ir.to_proto(graph)
    log_mel = log_mel_graph(extractor, OPSET, encoded.ir_version)
    for node in log_mel.graph.node:
        node.name = node.output[0]
    merged = compose.add_prefix(log_mel, _LOG_MEL_PREFIX, rename_inputs=False, rename_outputs=False)
    merged.producer_name, merged.graph.name = "asit_hf", model.config.model_type
    output, name = ("logits", "logits") if _is_classifier(model) else ("pooler_output", "embedding")
    for node in encoded.graph.node:
        node.output[:] = [name if one == output else one for one in node.output]
    (value,) = (one for one in encoded.graph.output if one.name == output)
    value.name = name
    merged.graph.node.extend(encoded.graph.node)
    merged.graph.initializer.extend(encoded.graph.initializer)
    merged.graph.output[0].CopyFrom(value)
    helper.set_model_props(merged, describe(model, extractor))
    return merged


def _products(nodes: Iterable[Any]) -> list[Any]:
    """The matrix products of the transformer layers, without those of log-mel and of the positions before them."""
    layers = dropwhile(lambda node: node.op_type != "LayerNormalization", nodes)
    return [node for node in layers if node.op_type == "MatMul"]


def _quantize_weights(model: "ModelProto") -> "ModelProto":
    """The same graph with the matrices of its linear layers as int8 and one float32 scale for each output."""
    from onnx import ModelProto, helper, numpy_helper

    small = ModelProto()
    small.CopyFrom(model)
    graph = small.graph
    weights = {one.name: one for one in graph.initializer}
    nodes = []
    for name in dict.fromkeys(node.input[1] for node in _products(graph.node) if node.input[1] in weights):
        matrix = numpy_helper.to_array(weights[name])
        scales = np.maximum(np.abs(matrix).max(0), np.finfo(np.float32).tiny) / 127
        values = {f"{name}.int8": np.round(matrix / scales).astype(np.int8), f"{name}.scale": scales}
        graph.initializer.remove(weights[name])
        graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in values.items())
        nodes.append(helper.make_node("DequantizeLinear", [*values], [name], axis=1))
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)
    return small
