"""
Finetunes an ASiT encoder to classify audio.

    python examples/run_audio_classification.py --model_name_or_path CHECKPOINT --train_data train.csv \
        --eval_data test.csv --output_dir runs/classifier --num_train_epochs 25 --learning_rate 1e-4

One label a clip, several (`--problem_type multi_label_classification`, or rows with lists of labels), or a number. The
best checkpoint is kept: by the clips that `--validation_fraction` puts aside from the training data, or without it by
`--eval_data`. `--recipe FILE` reads options from a file, `--resume_from_checkpoint True` goes on from the last
checkpoint. The output folder loads with `pipeline("audio-classification", model=...)` and holds `eval_results.json`
and `predictions.csv`.
"""

import csv
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import PredictionOutput, get_last_checkpoint
from transformers.utils import logging

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification
from asit_hf.data import ClassificationCollator, LabelledClips, label_names, split_dataset
from asit_hf.data.audio import AudioReadError, source_name
from asit_hf.data.epochs import EpochCallback
from asit_hf.evaluation.embeddings import load_encoder
from asit_hf.finetuning import load_labelled_dataset, problem_type_of
from asit_hf.finetuning.metrics import MAIN_METRIC, compute_metrics_for
from asit_hf.recipes import parse_arguments

logger = logging.get_logger(__name__)


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
    train_data: str = field(metadata={"help": "Folder of class folders, csv or json manifest, or Hub data set."})
    eval_data: str | None = field(
        default=None,
        metadata={"help": "The same; by default --train_data, if --eval_split or --eval_filter is given."},
    )
    train_split: str | None = field(default=None, metadata={"help": "Split of the training data."})
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
    audio_column: str | None = field(default=None, metadata={"help": "Column of the audio."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels."})
    root: str | None = field(default=None, metadata={"help": "Folder that a manifest's paths are relative to."})
    problem_type: str | None = field(
        default=None,
        metadata={
            "help": "single_label_classification, multi_label_classification or regression; default: as labelled."
        },
    )
    max_seconds: float | None = field(default=None, metadata={"help": "Train on random crops of longer clips."})
    max_eval_seconds: float | None = field(
        default=None, metadata={"help": "Evaluate on the beginning of longer clips; by default on whole clips."}
    )
    strict: bool = field(default=False, metadata={"help": "Stop at a file that cannot be read."})

    def __post_init__(self):
        if self.eval_data is None and (self.eval_split or self.eval_filter):
            self.eval_data = self.train_data
        if self.eval_data is None and not self.validation_fraction:
            raise ValueError("give --eval_data, --eval_split or --eval_filter, or --validation_fraction")


@dataclass
class FinetuningArguments(TrainingArguments):
    """Trainer's arguments with other defaults."""

    eval_strategy: str = field(default="epoch", metadata={"help": "no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "no, steps, epoch or best."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept beside the best."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best checkpoint, not the last."})
    metric_for_best_model: str | None = field(
        default="auto", metadata={"help": "auto: accuracy, mAP or mse, as the problem type has it."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: the collator reads them."})

    def choose_metric(self, problem_type: str) -> None:
        if self.metric_for_best_model == "auto":
            self.metric_for_best_model, self.greater_is_better = MAIN_METRIC[problem_type]


def load_data(args: DataArguments, seed: int) -> tuple[Dataset, Dataset, Dataset]:
    """(training, validation, evaluation) data; the last two are the same unless both were asked for."""
    reading = {name: getattr(args, name) for name in ("audio_column", "label_column", "root", "strict")}
    train = load_labelled_dataset(args.train_data, args.train_filter, split=args.train_split, **reading)
    names = None if problem_type_of(train) == "regression" else label_names(train)
    validation = evaluation = None
    if args.eval_data is not None:
        evaluation = load_labelled_dataset(args.eval_data, args.eval_filter, names, split=args.eval_split, **reading)
    if args.validation_fraction:
        train, validation = split_dataset(train, args.validation_fraction, seed, args.group_column)
    else:
        logger.warning("The best checkpoint is chosen by the evaluation data: its score is a little too good.")
    return train, validation or evaluation, evaluation or validation


def build_model(
    args: ModelArguments, problem_type: str, names: Sequence[str] | None
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
    return model, ASiTFeatureExtractor.from_pretrained(path) if path else ASiTFeatureExtractor()


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
    if problem_type == "single_label_classification":
        scores, best = logits.softmax(-1).max(-1)
        rows = [(names[label], names[guess], score) for label, guess, score in zip(output.label_ids, best, scores)]
    elif problem_type == "multi_label_classification":
        rows = []
        for targets, probabilities in zip(torch.as_tensor(output.label_ids), logits.sigmoid()):
            guesses = (probabilities > 0.5).nonzero().flatten()
            labels = [";".join(names[index] for index in chosen) for chosen in (targets.nonzero().flatten(), guesses)]
            rows.append((*labels, ";".join(f"{score:.4f}" for score in probabilities[guesses])))
    else:
        rows = [(label, guess, "") for label, guess in zip(output.label_ids.flatten(), logits.flatten().tolist())]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "label", "prediction", "score"))
        for source, (label, guess, score) in zip(dataset["audio"][:], rows, strict=True):
            score = f"{score:.4f}" if isinstance(score, torch.Tensor) else score
            writer.writerow((source_name(source), label, guess, score))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, args = parse_arguments((ModelArguments, DataArguments, FinetuningArguments), arguments)
    logging.set_verbosity_info() if args.should_log else logging.set_verbosity_warning()
    set_seed(args.seed)

    train, validation, evaluation = load_data(data_args, args.seed)
    problem_type = check_problem_type(data_args.problem_type, train)
    names = None if problem_type == "regression" else label_names(train)
    args.choose_metric(problem_type)
    model, feature_extractor = build_model(model_args, problem_type, names)

    rate = feature_extractor.sampling_rate
    held_out = {"sampling_rate": rate, "max_seconds": data_args.max_eval_seconds}
    train_clips = LabelledClips(
        train, rate, data_args.max_seconds, train=True, seed=args.seed, strict=data_args.strict
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train_clips,
        eval_dataset=LabelledClips(validation, **held_out),
        # log-mel here, so in the loader's workers: a few per cent of the time of a training step
        data_collator=ClassificationCollator(feature_extractor, model.config.num_labels, problem_type),
        compute_metrics=compute_metrics_for(problem_type, names or ["value"]),
        processing_class=feature_extractor,
        callbacks=[EpochCallback(train_clips)],
    )
    checkpoint = args.resume_from_checkpoint
    if checkpoint in ("True", "true"):
        checkpoint = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()

    output = trainer.predict(LabelledClips(evaluation, **held_out), metric_key_prefix="eval")
    trainer.log_metrics("eval", output.metrics)
    trainer.save_metrics("eval", output.metrics, combined=False)
    if trainer.is_world_process_zero():
        write_predictions(Path(args.output_dir) / "predictions.csv", evaluation, output, problem_type, names)
    if args.push_to_hub:
        trainer.push_to_hub()
    return output.metrics


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AudioReadError as error:
        sys.exit(f"error: {error}; repair this file or take it out of the data")
