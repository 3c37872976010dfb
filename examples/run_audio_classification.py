r"""
Finetunes an ASiT encoder to classify audio.

    python examples/run_audio_classification.py --model_name_or_path CHECKPOINT --train_data train.csv \
        --eval_data test.csv --output_dir runs/classifier --num_train_epochs 25 --learning_rate 1e-4

Clips have one label, several (lists of labels, or `--problem_type multi_label_classification`) or a number. The best
checkpoint is selected on `--validation_split`, or on `--validation_fraction` of the training data; without either, on
`--eval_data`.

Recipes reproduce the tasks of the paper, with the splits and classes of each corpus:

    python examples/run_audio_classification.py --recipe examples/recipes/esc50.yaml --model_name_or_path CHECKPOINT \
        --train_data ESC-50 --output_dir runs/esc50

`--recipe FILE` reads options from a file; options on the command line override it. `--resume_from_checkpoint True`
continues from the last checkpoint. The output folder loads with `pipeline("audio-classification", model=...)` and
holds `eval_results.json`, `predictions.csv`, `per_class.csv` and, for up to 100 single-label classes, `confusion.png`.
With single labels the results include the expected calibration error (`eval_ece_percent`) and the best temperature
for the same evaluation clips (`eval_in_sample_temperature`).
`--calibrate` divides the logits by a temperature fitted on the validation data, in the weights of the saved model, and
adds the calibration error and the negative log-likelihood before and after it to the results.
`--folds 1,2,3,4,5` cross-validates, with an output folder for each fold and `fold_results.json`.

`--do_train False --do_eval True` evaluates a trained classifier instead, and writes the same tables:

    python examples/run_audio_classification.py --model_name_or_path runs/classifier --eval_data test.csv \
        --output_dir runs/scores --do_train False --do_eval True

and with `--calibrate --validation_data validation.csv` it also calibrates, and saves the result to `--output_dir`.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import PredictionOutput

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification
from asit_hf.data import CORPORA, ClassificationCollator, LabelledClips, filter_rows, label_names, split_dataset
from asit_hf.data.clips import MAX_SECONDS, warn_of_longer
from asit_hf.data.labelled import DatasetArguments, audio_paths, check_classes, problem_type_of
from asit_hf.data.manifests import SPLIT_COLUMNS
from asit_hf.evaluation.metrics import TOP_K, calibration_metrics, compute_metrics_for, temperature_metrics
from asit_hf.finetuning.augmentation import Augmentation, TrainingClips
from asit_hf.finetuning.calibration import describe_calibration, label_options
from asit_hf.finetuning.reports import best_common_epoch, summarize_folds, write_reports
from asit_hf.finetuning.sampling import balanced_weights
from asit_hf.finetuning.trainer import FinetuningArguments, FinetuningTrainer
from asit_hf.hub.cards import CardArguments, describe_run, write_model_card
from asit_hf.hub.run_record import add_results
from asit_hf.loading import is_pretraining_checkpoint, load_config, load_encoder, load_feature_extractor, load_trained
from asit_hf.utils.arguments import (
    OptionError,
    checkpoint_to_resume,
    finished_run,
    parse_arguments,
    refuse_without_effect,
    run_script,
    start_run,
)

logger = logging.getLogger(__name__)

# those that calibration changes
SCORE_METRICS = ("temperature", "ece_percent_before", "ece_percent", "nll_before", "nll", "in_sample_temperature")
CARD_METRICS = ("accuracy", f"top{TOP_K}_accuracy", "mAP", "mAUC", "mse", *SCORE_METRICS)


@dataclass
class ModelArguments:
    model_name_or_path: str | None = HfArg(default=None, help="Encoder, classifier or pretraining checkpoint.")
    encoder: str = HfArg(default="teacher", help="Encoder of a pretraining checkpoint: teacher or student.")
    random_init: bool = HfArg(default=False, help="Train from scratch, with the checkpoint's architecture or --size.")
    size: str | None = HfArg(default=None, help="Model size without a checkpoint: tiny, small or base (default).")
    pooling_mode: str | None = HfArg(default=None, help="cls, mean or cls_mean (default: the checkpoint's).")
    drop_path_rate: float = HfArg(default=0.0, help="Stochastic depth rate.")
    freeze_encoder: bool = HfArg(default=False, help="Train only the classifier.")
    attn_implementation: str = HfArg(default="sdpa", help="eager, sdpa, flash_attention_2, ...")

    def __post_init__(self):
        if self.model_name_or_path is None and not self.random_init:
            raise ValueError("expected --model_name_or_path or --random_init, got neither")
        if self.model_name_or_path is not None:
            refuse_without_effect(self, ["size"], "with a checkpoint, which has its own size")
        if self.random_init:
            refuse_without_effect(self, ["encoder"], "with random_init")
        if self.freeze_encoder:
            refuse_without_effect(self, ["drop_path_rate"], "with freeze_encoder")


@dataclass(kw_only=True)
class DataArguments(DatasetArguments):
    train_data: str | None = HfArg(
        default=None,
        help="Folder of class folders, csv or json manifest, Hub data set, or root of a corpus. Needed to train.",
    )
    validation_data: str | None = HfArg(
        default=None, help="Data to select the best checkpoint and to calibrate (default: rows of --train_data)."
    )
    eval_data: str | None = HfArg(default=None, help="Evaluation data (default: rows of --train_data).")
    train_split: str | None = HfArg(
        default=None, help="Split of the training data. Without any split named, those that local data have are used."
    )
    validation_split: str | None = HfArg(default=None, help="Split of the validation data.")
    eval_split: str | None = HfArg(default=None, help="Split of the evaluation data.")
    train_filter: list[str] = HfArg(default_factory=list, help="COLUMN=VALUE[,VALUE...]: training rows to keep.")
    eval_filter: list[str] = HfArg(default_factory=list, help="COLUMN=VALUE[,VALUE...]: evaluation rows to keep.")
    validation_fraction: float = HfArg(default=0.0, help="Share of --train_data held out as validation data.")
    group_column: str | None = HfArg(
        default=None,
        help='Column whose groups are not split, "" for none. Default: speaker, source, fold, ... if one fits.',
    )
    folds: str | None = HfArg(default=None, help="Cross-validation folds: 1,2,3,4 evaluates on each in turn.")
    fold_column: str = HfArg(default="fold", help="Column of the folds.")
    problem_type: str | None = HfArg(
        default=None, help="single_label_ or multi_label_classification, or regression (default: from the labels)."
    )
    balanced_sampling: bool = HfArg(default=False, help="Sample training clips by inverse class frequency.")
    check_train_files: bool = HfArg(default=True, help="Check at the start that all training files can be opened.")

    def __post_init__(self):
        if self.corpus is not None and self.corpus not in CORPORA:
            raise ValueError(f"corpus must be one of {', '.join(CORPORA)}, got {self.corpus!r}")
        self._use_splits()
        if self.folds is not None:
            self._check_folds()
        else:
            refuse_without_effect(self, ["fold_column"], "without folds")
            if self.eval_data is None and (self.eval_split or self.eval_filter):
                self.eval_data = self.train_data
        if not (self.folds or self.eval_data or self.has_validation()):
            raise ValueError("no evaluation data: set --eval_data, --eval_split, --validation_* or --folds")
        if (self.validation_data or self.validation_split) and self.validation_fraction:
            named = "validation_data" if self.validation_data else "validation_split"
            raise ValueError(f"{named} and validation_fraction exclude each other: unset one of them")
        if not self.validation_fraction:
            refuse_without_effect(self, ["group_column"], "without validation_fraction")

    def has_validation(self) -> bool:
        """Whether validation data were requested, apart from the evaluation data."""
        return bool(self.validation_data or self.validation_split or self.validation_fraction)

    def load_validation(self, **options: Any) -> Dataset:
        """The validation data of their own, or the rows of the training data's split."""
        filters = () if self.validation_data else self.train_filter
        return self.load(self.validation_data or self.train_data, filters, split=self.validation_split, **options)

    def hold_out(self, fold: str) -> None:
        """Train on the other folds and evaluate on this one; `train_filter` applies to both."""
        others = ",".join(other for other in self.fold_names() if other != fold)
        self.eval_filter = [*self.train_filter, f"{self.fold_column}={fold}"]
        self.train_filter = [*self.train_filter, f"{self.fold_column}={others}"]
        self.eval_data, self.eval_split = self.train_data, self.train_split

    def fold_names(self) -> list[str]:
        return [fold.strip() for fold in self.folds.split(",")]

    def _use_splits(self) -> None:
        """Sets the splits that are not named: always those of a corpus, those of other data if none is named."""
        of_rows = None if self.validation_data else self.validation_split
        named = self.train_split or of_rows or self.eval_split or self.folds
        filtered = any(one.partition("=")[0].strip() in SPLIT_COLUMNS for one in self.train_filter)
        by_filter = filtered or (self.eval_filter and not self.eval_data)
        if self.corpus is None and (named or by_filter or not self.train_data):
            return
        splits = self.default_splits(self.train_data)
        self.train_split = self.train_split or splits.get("train")
        if self.eval_data is None or self.corpus is not None:
            self.eval_split = self.eval_split or splits.get("test")
        if not (self.validation_fraction or self.validation_data):
            self.validation_split = self.validation_split or splits.get("validation")

    def _check_folds(self) -> None:
        if self.eval_data or self.eval_split or self.eval_filter or self.validation_split or self.validation_data:
            raise ValueError("folds are evaluated on each other: omit --eval_* and --validation_split or _data")
        folds = self.fold_names()
        if len(folds) < 2 or len(set(folds)) < len(folds):
            raise ValueError(f"expected at least two different folds, such as 1,2,3; got {self.folds!r}")


