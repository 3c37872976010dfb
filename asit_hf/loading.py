"""One way from any ASiT checkpoint to its configuration, its encoder and its feature extractor."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    FEATURE_EXTRACTOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from .configuration_asit import TEACHER_KEYS, ASiTConfig, read_adapter
from .feature_extraction_asit import ASiTFeatureExtractor
from .modeling_asit import ASiTForAudioClassification, ASiTForAudioFrameClassification, ASiTModel
from .utils.extras import extra

logger = logging.getLogger(__name__)

ENCODERS = ("teacher", "student")


def load_encoder(path: str | PathLike, encoder: str = "teacher", **kwargs: Any) -> ASiTModel:
    """
    Loads the encoder of any ASiT checkpoint. For a pretraining checkpoint, only the chosen encoder is built.

    Args:
        path: folder, Trainer run folder or Hub name of an encoder, a classifier or a pretraining checkpoint; or the
            folder of an adapter of peft, which is merged into its base model.
        encoder: `"teacher"` or `"student"`, of a pretraining checkpoint; others have only one encoder.
        kwargs: passed to `from_pretrained`.

    Raises:
        FileNotFoundError: no such folder, no complete checkpoint in it, or no such model on the Hub.
        ValueError: unknown `encoder`, or the checkpoint's encoder weights are incomplete or of another shape.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}, got {encoder!r}")
    config = load_config(path)
    is_teacher = encoder == "teacher" and is_pretraining_checkpoint(config)
    path = resolve_checkpoint(path)
    if read_adapter(path) is not None:
        with extra("peft"):
            return ASiTModel.from_pretrained(path, **kwargs)
    if isinstance(path, Path):
        _check_weights(path, config, "teacher.asit." if is_teacher else "asit.", encoder)
    if is_teacher:
        kwargs["key_mapping"] = TEACHER_KEYS
    with _hub_errors(path), _without_load_report():
        model, info = ASiTModel.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{path} lacks weights of the {encoder}'s encoder, first {missing[0]}")
    for name, found, expected in info["mismatched_keys"]:
        raise ValueError(f"{path}: expected {name} of shape {tuple(expected)}, got {tuple(found)}")
    return model


def load_trained(path: str | PathLike, model_class: type, **kwargs: Any) -> tuple[Any, ASiTFeatureExtractor]:
    """
    A trained model of `model_class`, such as [`ASiTForAudioClassification`], and its feature extractor.

    Args:
        path, kwargs: as in `load_encoder`.

    Raises:
        FileNotFoundError: as in `load_encoder`.
        ValueError: another kind of model, such as an encoder, which has no trained classifier, or missing weights.
    """
    config, expected = load_config(path), model_class.__name__
    if expected not in (config.architectures or []):
        script = "frame" if "Frame" in expected else "audio"
        hint = f"finetune it first (examples/run_{script}_classification.py)"
        raise ValueError(f"{path}: expected an {expected}, got {config.architectures}; {hint}")
    checkpoint = resolve_checkpoint(path)
    with _hub_errors(path):
        model, info = model_class.from_pretrained(checkpoint, output_loading_info=True, **kwargs)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{path} lacks weights of the {expected}, first {missing[0]}")
    return model, load_feature_extractor(path)


def load_model(path: str | PathLike, encoder: str = "teacher", **kwargs: Any) -> Any:
    """
    The model of any ASiT checkpoint as it was saved: an [`ASiTModel`], [`ASiTForAudioClassification`] or
    [`ASiTForAudioFrameClassification`]; of a pretraining checkpoint, the chosen encoder.

    Args:
        path, encoder, kwargs: as in `load_encoder`.

    Raises:
        FileNotFoundError, ValueError: as in `load_encoder`.
    """
    architectures = load_config(path).architectures or []
    for one in (ASiTForAudioClassification, ASiTForAudioFrameClassification):
        if one.__name__ in architectures:
            return load_trained(path, one, **kwargs)[0]
    return load_encoder(path, encoder, **kwargs)


def load_feature_extractor(path: str | PathLike, **kwargs: Any) -> ASiTFeatureExtractor:
    """
    Loads the feature extractor saved beside a checkpoint's weights, or else in its run folder.

    Args:
        path: as in `load_encoder`.
        kwargs: passed to `from_pretrained`; fields of the extractor override those that were saved.

    Raises:
        FileNotFoundError: no such folder or Hub name, or no `preprocessor_config.json` in it.
        ValueError: a damaged file, or settings that the extractor refuses.
    """
    folders = dict.fromkeys([_config_folder(path), Path(path)])
    if not Path(path).is_dir():
        with _hub_errors(path):
            return ASiTFeatureExtractor.from_pretrained(path, **kwargs)
    if all(not (folder / FEATURE_EXTRACTOR_NAME).is_file() for folder in folders) and (
        adapter := read_adapter(_config_folder(path))
    ):
        return load_feature_extractor(adapter["base_model_name_or_path"], **kwargs)
    for folder in folders:
        if (folder / FEATURE_EXTRACTOR_NAME).is_file():
            with _names_file(folder / FEATURE_EXTRACTOR_NAME):
                return ASiTFeatureExtractor.from_pretrained(folder, **kwargs)
    where = " or ".join(map(str, folders))
    raise FileNotFoundError(
        f"no {FEATURE_EXTRACTOR_NAME} in {where}: save the ASiTFeatureExtractor of the training there"
    )


