r"""
Finetunes an ASiT encoder for sound event detection: a score for every class in every time patch of 160 ms.

    python examples/run_frame_classification.py --model_name_or_path CHECKPOINT --train_labels train.tsv \
        --eval_labels test.tsv --data FOLDER --output_dir runs/events --num_train_epochs 20 --learning_rate 1e-4

Labels are tables of events from DCASE, AudioSet, Raven, BirdNET or Audacity, see `asit_hf/data/README.md`. The output
folder holds the last model, `eval_results.json` and `events.tsv`, the detected events of the evaluation clips: runs of
time patches above `--threshold` after a median filter of `--median_filter_size`. No choice depends on the evaluation
data.
`--do_train False --do_eval True` evaluates the frame classifier of `--model_name_or_path` without training.
"""

import logging
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import EvalPrediction

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioFrameClassification
from asit_hf.data import audio_info
from asit_hf.data.clips import MAX_SECONDS, warn_of_longer
from asit_hf.data.epochs import EpochCallback
from asit_hf.data.event_tables import Event, event_names, read_strong_labels, write_strong_labels
from asit_hf.data.events import (
    IGNORED,
    FrameCollator,
    StronglyLabelledClips,
    time_patch_edges,
    warn_of_unlabelled_files,
)
from asit_hf.evaluation.metrics import score
from asit_hf.evaluation.sound_events import PSDS_SCENARIOS, decode_events, psds, segment_metrics
from asit_hf.finetuning.trainer import SupervisedArguments, SupervisedTrainer
from asit_hf.hub.cards import CardArguments, describe_run
from asit_hf.loading import load_config, load_encoder, load_feature_extractor, load_trained
from asit_hf.utils.arguments import (
    OptionError,
    checkpoint_to_resume,
    parse_arguments,
    refuse_without_effect,
    run_script,
    start_run,
)

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Encoder, classifier or pretraining checkpoint; the classifier is newly initialized."},
    )
    encoder: str | None = field(
        default=None, metadata={"help": "Encoder of a pretraining checkpoint: teacher (default) or student."}
    )
    random_init: bool = field(
        default=False, metadata={"help": "Random weights, in the architecture of the checkpoint or of --size."}
    )
    size: str | None = field(
        default=None,
        metadata={"help": "Model size with --random_init and no checkpoint: tiny, small or base (default)."},
    )
    drop_path_rate: float = field(default=0.0, metadata={"help": "Stochastic depth rate. Default: 0."})

    def __post_init__(self):
        if self.model_name_or_path is None and not self.random_init:
            raise ValueError("expected --model_name_or_path or --random_init")
        if self.size is not None and self.model_name_or_path is not None:
            raise ValueError("--size has no effect with --model_name_or_path, whose architecture is used")
        if self.encoder is not None and self.random_init:
            raise ValueError("--encoder has no effect with --random_init, which reads no weights")


@dataclass(kw_only=True)
class DataArguments:
    train_labels: str | None = field(
        default=None,
        metadata={
            "help": "Table of training events, one per row (csv, tsv, txt), or folder of a table for each clip."
        },
    )
    eval_labels: str = field(metadata={"help": "Table of evaluation events, or folder of tables."})
    data: str = field(metadata={"help": "Folder of the audio files in the tables, searched recursively."})
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the labels. Default: event_label, label, species, ..."}
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Folder of the evaluation audio files. Default: --data."}
    )
    max_seconds: float | None = field(
        default=None, metadata={"help": "Train on random crops of this length. Default: 30; inf: whole clips."}
    )
    threshold: float = field(default=0.5, metadata={"help": "Detection threshold of a class score. Default: 0.5."})
    median_filter_size: int = field(
        default=1, metadata={"help": "Odd width of the median filter in time patches. Default: 1, no filter."}
    )
    segment_seconds: float = field(
        default=1.0, metadata={"help": "Segment length of the segment-based scores. Default: 1."}
    )
    drop_unknown_labels: bool = field(
        default=False, metadata={"help": "Drop evaluation events of classes that are not in the training events."}
    )
    strict: bool = field(default=False, metadata={"help": "Stop at the first unreadable file."})


