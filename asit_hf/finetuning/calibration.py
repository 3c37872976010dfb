"""
Calibrates a classifier's confidence by temperature scaling (Guo et al. 2017, https://arxiv.org/abs/1706.04599): its
logits are divided by one number, fitted on held-out clips, which changes scores and not their order.
"""

import logging
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from ..data.clips import MAX_SECONDS, LabelledClips, warn_of_longer
from ..data.collators import ClassificationCollator
from ..data.labelled import load_labelled, problem_type_of
from ..evaluation.metrics import held_out_temperature, temperature_metrics
from ..feature_extraction_asit import ASiTFeatureExtractor
from ..modeling_asit import ASiTForAudioClassification

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


def calibrate_classifier(
    model: ASiTForAudioClassification,
    feature_extractor: ASiTFeatureExtractor,
    data: str | PathLike,
    *,
    batch_size: int = 8,
    max_seconds: float = MAX_SECONDS,
    problem_type: str | None = None,
    **options: Any,
) -> dict[str, float]:
    """
    Calibrates a trained classifier, in place, on labelled clips that it was not trained on.

    ```python
    >>> from asit_hf import ASiTFeatureExtractor, ASiTForAudioClassification, calibrate_classifier

    >>> model = ASiTForAudioClassification.from_pretrained("runs/classifier")
    >>> feature_extractor = ASiTFeatureExtractor.from_pretrained("runs/classifier")
    >>> calibrate_classifier(model, feature_extractor, "validation.csv")["temperature"]
    1.62
    >>> model.save_pretrained("runs/calibrated")
    >>> feature_extractor.save_pretrained("runs/calibrated")
    ```

    Args:
        model: with a linear classifier, also with an adapter of peft that saves it (`modules_to_save`). The weights of
            one in 16 bits are rounded again, which may change the best of nearly equal scores: load it in float32.
        feature_extractor: of the model.
        data: folder of class folders, csv or json manifest, or Hub data set, with classes of the model.
        batch_size (`int`): clips per forward pass.
        max_seconds (`float`): only the beginning of longer clips counts.
        problem_type (`str`, *optional*): of a model whose configuration has none.
        options: of [`~asit_hf.data.labelled.load_labelled`], such as `filters`, `split` or `label_column`.

    Returns:
        `dict[str, float]`: `temperature`, and what [`~asit_hf.evaluation.metrics.temperature_metrics`] says of the
        clips that it was fitted on: lower errors than on other clips are to be expected.

    Raises:
        ValueError: a regression model, labels that the model lacks, or an adapter that does not save the classifier.
    """
    layer = last_linear(model)
    problem_type, labels = label_options(model.config, problem_type)
    dataset = load_labelled(data, **{**labels, **options})
    problem_type = problem_type or problem_type_of(dataset)
    warn_of_longer(dataset, max_seconds, "their beginning counts (max_seconds)")
    clips = LabelledClips(dataset, feature_extractor.sampling_rate, max_seconds)
    collate = ClassificationCollator(feature_extractor, model.config.num_labels, problem_type)
    logits, targets, was_training = [], [], model.training
    model.eval()
    with torch.inference_mode():
        for batch in DataLoader(clips, batch_size, collate_fn=collate):
            targets.append(batch.pop("labels").numpy())
            batch["input_values"] = batch["input_values"].to(model.dtype)
            batch = {name: value.to(model.device) for name, value in batch.items()}
            logits.append(model(**batch).logits.float().cpu().numpy())
    model.train(was_training)
    return calibrate_layer(layer, np.concatenate(logits), np.concatenate(targets))


def calibrate_layer(layer: nn.Linear, logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """
    Divides weight and bias of the layer that gave the `logits` of held-out clips by their
    [`~asit_hf.evaluation.metrics.held_out_temperature`], in place. Returns what `calibrate_classifier` does.
    """
    temperature = held_out_temperature(logits, targets)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.div_(temperature)
    metrics = temperature_metrics(np.asarray(logits, dtype=float) / temperature, targets, temperature)
    fitted = describe_calibration(metrics, "held-out clips, on which it was fitted")
    logger.info(f"logits are divided by the temperature {temperature:.4g}: {fitted}")
    return {"temperature": temperature, **metrics}


def describe_calibration(metrics: dict[str, float], clips: str) -> str:
    """One line of the result of [`~asit_hf.evaluation.metrics.temperature_metrics`]."""
    return (
        f"calibration error {metrics['ece_percent_before']:.1f} -> {metrics['ece_percent']:.1f} %, negative "
        f"log-likelihood {metrics['nll_before']:.4f} -> {metrics['nll']:.4f} on {metrics['clips']} {clips}"
    )


def last_linear(model: nn.Module) -> nn.Linear:
    """
    The layer of a model of transformers, or of peft around one, that gives the logits.

    Raises:
        ValueError: a regression model, a classifier without a linear layer, or one that is not saved with the adapter.
    """
    if label_options(model.config)[0] == "regression":
        raise ValueError("expected a classifier to calibrate, got a regression model")
    classifier = model.classifier
    if hasattr(model, "get_base_model"):  # of peft
        copies = getattr(classifier, "modules_to_save", None)
        if copies is None:
            raise ValueError(
                "expected an adapter that saves the classifier, got one without it: train it with "
                'modules_to_save=["classifier"], or calibrate the model of merge_and_unload()'
            )
        classifier = copies[model.active_adapter]
    layers = [module for module in classifier.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(f"expected a classifier with a linear layer, got {type(classifier).__name__}")
    return layers[-1]


def label_options(config: "PreTrainedConfig", problem_type: str | None = None) -> tuple[str, dict[str, Any]]:
    """
    The problem type of a trained classifier, `problem_type` if its configuration has none, and the arguments with
    which `load_labelled` reads clips in its own classes. A model of several labels also takes single ones.

    Raises:
        ValueError: the model has another type than `problem_type`.
    """
    of_model = config.problem_type or ("regression" if config.num_labels == 1 else problem_type)
    if problem_type not in (None, of_model):
        raise ValueError(f"expected problem_type {of_model}, as the model has, got {problem_type}")
    names = None
    if of_model != "regression":
        names = [config.id2label[index] for index in range(config.num_labels)]
    return of_model, {"names": names, "problem_type": None if of_model == "multi_label_classification" else of_model}
