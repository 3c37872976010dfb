"""Reading audio, data sets of it, and the crops and batches made from them."""

from .audio import AudioInfo, AudioReader, AudioReadError, audio_info, read_audio, resample, to_mono_float
from .benchmarks import BENCHMARKS, load_benchmark
from .collators import ClassificationCollator, collate_crops
from .crops import CropSettings, LabelledClips, PretrainingCrops, StreamingCrops, sample_key
from .datasets import (
    AUDIO_EXTENSIONS,
    encode_labels,
    find_audio_files,
    find_group_column,
    label_names,
    load_audio_dataset,
    split_dataset,
)
from .packed import PackedAudio, PackedCrops, is_packed
from .sources import filter_rows, load_unlabelled

__all__ = [
    "AUDIO_EXTENSIONS",
    "AudioInfo",
    "AudioReadError",
    "AudioReader",
    "BENCHMARKS",
    "ClassificationCollator",
    "CropSettings",
    "LabelledClips",
    "PackedAudio",
    "PackedCrops",
    "PretrainingCrops",
    "StreamingCrops",
    "audio_info",
    "collate_crops",
    "encode_labels",
    "filter_rows",
    "find_audio_files",
    "find_group_column",
    "is_packed",
    "label_names",
    "load_audio_dataset",
    "load_benchmark",
    "load_unlabelled",
    "read_audio",
    "resample",
    "sample_key",
    "split_dataset",
    "to_mono_float",
]
