"""Sharing ASiT models: export of a pretrained encoder, and model cards."""

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, FEATURE_EXTRACTOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .configuration_asit import HUB_FILES, ASiTConfig
from .feature_extraction_asit import ASiTFeatureExtractor
from .modeling_asit import ASiTModel
from .pretraining.modeling import ASiTForPreTraining

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
_UNKNOWN = "Unknown: it was not recorded."
_EXPORTED = {CONFIG_NAME, FEATURE_EXTRACTOR_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, CARD_NAME, *HUB_FILES}


def export_encoder(
    pretraining_dir: str | os.PathLike,
    output_dir: str | os.PathLike,
    source: Literal["teacher", "student"] = "teacher",
    overwrite: bool = False,
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
    extractor = _load_feature_extractor(checkpoint, Path(pretraining_dir))
    encoder = _load_encoder(checkpoint, source)
    if extractor.num_mel_bins != encoder.config.num_mel_bins:
        raise ValueError(
            f"{checkpoint}: the feature extractor makes {extractor.num_mel_bins} mel bins, the model takes "
            f"{encoder.config.num_mel_bins}"
        )
    facts = {"recipe": _recipe(checkpoint, source, encoder.config), **facts}
    with whole_folder(output_dir) as export:
        encoder.save_pretrained(export)
        extractor.save_pretrained(export)
        write_model_card(export, **facts)
    return output_dir


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


def write_model_card(
    folder: str | os.PathLike,
    *,
    name: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    training_data: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    limitations: str | None = None,
    base_model: str | None = None,
) -> Path:
    """
    Writes `README.md`, a Hub model card, into the folder of a saved ASiT model; what is not given it calls unknown.

    Args:
        folder: holds `config.json` and `preprocessor_config.json`.
        name (`str`, *optional*): the model's name on the Hub, which the examples load; by default the folder's.
        license (`str`, *optional*): of the weights, as the Hub abbreviates it (`"cc-by-4.0"`).
        datasets (`Sequence[str]`): Hub names of the training data.
        training_data (`str`, *optional*): what it was trained on: hours, sources, licences.
        recipe (`Mapping[str, Any]`, *optional*): hyperparameters by name.
        results (`Sequence[Mapping[str, Any]]`): rows with `task`, `dataset`, `metric`, `value`, `command`.
        limitations (`str`, *optional*): what the model should not be trusted with.
        base_model (`str`, *optional*): Hub name of the encoder it was finetuned from.

    Returns:
        `Path`: of the card.

    Raises:
        `FileNotFoundError`: no `config.json` or `preprocessor_config.json`.
        `ValueError`: another type of model, or a row of `results` that lacks a field.
    """
    folder = Path(folder)
    config = _load_config(folder)
    extractor = _load_feature_extractor(folder)
    name = name or folder.resolve().name
    classifies = any("Classification" in architecture for architecture in config.architectures or [])
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="audio-classification" if classifies else "feature-extraction",
        tags=["asit", "audio", "self-supervised-learning", "spectrogram"],
        license=license,
        datasets=list(datasets) or None,
        base_model=base_model,
    )
    sections = {
        "What it is": _description(config, extractor, classifies),
        "Use": _usage(name, config, extractor),
        "Training data": "\n\n".join(filter(None, [training_data or _UNKNOWN, _licence(license)])),
        "Training recipe": _table(["setting", "value"], list(recipe.items())) if recipe else _UNKNOWN,
        "Measured results": _results(results),
        "Limits": limitations or _limits(config),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n# {name.split('/')[-1]}\n\n{body}\n")
    path = folder / CARD_NAME
    card.save(path)
    return path


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


def _load_config(folder: Path) -> ASiTConfig:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected a saved model, found no {CONFIG_NAME}")
    model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if model_type != "asit":
        raise ValueError(f"{path}: expected model_type 'asit', got {model_type!r}")
    return ASiTConfig.from_pretrained(folder)


def _load_feature_extractor(*folders: Path) -> ASiTFeatureExtractor:
    """From the first of `folders` that holds one."""
    for folder in folders:
        if (folder / FEATURE_EXTRACTOR_NAME).is_file():
            return ASiTFeatureExtractor.from_pretrained(folder)
    searched = " and ".join(dict.fromkeys(str(folder) for folder in folders))
    raise FileNotFoundError(
        f"no {FEATURE_EXTRACTOR_NAME} in {searched}: without it the rate, mean and std of pretraining are not known; "
        "save the ASiTFeatureExtractor that was used there"
    )


def _load_encoder(checkpoint: Path, source: str) -> ASiTModel:
    architectures = _load_config(checkpoint).architectures
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


def _description(config: ASiTConfig, extractor: ASiTFeatureExtractor, classifies: bool) -> str:
    kind = f"A classifier of {config.num_labels} labels on an" if classifies else "An"
    lines = [
        f"{kind} [ASiT](https://arxiv.org/abs/2211.13189) encoder, a vision transformer on log-mel spectrograms. ASiT "
        "encoders are pretrained without labels, by masked reconstruction and self-distillation.",
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} heads, "
        f"{config.patch_size} x {config.patch_size} patches; input: mono audio at {extractor.sampling_rate} Hz, "
        f"{extractor.num_mel_bins} mel bins, normalised with mean {extractor.mean} and standard deviation "
        f"{extractor.std}.",
    ]
    if classifies and config.num_labels <= 100:
        lines.append("Labels: " + ", ".join(str(config.id2label[index]) for index in range(config.num_labels)) + ".")
    return "\n\n".join(lines)


