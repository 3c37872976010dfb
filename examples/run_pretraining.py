"""
Pretrains ASiT on unlabelled audio.

    python examples/run_pretraining.py --train_data FOLDER --output_dir runs/tiny --size tiny \
        --per_device_train_batch_size 32 --num_train_epochs 100

`--train_data` takes folders of audio, csv / json manifests, parquet shards or names of Hub data sets, several of them
at once, or one packed pool (`make_shards.py --format packed`), which an accelerator holds in its memory.
`--model_name_or_path` starts from the weights of an ASiT or of a ViT of images instead of random ones.
`--recipe FILE` reads options from a file; options on the command line override it. Add `--resume_from_checkpoint True`
to go on from the last checkpoint of `--output_dir`.
"""

import logging

if __name__ == "__main__":  # transformers imports torchao where it is installed, which logs kernels it cannot load
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)

import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.data import (
    LabelledClips,
    PackedCrops,
    PretrainingCrops,
    StreamingCrops,
    is_packed,
    label_names,
    load_unlabelled,
)
from asit_hf.data.labelled import load_labelled
from asit_hf.data.parcels import is_parcels
from asit_hf.hub.cards import CardArguments, describe_run
from asit_hf.pretraining.arguments import ASiTPreTrainingArguments
from asit_hf.pretraining.initialization import encoder_from_vit, read_model_type
from asit_hf.pretraining.monitoring import KnnProbeCallback
from asit_hf.pretraining.presets import get_preset
from asit_hf.pretraining.trainer import ASiTPreTrainer
from asit_hf.utils.arguments import checkpoint_to_resume, parse_arguments, run_script, start_run

logger = logging.getLogger(__name__)

LOSS_OPTIONS = ("global_loss_weight", "local_loss_weight", "reconstruction_loss_weight", "local_loss_patches")


