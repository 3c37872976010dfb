"""ASiT: self-supervised audio spectrogram transformers for Hugging Face Transformers."""

from importlib import import_module

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    AutoModelForPreTraining,
    AutoProcessor,
)

from .configuration_asit import ASiTConfig
from .data.audio import read_audio
from .feature_extraction_asit import ASiTFeatureExtractor
from .modeling_asit import ASiTForAudioClassification, ASiTForAudioFrameClassification, ASiTModel, ASiTPreTrainedModel
from .pipeline import ASiTAudioClassificationPipeline, register_pipeline
from .pretraining.modeling import ASiTForPreTraining
from .utils.extras import extra

__version__ = "0.1.0"

AutoConfig.register("asit", ASiTConfig, exist_ok=True)
AutoFeatureExtractor.register(ASiTConfig, ASiTFeatureExtractor, exist_ok=True)
AutoProcessor.register(ASiTConfig, ASiTFeatureExtractor, exist_ok=True)
AutoModel.register(ASiTConfig, ASiTModel, exist_ok=True)
AutoModelForAudioClassification.register(ASiTConfig, ASiTForAudioClassification, exist_ok=True)
AutoModelForAudioFrameClassification.register(ASiTConfig, ASiTForAudioFrameClassification, exist_ok=True)
AutoModelForPreTraining.register(ASiTConfig, ASiTForPreTraining, exist_ok=True)
register_pipeline()
ASiTFeatureExtractor.read_audio = staticmethod(read_audio)

# Imported on first access: names that need the train extra, and names that inference does without.
_TRAINING = {
    "ASiTPreTrainer": "pretraining.trainer",
    "ASiTPreTrainingArguments": "pretraining.arguments",
    "calibrate_classifier": "finetuning.calibration",
    "fit_classifier": "fit",
}
_LAZY = {"export_encoder": "hub.export", "export_model": "hub.export", "load_encoder": "loading"}
__all__ = [
    "ASiTAudioClassificationPipeline",
    "ASiTConfig",
    "ASiTFeatureExtractor",
    "ASiTForAudioClassification",
    "ASiTForAudioFrameClassification",
    "ASiTForPreTraining",
    "ASiTModel",
    "ASiTPreTrainedModel",
    "read_audio",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _TRAINING:
        with extra("train"):
            return getattr(import_module(f".{_TRAINING[name]}", __name__), name)
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_TRAINING})