def load_config(path: str | PathLike, **kwargs: Any) -> ASiTConfig:
    """
    Loads the configuration of any ASiT checkpoint, whose weights need not be there.

    Args:
        path, kwargs: as in `load_feature_extractor`.

    Raises:
        FileNotFoundError: no such folder or Hub name, or no model in it.
        ValueError: the checkpoint is of another model type, or its configuration is damaged or gives no model.
    """
    if (model_type := read_model_type(path)) != ASiTConfig.model_type:
        raise ValueError(f"{path}: expected model_type 'asit', got {model_type!r}")
    folder = _config_folder(path)
    with _names_file(folder):
        config = ASiTConfig.from_pretrained(folder, **kwargs)
        if not isinstance(config.dtype, (torch.dtype, str, NoneType)):
            raise ValueError(f"expected dtype to be the name of a torch type, got {config.dtype!r}")
    return config


def read_model_type(path: str | PathLike) -> str | None:
    """The `model_type` of any transformers checkpoint, which transformers need not support."""
    folder = _config_folder(path)
    with _hub_errors(folder), _names_file(folder):
        return ASiTConfig.get_config_dict(folder)[0].get("model_type")


def is_pretraining_checkpoint(config: ASiTConfig) -> bool:
    """Whether a checkpoint holds a student, a teacher and their heads, rather than one encoder."""
    return config.architectures == ["ASiTForPreTraining"]


def resolve_checkpoint(path: str | PathLike) -> str | Path:
    """
    The folder that `find_checkpoint` finds if `path` is a folder; otherwise `path` itself, which must be a possible
    Hub name.

    Raises:
        FileNotFoundError: no complete checkpoint in the folder, or neither a folder nor a possible Hub name.
        ValueError: `path` is a file.
    """
    if Path(path).is_dir():
        return find_checkpoint(path)
    if Path(path).is_file():
        hint = "python -m asit_hf.convert_original converts a checkpoint of the ASiT authors"
        raise ValueError(f"expected a folder or Hub name, got the file {path}; {hint}")
    try:
        validate_repo_id(str(path))
    except HFValidationError:
        raise FileNotFoundError(f"no such folder: {path}, and it is not a Hub name of the form user/name") from None
    return str(path)


def find_checkpoint(folder: str | PathLike) -> Path:
    """
    `folder` itself if a complete model is saved in it, else the last complete one of a Trainer run's
    `checkpoint-<step>` folders. A checkpoint whose saving was interrupted is skipped with a warning.

    Raises:
        FileNotFoundError: there is neither; the message lists what each folder lacks.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    steps = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    steps = sorted((step for step in steps if step.isdigit()), key=int, reverse=True)
    reasons = []
    for candidate in [folder, *(folder / f"checkpoint-{step}" for step in steps)]:
        if (reason := why_incomplete(candidate)) is None:
            for skipped in reasons[1:]:
                logger.warning("skipped %s", skipped)
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise FileNotFoundError(f"expected a saved model or a Trainer's run folder, got {'; '.join(reasons)}")


def why_incomplete(folder: Path) -> str | None:
    """Why no model can be loaded from `folder`, or `None`."""
    if read_adapter(folder) is not None:
        names = (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)
        return None if any((folder / name).is_file() for name in names) else f"no {names[0]}"
    if not (folder / CONFIG_NAME).is_file():
        return f"no {CONFIG_NAME}"
    try:
        names = _weight_files(folder)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        return f"damaged {SAFE_WEIGHTS_INDEX_NAME}: {error}"
    for name in names:
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except FileNotFoundError:
            return f"no {name}"
        except SafetensorError as error:
            return f"damaged {name}: {error}"
    return None


def _check_weights(folder: Path, config: ASiTConfig, prefix: str, encoder: str) -> None:
    """Raises `ValueError` for weights that do not fit the configuration, before memory is allocated for them."""
    saved = {}
    for name in _weight_files(folder):
        with safe_open(folder / name, framework="pt") as weights:
            keys = weights.keys()
            saved |= {key.removeprefix(prefix): tuple(weights.get_slice(key).get_shape()) for key in keys}
    layers = {key.split(".")[1] for key in saved if key.startswith("layers.")}
    config = copy(config)
    config.num_hidden_layers = min(config.num_hidden_layers, len(layers) + 1)  # one missing layer is enough to know
    with torch.device("meta"), _names_file(folder / CONFIG_NAME):
        expected = {name: tuple(weight.shape) for name, weight in ASiTModel(config).state_dict().items()}
    for name, shape in expected.items():
        if name not in saved:
            raise ValueError(f"{folder} lacks weights of the {encoder}'s encoder, first {name}")
        if saved[name] != shape:
            raise ValueError(f"{folder}: expected {name} of shape {shape}, got {saved[name]}")


def _weight_files(folder: Path) -> list[str]:
    """Names of the files with a saved model's weights."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    return (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [SAFE_WEIGHTS_NAME]
    )


def _config_folder(path: str | PathLike) -> str | Path:
    has_config = (Path(path) / CONFIG_NAME).is_file()
    return Path(path) if has_config else resolve_checkpoint(path)


@contextmanager
def _hub_errors(path: str | PathLike) -> Iterator[None]:
    """Adds to errors of the Hub that `path`, if it was meant as a folder, does not exist."""
    try:
        yield
    except OSError as error:
        if Path(path).exists():
            raise
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"no such folder: {path}, and loading it from the Hub failed: {reason}") from error


@contextmanager
def _names_file(path: str | PathLike) -> Iterator[None]:
    """Turns errors of settings of a wrong type or value into a `ValueError` that names their file."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be used: {reason}") from error


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Hides transformers' table of unused and missing weights, which `load_encoder` expects or reports itself."""
    report = logging.getLogger("transformers.modeling_utils")

    def is_not_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    report.addFilter(is_not_report)
    try:
        yield
    finally:
        report.removeFilter(is_not_report)
