"""Exports the model of any checkpoint, and stores weights in 16 bits."""

import json
import os
import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import (
    CONFIG_NAME,
    FEATURE_EXTRACTOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)

from ..configuration_asit import HUB_FILES, SENTENCE_TRANSFORMERS_FILES, ASiTConfig, read_adapter
from ..loading import (
    ENCODERS,
    is_pretraining_checkpoint,
    load_config,
    load_feature_extractor,
    load_model,
    resolve_checkpoint,
    why_incomplete,
)
from ..modeling_asit import ASiTModel
from ..utils.files import whole_file, whole_folder
from .cards import CARD_NAME, write_model_card
from .onnx import ONNX_FOLDER, check_requirements, export_onnx, is_onnx_export
from .run_record import RUN_NAME

_SETTINGS = (CONFIG_NAME, FEATURE_EXTRACTOR_NAME, CARD_NAME, RUN_NAME)
# Marks a folder as an export, which another export may replace. It is hidden, so it is not uploaded.
_MARK = ".export"
_EXPORTED = {*_SETTINGS, SAFE_WEIGHTS_INDEX_NAME, *HUB_FILES, *SENTENCE_TRANSFORMERS_FILES, ONNX_FOLDER, _MARK}


def export_model(
    path: str | os.PathLike,
    output_dir: str | os.PathLike,
    encoder: str = "teacher",
    overwrite: bool = False,
    half: bool = False,
    max_shard_size: int | str = "50GB",
    onnx: bool = False,
    int8: bool = False,
    **facts: Any,
) -> Path:
    """
    Writes the model of any ASiT checkpoint with its feature extractor and a model card: an encoder or a classifier as
    it was saved, an adapter of peft merged into its base model, and of a pretraining checkpoint one encoder.

    Args:
        path: a checkpoint, a Trainer's run folder or a Hub name. A run folder means the model saved in the folder
            itself if there is one, else its last complete checkpoint. The feature extractor is the one beside the
            weights, else the run folder's.
        output_dir: written completely or not at all. An earlier export there is replaced. With `onnx` it may be the
            checkpoint's own folder, where only `onnx/` is written.
        encoder: which encoder of a pretraining checkpoint, `"teacher"` or `"student"`.
        overwrite: whether to replace any other content of `output_dir`.
        half: whether to store the weights in 16 bits, as [`halve_weights`] does.
        max_shard_size: size of the largest weight file, as in `save_pretrained`.
        onnx: whether to also write the files of [`~asit_hf.hub.onnx.export_onnx`] to `onnx/`.
        int8: whether to also write ONNX files with weights in 8 bits.
        facts: arguments of [`~asit_hf.hub.cards.write_model_card`], for a new card; without them, the card of an
            encoder or classifier is copied.

    Returns:
        `Path`: `output_dir`, absolute.

    Raises:
        FileNotFoundError: no complete checkpoint, or no `preprocessor_config.json`.
        FileExistsError: `output_dir` holds something other than an earlier export.
        ValueError: unknown `encoder`, another type of model, or a checkpoint without that encoder.
    """
    output_dir, checkpoint = Path(output_dir).resolve(), resolve_checkpoint(path)
    config, extractor = load_config(path), load_feature_extractor(path)
    pretrained, adapter = is_pretraining_checkpoint(config), read_adapter(checkpoint)
    if encoder not in ENCODERS or (encoder != "teacher" and not pretrained):
        expected = ENCODERS if pretrained else "teacher, since only pretraining checkpoints have two encoders"
        raise ValueError(f"{path}, an {config.architectures}: expected encoder to be {expected}, got {encoder!r}")
    if int8 and not onnx:
        raise ValueError("int8 is for the ONNX files: set onnx too")
    if onnx:
        check_requirements()
    sources = [checkpoint, *([adapter["base_model_name_or_path"]] if adapter else [])]
    sources = [Path(source).resolve() for source in sources if Path(source).exists()]
    onnx_dir = output_dir / ONNX_FOLDER
    in_place = onnx and not pretrained and [output_dir] == sources[:1]  # a Hub name is no source
    if not in_place:
        for source in sources:
            check_replaceable(output_dir, source, overwrite)
    elif half or facts or max_shard_size != "50GB":
        raise ValueError(f"{output_dir}: only {ONNX_FOLDER}/ is added to a model's own folder, without other options")
    elif not (overwrite or not onnx_dir.exists() or is_onnx_export(onnx_dir)):
        raise FileExistsError(f"{onnx_dir} is not an earlier export: overwrite=True replaces it")
    expected, got = config.num_mel_bins, extractor.num_mel_bins
    if got != expected:
        raise ValueError(f"{checkpoint}: expected {expected} mel bins, got {got} from the feature extractor")
    model = load_model(path, encoder, dtype="auto")
    if in_place:
        with whole_folder(onnx_dir) as folder:
            export_onnx(model.float(), extractor, folder, int8)
        return output_dir
    run, card = (_find(name, (checkpoint, path)) for name in (RUN_NAME, CARD_NAME))
    with whole_folder(output_dir) as export:
        weights = to_float16(model.state_dict()) if half else None
        model.save_pretrained(export, state_dict=weights, max_shard_size=max_shard_size)
        extractor.save_pretrained(export)
        if run is not None:
            shutil.copy(run, export)
        if facts or pretrained or adapter or card is None:
            write_model_card(export, **{**_known_facts(checkpoint, encoder, config), **facts})
        else:
            text = card.read_text(encoding="utf-8").replace(f'"{card.parent.resolve().name}"', f'"{output_dir.name}"')
            (export / CARD_NAME).write_text(text, encoding="utf-8")
        if onnx:
            if half:  # the values that were stored
                model.load_state_dict(weights)
            export_onnx(model.float(), extractor, export / ONNX_FOLDER, int8)
        (export / _MARK).touch()
    return output_dir


