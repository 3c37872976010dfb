r"""
Compares the labels of a classifier's ONNX files with those of the pipeline, on the clips of a labelled data set.

    python -m asit_hf.hub export MODEL DIR --onnx --int8
    python examples/benchmarks/exported_labels.py DIR --data "$ASIT_REAL_AUDIO/esc50-16k" --corpus esc50 \
        --filters fold=4
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from tqdm.auto import tqdm
from transformers import pipeline
from transformers.exporters import ExportedModel

from asit_hf.data import LabelledClips
from asit_hf.data.labelled import load_labelled
from asit_hf.pipeline import ASiTAudioClassificationPipeline
from asit_hf.predict import load_classifier
from asit_hf.utils.arguments import run_script


def waveform_logits(file: Path) -> Callable[[np.ndarray], np.ndarray]:
    session = onnxruntime.InferenceSession(file)
    return lambda waveform: session.run(None, {"waveform": waveform[None]})[0][0]


def pipeline_logits(classifier: ASiTAudioClassificationPipeline) -> Callable[[np.ndarray], np.ndarray]:
    names = classifier.model.config.id2label

    def logits(waveform: np.ndarray) -> np.ndarray:
        found = classifier(waveform, top_k=None, function_to_apply="none")
        by_label = {one["label"]: one["score"] for one in found}
        return np.array([by_label[names[index]] for index in range(len(names))])

    return logits


def main(arguments: list[str] | None = None) -> dict[str, tuple[int, float]]:
    """Prints and returns, for every graph, the clips with the pipeline's first label and the largest difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a classifier for single labels, exported with ONNX files")
    parser.add_argument("--data", required=True, help="folder of class folders, csv or json manifest")
    parser.add_argument("--corpus", help="published data set that --data is the root folder of")
    parser.add_argument("--filters", nargs="+", default=(), metavar="COLUMN=V1,V2", help="keep rows with these values")
    args = parser.parse_args(arguments)
    classifier = load_classifier(args.model, "cpu")
    folders = [folder for folder in (args.model / "onnx", args.model / "onnx" / "int8") if folder.is_dir()]
    graphs = {file.name: waveform_logits(file) for file in sorted(folders[0].glob("waveform*.onnx"))}
    for folder in folders:
        exported = pipeline(
            "audio-classification",
            model=ExportedModel.from_pretrained(folder),
            feature_extractor=classifier.feature_extractor,
        )
        graphs[f"{folder.name}/"] = pipeline_logits(exported)
    torch_logits, expected, found = pipeline_logits(classifier), [], {name: [] for name in graphs}
    clips = LabelledClips(
        load_labelled(args.data, args.filters, corpus=args.corpus), classifier.feature_extractor.sampling_rate
    )
    for index in tqdm(range(len(clips)), unit="clip"):
        waveform = clips[index]["waveform"]
        expected.append(torch_logits(waveform))
        for name, logits in graphs.items():
            found[name].append(logits(waveform))
    results = {}
    scores = torch.tensor(np.stack(expected)).softmax(-1)
    for name, rows in found.items():
        others = torch.tensor(np.stack(rows)).softmax(-1)
        same = int((others.argmax(-1) == scores.argmax(-1)).sum())
        results[name] = same, float((others - scores).abs().max())
        print(f"{name}: the pipeline's label for {same} of {len(rows)} clips, scores within {results[name][1]:.2g}")
    return results


if __name__ == "__main__":
    run_script(main)
