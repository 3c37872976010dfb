"""A page to try an ASiT checkpoint on a sound: `python app.py --model FOLDER_OR_HUB_NAME`, or set ASIT_MODEL."""

import argparse
import html
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from matplotlib.figure import Figure

from asit_hf import ASiTAudioClassificationPipeline, ASiTFeatureExtractor, ASiTForPreTraining, ASiTPreTrainedModel
from asit_hf.data.audio import AudioReader, AudioReadError
from asit_hf.evaluation.attention import attention_rollout
from asit_hf.listen import default_window_seconds
from asit_hf.loading import is_pretraining_checkpoint, load_config, load_feature_extractor, resolve_checkpoint
from asit_hf.plotting import plot_attention, plot_log_mel, plot_reconstruction, plot_timeline
from asit_hf.predict import load_classifier
from asit_hf.pretraining.reconstruction import reconstruct

MAX_SECONDS = 600  # for longer sounds there is `python -m asit_hf.predict`
VIEW_SECONDS = 10  # the cost of attention and reconstruction is quadratic in the length


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; `classifier` is `None` for a pretraining checkpoint."""

    model: ASiTPreTrainedModel
    extractor: ASiTFeatureExtractor
    classifier: ASiTAudioClassificationPipeline | None

    @property
    def window_seconds(self) -> float:
        """Longer sounds get a timeline."""
        return default_window_seconds(self.model.config)


def load_checkpoint(name: str) -> Checkpoint:
    """Loads a classifier or pretraining checkpoint from a folder or Hub name; others raise `ValueError`."""
    if not is_pretraining_checkpoint(load_config(name)):
        classifier = load_classifier(name)
        return Checkpoint(classifier.model, classifier.feature_extractor, classifier)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ASiTForPreTraining.from_pretrained(resolve_checkpoint(name)).eval().to(device)
    return Checkpoint(model, load_feature_extractor(name), None)


def read_sound(checkpoint: Checkpoint, path: str) -> np.ndarray:
    """The waveform `(samples,)` at the model's rate; `AudioReadError` for an unreadable or too long sound."""
    rate = checkpoint.extractor.sampling_rate
    with AudioReader(path) as reader:
        if reader.info.duration > MAX_SECONDS:
            reason = f"it lasts {reader.info.duration:.0f} s, this page takes up to {MAX_SECONDS} s"
            raise AudioReadError(path, reason)
        return reader.read(rate)


def features(checkpoint: Checkpoint, waveform: np.ndarray, seconds: float | None = None) -> torch.Tensor:
    """Log-mel `(frames, mel)` of the first `seconds`, or of the whole sound."""
    rate = checkpoint.extractor.sampling_rate
    waveform = waveform if seconds is None else waveform[: round(seconds * rate)]
    return checkpoint.extractor(waveform, sampling_rate=rate, return_tensors="pt")["input_values"][0]


def labels_view(
    checkpoint: Checkpoint, waveform: np.ndarray, window_seconds: float
) -> tuple[dict[str, float], Figure | None]:
    """Scores of all labels and, for a sound longer than one window, the timeline."""
    sound = {"array": waveform, "sampling_rate": checkpoint.extractor.sampling_rate}
    result = checkpoint.classifier(
        sound, top_k=None, window_seconds=window_seconds, return_timeline=True, batch_size=8
    )
    labels = {entry["label"]: entry["score"] for entry in result["labels"]}
    return labels, plot_timeline(result["timeline"]) if len(result["timeline"]) > 1 else None


def log_mel_view(checkpoint: Checkpoint, waveform: np.ndarray) -> Figure:
    return plot_log_mel(features(checkpoint, waveform))


def attention_view(checkpoint: Checkpoint, waveform: np.ndarray) -> Figure:
    log_mel = features(checkpoint, waveform, VIEW_SECONDS)
    title = f"attention rollout (first {VIEW_SECONDS} s)"
    return plot_attention(log_mel, attention_rollout(checkpoint.model, log_mel), title)


def reconstruction_view(checkpoint: Checkpoint, waveform: np.ndarray) -> Figure | None:
    """`None` for a sound shorter than one patch."""
    log_mel = features(checkpoint, waveform, VIEW_SECONDS)
    if len(log_mel) < checkpoint.model.config.patch_size:
        return None
    return plot_reconstruction(**reconstruct(checkpoint.model, log_mel))


def show(checkpoint: Checkpoint, path: str | None, window_seconds: float | None = None) -> list:
    """
    The page's outputs: labels, timeline, log-mel and attention; for a pretraining checkpoint log-mel, attention and
    reconstruction. A sound that cannot be read raises a `gr.Error`, shown as one line on the page.
    """
    if path is None:
        return [None] * (3 if checkpoint.classifier is None else 4)
    try:
        waveform = read_sound(checkpoint, path)
    except AudioReadError as error:
        message = html.escape(f"Cannot read {Path(path).name}: {error.reason}")
        raise gr.Error(message, duration=None, print_exception=False) from error
    pictures = [log_mel_view(checkpoint, waveform), attention_view(checkpoint, waveform)]
    if checkpoint.classifier is None:
        return [*pictures, reconstruction_view(checkpoint, waveform)]
    return [*labels_view(checkpoint, waveform, window_seconds), *pictures]


def build_page(checkpoint: Checkpoint, name: str) -> gr.Blocks:
    """The interface: a sound on the left, the checkpoint's outputs on the right."""
    with gr.Blocks(title="ASiT", analytics_enabled=False) as page:
        gr.Markdown(f"# ASiT\nRecord or upload a sound to try **{html.escape(Path(name).name)}**.")
        with gr.Row():
            with gr.Column(scale=2):
                sound = gr.Audio(type="filepath", label="sound", buttons=["download"])
                inputs, outputs = [sound], []
                if checkpoint.classifier is not None:
                    seconds = checkpoint.window_seconds
                    inputs.append(gr.Slider(1, max(30, seconds), seconds, step=0.1, label="window (seconds)"))
                    outputs.append(gr.Label(num_top_classes=5, label="labels"))
            with gr.Column(scale=3):
                outputs.extend(gr.Plot(show_label=False) for _ in range(3))
        changes = [sound.change, *(control.release for control in inputs[1:])]
        gr.on(changes, partial(show, checkpoint), inputs, outputs, show_progress="minimal")
    return page


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument(
        "--model",
        default=os.environ.get("ASIT_MODEL"),
        help="folder or Hub name of a classifier or pretraining checkpoint (default: $ASIT_MODEL)",
    )
    args = parser.parse_args(arguments)
    if not args.model:
        parser.error("expected a model: pass --model, or set ASIT_MODEL, to a folder or Hub name")
    try:
        checkpoint = load_checkpoint(args.model)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    # the default theme downloads its fonts from another server
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    build_page(checkpoint, args.model).launch(theme=theme)


if __name__ == "__main__":
    main()
