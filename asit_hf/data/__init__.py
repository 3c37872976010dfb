"""Audio files, data sets of audio, and the crops and batches made from them."""

from .audio import AudioInfo, AudioReader, AudioReadError, audio_info, read_audio, resample, to_mono_float
from .clips import LabelledClips
from .collators import ClassificationCollator, collate_crops
from .corpora.registry import CORPORA, load_corpus
from .crops import CropSettings, PretrainingCrops
from .datasets import find_audio_files, load_audio_dataset, load_unlabelled
from .filters import filter_rows
from .formats import AUDIO_EXTENSIONS
from .labels import encode_labels, label_names
from .packed import PackedAudio, PackedCrops, is_packed
from .randomness import sample_key
from .splits import find_group_column, split_dataset
from .streaming import StreamingCrops

__all__ = [
    "AUDIO_EXTENSIONS",
    "AudioInfo",
    "AudioReadError",
    "AudioReader",
    "CORPORA",
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
    "load_corpus",
    "load_unlabelled",
    "read_audio",
    "resample",
    "sample_key",
    "split_dataset",
    "to_mono_float",
]