def build_model(
    args: ModelArguments, names: list[str]
) -> tuple[ASiTForAudioFrameClassification, ASiTFeatureExtractor]:
    fields = {"drop_path_rate": args.drop_path_rate, "problem_type": "multi_label_classification"}
    fields |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    path = args.model_name_or_path
    config = load_config(path, **fields) if path else ASiTConfig.from_size(args.size or "base", **fields)
    model = ASiTForAudioFrameClassification(config)
    if not args.random_init:
        model.asit.load_state_dict(load_encoder(path, args.encoder or "teacher").state_dict())
    return model, load_feature_extractor(path) if path else ASiTFeatureExtractor()


def known_events(events: dict[str, list[Event]], names: list[str], args: DataArguments) -> dict[str, list[Event]]:
    """The evaluation events; in AudioSet they have classes that training lacks."""
    unknown = [name for name in event_names(events) if name not in names]
    if not unknown:
        return events
    if not args.drop_unknown_labels:
        raise ValueError(
            f"expected the classes of {args.train_labels or 'the model'} in {args.eval_labels}, got {len(unknown)} "
            f"others, first {unknown[0]!r}: --drop_unknown_labels drops their events"
        )
    kept = {file: [event for event in of_file if event.label not in unknown] for file, of_file in events.items()}
    dropped = sum(map(len, events.values())) - sum(map(len, kept.values()))
    logger.warning(f"dropped {dropped} evaluation events of {len(unknown)} classes that training lacks: {unknown}")
    return kept


