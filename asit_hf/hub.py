"""Sharing ASiT models: export of a pretrained encoder."""

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.utils import CONFIG_NAME, FEATURE_EXTRACTOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .cards import CARD_NAME, RUN_NAME, load_config, load_feature_extractor, write_model_card
from .configuration_asit import HUB_FILES, ASiTConfig
from .modeling_asit import ASiTModel
from .pretraining.modeling import ASiTForPreTraining

logger = logging.getLogger(__name__)

_EXPORTED = {
    CONFIG_NAME,
    FEATURE_EXTRACTOR_NAME,
    SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    CARD_NAME,
    RUN_NAME,
    *HUB_FILES,
}


def export_encoder(
    pretraining_dir: str | os.PathLike,
    output_dir: str | os.PathLike,
    source: Literal["teacher", "student"] = "teacher",
    overwrite: bool = False,
    half: bool = False,
    **facts: Any,
) -> Path:
    """
    Writes the encoder of a pretraining checkpoint as a plain `ASiTModel`, with its feature extractor and a model card.

    Args:
        pretraining_dir: a checkpoint saved by `ASiTForPreTraining`, or a Trainer's run folder: the model saved in the
            folder itself if there is one, else its last whole checkpoint. The feature extractor is the one beside the
            weights, else the run folder's.
        output_dir: written as a whole or not at all. An earlier export there is replaced.
        source (`str`, defaults to `"teacher"`): which encoder, `"teacher"` or `"student"`.
        overwrite (`bool`, defaults to `False`): whether to replace whatever else `output_dir` holds.
        half (`bool`, defaults to `False`): whether to store the weights in 16 bits, see [`halve_weights`].
        facts: what is known for the card, see `write_model_card`.

    Returns:
        `Path`: `output_dir`.

    Raises:
        `FileNotFoundError`: no whole checkpoint, or no `preprocessor_config.json`.
        `FileExistsError`: `output_dir` holds something that is not an earlier export.
        `ValueError`: another `source`, another type of model, or a checkpoint without that encoder.
    """
    if source not in ("teacher", "student"):
        raise ValueError(f"source must be 'teacher' or 'student', got {source!r}")
    output_dir = Path(output_dir).resolve()
    checkpoint = find_checkpoint(pretraining_dir)
    check_replaceable(output_dir, checkpoint.resolve(), overwrite)
    extractor = load_feature_extractor(checkpoint, Path(pretraining_dir))
    encoder = _load_encoder(checkpoint, source)
    if extractor.num_mel_bins != encoder.config.num_mel_bins:
        raise ValueError(
            f"{checkpoint}: the feature extractor makes {extractor.num_mel_bins} mel bins, the model takes "
            f"{encoder.config.num_mel_bins}"
        )
    run = next((path for folder in (checkpoint, Path(pretraining_dir)) if (path := folder / RUN_NAME).is_file()), None)
    facts = {"recipe": _recipe(checkpoint, source, encoder.config), **facts}
    with whole_folder(output_dir) as export:
        encoder.save_pretrained(export)
        extractor.save_pretrained(export)
        if half:
            halve_weights(export)
        if run is not None:
            shutil.copy(run, export)
        write_model_card(export, **facts)
    return output_dir