@dataclass
class InputArguments:
    mean: float | None = HfArg(default=None, help="Mean of log-mel values (default: checkpoint's or AudioSet's).")
    std: float | None = HfArg(default=None, help="Standard deviation of log-mel values (default: as for mean).")
    max_seconds: float | None = HfArg(
        default=None, help="Train on random crops of this length in seconds (default: 30; inf: whole clips)."
    )
    max_eval_seconds: float | None = HfArg(
        default=None, help="Evaluate only the first seconds of each clip (default: 30, or max_seconds if longer)."
    )

    def training_seconds(self, clips: Dataset, check_files: bool) -> float:
        """The bound of training clips. A bound by default is reported with the number of longer clips."""
        if self.max_seconds is None and check_files:
            warn_of_longer(clips, MAX_SECONDS, "training takes random crops of this length (--max_seconds)")
        return MAX_SECONDS if self.max_seconds is None else self.max_seconds

    def evaluation_seconds(self, clips: Dataset) -> float:
        """The bound of evaluation clips, likewise."""
        if self.max_eval_seconds is not None:
            return self.max_eval_seconds
        seconds = max(MAX_SECONDS, self.max_seconds or 0.0)
        warn_of_longer(clips, seconds, "evaluation takes their beginning (--max_eval_seconds)")
        return seconds


