"""Exports the encoder of a pretraining checkpoint, and stores weights in 16 bits."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import CONFIG_NAME, FEATURE_EXTRACTOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..configuration_asit import HUB_FILES, SENTENCE_TRANSFORMERS_FILES, ASiTConfig
from ..loading import (
    find_checkpoint,
    is_pretraining_checkpoint,
    load_config,
    load_encoder,
    load_feature_extractor,
    why_incomplete,
)
from ..modeling_asit import ASiTModel
from ..utils.files import whole_file, whole_folder
from .cards import CARD_NAME, write_model_card
from .run_record import RUN_NAME

_SETTINGS = (CONFIG_NAME, FEATURE_EXTRACTOR_NAME, CARD_NAME, RUN_NAME)
_EXPORTED = {*_SETTINGS, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, *HUB_FILES, *SENTENCE_TRANSFORMERS_FILES}


def export_encoder(
    pretraining_dir: str | os.PathLike,
    output_dir: str | os.PathLike,
    encoder: str = "teacher",
    overwrite: bool = False,
    half: bool = False,
    max_shard_size: int | str = "50GB",
    **facts: Any,
) -> Path:
    """
    Writes the encoder of a pretraining checkpoint as a plain `ASiTModel`, with its feature extractor and a model card.

    Args:
        pretraining_dir: a checkpoint saved by `ASiTForPreTraining`, or a Trainer's run folder: the model saved in the
            folder itself if there is one, else its last complete checkpoint. The feature extractor is the one beside
            the weights, else the run folder's.
        output_dir: written completely or not at all. An earlier export there is replaced.
        encoder: which encoder, `"teacher"` or `"student"`.
        overwrite: whether to replace any other content of `output_dir`.
        half: whether to store the weights in 16 bits, as [`halve_weights`] does.
        max_shard_size: size of the largest weight file, as in `save_pretrained`.
        facts: arguments of [`~asit_hf.hub.cards.write_model_card`].

    Returns:
        `Path`: `output_dir`, absolute.

    Raises:
        FileNotFoundError: no complete checkpoint, or no `preprocessor_config.json`.
        FileExistsError: `output_dir` holds something other than an earlier export.
        ValueError: unknown `encoder`, another type of model, or a checkpoint without that encoder.
    """
    output_dir, pretraining_dir = Path(output_dir).resolve(), Path(pretraining_dir)
    checkpoint = find_checkpoint(pretraining_dir)
    check_replaceable(output_dir, checkpoint.resolve(), overwrite)
    extractor = load_feature_extractor(pretraining_dir)
    config = load_config(checkpoint)
    if not is_pretraining_checkpoint(config):
        raise ValueError(f"{checkpoint}: expected an ASiTForPreTraining checkpoint, got {config.architectures}")
    model = load_encoder(checkpoint, encoder, dtype="auto")
    expected, got = config.num_mel_bins, extractor.num_mel_bins
    if got != expected:
        raise ValueError(f"{checkpoint}: expected {expected} mel bins, got {got} from the feature extractor")
    run = next((path for folder in (checkpoint, pretraining_dir) if (path := folder / RUN_NAME).is_file()), None)
    facts = {"recipe": _recipe(checkpoint, encoder, config), **facts}
    with whole_folder(output_dir) as export:
        weights = to_float16(model.state_dict()) if half else None
        model.save_pretrained(export, state_dict=weights, max_shard_size=max_shard_size)
        extractor.save_pretrained(export)
        if run is not None:
            shutil.copy(run, export)
        write_model_card(export, **facts)
    return output_dir


def halve_weights(folder: str | os.PathLike) -> None:
    """
    Stores the float32 weights of a saved model as float16, in half the space. `config.json` still states float32, so
    that models are loaded and computed in float32 unless `dtype` requests another type.

    Args:
        folder: a model saved in one `model.safetensors`.

    Raises:
        FileNotFoundError: no such model in `folder`.
        ValueError: a weight exceeds the range of float16.
    """
    folder = Path(folder)
    if reason := why_incomplete(folder):
        raise FileNotFoundError(f"{folder}: expected a saved model, found {reason}")
    path = folder / SAFE_WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected the weights in one {SAFE_WEIGHTS_NAME}, got several shards")
    try:
        halves = to_float16(load_file(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")) | {"dtype": "float32"}
    with whole_file(path) as unfinished:
        save_file(halves, unfinished, metadata={"format": "pt"})
    with whole_file(folder / CONFIG_NAME) as unfinished:
        unfinished.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def to_float16(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with its float32 weights as float16; a `ValueError` if one exceeds the range."""
    halves = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in weights.items()}
    if overflown := [name for name, tensor in halves.items() if not tensor.isfinite().all()]:
        raise ValueError(f"float16 cannot represent the values of {overflown[0]}")
    return halves


def check_replaceable(output_dir: Path, checkpoint: Path, overwrite: bool) -> None:
    """Raises an error if writing `output_dir` would delete `checkpoint` or, unless `overwrite`, other files."""
    if output_dir in (checkpoint, *checkpoint.parents):
        raise ValueError(f"output_dir {output_dir} contains the checkpoint, {checkpoint}: choose another folder")
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"output_dir {output_dir} is a file")
    if overwrite or not output_dir.exists() or not any(output_dir.iterdir()) or _is_export(output_dir):
        return
    raise FileExistsError(
        f"output_dir {output_dir} is neither empty nor an earlier export: overwrite=True replaces it"
    )


def _is_export(folder: Path) -> bool:
    """Whether `folder` holds what `export_encoder` writes, and nothing else."""
    config = folder / CONFIG_NAME
    if not config.is_file() or json.loads(config.read_text()).get("architectures") != [ASiTModel.__name__]:
        return False
    return all(path.name in _EXPORTED or path.match("model-*.safetensors") for path in folder.iterdir())


def _recipe(checkpoint: Path, encoder: str, config: ASiTConfig) -> dict[str, Any]:
    """The settings of a pretraining run that its checkpoint records."""
    recipe: dict[str, Any] = {"encoder": encoder}
    if (file := checkpoint / "trainer_state.json").is_file():
        state = json.loads(file.read_text(encoding="utf-8"))
        recipe |= {"optimizer steps": state.get("global_step"), "epochs": state.get("epoch")}
    names = ("global_loss_weight", "local_loss_weight", "reconstruction_loss_weight", "num_prototypes")
    return recipe | {name.replace("_", " "): getattr(config, name) for name in names}
