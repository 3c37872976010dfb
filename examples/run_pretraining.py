"""
Pretrains ASiT on unlabelled audio.

    python examples/run_pretraining.py --train_data FOLDER --output_dir runs/tiny --size tiny \
        --per_device_train_batch_size 32 --num_train_epochs 100

`--train_data` takes folders of audio, csv / json manifests, parquet shards or names of Hub data sets, several of them
at once. `--recipe FILE` reads options from a file; options on the command line override it. Add
`--resume_from_checkpoint True` to go on from the last checkpoint of `--output_dir`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.data import PretrainingCrops, StreamingCrops, load_unlabelled
from asit_hf.pretraining.callbacks import PicturesCallback
from asit_hf.pretraining.objectives import get_objective
from asit_hf.pretraining.trainer import ASiTPreTrainer, ASiTPreTrainingArguments
from asit_hf.recipes import parse_arguments

logger = logging.get_logger(__name__)


@dataclass
class DataArguments:
    train_data: list[str] = field(
        metadata={
            "help": "Folders, manifests, parquet files or Hub data sets. A source with options of its own is JSON: "
            '{"source": "meta.csv", "root": "audio", "audio_column": "filename", "filter": ["fold=1,2,3"]}'
        }
    )
    streaming: bool = field(default=False, metadata={"help": "Read the data as a stream (needs --max_steps)."})
    sampling_rate: int = field(default=16000, metadata={"help": "Rate in Hz that audio is resampled to."})
    global_seconds: float = field(default=6.0, metadata={"help": "Length of the two global crops."})
    local_seconds: float = field(default=2.0, metadata={"help": "Length of the local crops."})
    num_local_crops: int | None = field(default=None, metadata={"help": "Local crops a clip (2024: 4, 2023: none)."})
    mean: float = field(default=-4.2677393, metadata={"help": "Mean of the log-mel values (default: AudioSet's)."})
    std: float = field(default=4.5689974, metadata={"help": "Standard deviation of the log-mel values."})
    strict: bool = field(default=False, metadata={"help": "Stop at a file that cannot be read."})


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to go on from: an encoder (heads are fresh) or a pretraining one."}
    )
    size: str = field(default="base", metadata={"help": "tiny, small or base."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Other fields of ASiTConfig: num_prototypes=4096,num_hidden_layers=6"}
    )
    drop_path_rate: float = field(default=0.1, metadata={"help": "Stochastic depth of the student."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager, sdpa, flash_attention_2, ..."})


def build_dataset(data: DataArguments, args: ASiTPreTrainingArguments):
    objective = get_objective(args.objective)
    dataset = load_unlabelled(data.train_data, streaming=data.streaming)
    crops = StreamingCrops if data.streaming else PretrainingCrops
    return crops(
        dataset,
        sampling_rate=data.sampling_rate,
        global_seconds=data.global_seconds,
        local_seconds=data.local_seconds,
        num_local_crops=objective.num_local_crops if data.num_local_crops is None else data.num_local_crops,
        roll_probability=objective.roll_probability,
        seed=args.seed,
        strict=data.strict,
    )


def build_model(model: ModelArguments, data: DataArguments, args: ASiTPreTrainingArguments) -> ASiTForPreTraining:
    fields = {**get_objective(args.objective).config, "drop_path_rate": model.drop_path_rate}
    if model.model_name_or_path:
        config = ASiTConfig.from_pretrained(model.model_name_or_path, **fields)
    else:
        config = ASiTConfig.from_size(model.size, num_frames=position_frames(data.global_seconds), **fields)
    if model.config_overrides:
        config.update_from_string(model.config_overrides)
    if model.model_name_or_path:
        return ASiTForPreTraining.from_pretrained(
            model.model_name_or_path, config=config, attn_implementation=model.attn_implementation
        )
    config._attn_implementation = model.attn_implementation
    return ASiTForPreTraining(config)


def position_frames(seconds: float) -> int:
    """Frames of a crop, cut to whole patches: 6 s are 598 frames, cut to 592."""
    return (round(seconds * 100) - 2) // 16 * 16


def main(arguments: list[str] | None = None) -> ASiTPreTrainer:
    model_args, data_args, args = parse_arguments((ModelArguments, DataArguments, ASiTPreTrainingArguments), arguments)
    logging.set_verbosity_info() if args.should_log else logging.set_verbosity_warning()
    set_seed(args.seed)

    dataset = build_dataset(data_args, args)
    model = build_model(model_args, data_args, args)
    feature_extractor = ASiTFeatureExtractor(
        sampling_rate=data_args.sampling_rate,
        num_mel_bins=model.config.num_mel_bins,
        mean=data_args.mean,
        std=data_args.std,
    )
    trainer = ASiTPreTrainer(model=model, args=args, train_dataset=dataset, processing_class=feature_extractor)
    trainer.add_callback(PicturesCallback(trainer))
    checkpoint = args.resume_from_checkpoint
    if checkpoint in ("True", "true"):
        checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    if args.push_to_hub:
        trainer.push_to_hub()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
