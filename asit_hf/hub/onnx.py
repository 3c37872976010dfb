"""ONNX files of a model: a graph that takes log-mel spectrograms, by transformers, and one that takes waveforms."""

import io
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import CONFIG_NAME, FEATURE_EXTRACTOR_NAME

from ..configuration_asit import HUB_FILES, ASiTConfig
from ..fbank_asit import HOP_SECONDS, PREEMPHASIS, mel_filters, window_and_hop
from ..feature_extraction_asit import ASiTFeatureExtractor
from ..utils.extras import extra

if TYPE_CHECKING:  # of the extra onnx
    from onnx import ModelProto

ONNX_FOLDER = "onnx"
WAVEFORM, WAVEFORM_INT8 = "waveform.onnx", "waveform_int8.onnx"
# The graph and the weights have the names that `ExportedModel.from_pretrained` expects.
_FILES = {
    *(WAVEFORM, WAVEFORM_INT8, "model.onnx", "model.onnx.data", "export.json"),
    *(CONFIG_NAME, FEATURE_EXTRACTOR_NAME, *HUB_FILES),
}
OPSET = 20  # the first with Gelu; onnxruntime reads it since 1.17
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
        int8: whether to also write `waveform_int8.onnx`, with the weights of the linear layers in 8 bits.

    Raises:
        ModuleNotFoundError: the extra `onnx` is not installed.
    """
    with extra("onnx"):
        import onnx
    folder, frames = Path(folder), 4 * model.config.patch_size
    inputs = {
        "input_values": torch.zeros(2, frames, model.config.num_mel_bins),
        "attention_mask": torch.ones(2, frames, dtype=torch.long),
    }
    _export(model, inputs).save_pretrained(folder)
    extractor.save_pretrained(folder)
    graph = _export(model, {"input_values": inputs["input_values"]}).program
    waveform_graph = _add_log_mel(graph, model.config, extractor)
    onnx.checker.check_model(waveform_graph, full_check=True)
    onnx.save(waveform_graph, folder / WAVEFORM)
    if int8:
        onnx.save(_quantize_weights(waveform_graph), folder / WAVEFORM_INT8)


def is_onnx_export(folder: Path) -> bool:
    """Whether `folder` holds what `export_onnx` writes, and nothing else."""
    return (folder / WAVEFORM).is_file() and all(path.name in _FILES for path in folder.iterdir())


def describe(config: ASiTConfig, extractor: ASiTFeatureExtractor) -> dict[str, str]:
    """What a program that has only `waveform.onnx` must know: the metadata in the file."""
    facts = {"sampling_rate": str(extractor.sampling_rate)}
    if not _is_classifier(config):
        return facts | {"output": "embedding (batch, size), the pooled output"}
    by_frame = "Frame" in config.architectures[0]
    single = "regression" if config.num_labels == 1 else "single_label_classification"
    facts |= {
        "output": "logits (batch, frames, labels)" if by_frame else "logits (batch, labels)",
        "labels": json.dumps([config.id2label[index] for index in range(config.num_labels)], ensure_ascii=False),
        "problem_type": config.problem_type or single,
    }
    return facts | ({"frame_seconds": f"{config.patch_size * HOP_SECONDS:g}"} if by_frame else {})


def _is_classifier(config: ASiTConfig) -> bool:
    return "Classification" in config.architectures[0]


def _export(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Any:
    """An `ExportedModel` of transformers, without the traces of its making, half a megabyte, in every node."""
    from torch.export import Dim
    from transformers.exporters import OnnxConfig, OnnxExporter

    shapes = dict.fromkeys(inputs, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC})
    with _quiet(), torch.no_grad():
        exported = OnnxExporter().export(model, inputs, OnnxConfig(dynamic_shapes=shapes, opset_version=OPSET))
    for node in exported.program.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    return exported


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


def _add_log_mel(graph: Any, config: ASiTConfig, extractor: ASiTFeatureExtractor) -> "ModelProto":
    """A graph from `input_values` to a model's outputs as one from `waveform` to one output, with its metadata."""
    import onnx_ir
    from onnx import compose, helper

    model = onnx_ir.to_proto(graph)
    log_mel = compose.add_prefix(
        log_mel_graph(extractor, OPSET, model.ir_version), _LOG_MEL_PREFIX, rename_inputs=False, rename_outputs=False
    )
    output, name = ("logits", "logits") if _is_classifier(config) else ("pooler_output", "embedding")
    merged = compose.merge_models(log_mel, model, [("input_values", "input_values")], outputs=[output])
    del merged.graph.value_info[:]
    for node in merged.graph.node:
        node.output[:] = [name if one == output else one for one in node.output]
    (value,) = merged.graph.output
    value.name = name
    for dimension, symbol in zip(value.type.tensor_type.shape.dim, ("batch", "frames")):
        if not dimension.HasField("dim_value"):
            dimension.dim_param = symbol
    helper.set_model_props(merged, describe(config, extractor))
    return merged


def _quantize_weights(model: "ModelProto") -> "ModelProto":
    """The same graph with the matrices of its linear layers as int8 and one float32 scale for each output."""
    from onnx import ModelProto, helper, numpy_helper

    small = ModelProto()
    small.CopyFrom(model)
    graph = small.graph
    weights = {one.name: one for one in graph.initializer if not one.name.startswith(_LOG_MEL_PREFIX)}
    names = [node.input[1] for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    nodes = []
    for name in dict.fromkeys(names):
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
