"""Fits a classifier to a few labelled clips, on a frozen encoder: `python -m asit_hf.fit MODEL DATA OUTPUT`."""

import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser, pipeline

from .configuration_asit import POOLING_MODES
from .data.audio import AudioReadError
from .data.clips import MAX_SECONDS, warn_of_longer
from .data.labelled import DatasetArguments, check_classes, load_labelled, problem_type_of, targets
from .data.labels import encode_labels, label_names
from .data.splits import find_group_column, group_ids
from .evaluation.probes import LinearClassifier, fit_linear
from .hub.cards import write_model_card
from .hub.run_record import record_run
from .loading import load_config, load_encoder, load_feature_extractor
from .modeling_asit import ASiTForAudioClassification
from .pipeline import ASiTAudioClassificationPipeline
from .utils.files import check_writable

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


class FittedClassifier(ASiTAudioClassificationPipeline):
    """
    The pipeline of a classifier from [`fit_classifier`]. `validation` is what cross-validation says of it (see
    [`~asit_hf.evaluation.probes.LinearClassifier`]); `record` are the facts for `run.json`, and `base_model` is that
    of the model card.
    """

    validation: dict[str, float]
    record: dict[str, Any]
    base_model: str | None

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves model, feature extractor, `run.json` and model card: a folder as finetuning writes it."""
        check_writable(Path(save_directory, "config.json"))
        super().save_pretrained(save_directory, **kwargs)
        command, options = self.record["command"]
        record_run(save_directory, **{**self.record, "command": [*command, str(save_directory), *options]})
        write_model_card(save_directory, base_model=self.base_model)


def fit_classifier(
    model: str | os.PathLike,
    data: str | os.PathLike,
    *,
    pooling_mode: str = "cls_mean",
    group_column: str | None = None,
    seed: int = 0,
    device: str = "auto",
    **options: Any,
) -> FittedClassifier:
    """
    A classifier of your own sounds from a handful of labelled clips, one per class at least: logistic regression on
    the frozen encoder's pooled output, with a weight decay and temperature chosen by cross-validation.

    ```python
    >>> from asit_hf import fit_classifier

    >>> classifier = fit_classifier("path/to/encoder", "my_sounds")  # a folder of class folders
    >>> classifier("recording.wav", top_k=1)
    [{'score': 0.93, 'label': 'rain'}]
    >>> classifier.save_pretrained("runs/mine")
    ```

    A clip longer than 30 s is divided into windows as the pipeline does it, and fitted by the mean over them of the
    pooled output. The saved folder is an ordinary [`ASiTForAudioClassification`].

    Args:
        model: folder or Hub name of an encoder, classifier or pretraining checkpoint, as in `load_encoder`.
        data: folder of class folders, csv or json manifest, or Hub data set. Cells with several labels give a
            multi-label classifier, whose scores are independent probabilities.
        pooling_mode (`str`): `"cls"`, `"mean"` or `"cls_mean"`, both concatenated.
        group_column (`str`, *optional*): column of groups, such as speakers, that cross-validation does not split, ""
            for none; by default found by its name.
        seed (`int`): draws the folds of the cross-validation.
        device (`str`): `"cpu"`, `"cuda"`, or `"auto"`, which takes cuda if available.
        options: of [`~asit_hf.data.labelled.load_labelled`], such as `label_column`, `split`, `filters` or `strict`.

    Returns:
        [`FittedClassifier`]: the pipeline.

    Raises:
        FileNotFoundError: no such model or data.
        ValueError: clips of one class only, labels that are numbers, or no labels.
        AudioReadError: a file that cannot be read, with `strict`; otherwise it is reported and skipped.
    """
    start = time.perf_counter()
    dataset = load_labelled(data, **options)
    if problem_type_of(dataset) == "regression":
        raise ValueError(f"expected classes in {data}, got numbers: run_audio_classification.py finetunes for them")
    check_classes(dataset, data)
    classifier = _load_pooled(model, pooling_mode, device)
    warn_of_longer(dataset, MAX_SECONDS, "the mean over windows of this length is fitted")
    rows, embeddings, hours = _embed(classifier, dataset, options.get("strict", False))
    dataset = _without_unused_classes(dataset.select(rows))
    check_classes(dataset, data)
    column = find_group_column(dataset, group_column)
    linear = fit_linear(embeddings, targets(dataset), seed, group_ids(dataset, column) if column else None)
    _set_classifier(classifier.model, linear, label_names(dataset), problem_type_of(dataset))
    _report(linear, dataset)

    chosen = {"pooling_mode": pooling_mode, "group_column": group_column, "seed": seed, **options}
    command = ["-m", "asit_hf.fit", str(model), str(data)], _command_line(chosen)
    measured = f"{Path(data).name} (cross-validation)"
    classifier.validation, classifier.base_model = linear.validation, None if os.path.exists(model) else str(model)
    classifier.record = {
        "command": command,
        "recipe": {
            "classifier": "logistic regression on the frozen encoder",
            "weight decay": linear.weight_decay,
            "temperature": linear.temperature,
            "seed": seed,
        },
        "seconds": time.perf_counter() - start,
        "clips": len(dataset),
        "hours": hours,
        "sampling_rate": classifier.feature_extractor.sampling_rate,
        "results": [(measured, name, value) for name, value in linear.validation.items() if name == "accuracy"],
    }
    return classifier


def _load_pooled(model: str | os.PathLike, pooling_mode: str, device: str) -> FittedClassifier:
    """A pipeline whose logits are the pooled output."""
    network = ASiTForAudioClassification(load_config(model, pooling_mode=pooling_mode))
    network.asit.load_state_dict(load_encoder(model).state_dict())
    network.classifier = nn.Identity()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"feature_extractor": load_feature_extractor(model), "device": device}
    return pipeline("audio-classification", model=network.eval(), pipeline_class=FittedClassifier, **options)


def _embed(classifier: FittedClassifier, dataset: "Dataset", strict: bool) -> tuple[list[int], np.ndarray, float]:
    """The readable rows, their pooled output `(clips, dim)`, the mean over the pipeline's windows, and their hours."""
    rows, embeddings, seconds = [], [], 0.0
    for row, clip in enumerate(tqdm(dataset.select_columns("audio"), desc="Embedding", unit="clip")):
        try:
            windows = [classifier.forward(features) for features in classifier.preprocess(clip)]
        except AudioReadError as error:
            if strict:
                raise
            logger.warning("skipped: %s", error)
            continue
        rows.append(row)
        embeddings.append(torch.cat([window["logits"] for window in windows]).mean(0).cpu().numpy())
        seconds += windows[-1]["end"]
    if not rows:
        raise ValueError(f"none of the {len(dataset)} clips can be read")
    return rows, np.stack(embeddings), seconds / 3600