@dataclass
class DataArguments:
    train_data: list[str] = field(
        metadata={
            "help": "Folders, manifests, parquet files or Hub data sets; or one folder of packed audio. A source with "
            "options of its own is JSON: "
            '{"source": "meta.csv", "root": "audio", "audio_column": "filename", "filter": ["fold=1,2,3"]}'
        }
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the data as a stream (needs --steps_per_epoch, and --max_steps or --max_minutes)."},
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Of a stream: clips that the next is drawn from."})
    sampling_rate: int | None = field(
        default=None, metadata={"help": "Rate in Hz that audio is resampled to (default: the checkpoint's, or 16000)."}
    )
    global_seconds: float = field(default=6.0, metadata={"help": "Length of the two global crops."})
    local_seconds: float = field(default=2.0, metadata={"help": "Length of the local crops."})
    num_local_crops: int | None = field(default=None, metadata={"help": "Local crops a clip (2024: 4, 2023: none)."})
    mean: float | None = field(
        default=None, metadata={"help": "Mean of the log-mel values (default: the checkpoint's, or AudioSet's)."}
    )
    std: float | None = field(default=None, metadata={"help": "Their standard deviation, likewise."})
    strict: bool = field(default=False, metadata={"help": "Stop at a file that cannot be read."})
    knn_train: str | None = field(
        default=None, metadata={"help": "csv of labelled clips (columns file and label) that vote in a kNN probe."}
    )
    knn_test: str | None = field(default=None, metadata={"help": "csv of the clips that it is scored on."})
    knn_steps: int = field(default=1000, metadata={"help": "Optimizer steps between two kNN probes."})


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to go on from: an ASiT encoder (heads are fresh, the teacher is a copy), an ASiT "
            "pretraining checkpoint (all of it goes on), or a ViT of images (as an encoder). An ASiT keeps its "
            "positions, whatever --global_seconds is."
        },
    )
    size: str = field(default="base", metadata={"help": "Of a model from random weights: tiny, small or base."})
    global_loss_weight: float | None = field(default=None, metadata={"help": "Of the CLS loss (2024: 0.5, 2023: 1)."})
    local_loss_weight: float | None = field(default=None, metadata={"help": "Of the patch loss (0.5, 1)."})
    reconstruction_loss_weight: float | None = field(default=None, metadata={"help": "Of the L1 loss (1, 2)."})
    local_loss_patches: str | None = field(
        default=None, metadata={"help": "Patches that the patch loss is taken over: all or corrupted."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Other fields of ASiTConfig: num_prototypes=4096,num_hidden_layers=6"}
    )
    drop_path_rate: float = field(default=0.1, metadata={"help": "Stochastic depth of the student."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager, sdpa, flash_attention_2, ..."})


def build_dataset(
    data: DataArguments, args: ASiTPreTrainingArguments, sampling_rate: int, num_local_crops: int
) -> PretrainingCrops | StreamingCrops | PackedCrops:
    settings = {
        "sampling_rate": sampling_rate,
        "global_seconds": data.global_seconds,
        "local_seconds": data.local_seconds,
        "num_local_crops": num_local_crops,
        "roll_probability": get_preset(args.preset).roll_probability,
        "seed": args.seed,
    }
    if packed := [source for source in data.train_data if is_packed(source)]:
        if len(data.train_data) > 1:
            raise ValueError(
                f"expected the packed audio of {packed[0]} to be the only train_data, got {data.train_data}: pack all "
                "of it together (examples/tools/make_shards.py --format packed)"
            )
        if data.streaming:
            raise ValueError(f"expected audio to stream, got packed audio in {packed[0]}: leave out --streaming")
        return PackedCrops(packed[0], **settings)
    if parcels := [source for source in data.train_data if is_parcels(source)]:
        raise ValueError(
            f"expected audio or packed audio, got the Opus parcels {parcels[0]}: decode them first "
            f"(python -m asit_hf.data.parcels decode {parcels[0]} POOL)"
        )
    dataset = load_unlabelled(data.train_data, streaming=data.streaming)
    if data.streaming:
        dataset = dataset.shuffle(seed=args.seed, buffer_size=data.shuffle_buffer)
    crops = StreamingCrops if data.streaming else PretrainingCrops
    return crops(dataset, **settings, strict=data.strict)


def build_model(model: ModelArguments, data: DataArguments, args: ASiTPreTrainingArguments) -> ASiTForPreTraining:
    overrides = {"drop_path_rate": model.drop_path_rate, **parse_overrides(model.config_overrides)}
    overrides |= {name: value for name in LOSS_OPTIONS if (value := getattr(model, name)) is not None}
    fields = {**get_preset(args.preset).config, **overrides}
    name = model.model_name_or_path
    if name and is_asit(name):
        config = ASiTConfig.from_pretrained(name)
        if config.architectures == [ASiTForPreTraining.__name__]:  # its heads and loss weights go on as they are
            if (config.num_patch_prototypes is None) != (fields["num_patch_prototypes"] is None):
                logger.warning("%s has not the heads of the %s objective; it keeps its own", name, args.preset)
            fields = overrides
        config = ASiTConfig.from_pretrained(name, **fields)
        return ASiTForPreTraining.from_pretrained(name, config=config, attn_implementation=model.attn_implementation)
    fields.setdefault("num_frames", position_frames(data.global_seconds))
    encoder = encoder_from_vit(name, **fields) if name else None
    config = encoder.config if encoder else ASiTConfig.from_size(model.size, **fields)
    config._attn_implementation = model.attn_implementation
    pretraining = ASiTForPreTraining(config)
    if encoder:
        pretraining.asit.load_state_dict(encoder.state_dict())
        pretraining.reset_teacher()
    return pretraining


def is_asit(name_or_path: str) -> bool:
    """Whether a checkpoint is one of this package's."""
    if Path(name_or_path).is_file():
        raise ValueError(
            f"model_name_or_path must be a folder or Hub name, got the file {name_or_path}; "
            "python -m asit_hf.convert_original makes a folder of an official checkpoint"
        )
    return read_model_type(name_or_path) == ASiTConfig.model_type


def parse_overrides(text: str | None) -> dict:
    """`name=value,name=value` as fields of the configuration."""
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    for name, _, value in pairs:
        if name not in ASiTConfig.__dataclass_fields__ or not value:
            raise ValueError(f"config_overrides must read FIELD=VALUE,..., with fields of ASiTConfig; got {name!r}")
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def build_feature_extractor(model: ModelArguments, data: DataArguments, num_mel_bins: int) -> ASiTFeatureExtractor:
    """An ASiT checkpoint's, or a fresh one; with what the command line says."""
    chosen = {name: getattr(data, name) for name in ("sampling_rate", "mean", "std")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if model.model_name_or_path and is_asit(model.model_name_or_path):
        return ASiTFeatureExtractor.from_pretrained(model.model_name_or_path, **chosen)
    return ASiTFeatureExtractor(num_mel_bins=num_mel_bins, **chosen)


def build_knn_probe(data: DataArguments, trainer: ASiTPreTrainer) -> KnnProbeCallback:
    if not data.knn_test:
        raise ValueError("knn_train needs knn_test, the clips that the probe is scored on")
    train = load_labelled(data.knn_train)
    test = load_labelled(data.knn_test, names=label_names(train))
    rate = trainer.processing_class.sampling_rate
    return KnnProbeCallback(trainer, LabelledClips(train, rate), LabelledClips(test, rate), data.knn_steps)


def position_frames(seconds: float) -> int:
    """Frames of a crop, cut to whole patches: 6 s are 598 frames, cut to 592."""
    return (round(seconds * 100) - 2) // 16 * 16


def main(arguments: list[str] | None = None) -> ASiTPreTrainer:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    groups = (ModelArguments, DataArguments, CardArguments, ASiTPreTrainingArguments)
    model_args, data_args, card_args, args = parse_arguments(groups, arguments)
    start_run(args)

    model = build_model(model_args, data_args, args)
    feature_extractor = build_feature_extractor(model_args, data_args, model.config.num_mel_bins)
    num_local_crops = data_args.num_local_crops
    if num_local_crops is None:  # they enter the global loss only
        num_local_crops = get_preset(args.preset).num_local_crops if model.config.global_loss_weight else 0
    dataset = build_dataset(data_args, args, feature_extractor.sampling_rate, num_local_crops)
    trainer = ASiTPreTrainer(model=model, args=args, train_dataset=dataset, processing_class=feature_extractor)
    checkpoint = checkpoint_to_resume(args)
    if data_args.knn_train:
        trainer.add_callback(build_knn_probe(data_args, trainer))
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.terminated:
        logger.warning(f"terminated at step {trainer.state.global_step}: --resume_from_checkpoint True goes on")
        sys.exit(128 + signal.SIGTERM)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        sources = None if data_args.streaming else dataset.sources
        describe_run(trainer, ["examples/run_pretraining.py", *arguments], card_args, sources)
    if args.push_to_hub:
        trainer.push_to_hub()
    return trainer


if __name__ == "__main__":
    run_script(main)