GROUPS = (ModelArguments, DataArguments, InputArguments, Augmentation, CardArguments, FinetuningArguments)


def load_data(args: DataArguments, seed: int, selects: bool = True) -> tuple[Dataset, Dataset, Dataset]:
    """
    (training, validation, evaluation) data; the last two are the same unless both were requested. `selects`: whether
    the validation data select a checkpoint.
    """
    options = {"check_files": args.check_train_files, "problem_type": args.problem_type}
    train = args.load(args.train_data, args.train_filter, split=args.train_split, **options)
    check_classes(train, args.train_data)
    form = problem_type_of(train)
    like = {
        "names": None if form == "regression" else label_names(train),
        # single labels may be trained like lists and evaluated on them
        "problem_type": form if args.problem_type in (None, form) else None,
    }
    validation = evaluation = None
    if args.eval_data is not None:
        evaluation = args.load(args.eval_data, args.eval_filter, split=args.eval_split, **like)
    if args.validation_data or args.validation_split:
        validation = args.load_validation(**like)
    elif args.validation_fraction:
        train, validation = split_dataset(train, args.validation_fraction, seed, args.group_column)
    elif selects:
        logger.warning("the evaluation data also select the best checkpoint, which makes its score optimistic")
    if args.train_split:
        uses = ("train", train, args.train_split), ("select", validation, args.validation_split)
        uses = *uses, ("evaluate", evaluation, args.eval_split)
        used = [f"{what}: {len(rows)} clips of {name}" for what, rows, name in uses if rows is not None and name]
        logger.info(f"{'; '.join(used)} (--train_split, --validation_split, --eval_split)")
    return train, validation or evaluation, evaluation or validation


