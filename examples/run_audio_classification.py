"""
Finetunes an ASiT encoder to classify audio.

    python examples/run_audio_classification.py --model_name_or_path CHECKPOINT --train_data train.csv \
        --eval_data test.csv --output_dir runs/classifier --num_train_epochs 25 --learning_rate 1e-4

One label a clip, several (`--problem_type multi_label_classification`, or rows with lists of labels), or a number. The
best checkpoint is kept: by the clips of `--validation_split`, or those that `--validation_fraction` puts aside from
the training data, or without them by `--eval_data`.

The data sets of the paper are read as they lie on disk, with their own splits and classes, and have recipes:

    python examples/run_audio_classification.py --recipe examples/recipes/esc50.yaml --model_name_or_path CHECKPOINT \
        --train_data ESC-50 --output_dir runs/esc50

`--recipe FILE` reads options from a file, which the command line overrides; `--resume_from_checkpoint True` goes on
from the last checkpoint. The output folder loads with `pipeline("audio-classification", model=...)` and holds
`eval_results.json`, `predictions.csv`, `per_class.csv` and, up to 100 classes of one label a clip, `confusion.png`.
`--folds 1,2,3,4,5` leaves one fold out after the other, with an output folder each and `fold_results.json`.
"""

import csv
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers.trainer_utils import PredictionOutput
from transformers.utils import logging

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification
from asit_hf.data import CORPORA, ClassificationCollator, LabelledClips, filter_rows, label_names, split_dataset
from asit_hf.data.audio import source_name
from asit_hf.data.labelled import load_labelled, problem_type_of
from asit_hf.evaluation.metrics import TOP_K, compute_metrics_for, confusion_counts, per_class_report
from asit_hf.finetuning.augmentation import Augmentation, TrainingClips
from asit_hf.finetuning.sampling import balanced_weights
from asit_hf.finetuning.trainer import FinetuningArguments, FinetuningTrainer
from asit_hf.hub.cards import CardArguments, describe_run
from asit_hf.loading import load_encoder
from asit_hf.utils.arguments import checkpoint_to_resume, parse_arguments, run_script, start_run

logger = logging.get_logger(__name__)

