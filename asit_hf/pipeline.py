"""`pipeline("audio-classification")` for ASiT: files of any format, sampling rate and length, without ffmpeg."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import httpx
from torch.utils.data import Dataset
from transformers import AudioClassificationPipeline, AutoFeatureExtractor
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import ChunkPipeline

from .configuration_asit import ASiTConfig
from .data.audio import AudioReader, AudioReadError
from .data.clips import MAX_SECONDS, undecoded
from .data.windows import Windows
from .fbank_asit import WINDOW_SECONDS
from .feature_extraction_asit import MAX_CHANNELS

# A larger one is a mistake: torch's loader lists all its indices before the first clip.
MAX_BATCH_SIZE = 2**16

# Iterables that are one clip, or that torch loads itself.
_NOT_CLIPS = (str, bytes, bytearray, memoryview, io.IOBase, Mapping, np.ndarray, torch.Tensor, Dataset)

_PREPROCESS = ("window_seconds", "overlap")
_POSTPROCESS = ("top_k", "function_to_apply", "aggregate", "return_timeline")
SCORE_FUNCTIONS = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "none": lambda logits: logits,
}
_AGGREGATES = {"mean": lambda scores: scores.mean(0), "max": lambda scores: scores.amax(0)}


class ASiTAudioClassificationPipeline(AudioClassificationPipeline, ChunkPipeline):
    """
    Audio classification of clips of any length. After `import asit_hf`, `pipeline("audio-classification")` returns it
    for ASiT models; `pipeline_class=ASiTAudioClassificationPipeline` selects it explicitly.

    ```python
    >>> from transformers import pipeline
    >>> import asit_hf

    >>> classifier = pipeline("audio-classification", model="path/to/asit")
    >>> classifier("rain.flac", top_k=2)
    [{'score': 0.93, 'label': 'rain'}, {'score': 0.04, 'label': 'wind'}]
    ```
    """

    _load_feature_extractor = None  # `pipeline()` looks for that of an adapter in its folder only

    def __init__(self, *args: Any, **kwargs: Any):
        _check_batch_size(kwargs.get("batch_size"))
        super().__init__(*args, **kwargs)
        if self.feature_extractor is None:
            self.feature_extractor = _feature_extractor_of(self.model)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """
        Classifies one clip or many.

        Args:
            inputs: one clip, or a list, tuple, data set, data set column, or iterator of clips. A clip is a path
                (`str` or `Path`), an http(s) URL, the `bytes` of a file, a numpy array or torch tensor at the model's
                sampling rate, an `{"array" or "raw", "sampling_rate"}` dict at any rate, a `{"path", "bytes"}` dict, a
                decoder with `get_all_samples()` (torchcodec), or a data set's row with one of these in its column
                `"audio"`; if a data set has one audio column, its name does not matter. Data sets' audio is read
                undecoded, without torchcodec. Channels are averaged: of files, of an array in a dict or list, and of
                `(samples, channels)`. A bare array `(rows, samples)` is refused, because the feature extractor, like
                those of Transformers, takes it as a batch; with one row it is one clip for both.
            top_k (`int`, *optional*, defaults to 5): number of labels to return; `None` returns all.
            function_to_apply (`str`, *optional*): `"softmax"`, `"sigmoid"` or `"none"`; default by
                `config.problem_type`: sigmoid for multi-label, none for regression, otherwise softmax.
            window_seconds (`float`, defaults to 30): length of the windows that longer clips are cut into. All have
                this length, and the last one ends with the clip.
            overlap (`float`, defaults to 0.5): fraction of a window that the next one repeats, in [0, 1).
            aggregate (`str`, defaults to `"mean"`): whether a clip's scores are the `"mean"` or `"max"` over windows.
            return_timeline (`bool`, defaults to `False`): whether to also return the labels of every window.
            batch_size (`int`, defaults to 1): windows in one forward pass, from one clip or several.

        Returns:
            For each clip a list of `{"score", "label"}`, best first; with `return_timeline` a dict of these `labels`
            and the `timeline`, a list of `{"start", "end", "labels"}` in seconds. For an iterator or a data set, an
            iterator over these.

        Raises:
            AudioReadError: a clip cannot be read (a `ValueError` with its `source` and the `reason`).
            TypeError, ValueError: an input of another type, or an argument out of range.
        """
        _check_batch_size(kwargs.get("batch_size"))
        _check_is_one_clip(inputs)
        inputs = _audio_column(undecoded(inputs))
        if not isinstance(inputs, Iterable) or isinstance(inputs, _NOT_CLIPS):
            return super().__call__(inputs, **kwargs)
        if isinstance(inputs, Sequence) and len(inputs) == 0:
            return []
        # always a generator: transformers before 5.16 would inspect the first clip of a list
        outputs = super().__call__(_clips(inputs), **kwargs)
        return list(outputs) if isinstance(inputs, Sequence) else outputs

    def check_model_type(self, supported_models: Any) -> None:
        """Accepts any ASiT clip classifier, also wrapped, for example by peft."""
        name, model_type = type(self.model).__name__, self.model.config.model_type
        if model_type != "asit" or name in ("ASiTModel", "ASiTForAudioFrameClassification", "ASiTForPreTraining"):
            raise ValueError(f"expected an ASiTForAudioClassification, got {name} (model_type {model_type!r})")

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict, dict, dict]:
        parameters.pop("local_files_only", None)  # passed on by `pipeline()`
        if unknown := sorted(set(parameters) - {*_PREPROCESS, *_POSTPROCESS}):
            raise TypeError(f"expected arguments among {[*_PREPROCESS, *_POSTPROCESS]}, got {unknown}")
        top_k = parameters.get("top_k")
        if top_k is not None and not (isinstance(top_k, Integral) and top_k >= 1):
            raise ValueError(f"top_k must be None or at least 1, got {top_k!r}")
        for name, choices in (("function_to_apply", [None, *SCORE_FUNCTIONS]), ("aggregate", list(_AGGREGATES))):
            if name in parameters and parameters[name] not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {parameters[name]!r}")
        preprocess = {name: parameters[name] for name in _PREPROCESS if name in parameters}
        label_windows(1, **preprocess)  # raises for options out of range
        postprocess = {name: parameters[name] for name in _POSTPROCESS if name in parameters}
        return preprocess, {}, postprocess

    def preprocess(
        self, inputs: Any, window_seconds: float | None = None, overlap: float = 0.5
    ) -> Iterator[dict[str, Any]]:
        """Yields the features of one clip's windows one by one, so that a long file is never completely in memory."""
        rate = self.feature_extractor.sampling_rate
        windows = label_windows(rate, window_seconds, overlap)
        with AudioReader(_to_source(inputs, rate)) as reader:
            for start, waveform, is_last in windows.read(reader):
                options = {"sampling_rate": rate, "return_attention_mask": True, "return_tensors": "pt"}
                features = self.feature_extractor(waveform, **options).to(dtype=self.dtype)
                end = start + len(waveform)
                yield {**features, "start": start / rate, "end": end / rate, "is_last": is_last}

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        window = {name: model_inputs.pop(name) for name in ("start", "end", "is_last")}
        return {"logits": self.model(**model_inputs).logits, **window}

    def postprocess(
        self,
        model_outputs: list[dict[str, Any]],
        top_k: int | None = 5,
        function_to_apply: str | None = None,
        aggregate: str = "mean",
        return_timeline: bool = False,
    ) -> list[dict[str, Any]] | dict[str, Any]:
        logits = torch.cat([window["logits"] for window in model_outputs]).float()
        scores = SCORE_FUNCTIONS[function_to_apply or default_function(self.model.config)](logits)
        labels = self._top_labels(_AGGREGATES[aggregate](scores), top_k)
        if not return_timeline:
            return labels
        timeline = [
            {"start": window["start"], "end": window["end"], "labels": self._top_labels(window_scores, top_k)}
            for window, window_scores in zip(model_outputs, scores)
        ]
        return {"labels": labels, "timeline": timeline}

    def _top_labels(self, scores: torch.Tensor, top_k: int | None) -> list[dict[str, Any]]:
        best = scores.topk(len(scores) if top_k is None else min(top_k, len(scores)))
        pairs = zip(best.values.tolist(), best.indices.tolist())
        return [{"score": score, "label": self.model.config.id2label[index]} for score, index in pairs]