def build_model(
    args: ModelArguments, inputs: InputArguments, problem_type: str, names: Sequence[str] | None
) -> tuple[ASiTForAudioClassification, ASiTFeatureExtractor]:
    fields = {"problem_type": problem_type, "drop_path_rate": args.drop_path_rate}
    if names is None:
        fields["num_labels"] = 1
    else:
        fields |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if args.pooling_mode:
        fields["pooling_mode"] = args.pooling_mode
    if args.freeze_encoder:  # whose features must not vary
        fields |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    path = args.model_name_or_path
    config = load_config(path, **fields) if path else ASiTConfig.from_size(args.size or "base", **fields)
    options = {"attn_implementation": args.attn_implementation, "dtype": torch.float32}  # also of 16-bit checkpoints
    model = ASiTForAudioClassification._from_config(config, **options)
    if not args.random_init:
        if not is_pretraining_checkpoint(config):
            refuse_without_effect(args, ["encoder"], f"with {path}, which is not a pretraining checkpoint")
        model.asit.load_state_dict(load_encoder(path, args.encoder).state_dict())
    if args.freeze_encoder:
        model.asit.requires_grad_(False)
    chosen = {name: value for name in ("mean", "std") if (value := getattr(inputs, name)) is not None}
    extractor = load_feature_extractor(path, **chosen) if path else ASiTFeatureExtractor(**chosen)
    return model, extractor


def check_problem_type(wanted: str | None, dataset: Dataset) -> str:
    """The problem type: by default that of the labels; single labels can also be trained as multi-label."""
    of_labels = problem_type_of(dataset)
    single = of_labels == "single_label_classification"
    possible = [of_labels, "multi_label_classification"] if single else [of_labels]
    if wanted not in (None, *possible):
        raise ValueError(f"problem_type must be {' or '.join(possible)} for these labels, got {wanted!r}")
    return wanted or of_labels