def _usage(name: str, config: ASiTConfig, extractor: ASiTFeatureExtractor) -> str:
    code, note = _ENCODER_USAGE, "with `pip install asit-hf` and `import asit_hf`, `trust_remote_code` is not needed"
    if "ASiTForAudioClassification" in (config.architectures or []):
        code, note = _CLASSIFIER_USAGE, f"{note}, and the pipeline takes files of any rate and length"
    code = code.replace("NAME", name).replace("RATE", str(extractor.sampling_rate))
    return f"```python\n{code}```\n\nThe code travels with the weights; {note}."


_CLASSIFIER_USAGE = """\
import numpy as np
from transformers import pipeline

classifier = pipeline("audio-classification", model="NAME", trust_remote_code=True)
waveform = np.zeros(RATE, dtype=np.float32)  # your audio: mono, RATE Hz, in [-1, 1]
print(classifier(waveform, top_k=3))
"""

_ENCODER_USAGE = """\
import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModel

feature_extractor = AutoFeatureExtractor.from_pretrained("NAME", trust_remote_code=True)
model = AutoModel.from_pretrained("NAME", trust_remote_code=True).eval()
waveform = np.zeros(RATE, dtype=np.float32)  # your audio: mono, RATE Hz, in [-1, 1]
inputs = feature_extractor(waveform, sampling_rate=RATE, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
print(outputs.pooler_output.shape)  # the clip's embedding; outputs.last_hidden_state has one a patch
"""


def _licence(license: str | None) -> str | None:
    if license is not None:
        return None
    return "The licence of the weights is unknown: it depends on that of the training data."


def _results(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "None recorded."
    columns = ["task", "dataset", "metric", "value", "command"]
    for row in results:
        if set(row) != set(columns):
            raise ValueError(f"a result needs the fields {columns}, got {sorted(row)}")
    return _table(columns, [[row[column] for column in columns] for row in results])


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _limits(config: ASiTConfig) -> str:
    return (
        f"Position embeddings were learned on clips of {config.num_frames / 100:.2f} s; other lengths resize them. "
        "Nothing is known of how it does on audio unlike its training data, and its biases were not studied."
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m asit_hf.hub", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write the encoder of a pretraining checkpoint as a plain ASiTModel")
    export.add_argument("pretraining_dir", type=Path, help="a checkpoint, or a Trainer's run folder")
    export.add_argument("output_dir", type=Path)
    export.add_argument("--source", choices=["teacher", "student"], default="teacher")
    export.add_argument("--overwrite", action="store_true", help="replace whatever output_dir holds")
    args = parser.parse_args(arguments)
    try:
        path = export_encoder(args.pretraining_dir, args.output_dir, source=args.source, overwrite=args.overwrite)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
