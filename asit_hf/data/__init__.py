"""Audio files, data sets of audio, and the crops and batches made from them."""

from importlib import import_module

# Names by module, imported on first access: inference reads audio, and does without what training and tables need.
_EXPORTS = {
    "audio": ["AudioInfo", "AudioReader", "AudioReadError", "audio_info", "read_audio", "resample", "to_mono_float"],
    "clips": ["LabelledClips"],
    "collators": ["ClassificationCollator", "collate_crops"],
    "corpora.registry": ["CORPORA", "load_corpus"],
    "crops": ["CropSettings", "PretrainingCrops"],
    "datasets": ["load_audio_dataset", "load_unlabelled"],
    "filters": ["filter_rows"],
    "formats": ["AUDIO_EXTENSIONS"],
    "inputs": ["find_audio_files"],
    "labels": ["encode_labels", "label_names"],
    "packed": ["PackedAudio", "PackedCrops", "is_packed"],
    "randomness": ["sample_key"],
    "splits": ["find_group_column", "split_dataset"],
    "streaming": ["StreamingCrops"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