def halve_weights(folder: str | os.PathLike) -> None:
    """
    Stores the float32 weights of a saved model as float16, in half the space. `config.json` goes on saying float32, so
    that they load, and compute, as float32 unless `dtype` asks for something else.

    Args:
        folder: a saved model in one `model.safetensors`.

    Raises:
        `FileNotFoundError`: no such model there.
        `ValueError`: a weight that float16 cannot hold.
    """
    folder = Path(folder)
    if reason := _incomplete(folder):
        raise FileNotFoundError(f"{folder}: expected a saved model, found {reason}")
    path = folder / SAFE_WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected the weights in one {SAFE_WEIGHTS_NAME}, they are in several")
    tensors = load_file(path)
    halves = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in tensors.items()}
    if overflown := [name for name, tensor in halves.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path}: float16 cannot hold the values of {overflown[0]}")
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")) | {"dtype": "float32"}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".half-") as scratch:
        save_file(halves, Path(scratch) / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        os.replace(Path(scratch) / SAFE_WEIGHTS_NAME, path)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
        reason = _incomplete(candidate)
        if reason is None:
            for skipped in reasons[1:]:
                logger.warning("passed over %s", skipped)
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise FileNotFoundError(f"expected a saved model or a Trainer's run folder, got {'; '.join(reasons)}")


def check_replaceable(output_dir: Path, checkpoint: Path, overwrite: bool) -> None:
    """Raises where writing `output_dir` would cost the `checkpoint` or, unless `overwrite`, somebody's files."""
    if output_dir in (checkpoint, *checkpoint.parents):
        raise ValueError(
            f"output_dir {output_dir} holds the checkpoint to export, {checkpoint}: choose another folder"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"output_dir {output_dir} is a file")
    if overwrite or not output_dir.exists() or not any(output_dir.iterdir()) or _is_export(output_dir):
        return
    raise FileExistsError(
        f"output_dir {output_dir} is neither empty nor an earlier export; overwrite=True replaces it"
    )


@contextmanager
def whole_folder(output_dir: Path) -> Iterator[Path]:
    """A folder to write, which takes the place of `output_dir` at the end, or leaves nothing behind after an error."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as scratch:
        folder = Path(scratch) / output_dir.name
        yield folder
        if output_dir.exists():
            output_dir.rename(Path(scratch) / "replaced")
        folder.rename(output_dir)


def _incomplete(folder: Path) -> str | None:
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


def _load_encoder(checkpoint: Path, source: str) -> ASiTModel:
    architectures = load_config(checkpoint).architectures
    if architectures != [ASiTForPreTraining.__name__]:
        raise ValueError(f"{checkpoint}: expected an ASiTForPreTraining checkpoint, got {architectures}")
    model, info = ASiTForPreTraining.from_pretrained(checkpoint, dtype="auto", output_loading_info=True)
    prefix = "teacher.asit." if source == "teacher" else "asit."
    if missing := sorted(key for key in info["missing_keys"] if key.startswith(prefix)):
        raise ValueError(f"{checkpoint}: {len(missing)} tensors of the {source} are missing: {missing[0]}, ...")
    return model.teacher["asit"] if source == "teacher" else model.asit


def _is_export(folder: Path) -> bool:
    """Whether `folder` holds what `export_encoder` writes, and nothing else."""
    config = folder / CONFIG_NAME
    if not config.is_file() or json.loads(config.read_text()).get("architectures") != [ASiTModel.__name__]:
        return False
    return all(path.name in _EXPORTED or path.match("model-*.safetensors") for path in folder.iterdir())


def _recipe(checkpoint: Path, source: str, config: ASiTConfig) -> dict[str, Any]:
    """What the checkpoint itself tells of its pretraining."""
    recipe: dict[str, Any] = {"encoder": source}
    state_file = checkpoint / "trainer_state.json"
    if state_file.is_file():
        state = json.loads(state_file.read_text(encoding="utf-8"))
        recipe |= {"optimiser steps": state.get("global_step"), "epochs": state.get("epoch")}
    names = ("global_loss_weight", "local_loss_weight", "reconstruction_loss_weight", "num_prototypes")
    return recipe | {name.replace("_", " "): getattr(config, name) for name in names}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m asit_hf.hub", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write the encoder of a pretraining checkpoint as a plain ASiTModel")
    export.add_argument("pretraining_dir", type=Path, help="a checkpoint, or a Trainer's run folder")
    export.add_argument("output_dir", type=Path)
    export.add_argument("--source", choices=["teacher", "student"], default="teacher")
    export.add_argument("--overwrite", action="store_true", help="replace whatever output_dir holds")
    export.add_argument("--half", action="store_true", help="store the weights in 16 bits")
    halve = commands.add_parser("halve", help="store the weights of any saved model in 16 bits")
    halve.add_argument("output_dir", type=Path, metavar="folder")
    args = parser.parse_args(arguments)
    try:
        if args.command == "halve":
            halve_weights(args.output_dir)
        else:
            export_encoder(args.pretraining_dir, args.output_dir, args.source, args.overwrite, args.half)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.output_dir.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