def _without_unused_classes(dataset: "Dataset") -> "Dataset":
    names, y = label_names(dataset), targets(dataset)
    used = np.unique(y) if y.ndim == 1 else np.flatnonzero(y.any(0))
    return dataset if len(used) == len(names) else encode_labels(dataset, [names[index] for index in used])


def _set_classifier(
    model: ASiTForAudioClassification, linear: LinearClassifier, names: list[str], problem_type: str
) -> None:
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    model.config.problem_type, model.num_labels = problem_type, len(names)
    model.classifier = nn.Linear(model.config.pooled_size, len(names))
    model.classifier.load_state_dict({"weight": torch.as_tensor(linear.weight), "bias": torch.as_tensor(linear.bias)})
    model.classifier.to(model.device)


def _report(linear: LinearClassifier, dataset: "Dataset") -> None:
    """One line with what cross-validation says."""
    y, count = targets(dataset), len(label_names(dataset))
    fitted = f"fitted {len(y)} clips of {count} classes with weight decay {linear.weight_decay:g}"
    fitted += f" and temperature {linear.temperature:g}"
    if not linear.validation:
        logger.warning(f"{fitted}; not validated, as every class has a single clip")
        return
    right, confidence = (f"{100 * linear.validation[name]:.1f} %" for name in ("accuracy", "confidence"))
    if y.ndim == 1:
        what, guess = "clips", f"{100 * np.bincount(y).max() / len(y):.1f} % by the most frequent class"
    else:
        what, guess = "labels, present or absent,", f"{100 * (1 - y.mean()):.1f} % if all were absent"
    scores = f"{right} of the {what} are right ({guess}), with a mean confidence of {confidence}"
    logger.warning(f"{fitted}; in cross-validation {scores}")


def _command_line(options: dict[str, Any]) -> list[str]:
    """The options of [`main`] that differ from its defaults."""
    arguments = []
    for name, value in options.items():
        if value not in (None, False, (), {"pooling_mode": "cls_mean", "seed": 0}.get(name)):
            values = value if isinstance(value, (list, tuple)) else [value]
            arguments += [f"--{name}", *(str(one) for one in values if value is not True)]
    return arguments


def main(arguments: list[str] | None = None) -> int:
    parser = HfArgumentParser(
        DatasetArguments, prog="python -m asit_hf.fit", description=__doc__.split(":")[0], allow_abbrev=False
    )
    parser.add_argument("model", help="folder or Hub name of an encoder, classifier or pretraining checkpoint")
    parser.add_argument("data", help="folder of class folders, csv or json manifest, or Hub data set")
    parser.add_argument("output", type=Path, help="folder of the classifier to write")
    parser.add_argument("--split", help="split of the data; default: the only one, or all rows of a manifest")
    parser.add_argument("--filters", nargs="+", metavar="COLUMN=V1,V2", help="keep rows with these values")
    parser.add_argument("--pooling_mode", choices=POOLING_MODES, default="cls_mean", help="default: %(default)s")
    parser.add_argument(
        "--group_column", help='column of groups that cross-validation does not split, "" for none (default: by name)'
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the cross-validation (default: 0)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: cuda if available")
    options = vars(parser.parse_args(arguments))
    model, data, output = (options.pop(name) for name in ("model", "data", "output"))
    options["filters"] = options["filters"] or ()
    try:
        if output.resolve() == Path(model).resolve():
            raise ValueError(f"expected another folder than the encoder's, got {output}")
        check_writable(output / "config.json")
        fit_classifier(model, data, **options).save_pretrained(output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("asit_hf").setLevel(logging.INFO)
    sys.exit(main())