def default_function(config: ASiTConfig) -> str:
    """The name of the function, of `SCORE_FUNCTIONS`, that turns a model's logits into scores."""
    if config.problem_type == "multi_label_classification":
        return "sigmoid"
    is_regression = config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)
    return "none" if is_regression else "softmax"


def label_windows(sampling_rate: int, window_seconds: float | None = None, overlap: float = 0.5) -> Windows:
    """
    The windows of clips to label; options as in [`ASiTAudioClassificationPipeline`]. Raises `ValueError` for one that
    is out of range.
    """
    if window_seconds is not None and not (isinstance(window_seconds, Real) and window_seconds >= WINDOW_SECONDS):
        raise ValueError(f"window_seconds must be None or at least {WINDOW_SECONDS}, got {window_seconds!r}")
    if not (isinstance(overlap, Real) and 0 <= overlap < 1):
        raise ValueError(f"overlap must be in [0, 1), got {overlap!r}")
    length = round((MAX_SECONDS if window_seconds is None else window_seconds) * sampling_rate)
    return Windows(sampling_rate, length, step=max(1, round(length * (1 - overlap))))


class _AudioClassification(AudioClassificationPipeline):
    """The task's registered class: builds ASiT's pipeline for ASiT models, transformers' own for all others."""

    _load_feature_extractor = None

    def __new__(cls, *args: Any, model: Any, **kwargs: Any) -> AudioClassificationPipeline:
        if getattr(model.config, "model_type", None) == "asit":
            return ASiTAudioClassificationPipeline(*args, model=model, **kwargs)
        if kwargs.get("feature_extractor") is None:
            kwargs["feature_extractor"] = _feature_extractor_of(model)
        return AudioClassificationPipeline(*args, model=model, **kwargs)