class Scorer:
    """Scores predictions for the evaluation clips, in their order."""

    def __init__(self, clips: StronglyLabelledClips, names: list[str], patch_size: int, args: DataArguments):
        self.names, self.args = names, args
        self.rate, self.patch_size = clips.sampling_rate, patch_size
        self.reference = dict(zip(clips.names, clips.events))
        self.durations = {name: audio_info(file).duration for name, file in zip(clips.names, clips.files)}

    def scores(self, predictions: np.ndarray, labels: np.ndarray) -> tuple[dict, dict]:
        """Probabilities `(time_patches, classes)` and edges `(time_patches + 1,)` by file, without padding."""
        scores, edges = {}, {}
        for logits, targets, (name, duration) in zip(predictions, labels, self.durations.items(), strict=True):
            time_patches = int((targets[:, 0] != IGNORED).sum())
            scores[name] = 1 / (1 + np.exp(-logits[:time_patches].astype(np.float64)))
            edges[name] = time_patch_edges(time_patches, duration, self.rate, self.patch_size)
        return scores, edges

    def detect(self, scores: dict, edges: dict) -> dict:
        """Events by file."""
        options = {"threshold": self.args.threshold, "median_filter_size": self.args.median_filter_size}
        return {name: decode_events(scores[name], self.names, edges[name], **options) for name in scores}

    def check_metric(self, name: str) -> None:
        """Raises `ValueError` if `metric_for_best_model` is none of the metrics."""
        targets = (np.arange(len(self.durations))[:, None, None] + np.arange(len(self.names))) % 2
        known = ["loss", *self(EvalPrediction(np.zeros(targets.shape), targets))]
        if name.removeprefix("eval_") not in known:
            raise ValueError(f"expected metric_for_best_model among {', '.join(known)}; got {name!r}")

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        scores, edges = self.scores(prediction.predictions, prediction.label_ids)
        targets = np.concatenate([rows[rows[:, 0] != IGNORED] for rows in prediction.label_ids])
        if targets.any():
            metrics = score(np.concatenate(list(scores.values())), targets)
        else:
            metrics = {
                **dict.fromkeys(("mAP", "mAUC", "d_prime"), math.nan),
                "classes_without_positives": len(self.names),
            }
        segments = segment_metrics(
            self.reference, self.detect(scores, edges), self.names, self.durations, self.args.segment_seconds
        )
        return {**metrics, **segments}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    groups = (ModelArguments, DataArguments, CardArguments, SupervisedArguments)
    model_args, data_args, card_args, args = parse_arguments(groups, arguments)
    start_run(args)

    model = None
    if args.do_train:
        if data_args.train_labels is None:
            raise OptionError("expected --train_labels, the training events, got none")
        train_events = read_strong_labels(data_args.train_labels, data_args.label_column)
        names = event_names(train_events)
        if not names:
            raise ValueError(f"expected events in {data_args.train_labels}, got {len(train_events)} clips without any")
    else:
        refuse_without_effect(model_args, ["encoder", "random_init", "drop_path_rate"], "with do_train False")
        model, feature_extractor = load_trained(
            model_args.model_name_or_path, ASiTForAudioFrameClassification, dtype=torch.float32
        )
        names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    eval_events = read_strong_labels(data_args.eval_labels, data_args.label_column)
    eval_events = known_events(eval_events, names, data_args)
    if model is None:
        model, feature_extractor = build_model(model_args, names)
    rate = feature_extractor.sampling_rate
    seconds = MAX_SECONDS if data_args.max_seconds is None else data_args.max_seconds
    crop = {"max_seconds": seconds, "train": True, "seed": args.seed}
    train = None
    if args.do_train:
        train = StronglyLabelledClips(train_events, data_args.data, rate, strict=data_args.strict, **crop)
    evaluation = StronglyLabelledClips(eval_events, data_args.eval_data or data_args.data, rate)
    all_clips = [clips for clips in (train, evaluation) if clips is not None]
    for clips in all_clips:
        if not data_args.strict:
            clips.drop_unreadable()
        clips.cut_to_durations()
    warn_of_unlabelled_files(*all_clips)
    if train is not None and (lost := sorted(set(names) - set(event_names(dict(zip(train.names, train.events)))))):
        logger.warning(f"no training event is left of {len(lost)} classes: {', '.join(lost)}")
    if not any(evaluation.events):
        logger.warning(f"no event is left in the {len(evaluation)} evaluation clips: most scores are undefined (NaN)")
    if train is not None and data_args.max_seconds is None:
        warn_of_longer(train.files, MAX_SECONDS, "training takes random crops of this length (--max_seconds)")
    if args.per_device_eval_batch_size > 1 and warn_of_longer(
        evaluation.files, MAX_SECONDS, "clips are evaluated one by one (per_device_eval_batch_size 1)"
    ):
        args.per_device_eval_batch_size = 1  # a batch would be padded to the longest
    scorer = Scorer(evaluation, names, model.config.patch_size, data_args)
    if args.metric_for_best_model not in (None, "loss"):
        scorer.check_metric(args.metric_for_best_model)
    trainer = SupervisedTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=FrameCollator(feature_extractor, names, model.config.patch_size),
        compute_metrics=scorer,
        processing_class=feature_extractor,
        callbacks=[EpochCallback(train)] if args.do_train else None,
    )
    if args.do_train:
        trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
        trainer.save_model()
        trainer.save_state()

    output = trainer.predict(evaluation, metric_key_prefix="eval")
    scores, edges = scorer.scores(output.predictions, output.label_ids)
    for scenario in PSDS_SCENARIOS:
        options = {"scenario": scenario, "median_filter_size": data_args.median_filter_size}
        output.metrics[f"eval_{scenario}"] = psds(scorer.reference, scores, edges, names, **options)
    trainer.log_metrics("eval", output.metrics)
    trainer.save_metrics("eval", output.metrics, combined=False)
    if trainer.is_world_process_zero():
        write_strong_labels(Path(args.output_dir) / "events.tsv", scorer.detect(scores, edges))
    if args.do_train and trainer.is_world_process_zero():
        data = Path(data_args.eval_labels).name
        results = [(data, name, output.metrics[f"eval_{name}"]) for name in ("segment_f1", *PSDS_SCENARIOS)]
        results = [row for row in results if not math.isnan(row[-1])]
        command = ["examples/run_frame_classification.py", *arguments]
        base_model = None if model_args.random_init else model_args.model_name_or_path
        describe_run(trainer, command, card_args, train.files, results, base_model)
    if args.push_to_hub:
        trainer.push_to_hub()
    return output.metrics


if __name__ == "__main__":
    run_script(main)
