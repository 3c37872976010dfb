"""One way from any ASiT checkpoint to an encoder and its feature extractor."""

import json
import logging
import os
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, FEATURE_EXTRACTOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .configuration_asit import ASiTConfig
from .feature_extraction_asit import ASiTFeatureExtractor
from .modeling_asit import ASiTModel

logger = logging.getLogger(__name__)

ENCODERS = ("teacher", "student")
# The teacher's weights under the names that an encoder has, and the student's out of their way.
TEACHER_KEYS = {r"^asit\.": "student.", r"^teacher\.asit\.": "asit."}


def load_config(folder: Path) -> ASiTConfig:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected a saved model, found no {CONFIG_NAME}")
    model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if model_type != "asit":
        raise ValueError(f"{path}: expected model_type 'asit', got {model_type!r}")
    return ASiTConfig.from_pretrained(folder)


def load_feature_extractor(*folders: Path) -> ASiTFeatureExtractor:
    """From the first of `folders` that holds one."""
    for folder in folders:
        if (folder / FEATURE_EXTRACTOR_NAME).is_file():
            return ASiTFeatureExtractor.from_pretrained(folder)
    searched = " and ".join(dict.fromkeys(str(folder) for folder in folders))
    raise FileNotFoundError(
        f"no {FEATURE_EXTRACTOR_NAME} in {searched}: without it the rate, mean and std of pretraining are not known; "
        "save the ASiTFeatureExtractor that was used there"
    )


def find_checkpoint(folder: str | os.PathLike) -> Path:
    """
    `folder` itself if a whole model is saved in it, else the last whole one of a Trainer run's `checkpoint-<step>`
    folders: one that was cut off while it was written is passed over with a warning.

    Raises:
        `FileNotFoundError`: neither; the message says what each folder lacks.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    checkpoints = sorted((path for path in steps if steps[path].isdigit()), key=lambda path: int(steps[path]))
    reasons = []
    for candidate in [folder, *reversed(checkpoints)]:
        reason = why_incomplete(candidate)
        if reason is None:
            for skipped in reasons[1:]:
                logger.warning("passed over %s", skipped)
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise FileNotFoundError(f"expected a saved model or a Trainer's run folder, got {'; '.join(reasons)}")


def why_incomplete(folder: Path) -> str | None:
    """Why no model can be loaded from `folder`, or `None`."""
    if not (folder / CONFIG_NAME).is_file():
        return f"no {CONFIG_NAME}"
    names = [SAFE_WEIGHTS_NAME]
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        names = sorted(set(json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"].values()))
    for name in names:
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except FileNotFoundError:
            return f"no {name}"
        except SafetensorError as error:
            return f"damaged {name}: {error}"
    return None


def load_encoder(path: str | PathLike, encoder: str = "teacher", **kwargs: Any) -> ASiTModel:
    """
    Loads the encoder of any ASiT checkpoint; a pretraining checkpoint's is loaded without building the rest of it.

    Args:
        path (`str`): folder or Hub name of an encoder, a classifier or a pretraining checkpoint.
        encoder (`str`, defaults to `"teacher"`): which encoder of a pretraining checkpoint, `"teacher"` or
            `"student"`; other checkpoints have only one.
        kwargs: passed to `from_pretrained`.

    Raises:
        ValueError: another `encoder`, or a checkpoint that lacks weights of the encoder.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}, got {encoder!r}")
    config = ASiTConfig.from_pretrained(path)
    if encoder == "teacher" and is_pretraining_checkpoint(config):
        kwargs["key_mapping"] = TEACHER_KEYS
    model, info = ASiTModel.from_pretrained(path, output_loading_info=True, **kwargs)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{path} lacks {len(missing)} weights of the {encoder}'s encoder, first {missing[0]}")
    return model


def is_pretraining_checkpoint(config: ASiTConfig) -> bool:
    """Whether a checkpoint holds a student, a teacher and their heads, rather than one encoder."""
    return config.architectures == ["ASiTForPreTraining"]