MAX_CLASSES_OF_PICTURE = 100
CARD_METRICS = ("accuracy", f"top{TOP_K}_accuracy", "mAP", "mAUC", "mse")


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Encoder, classifier or pretraining checkpoint; the classifier starts afresh."}
    )
    source: str = field(default="teacher", metadata={"help": "Encoder of a pretraining checkpoint: teacher, student."})
    random_init: bool = field(
        default=False, metadata={"help": "Fresh weights, in the checkpoint's architecture or in that of --size."}
    )
    size: str = field(default="base", metadata={"help": "tiny, small or base; with --random_init and no checkpoint."})
    pooling_mode: str | None = field(
        default=None, metadata={"help": "cls, mean or cls_mean; by default the checkpoint's."}
    )
    drop_path_rate: float = field(default=0.0, metadata={"help": "Stochastic depth."})
    freeze_encoder: bool = field(default=False, metadata={"help": "Train the classifier alone."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager, sdpa, flash_attention_2, ..."})

    def __post_init__(self):
        if self.model_name_or_path is None and not self.random_init:
            raise ValueError("give --model_name_or_path, or --random_init")


@dataclass
class DataArguments:
    train_data: str = field(
        metadata={"help": "Folder of class folders, csv or json manifest, Hub data set, or root of a corpus."}
    )
    corpus: str | None = field(
        default=None, metadata={"help": f"A published data set, with its splits and classes: {', '.join(CORPORA)}."}
    )
    eval_data: str | None = field(
        default=None,
        metadata={"help": "The same; by default --train_data, if --eval_split or --eval_filter is given."},
    )
    train_split: str | None = field(default=None, metadata={"help": "Split of the training data."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Split of --train_data that chooses the checkpoint."}
    )
    eval_split: str | None = field(default=None, metadata={"help": "Split of the evaluation data."})
    train_filter: list[str] = field(
        default_factory=list, metadata={"help": "COLUMN=V1,V2: keep the rows with these values."}
    )
    eval_filter: list[str] = field(default_factory=list, metadata={"help": "The same for the evaluation data."})
    validation_fraction: float = field(
        default=0.0, metadata={"help": "Part of the training data put aside to choose the checkpoint, say 0.1."}
    )
    group_column: str | None = field(
        default=None, metadata={"help": "Rows alike here stay on one side of it; by default speaker, source or fold."}
    )
    folds: str | None = field(
        default=None, metadata={"help": "1,2,3,4: train on all of these folds but one and evaluate on that, in turn."}
    )
    fold_column: str = field(default="fold", metadata={"help": "Column of the folds."})
    audio_column: str | None = field(default=None, metadata={"help": "Column of the audio."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels."})
    root: str | None = field(default=None, metadata={"help": "Folder that a manifest's paths are relative to."})
    problem_type: str | None = field(
        default=None,
        metadata={
            "help": "single_label_classification, multi_label_classification or regression; default: as labelled."
        },
    )
    balanced_sampling: bool = field(
        default=False,
        metadata={"help": "Draw training clips with replacement, by their labels' sum of 1000 / (count + 0.01)."},
    )
    check_train_files: bool = field(
        default=True,
        metadata={"help": "Open every training file beforehand; unreadable ones are left out either way."},
    )
    strict: bool = field(default=False, metadata={"help": "Stop at a file that cannot be read."})

    def __post_init__(self):
        if self.corpus is not None:
            self._use_corpus()
        if self.folds is not None:
            self._check_folds()
        elif self.eval_data is None and (self.eval_split or self.eval_filter):
            self.eval_data = self.train_data
        if not (self.folds or self.eval_data or self.validation_split or self.validation_fraction):
            raise ValueError("give --eval_data, --eval_split or --eval_filter, --validation_*, or --folds")
        if self.validation_split and self.validation_fraction:
            raise ValueError("give --validation_split or --validation_fraction, not both")

    def hold_out(self, fold: str) -> None:
        """Train on the other folds, evaluate on this one; `train_filter` holds for both."""
        others = ",".join(other for other in self.fold_names() if other != fold)
        self.eval_filter = [*self.train_filter, f"{self.fold_column}={fold}"]
        self.train_filter = [*self.train_filter, f"{self.fold_column}={others}"]
        self.eval_data, self.eval_split = self.train_data, self.train_split

    def reading(self) -> dict[str, Any]:
        """What `load_labelled` needs to know of the training and of the evaluation data."""
        names = ("audio_column", "label_column", "root", "strict")
        return {**{name: getattr(self, name) for name in names}, "corpus": self.corpus}

    def fold_names(self) -> list[str]:
        return [fold.strip() for fold in self.folds.split(",")]

    def _use_corpus(self) -> None:
        if self.corpus not in CORPORA:
            raise ValueError(f"corpus must be one of {', '.join(CORPORA)}, got {self.corpus!r}")
        splits = CORPORA[self.corpus].splits
        if splits:
            self.train_split = self.train_split or "train"
            self.eval_split = self.eval_split or "test"
            if "validation" in splits and not self.validation_fraction:
                self.validation_split = self.validation_split or "validation"

    def _check_folds(self) -> None:
        if self.eval_data or self.eval_split or self.eval_filter or self.validation_split:
            raise ValueError("folds are evaluated on each other: leave out --eval_* and --validation_split")
        folds = self.fold_names()
        if len(folds) < 2 or len(set(folds)) < len(folds):
            raise ValueError(f"folds must name at least two, each once, as 1,2,3; got {self.folds!r}")


@dataclass
class InputArguments:
    mean: float | None = field(
        default=None, metadata={"help": "Mean of the log-mel values (default: the checkpoint's, or AudioSet's)."}
    )
    std: float | None = field(default=None, metadata={"help": "Their standard deviation, likewise."})
    max_seconds: float | None = field(default=None, metadata={"help": "Train on random crops of longer clips."})
    max_eval_seconds: float | None = field(
        default=None, metadata={"help": "Evaluate on the beginning of longer clips; by default on whole clips."}
    )


GROUPS = (ModelArguments, DataArguments, InputArguments, Augmentation, CardArguments, FinetuningArguments)


def load_data(args: DataArguments, seed: int, chooses: bool = True) -> tuple[Dataset, Dataset, Dataset]:
    """
    (training, validation, evaluation) data; the last two are the same unless both were asked for. `chooses`: whether
    the validation data choose a checkpoint.
    """
    reading = args.reading()
    train = load_labelled(
        args.train_data, args.train_filter, split=args.train_split, check_files=args.check_train_files, **reading
    )
    names = None if problem_type_of(train) == "regression" else label_names(train)
    validation = evaluation = None
    if args.eval_data is not None:
        evaluation = load_labelled(args.eval_data, args.eval_filter, names, split=args.eval_split, **reading)
    if args.validation_split:
        validation = load_labelled(args.train_data, args.train_filter, names, split=args.validation_split, **reading)
    elif args.validation_fraction:
        train, validation = split_dataset(train, args.validation_fraction, seed, args.group_column)
    elif chooses:
        logger.warning("The best checkpoint is chosen by the evaluation data: its score is a little too good.")
    return train, validation or evaluation, evaluation or validation


def build_model(
    args: ModelArguments, inputs: InputArguments, problem_type: str, names: Sequence[str] | None
) -> tuple[ASiTForAudioClassification, ASiTFeatureExtractor]:
    fields = {"problem_type": problem_type, "drop_path_rate": args.drop_path_rate}
    if names is None:
        fields["num_labels"] = 1
    else:
        fields["id2label"] = dict(enumerate(names))
        fields["label2id"] = {name: index for index, name in enumerate(names)}
    if args.pooling_mode:
        fields["pooling_mode"] = args.pooling_mode
    if args.freeze_encoder:  # frozen means the same features every time
        fields |= {"drop_path_rate": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    path = args.model_name_or_path
    config = ASiTConfig.from_pretrained(path, **fields) if path else ASiTConfig.from_size(args.size, **fields)
    model = ASiTForAudioClassification._from_config(config, attn_implementation=args.attn_implementation)
    if not args.random_init:
        model.asit.load_state_dict(load_encoder(path, args.source).state_dict())
    if args.freeze_encoder:
        model.asit.requires_grad_(False)
    chosen = {name: value for name in ("mean", "std") if (value := getattr(inputs, name)) is not None}
    extractor = ASiTFeatureExtractor.from_pretrained(path, **chosen) if path else ASiTFeatureExtractor(**chosen)
    return model, extractor


def check_problem_type(wanted: str | None, dataset: Dataset) -> str:
    """The problem type; single labels may be trained as multi-label, which other changes may not."""
    of_labels = problem_type_of(dataset)
    possible = {"single_label_classification": ("single_label_classification", "multi_label_classification")}
    possible = possible.get(of_labels, (of_labels,))
    if wanted not in (None, *possible):
        raise ValueError(f"problem_type must be {' or '.join(possible)} for these labels, got {wanted!r}")
    return wanted or of_labels


def write_predictions(
    path: Path, dataset: Dataset, output: PredictionOutput, problem_type: str, names: Sequence[str] | None
) -> None:
    """One row a clip: `file`, `label`, `prediction` and its `score`; several labels are joined by `;`."""
    logits = torch.as_tensor(output.predictions).float()
    if problem_type == "regression":
        rows = [(label, guess, "") for label, guess in zip(output.label_ids.flatten(), logits.flatten().tolist())]
    else:
        probabilities = logits.softmax(-1) if problem_type == "single_label_classification" else logits.sigmoid()
        if problem_type_of(dataset) == "single_label_classification":
            best = zip(dataset["label"][:], *(column.tolist() for column in reversed(probabilities.max(-1))))
            rows = [(names[label], names[guess], f"{score:.4f}") for label, guess, score in best]
        else:
            rows = []
            for labels, row in zip(dataset["label"][:], probabilities):
                guesses = (row > 0.5).nonzero().flatten().tolist()
                joined = (";".join(names[index] for index in chosen) for chosen in (sorted(labels), guesses))
                rows.append((*joined, ";".join(f"{row[index]:.4f}" for index in guesses)))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "label", "prediction", "score"))
        for source, row in zip(dataset["audio"][:], rows, strict=True):
            writer.writerow((source_name(source), *row))


def write_class_reports(folder: Path, dataset: Dataset, output: PredictionOutput, names: Sequence[str]) -> None:
    """`per_class.csv` and, for one label a clip, `confusion.png`."""
    single = problem_type_of(dataset) == "single_label_classification"
    targets = np.asarray(dataset["label"][:]) if single else output.label_ids
    rows = per_class_report(output.predictions, targets, names)
    with open(folder / "per_class.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if single and len(names) <= MAX_CLASSES_OF_PICTURE:
        from asit_hf.plotting import plot_confusion

        figure = plot_confusion(confusion_counts(output.predictions, targets), names)
        figure.savefig(folder / "confusion.png", dpi=120)


def finetune(
    model_args: ModelArguments,
    data_args: DataArguments,
    inputs: InputArguments,
    augmentation: Augmentation,
    card_args: CardArguments,
    args: FinetuningArguments,
    arguments: list[str],
    build: Callable = build_model,
) -> tuple[dict[str, float], FinetuningTrainer]:
    """
    The metrics on the evaluation data, and the trainer. `arguments` are those of the command line, which the card
    tells; `build` makes the model and its feature extractor.
    """
    start_run(args)
    train, validation, evaluation = load_data(data_args, args.seed, args.load_best_model_at_end)
    problem_type = check_problem_type(data_args.problem_type, train)
    names = None if problem_type == "regression" else label_names(train)
    if problem_type == "regression" and (data_args.balanced_sampling or args.label_smoothing):
        raise ValueError("balanced_sampling and label_smoothing need classes, the labels are numbers")
    args.choose_metric(problem_type_of(train))
    model, feature_extractor = build(model_args, inputs, problem_type, names)

    rate = feature_extractor.sampling_rate
    held_out = {"sampling_rate": rate, "max_seconds": inputs.max_eval_seconds}
    clips = LabelledClips(train, rate, inputs.max_seconds, train=True, seed=args.seed, strict=data_args.strict)
    weights = balanced_weights(clips.labels, len(names or ())) if data_args.balanced_sampling else None
    trainer = FinetuningTrainer(
        model=model,
        args=args,
        train_dataset=TrainingClips(clips, augmentation, weights),
        eval_dataset=LabelledClips(validation, **held_out),
        # log-mel here, so in the loader's workers: a few per cent of the time of a training step
        data_collator=ClassificationCollator(
            feature_extractor,
            model.config.num_labels,
            problem_type,
            partial(augmentation.spectrogram, patch_size=model.config.patch_size),
        ),
        compute_metrics=compute_metrics_for(problem_type, names or ["value"]),
        processing_class=feature_extractor,
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
    if args.average_checkpoints:
        trainer.load_average()
    trainer.save_model()
    trainer.save_state()

    output = trainer.predict(LabelledClips(evaluation, **held_out), metric_key_prefix="eval")
    trainer.log_metrics("eval", output.metrics)
    trainer.save_metrics("eval", output.metrics, combined=False)
    if trainer.is_world_process_zero() and model.config.model_type == "asit":
        split = ", ".join(data_args.eval_filter) or data_args.eval_split or "evaluation"
        data = f"{Path(data_args.eval_data or data_args.train_data).name} ({split})"
        results = [(data, metric, output.metrics.get(f"eval_{metric}")) for metric in CARD_METRICS]
        results = [row for row in results if row[-1] is not None]
        command = ["examples/run_audio_classification.py", *arguments]
        base_model = None if model_args.random_init else model_args.model_name_or_path
        describe_run(trainer, command, card_args, train.select_columns("audio"), results, base_model)
    if args.push_to_hub:
        trainer.push_to_hub()  # before there is a table that names files of this machine
    if trainer.is_world_process_zero():
        write_predictions(Path(args.output_dir) / "predictions.csv", evaluation, output, problem_type, names)
        if names is not None:
            write_class_reports(Path(args.output_dir), evaluation, output, names)
    return output.metrics, trainer


def cross_validate(
    arguments: list[str], folds: list[str], args: FinetuningArguments, build: Callable
) -> dict[str, float]:
    """Leaves out one fold after the other; each has its own output folder and its own arguments, parsed anew."""
    if args.push_to_hub:
        raise ValueError("folds give one model each: push the one you choose, not all of them with --push_to_hub")
    data_args = parse_arguments(GROUPS, arguments)[1]
    reading = {**data_args.reading(), "split": data_args.train_split, "check_files": False}
    dataset = load_labelled(data_args.train_data, data_args.train_filter, **reading)
    for fold in folds:  # now, not after hours of the others
        if len(filter_rows(dataset, [f"{data_args.fold_column}={fold}"])) == 0:
            raise ValueError(f"no row of {data_args.train_data} has {data_args.fold_column} {fold!r}")
    results, histories = {}, []
    for fold in folds:
        parsed = parse_arguments(GROUPS, [*arguments, "--output_dir", os.path.join(args.output_dir, f"fold-{fold}")])
        parsed[1].hold_out(fold)
        results[fold], trainer = finetune(*parsed, arguments, build=build)
        histories.append(trainer.state.log_history)
    summary = summarize_folds(results)
    if not parsed[1].validation_fraction:  # the history is of the fold that was left out
        summary |= best_common_epoch(histories, trainer.args.metric_for_best_model, trainer.args.greater_is_better)
    logger.info(f"{len(folds)} folds: {summary}")
    if trainer.is_world_process_zero():
        content = json.dumps({"summary": summary, "folds": results}, indent=2)
        Path(args.output_dir, "fold_results.json").write_text(content + "\n")
    return summary


def summarize_folds(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mean over folds of every metric, and `..._std`, its standard deviation."""
    names = [name for name in next(iter(results.values())) if not name.endswith(("_per_second", "_runtime"))]
    columns = {name: [metrics[name] for metrics in results.values()] for name in names}
    means = {name: float(np.mean(values)) for name, values in columns.items()}
    with np.errstate(invalid="ignore"):  # d' of a perfect score is infinite, its spread NaN
        return means | {f"{name}_std": float(np.std(values)) for name, values in columns.items()}


def best_common_epoch(histories: list[list[dict]], metric: str, greater_is_better: bool) -> dict[str, float]:
    """
    The evaluation at which the mean over folds is best, `best_common_epoch`, and that mean: AST's rule for ESC-50. It
    is chosen by the clips that it scores; the plain mean of a run that keeps the last epoch is not. Evaluations that
    not all folds have, as those by steps of folds of other sizes, are left out.
    """
    key = f"eval_{metric.removeprefix('eval_')}"
    rows = [[row for row in history if key in row] for history in histories]
    means = np.array([np.mean([row[key] for row in evaluated]) for evaluated in zip(*rows)])
    if means.size == 0:
        return {}
    best = int(means.argmax() if greater_is_better else means.argmin())
    return {"best_common_epoch": rows[0][best]["epoch"], f"best_common_{key}": float(means[best])}


def main(arguments: list[str] | None = None, build: Callable = build_model) -> dict[str, float]:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parse_arguments(GROUPS, arguments)
    data_args, args = parsed[1], parsed[-1]
    if data_args.folds is not None:
        return cross_validate(arguments, data_args.fold_names(), args, build)
    return finetune(*parsed, arguments, build=build)[0]


if __name__ == "__main__":
    run_script(main)