def _feature_extractor_of(model: Any) -> Any:
    """The feature extractor saved with a model, or an error that says where there is none."""
    # an `ExportedModel` of transformers has no name, but its configuration has
    if not (name := getattr(model, "name_or_path", "") or getattr(model.config, "name_or_path", "")):
        raise ValueError("expected a feature_extractor, got None")
    return AutoFeatureExtractor.from_pretrained(name)


def register_pipeline() -> None:
    """Makes `pipeline("audio-classification")` choose by the model: ASiT's pipeline, or transformers' own."""
    # not `PIPELINE_REGISTRY.register_pipeline`, which drops the task's default model and warns at every import
    PIPELINE_REGISTRY.supported_tasks["audio-classification"]["impl"] = _AudioClassification


def _check_batch_size(batch_size: int | None) -> None:
    if batch_size is not None and not (isinstance(batch_size, Integral) and 1 <= batch_size <= MAX_BATCH_SIZE):
        raise ValueError(f"batch_size must be an integer from 1 to {MAX_BATCH_SIZE}, got {batch_size!r}")


def _check_is_one_clip(inputs: Any) -> None:
    shape = tuple(inputs.shape) if isinstance(inputs, (np.ndarray, torch.Tensor)) else ()
    if len(shape) == 2 and shape[0] > 1 and not shape[1] <= MAX_CHANNELS < shape[0]:
        raise ValueError(
            f"expected one clip, got an array of shape {shape}, a batch or channels: pass list(array) for {shape[0]} "
            'clips, or {"array": array, "sampling_rate": ...} for one clip whose channels are averaged'
        )


def _clips(inputs: Iterable) -> Iterator[Any]:
    try:
        yield from inputs
    except ImportError as error:
        if "torchcodec" not in str(error):
            raise
        hint = 'cast_column("audio", Audio(decode=False)) before map, rename_column and the like needs no torchcodec'
        raise ImportError(f"{error} {hint}") from error


def _audio_column(inputs: Any) -> Any:
    """The only audio column of a data set that has none called `audio`; anything else is unchanged."""
    features = getattr(inputs, "features", None)
    if not hasattr(inputs, "select_columns") or not features or "audio" in features:
        return inputs
    columns = [name for name, feature in features.items() if type(feature).__name__ == "Audio"]
    return (row[columns[0]] for row in inputs.select_columns(columns)) if len(columns) == 1 else inputs


def _to_source(clip: Any, sampling_rate: int) -> Any:
    """Converts a clip to a source for `AudioReader`: unpacks rows, adds the rate to arrays, downloads URLs."""
    if isinstance(clip, dict) and "audio" in clip:
        clip = clip["audio"]
    if isinstance(clip, (np.ndarray, torch.Tensor)):
        return {"array": clip, "sampling_rate": sampling_rate}
    if isinstance(clip, str) and clip.startswith(("http://", "https://")):
        try:
            return httpx.get(clip, follow_redirects=True).raise_for_status().content
        except httpx.HTTPError as error:
            raise AudioReadError(clip, str(error)) from error
    return clip
