"""ASiT feature extractor: waveforms to normalized log-mel spectrograms, in batch, on the waveforms' device."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from io import BytesIO
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, FeatureExtractionMixin
from transformers.utils import FEATURE_EXTRACTOR_NAME, PaddingStrategy, TensorType, logging

from .configuration_asit import SavesHubFiles, read_adapter
from .fbank_asit import log_mel_spectrogram, num_fbank_frames, whole_rate, window_and_hop

# A base only because Trainer pads clips of different lengths by default for no other class. Nothing that it adds to
# FeatureExtractionMixin is used: versions of Transformers to come make it an audio processor, and then remove it.
try:
    from transformers import SequenceFeatureExtractor
except ImportError:
    SequenceFeatureExtractor = FeatureExtractionMixin
if not issubclass(SequenceFeatureExtractor, FeatureExtractionMixin):
    SequenceFeatureExtractor = FeatureExtractionMixin

logger = logging.get_logger(__name__)

# A last axis of at most this size is taken for channels, as soundfile returns them; clips are longer.
MAX_CHANNELS = 8

RawSpeech = np.ndarray | torch.Tensor | list[float] | list[np.ndarray] | list[torch.Tensor] | list[list[float]]


def read_audio(source: str | PathLike | bytes | dict[str, Any], sampling_rate: int) -> np.ndarray:
    """
    Mono waveform `(samples,)` at `sampling_rate` Hz of the path or content of a file that libsndfile reads (wav, flac,
    ogg, mp3, ...), or of an `{"array", "sampling_rate"}` dict.
    """
    if not isinstance(source, dict):
        file = source if isinstance(source, (str, PathLike)) else BytesIO(source)
        source = dict(zip(("array", "sampling_rate"), import_module("soundfile").read(file, dtype="float32")))
    array, rate = torch.as_tensor(source["array"]).detach().cpu(), whole_rate(source["sampling_rate"])
    if array.dtype in (torch.int16, torch.int32):  # PCM
        array = array.float() / -torch.iinfo(array.dtype).min
    if not array.is_floating_point():  # an error of `__call__`
        return array.numpy()
    array = array.float()
    if array.ndim == 2:
        array = array.mean(int(np.argmin(array.shape)))
    if rate == sampling_rate or array.ndim != 1 or array.numel() == 0:
        return array.numpy()
    return import_module("soxr").resample(array.numpy(), rate, sampling_rate, quality="HQ")


class ASiTFeatureExtractor(SavesHubFiles, SequenceFeatureExtractor):
    r"""
    Turns waveforms into `input_values`: Kaldi log-mel filter banks normalized as `(x - mean) / (2 * std)`.

    The defaults are the statistics of AudioSet, which the published checkpoints use. Clips shorter than one 25 ms
    window are padded with zeros. Padded frames hold `padding_value` and are 0 in `attention_mask`. Other options than
    these have no effect and give a warning.

    Args:
        feature_size (`int`, *optional*): width of the sequences that `pad` accepts: `num_mel_bins` (default) or 1.
        sampling_rate (`int`, defaults to 16000): required sampling rate of the waveforms in Hz.
        padding_value (`float`, defaults to 0.0): value of padded frames, on the scale of `input_values`.
        num_mel_bins (`int`, defaults to 128): number of mel bins.
        mean (`float`, defaults to -4.2677393): mean of the log-mel values.
        std (`float`, defaults to 4.5689974): their standard deviation.
        return_attention_mask (`bool`, defaults to `True`): whether to return `attention_mask`.
        do_normalize (`bool`, defaults to `True`): whether to normalize; `False` returns the log-mel values.
    """

    model_input_names = ["input_values", "attention_mask"]
    read_audio = staticmethod(read_audio)  # asit_hf, where it is imported, sets its own, which reads more formats

    def __init__(
        self,
        feature_size: int | None = None,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        num_mel_bins: int = 128,
        mean: float = -4.2677393,
        std: float = 4.5689974,
        return_attention_mask: bool = True,
        do_normalize: bool = True,
        **kwargs: Any,
    ):
        _warn_of_unknown(kwargs)
        if kwargs.get("padding_side", "right") != "right":
            raise ValueError(f"padding_side must be 'right', as the models expect, got {kwargs['padding_side']!r}")
        feature_size = int(num_mel_bins if feature_size is None else feature_size)
        if feature_size not in (1, num_mel_bins):
            raise ValueError(f"feature_size must be num_mel_bins {num_mel_bins} or 1, got {feature_size}")
        # scalars of numpy or torch too, which no settings file could hold
        sampling_rate, mean, std, padding_value = (
            whole_rate(sampling_rate),
            float(mean),
            float(std),
            float(padding_value),
        )
        num_mel_bins, do_normalize = int(num_mel_bins), bool(do_normalize)
        for name, value in {"num_mel_bins": num_mel_bins, "std": std}.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        FeatureExtractionMixin.__init__(self, **{"padding_side": "right", **kwargs})
        self.feature_size = feature_size
        self.sampling_rate = sampling_rate
        self.padding_value = padding_value
        self.return_attention_mask = return_attention_mask
        self.num_mel_bins = num_mel_bins
        self.mean = mean
        self.std = std
        self.do_normalize = do_normalize

    @classmethod
    def from_dict(cls, feature_extractor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Transformers, but options also override fields that the saved file lacks."""
        saved = {**feature_extractor_dict, **{name: kwargs.pop(name) for name in [*kwargs] if name in _FIELDS}}
        if not kwargs.get("return_unused_kwargs"):
            _warn_of_unknown(kwargs)
        return super().from_dict(saved, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; an adapter of peft saved without a feature extractor has that of its base model."""
        folder = pretrained_model_name_or_path
        adapter = None if (Path(folder) / FEATURE_EXTRACTOR_NAME).is_file() else read_adapter(folder)
        path = folder if adapter is None else adapter["base_model_name_or_path"]
        return super().from_pretrained(path, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers, with this class as the processor, so that `AutoProcessor` need not ask for one."""
        return {**super().to_dict(), "processor_class": type(self).__name__}

    def normalize(self, log_mel: torch.Tensor) -> torch.Tensor:
        """`(x - mean) / (2 * std)`, any shape; with `do_normalize=False` the values themselves."""
        return (log_mel - self.mean) / (2 * self.std) if self.do_normalize else log_mel

    def extract(self, waveforms: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """
        Converts a batch of waveforms at this extractor's rate to model input, without checks or padding.

        Args:
            waveforms (`torch.Tensor` of shape `(..., samples)`): floating point in [-1, 1] or int16 PCM, zero beyond
                each clip's length.
            lengths (`torch.Tensor` of shape `(...)`, *optional*): number of samples of each clip, over which its mean
                is removed first; by default all samples.

        Returns:
            `torch.Tensor` of shape `(..., frames, num_mel_bins)`, float32, on the waveforms' device.
        """
        waveforms = waveforms.float() * 2**-15 if waveforms.dtype == torch.int16 else waveforms.float()
        if lengths is None:
            waveforms = waveforms - waveforms.mean(-1, keepdim=True)
        else:
            real = torch.arange(waveforms.shape[-1], device=waveforms.device) < lengths[..., None]
            mean = waveforms.sum(-1, keepdim=True) / lengths[..., None]
            waveforms = (waveforms - mean) * real
        log_mel = log_mel_spectrogram(waveforms, self.sampling_rate, self.num_mel_bins)
        # `normalize`, in place
        return log_mel.sub_(self.mean).div_(2 * self.std) if self.do_normalize else log_mel

    def __call__(
        self,
        raw_speech: RawSpeech,
        sampling_rate: int | None = None,
        padding: bool | str | PaddingStrategy = True,
        truncation: bool = False,
        num_frames: int | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | TensorType | None = None,
        resample: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Extracts features of one waveform or a batch.

        Args:
            raw_speech: one mono waveform of shape `(samples,)`, or a batch as a list or an array of shape
                `(batch, samples)`, as in Transformers: average the channels of stereo first. Waveforms are numpy
                arrays, torch tensors (whose device is kept) or lists of floats in [-1, 1]; int16 and int32 PCM is
                scaled to that range.
            sampling_rate (`int`, or an array or tensor of one): sampling rate of the waveforms in Hz, which must be
                this extractor's.
            padding (`bool` or `str`, defaults to `True`): `True` or `"longest"` pads to the longest clip,
                `"max_length"` to `num_frames`, and `False` does not pad.
            truncation (`bool`, defaults to `False`): cut clips to `num_frames`.
            num_frames (`int`, *optional*): target length of padding and truncation, in frames of 10 ms.
            max_length (`int`, *optional*): alias of `num_frames`.
            pad_to_multiple_of (`int`, *optional*): round the padded length up to a multiple of this.
            return_attention_mask (`bool`, *optional*): overrides the extractor's setting.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`; by default, lists of numpy arrays.
            resample (`bool`, defaults to `False`): also accept paths and contents of files, waveforms of any
                `sampling_rate`, and channels `(channels, samples)` or `(samples, channels)`, which are averaged: one
                clip, or a list of clips. Without `asit_hf` this needs soundfile for files and soxr for other rates.

        Returns:
            [`BatchFeature`] with `input_values` of shape `(batch, frames, num_mel_bins)` and, unless disabled,
            `attention_mask` of shape `(batch, frames)`, 1 for real frames.

        Raises:
            `ValueError`: the sampling rate differs, or a waveform is empty, not mono or not finite.
        """
        if kwargs:
            raise TypeError(f"unexpected arguments {sorted(kwargs)}; see ASiTFeatureExtractor.__call__")
        if resample:
            raw_speech, sampling_rate = self._read(raw_speech, sampling_rate), self.sampling_rate
        self._check_rate(sampling_rate)
        if None not in (num_frames, max_length) and num_frames != max_length:
            raise ValueError(f"max_length is an alias of num_frames, got {num_frames} and {max_length}")
        num_frames = num_frames if num_frames is not None else max_length
        strategy = _padding_strategy(padding, truncation, pad_to_multiple_of, num_frames=num_frames)
        clips = [self._to_tensor(clip, index) for index, clip in enumerate(self._to_clips(raw_speech))]

        # one clip fits a CPU's cache; an accelerator is fastest with all at once
        groups = [[clip] for clip in clips] if clips[0].device.type == "cpu" else [clips]
        features = [feature for group in groups for feature in self._extract_clips(group)]
        if truncation:
            features = [feature[:num_frames] for feature in features]
        outputs = {"input_values": features}
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            outputs["attention_mask"] = [feature.new_ones(len(feature), dtype=torch.long) for feature in features]
        return self._pad_and_stack(outputs, strategy, num_frames, pad_to_multiple_of, return_tensors)

    def pad(
        self,
        processed_features: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str | PaddingStrategy = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | TensorType | None = None,
    ) -> BatchFeature:
        """
        Pads features of several clips, as the feature extractors of Transformers do: `DataCollatorWithPadding` of this
        extractor collates clips of different lengths.

        Args:
            processed_features: the clips' features and other values such as labels, as a list of one mapping per clip
                or a mapping of lists. `input_values` are of shape `(frames, feature_size)`, or `(frames,)` if
                `feature_size` is 1: tensors, arrays or lists.
            padding (`bool` or `str`, defaults to `True`): as in `__call__`, with `"max_length"` for `max_length`.
            max_length (`int`, *optional*): target length of padding and truncation, in frames.
            truncation (`bool`, defaults to `False`): cut features to `max_length`, rounded up to `pad_to_multiple_of`.
            pad_to_multiple_of (`int`, *optional*): round the padded length up to a multiple of this.
            return_attention_mask (`bool`, *optional*): whether to add an `attention_mask` where there is none; by
                default the extractor's setting.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`; by default, tensors if the features are tensors,
                otherwise arrays.

        Returns:
            [`BatchFeature`] with all values stacked, float64 as float32; other values than `input_values` and
            `attention_mask` are not padded.

        Raises:
            `ValueError`: there are no `input_values`, their shape is another, the values have different numbers of
                clips, or lengths that differ where tensors are wanted.
        """
        strategy = _padding_strategy(padding, truncation, pad_to_multiple_of, max_length=max_length)
        if not isinstance(processed_features, Mapping):
            clips = [dict(clip) for clip in processed_features]
            processed_features = {name: [clip[name] for clip in clips] for name in (clips[0] if clips else ())}
        if "input_values" not in processed_features:
            raise ValueError(f"expected features with input_values, got {sorted(processed_features)}")
        wants_mask = self.return_attention_mask if return_attention_mask is None else return_attention_mask
        if len(processed_features["input_values"]) == 0:
            return BatchFeature({**processed_features, **({"attention_mask": []} if wants_mask else {})})
        if return_tensors is None:
            return_tensors = "pt" if _is_tensor(processed_features["input_values"][0]) else "np"

        outputs = {name: [_as_tensor(one, name) for one in values] for name, values in processed_features.items()}
        if len({len(values) for values in outputs.values()}) > 1:
            counts = {name: len(values) for name, values in outputs.items()}
            raise ValueError(f"expected one value per clip, got {counts}")
        width = (self.feature_size,) if self.feature_size > 1 else ()
        for index, feature in enumerate(outputs["input_values"]):
            if feature.ndim == 0 or feature.shape[1:] != width:
                expected = f"(frames, {self.feature_size})" if width else "(frames,)"
                raise ValueError(f"input_values {index}: expected shape {expected}, got {tuple(feature.shape)}")
        if wants_mask and "attention_mask" not in outputs:
            outputs["attention_mask"] = [one.new_ones(len(one), dtype=torch.int32) for one in outputs["input_values"]]
        if truncation:
            limit = _round_up(max_length, pad_to_multiple_of)
            for name in outputs.keys() & set(self.model_input_names):
                outputs[name] = [one[:limit] for one in outputs[name]]
        return self._pad_and_stack(outputs, strategy, max_length, pad_to_multiple_of, return_tensors)

    def _pad_and_stack(
        self,
        outputs: dict[str, list[torch.Tensor]],
        strategy: PaddingStrategy,
        max_length: int | None,
        pad_to_multiple_of: int | None,
        return_tensors: str | TensorType | None,
    ) -> BatchFeature:
        if strategy != PaddingStrategy.DO_NOT_PAD:
            longest = max(len(feature) for feature in outputs["input_values"])
            target = _round_up(longest if strategy == PaddingStrategy.LONGEST else max_length, pad_to_multiple_of)
            fills = {"input_values": self.padding_value, "attention_mask": 0}
            for name in outputs.keys() & fills.keys():
                outputs[name] = [_pad(one, target, fills[name]) for one in outputs[name]]
        if return_tensors is None or TensorType(return_tensors) != TensorType.PYTORCH:
            arrays = {name: [one.cpu().numpy()[()] for one in values] for name, values in outputs.items()}
            return BatchFeature(arrays, tensor_type=return_tensors)
        for name, values in outputs.items():
            lengths = sorted({len(one) for one in values if one.ndim > 0})
            if len(lengths) > 1:
                raise ValueError(f"{name} of lengths {lengths} cannot be stacked: use padding=True")
        return BatchFeature({name: torch.stack(values) for name, values in outputs.items()})

    def _read(self, sources: Any, sampling_rate: int | None) -> list[np.ndarray]:
        """Mono waveforms at this extractor's rate of one source or a list of them, for `resample`."""
        if not isinstance(sources, (list, tuple)) or (len(sources) and isinstance(sources[0], Real)):
            sources = [sources]
        waveforms = []
        for source in sources:
            if not isinstance(source, (str, PathLike, bytes, bytearray, memoryview)):
                if sampling_rate is None:
                    self._check_rate(None)
                source = {"array": source, "sampling_rate": sampling_rate or self.sampling_rate}
            waveforms.append(self.read_audio(source, self.sampling_rate))
        return waveforms

    def _check_rate(self, sampling_rate: int | None) -> None:
        if sampling_rate is None:
            logger.warning_once(
                f"{type(self).__name__} assumes {self.sampling_rate} Hz; pass sampling_rate to have the rate checked"
            )
        elif whole_rate(sampling_rate) != self.sampling_rate:
            raise ValueError(f"expected waveforms at {self.sampling_rate} Hz, got {sampling_rate} Hz: resample them")

    @staticmethod
    def _to_clips(raw_speech: RawSpeech) -> list:
        if isinstance(raw_speech, (np.ndarray, torch.Tensor)):
            got = f"got an array of shape {tuple(raw_speech.shape)}"
            if raw_speech.ndim not in (1, 2):
                raise ValueError(f"expected mono audio (samples,) or a batch (batch, samples), {got}")
            if raw_speech.shape[0] > MAX_CHANNELS >= raw_speech.shape[-1] and raw_speech.ndim == 2:
                raise ValueError(f"expected mono audio, {got}, which looks like (samples, channels)")
            if raw_speech.ndim == 2 and len(raw_speech) == 0:
                raise ValueError(f"expected at least one waveform, {got}")
            return [raw_speech] if raw_speech.ndim == 1 else list(raw_speech)
        if not isinstance(raw_speech, (list, tuple)):
            raise ValueError(f"expected a numpy array, a torch tensor or a list, got {type(raw_speech).__name__}")
        if len(raw_speech) == 0:
            raise ValueError("expected at least one waveform, got an empty list")
        return list(raw_speech) if np.ndim(raw_speech[0]) > 0 else [raw_speech]

    @staticmethod
    def _to_tensor(clip: np.ndarray | torch.Tensor | list[float], index: int) -> torch.Tensor:
        if not isinstance(clip, torch.Tensor):
            clip = _to_array(clip, index)
        if clip.ndim != 1:
            raise ValueError(f"waveform {index} must be mono, of shape (samples,), got shape {tuple(clip.shape)}")
        if isinstance(clip, np.ndarray):  # torch warns of read-only arrays, so only those are copied ("W": writable)
            clip = torch.from_numpy(np.require(clip, None, ["C", "W"]))
        clip = clip.detach()
        if clip.dtype in (torch.int16, torch.int32):  # PCM
            clip = clip.float() / -torch.iinfo(clip.dtype).min
        if not clip.is_floating_point():
            raise ValueError(f"waveform {index} must be floating point, or PCM as int16 or int32, got {clip.dtype}")
        if clip.numel() == 0:
            raise ValueError(f"waveform {index} is empty")
        # a cheap test first: if the sum is finite, so are all values
        if not torch.isfinite(clip.sum()) and not torch.isfinite(clip).all():
            raise ValueError(f"waveform {index} contains values that are not finite (NaN or infinity)")
        return clip.float()

    def _extract_clips(self, clips: list[torch.Tensor]) -> list[torch.Tensor]:
        """Features of clips of any lengths, computed as one batch. Frames do not reach beyond a clip's samples."""
        window, _ = window_and_hop(self.sampling_rate)
        lengths = [len(clip) for clip in clips]
        samples = max(*lengths, window)
        batch = clips[0].new_zeros(len(clips), samples)
        for row, clip in zip(batch, clips):
            row[: len(clip)] = clip
        same_length = all(length == samples for length in lengths)
        features = self.extract(batch, None if same_length else torch.tensor(lengths, device=batch.device))
        frames = [num_fbank_frames(max(length, window), self.sampling_rate) for length in lengths]
        return [feature[:count] for feature, count in zip(features, frames)]


_FIELDS = [name for name in signature(ASiTFeatureExtractor.__init__).parameters if name not in ("self", "kwargs")]
# written or passed on by transformers and its users for other parts of a model, as are names that begin with `_`
_OF_TRANSFORMERS = {
    *("feature_extractor_type", "processor_class", "auto_map", "name_or_path", "padding_side", "truncation_side"),
    *("trust_remote_code", "code_revision", "return_unused_kwargs", "dtype", "torch_dtype", "device_map", "use_fast"),
    *("backend", "attn_implementation", "quantization_config", "transformers_version"),
}


def _warn_of_unknown(options: dict[str, Any]) -> None:
    unknown = sorted(name for name in options if name not in _OF_TRANSFORMERS and not name.startswith("_"))
    for name in unknown:
        close = get_close_matches(name, _FIELDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"its options are {', '.join(_FIELDS)}"
        logger.warning(f"ASiTFeatureExtractor has no option {name}, which has no effect: {hint}")


def _to_array(clip: Any, index: int) -> np.ndarray:
    """An array of a type that torch supports."""
    try:
        array = np.asarray(clip)
    except ValueError as error:
        raise ValueError(f"waveform {index}: expected numbers of shape (samples,), got nested sequences") from error
    if array.dtype.kind not in "fiubc":
        got = type(clip[0]).__name__ if isinstance(clip, (list, tuple)) else array.dtype
        raise ValueError(f"waveform {index}: expected numbers, got {got}")
    return array.astype(np.float32 if array.dtype.kind == "f" else array.dtype.newbyteorder("="), copy=False)


def _padding_strategy(
    padding: bool | str | PaddingStrategy, truncation: bool, pad_to_multiple_of: int | None, **length: int | None
) -> PaddingStrategy:
    """The strategy that `padding` names. `length` is the target length under its caller's name of it."""
    for name, value in {**length, "pad_to_multiple_of": pad_to_multiple_of}.items():
        if value is not None and not (isinstance(value, Integral) and value >= 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    named = {True: PaddingStrategy.LONGEST, False: PaddingStrategy.DO_NOT_PAD}
    strategy = named[padding] if isinstance(padding, bool) else PaddingStrategy(padding)
    if None in length.values() and (truncation or strategy == PaddingStrategy.MAX_LENGTH):
        raise ValueError(f"padding='max_length' and truncation=True need {', '.join(length)}, the target length")
    return strategy


def _round_up(length: int, multiple: int | None) -> int:
    return length if multiple is None else -(-length // multiple) * multiple


def _is_tensor(values: Any) -> bool:
    """Whether values, or the first of a list of them, are a tensor."""
    first = values[0] if isinstance(values, (list, tuple)) and values else values
    return isinstance(first, torch.Tensor)


def _as_tensor(values: Any, name: str) -> torch.Tensor:
    """A tensor of numbers of any shape, detached, with float64 as float32."""
    if not isinstance(values, torch.Tensor):
        array = np.asarray(values)
        if array.dtype.kind not in "biufc":
            raise ValueError(f"{name}: expected numbers, got {array.dtype}")
        values = torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    values = values.detach()
    return values.float() if values.dtype == torch.float64 else values


def _pad(values: torch.Tensor, length: int, value: float) -> torch.Tensor:
    """Pads the first axis on the right to `length`, if it is shorter, with `value`."""
    padding = values.new_full((max(length - len(values), 0), *values.shape[1:]), value)
    return torch.cat([values, padding]) if len(padding) else values


__all__ = ["ASiTFeatureExtractor"]