def finetune(
    model_args: ModelArguments,
    data_args: DataArguments,
    inputs: InputArguments,
    augmentation: Augmentation,
    card_args: CardArguments,
    args: FinetuningArguments,
    arguments: list[str],
    build: Callable = build_model,
) -> tuple[dict[str, float], list[dict]]:
    """The metrics on the evaluation data and the log history. `arguments` is the command line, for the model card."""
    start_run(args)
    if data_args.train_data is None:
        raise OptionError("expected --train_data, the training data, got none")
    if args.calibrate and not data_args.has_validation():
        raise OptionError(
            "calibrate needs validation data that are neither trained on nor evaluated: set --validation_data, "
            "--validation_split or --validation_fraction 0.1"
        )
    if model_args.freeze_encoder:
        refuse_without_effect(args, ["layer_decay"], "with freeze_encoder")
    train, validation, evaluation = load_data(data_args, args.seed, args.load_best_model_at_end)
    if args.calibrate:
        check_held_out(validation, train, evaluation)
    problem_type = check_problem_type(data_args.problem_type, train)
    names = None if problem_type == "regression" else label_names(train)
    if problem_type == "regression" and (data_args.balanced_sampling or args.label_smoothing or args.calibrate):
        raise ValueError("balanced_sampling, label_smoothing and calibrate need classes, but the labels are numbers")
    compute_metrics = compute_metrics_for(problem_type, names or ["value"])
    args.choose_metric(problem_type_of(train), compute_metrics, len(names or ["value"]))
    predictions = Path(args.output_dir, "predictions.csv")  # is written last
    if predictions.is_file() and (finished := finished_run(args, len(train))):
        metrics = json.loads(Path(args.output_dir, "eval_results.json").read_text())
        if args.calibrate == ("validation_temperature" in metrics):
            logger.warning(f"nothing to do: {args.output_dir} holds a finished run of {finished.global_step} steps")
            return metrics, finished.log_history
    predictions.unlink(missing_ok=True)
    model, feature_extractor = build(model_args, inputs, problem_type, names)
    classes = "" if names is None else f" of {len(names)} classes"
    logger.info(f"{len(train)} training clips, {len(evaluation)} evaluation clips, {problem_type}{classes}")

    rate = feature_extractor.sampling_rate
    held_out = {"sampling_rate": rate, "max_seconds": inputs.evaluation_seconds(evaluation)}
    seconds = inputs.training_seconds(train, data_args.check_train_files)
    clips = LabelledClips(train, rate, seconds, train=True, seed=args.seed, strict=data_args.strict)
    weights = balanced_weights(clips.labels, len(names or ())) if data_args.balanced_sampling else None
    trainer = FinetuningTrainer(
        model=model,
        args=args,
        train_dataset=TrainingClips(clips, augmentation, weights),
        eval_dataset=LabelledClips(validation, **held_out),
        # computes log-mel in the loader's workers: a few percent of the time of a training step
        data_collator=ClassificationCollator(
            feature_extractor,
            model.config.num_labels,
            problem_type,
            partial(augmentation.spectrogram, patch_size=model.config.patch_size),
        ),
        compute_metrics=compute_metrics,
        processing_class=feature_extractor,
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
    if args.average_checkpoints:
        trainer.load_average()
    elif trainer.state.best_model_checkpoint and args.load_best_model_at_end:
        best = f"{args.metric_for_best_model} {trainer.state.best_metric:.4g}"
        logger.info(f"kept the weights of step {trainer.state.best_global_step}, the best by {best}")
    calibration = trainer.calibrate() if args.calibrate else {}
    trainer.save_model()
    trainer.save_state()

    clips = LabelledClips(evaluation, **held_out)
    output = score(trainer, clips, problem_type, calibration, evaluation is not validation)
    if trainer.is_world_process_zero() and model.config.model_type == "asit":
        results = card_results(output.metrics, data_args)
        command = ["examples/run_audio_classification.py", *arguments]
        base_model = None if model_args.random_init else model_args.model_name_or_path
        describe_run(trainer, command, card_args, train.select_columns("audio"), results, base_model)
    if args.push_to_hub:
        trainer.push_to_hub()  # before predictions.csv, which holds local paths, exists
    if trainer.is_world_process_zero():
        write_reports(Path(args.output_dir), evaluation, output, problem_type, names)
    return output.metrics, trainer.state.log_history


def check_held_out(validation: Dataset, *others: Dataset) -> None:
    """Raises `ValueError` for validation clips whose files are also in other data, to train or to evaluate on."""
    held_out = set(audio_paths(validation))
    for other in others:
        if other is not validation and (shared := held_out.intersection(audio_paths(other))):
            got = f"{len(shared)} of {len(held_out)} files in common, first {min(shared)}"
            raise ValueError(
                f"calibrate needs validation clips that are neither trained on nor evaluated, got {got}: remove them "
                "from either"
            )


def score(
    trainer: FinetuningTrainer, clips: LabelledClips, problem_type: str, calibration: dict[str, float], others: bool
) -> PredictionOutput:
    """
    Predictions for clips and their metrics, which are logged and saved. `calibration` is the result of
    `FinetuningTrainer.calibrate` if it was called; `others`: whether it was fitted on other clips than these.
    """
    output, metrics = trainer.predict(clips, metric_key_prefix="eval"), {}
    if calibration and others:
        metrics = temperature_metrics(output.predictions, output.label_ids, calibration["temperature"])
        logger.info(describe_calibration(metrics, "evaluation clips"))
    elif problem_type == "single_label_classification" and not calibration:
        metrics = calibration_metrics(output.predictions, output.label_ids)
    output.metrics.update({f"eval_{metric}": value for metric, value in metrics.items()})
    output.metrics.update({f"validation_{metric}": value for metric, value in calibration.items()})
    trainer.log_metrics("eval", output.metrics)
    trainer.save_metrics("eval", output.metrics, combined=False)
    return output


def card_results(metrics: dict[str, float], args: DataArguments) -> list[tuple[str, str, float]]:
    """Rows for the model card: data, metric and value."""
    split = ", ".join(args.eval_filter) or args.eval_split or "evaluation"
    fitted = f"{metrics.get('validation_clips')} clips on which the temperature was fitted"
    validation = args.validation_data or args.train_data
    data = {
        "eval": f"{Path(args.eval_data or validation).name} ({split})",
        "validation": f"{Path(validation).name} ({args.validation_split or 'validation'}, {fitted})",
    }
    return [
        (data[kind], metric, metrics[f"{kind}_{metric}"])
        for kind in data
        for metric in CARD_METRICS
        if f"{kind}_{metric}" in metrics
    ]


def evaluate(
    model_args: ModelArguments,
    data_args: DataArguments,
    inputs: InputArguments,
    card_args: CardArguments,
    args: FinetuningArguments,
    arguments: list[str],
) -> dict[str, float]:
    """
    The metrics of a trained classifier, with its own classes, on the evaluation data. With `calibrate` they are those
    of the calibrated classifier, which is saved.
    """
    start_run(args)
    if args.calibrate:
        if not (data_args.validation_data or data_args.validation_split):
            raise OptionError("expected --validation_data, clips that were not trained on, to calibrate, got none")
        if Path(args.output_dir).resolve() == Path(model_args.model_name_or_path or "").resolve():
            raise OptionError(f"expected another --output_dir than the classifier's, got {args.output_dir}")
    else:
        if data_args.eval_data is None:
            raise OptionError("expected --eval_data, the data to evaluate on, with do_train False")
        refuse_without_effect(data_args, ["validation_data"], "with do_train False, without calibrate")
    refuse_without_effect(model_args, ["random_init", "pooling_mode", "freeze_encoder"], "with do_train False")
    refuse_without_effect(data_args, ["folds", "validation_fraction"], "with do_train False")
    model, feature_extractor = load_trained(
        model_args.model_name_or_path,
        ASiTForAudioClassification,
        attn_implementation=model_args.attn_implementation,
        dtype=torch.float32,  # as the features; 16 bits would also round the calibrated weights
    )
    for name in ("mean", "std"):
        if (value := getattr(inputs, name)) is not None:
            setattr(feature_extractor, name, value)
    of_model, options = label_options(model.config, data_args.problem_type)
    data = validation = None
    if data_args.eval_data is not None:
        data = data_args.load(data_args.eval_data, data_args.eval_filter, split=data_args.eval_split, **options)
    if args.calibrate:
        validation = data_args.load_validation(**options)
        check_held_out(validation, *([] if data is None else [data]))
    data = validation if data is None else data
    problem_type = check_problem_type(of_model, data)
    logger.info(f"{len(data)} evaluation clips, {problem_type}")
    args.eval_strategy = args.save_strategy = "no"  # of training
    held_out = {"sampling_rate": feature_extractor.sampling_rate, "max_seconds": inputs.evaluation_seconds(data)}
    names = options["names"]
    trainer = FinetuningTrainer(
        model=model,
        args=args,
        eval_dataset=LabelledClips(validation, **held_out) if args.calibrate else None,
        data_collator=ClassificationCollator(feature_extractor, model.config.num_labels, problem_type),
        compute_metrics=compute_metrics_for(problem_type, names or ["value"]),
        processing_class=feature_extractor,
    )
    calibration = trainer.calibrate() if args.calibrate else {}
    if calibration:
        trainer.save_model()
    output = score(trainer, LabelledClips(data, **held_out), problem_type, calibration, data is not validation)
    if calibration and trainer.is_world_process_zero():
        command = ["examples/run_audio_classification.py", *arguments]
        results = [row for row in card_results(output.metrics, data_args) if row[1] in SCORE_METRICS]
        add_results(args.output_dir, model_args.model_name_or_path, command, results, SCORE_METRICS)
        write_model_card(args.output_dir, **card_args.facts())
    if trainer.is_world_process_zero():
        write_reports(Path(args.output_dir), data, output, problem_type, names)
    return output.metrics


def cross_validate(
    arguments: list[str], data_args: DataArguments, args: FinetuningArguments, build: Callable
) -> dict[str, float]:
    """Holds out one fold after another, each with its own output folder."""
    if args.push_to_hub:
        raise ValueError("folds give one model each: push the one you choose, not all of them with --push_to_hub")
    folds = data_args.fold_names()
    dataset = data_args.load(
        data_args.train_data, data_args.train_filter, split=data_args.train_split, check_files=False
    )
    for fold in folds:  # before the first fold is trained
        filter_rows(dataset, [f"{data_args.fold_column}={fold}"], data_args.train_data)
    results, histories = {}, []
    for fold in folds:
        parsed = parse_arguments(GROUPS, [*arguments, "--output_dir", os.path.join(args.output_dir, f"fold-{fold}")])
        parsed[1].hold_out(fold)
        results[fold], history = finetune(*parsed, arguments, build=build)
        histories.append(history)
    summary = summarize_folds(results)
    if not data_args.validation_fraction:  # otherwise the histories are not of the held-out folds
        summary |= best_common_epoch(histories, parsed[-1].metric_for_best_model, parsed[-1].greater_is_better)
    logger.info(f"{len(folds)} folds: {summary}")
    if args.process_index == 0:
        content = json.dumps({"summary": summary, "folds": results}, indent=2)
        Path(args.output_dir, "fold_results.json").write_text(content + "\n")
    return summary


def main(arguments: list[str] | None = None, build: Callable = build_model) -> dict[str, float]:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parse_arguments(GROUPS, arguments)
    data_args, args = parsed[1], parsed[-1]
    if not args.do_train:
        return evaluate(*parsed[:3], *parsed[4:], arguments)
    if data_args.folds is not None:
        return cross_validate(arguments, data_args, args, build)
    return finetune(*parsed, arguments, build=build)[0]


if __name__ == "__main__":
    run_script(main)