export_encoder = export_model  # its name in 0.1


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
    """Whether `folder` holds what `export_model` writes, and nothing else. Version 0.1 did not mark its encoders."""
    # a killed export to the folder itself may have left its scratch folder
    names = [path.name for path in folder.iterdir() if not path.name.startswith(f".{ONNX_FOLDER}-")]
    weights = [name for name in names if name == SAFE_WEIGHTS_NAME or fnmatchcase(name, "model-*.safetensors")]
    if CONFIG_NAME not in names or set(names) - {*weights, *_EXPORTED}:
        return False
    if ONNX_FOLDER in names and not is_onnx_export(folder / ONNX_FOLDER):
        return False
    if json.loads((folder / CONFIG_NAME).read_text()).get("architectures") == [ASiTModel.__name__]:
        return True
    # a model saved here since is not an export
    changed = [(folder / name).stat().st_mtime_ns for name in weights]
    return _MARK in names and max(changed, default=0) <= (folder / _MARK).stat().st_mtime_ns


def _find(name: str, places: Iterable[str | os.PathLike]) -> Path | None:
    """A file of the first of these folders or Hub names that has it."""
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = (cached_file(place, name, **options) for place in places)
    return next((Path(file) for file in found if file is not None), None)


def _known_facts(checkpoint: str | Path, encoder: str, config: ASiTConfig) -> dict[str, Any]:
    """What a checkpoint itself records, as arguments of `write_model_card`."""
    recipe: dict[str, Any] = {}
    if (file := Path(checkpoint) / "trainer_state.json").is_file():
        state = json.loads(file.read_text(encoding="utf-8"))
        recipe |= {"optimizer steps": state.get("global_step"), "epochs": state.get("epoch")}
    if is_pretraining_checkpoint(config):
        names = ("global_loss_weight", "local_loss_weight", "reconstruction_loss_weight", "num_prototypes")
        recipe = {"encoder": encoder, **recipe, **{name.replace("_", " "): getattr(config, name) for name in names}}
    base = (read_adapter(checkpoint) or {}).get("base_model_name_or_path")
    return {"recipe": recipe, "base_model": None if base is None or os.path.exists(base) else base}
