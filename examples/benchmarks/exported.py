"""
A classifier's forward pass in onnxruntime (float32 and int8) and in torchao's int8, each against torch in float32; and
the ONNX files that take waveforms, against the feature extractor and torch.
`run.py` does not include it by default: it needs the extras `onnx` and `int8`, and exporting takes a minute.

    pip install "asit-hf[onnx,int8]"
    python examples/benchmarks/exported.py
"""

import copy
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import torch
from common import Report, Row, medians, ranges, run_alone, time_interleaved
from torch.export import Dim
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from training_step import TOY
from transformers.exporters import OnnxConfig, OnnxExporter, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification
from asit_hf.hub.onnx import WAVEFORM, WAVEFORM_INT8, export_onnx

SECONDS = (1, 10)
BATCHES = (1, 4)
BASE = {"num_labels": 527}


def build_batch(config: ASiTConfig, batch: int, frames: int) -> dict[str, torch.Tensor]:
    return {
        "input_values": torch.randn(batch, frames, config.num_mel_bins, generator=torch.Generator().manual_seed(0))
    }


def build_runs(model: ASiTForAudioClassification) -> dict[str, Callable[..., dict[str, torch.Tensor]]]:
    """The models to compare by name, torch in float32 first; all use torch's number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    sample = build_batch(model.config, 2, model.config.num_frames)
    shapes = {"input_values": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    quantizers = {"onnxruntime": None, "onnxruntime int8": OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig())}
    runs = {"torch": model}
    for name, quantizer in quantizers.items():
        exported = OnnxExporter().export(model, sample, OnnxConfig(dynamic_shapes=shapes, quantizer=quantizer))
        runs[name] = exported.to("cpu", session_options=options)
    runs["torchao int8"] = copy.deepcopy(model)
    quantize_(runs["torchao int8"], Int8DynamicActivationInt8WeightConfig())
    return runs


def build_waveform_runs(model: ASiTForAudioClassification) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """From waveforms to logits: extractor and torch first, then the ONNX files."""
    extractor = ASiTFeatureExtractor(num_mel_bins=model.config.num_mel_bins)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    runs = {"extractor and torch": lambda waveforms: model(extractor.extract(waveforms)).logits}
    with TemporaryDirectory() as folder:
        export_onnx(model, extractor, folder, int8=True)
        for name in (WAVEFORM, WAVEFORM_INT8):
            session = onnxruntime.InferenceSession(Path(folder, name), options, providers=["CPUExecutionProvider"])
            runs[name] = lambda waveforms, session=session: torch.from_numpy(
                session.run(None, {"waveform": waveforms.numpy()})[0]
            )
    return runs


@torch.no_grad()
def measure(quick: bool = False) -> Report:
    """Base size, clips of 1 s and 10 s, batches of 1 and 4; the notes give the logits' differences from torch's."""
    report = Report("exported")
    torch.manual_seed(0)
    model = ASiTForAudioClassification(ASiTConfig(**(TOY if quick else BASE))).eval()
    runs = build_runs(model)
    for seconds in SECONDS:
        for batch in BATCHES:
            inputs = build_batch(model.config, batch, 100 * seconds - 2)
            calls = {name: lambda run=run, inputs=inputs: run(**inputs) for name, run in runs.items()}
            found = time_interleaved(calls, rounds=1 if quick else 3)
            middle = medians(found)
            what = f"{seconds} s clips, batch {batch}"
            for name in list(runs)[1:]:
                report.add(Row(f"{name} against torch, {what}", middle[name], middle["torch"]))
            report.notes.append(f"{what}: {ranges(found)}.")
    logits = {name: run(**inputs)["logits"] for name, run in runs.items()}
    waveform_runs = build_waveform_runs(model)
    for seconds in SECONDS:
        waveforms = 0.1 * torch.randn(1, 16000 * seconds, generator=torch.Generator().manual_seed(0))
        calls = {name: lambda run=run, x=waveforms: run(x) for name, run in waveform_runs.items()}
        found = time_interleaved(calls, rounds=1 if quick else 3)
        middle, (baseline, *names) = medians(found), list(calls)
        for name in names:
            report.add(Row(f"{name} against {baseline}, {seconds} s clips", middle[name], middle[baseline]))
        report.notes.append(f"{seconds} s clips, from the waveform: {ranges(found)}.")
    waveform_logits = {name: run(waveforms) for name, run in waveform_runs.items()}
    for name in names:
        difference = (waveform_logits[name] - waveform_logits[baseline]).abs().max() / logits["torch"].std()
        report.notes.append(f"{name}: logits differ by at most {difference:.1g} of their standard deviation.")
    for name in list(runs)[1:]:
        difference = (logits[name] - logits["torch"]).abs().max() / logits["torch"].std()
        report.notes.append(f"{name}: logits differ by at most {difference:.1g} of their standard deviation.")
    return report


if __name__ == "__main__":
    run_alone(measure)
