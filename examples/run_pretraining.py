r"""
Pretrains ASiT on unlabelled audio.

    python examples/run_pretraining.py --train_data FOLDER --output_dir runs/tiny --size tiny \
        --per_device_train_batch_size 32 --num_train_epochs 100

`--train_data` takes folders of audio, csv or json manifests, parquet shards and names of Hub data sets, or one folder
of packed audio (`make_shards.py --format packed`), which an accelerator keeps in its memory.
`--recipe FILE` reads options from a file; options on the command line override it.

`--model_name_or_path CHECKPOINT` starts a new run from trained weights. `--resume_from_checkpoint True` continues the
run in `--output_dir` from its last checkpoint.
"""

import logging
import signal
import sys
from dataclasses import dataclass, field

import yaml

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.configuration_asit import LOCAL_LOSS_PATCHES, SIZES
from asit_hf.data import (
    LabelledClips,
    PackedAudio,
    PackedCrops,
    PretrainingCrops,
    StreamingCrops,
    is_packed,
    label_names,
    load_unlabelled,
)
from asit_hf.data.labelled import check_classes, load_labelled
from asit_hf.data.parcels import is_parcels
from asit_hf.hub.cards import CardArguments, describe_run
from asit_hf.loading import (
    is_pretraining_checkpoint,
    load_config,
    load_feature_extractor,
    read_model_type,
    resolve_checkpoint,
)
from asit_hf.pretraining.arguments import ASiTPreTrainingArguments, by_preset, option
from asit_hf.pretraining.initialization import encoder_from_vit
from asit_hf.pretraining.monitoring import KnnProbeCallback
from asit_hf.pretraining.presets import get_preset
from asit_hf.pretraining.trainer import ASiTPreTrainer
from asit_hf.utils.arguments import (
    checkpoint_to_resume,
    finished_run,
    parse_arguments,
    refuse_without_effect,
    run_script,
    start_run,
)

logger = logging.getLogger(__name__)

LOSS_OPTIONS = ("global_loss_weight", "local_loss_weight", "reconstruction_loss_weight", "local_loss_patches")


@dataclass
class DataArguments:
    train_data: list[str] = field(
        metadata={
            "help": "Training audio: folders, manifests, parquet files or Hub data sets, or one folder of packed "
            "audio. JSON gives one of them its own options: "
            '{"data": "meta.csv", "root": "audio", "audio_column": "filename", "filter": ["fold=1,2,3"]}'
        }
    )
    repeat: list[str] = field(
        default_factory=list,
        metadata={
            "help": "With packed audio: PART=TIMES, how often the clips of a part of the pool occur in an epoch "
            "(default: once)."
        },
    )
    streaming: bool = option(
        False, "Read the data as a stream; needs --steps_per_epoch, and --max_steps or --max_minutes."
    )
    shuffle_buffer: int = option(1000, "With --streaming: clips in the shuffle buffer.")
    sampling_rate: int | None = option(
        None, "Sampling rate in Hz that audio is resampled to (default: the checkpoint's, or 16000)."
    )
    global_seconds: float = option(6.0, "Length of the two global crops of a clip, in seconds.")
    local_seconds: float = option(2.0, "Length of the local crops, in seconds.")
    num_local_crops: int | None = option(
        None,
        f"Local crops per clip {by_preset(lambda p: p.num_local_crops)}; none with --global_loss_weight 0.",
    )
    mean: float | None = option(
        None, "Mean of the log-mel values, for normalization (default: the checkpoint's, or that of AudioSet)."
    )
    std: float | None = option(
        None, "Standard deviation of the log-mel values (default: the checkpoint's, or that of AudioSet)."
    )
    strict: bool = option(False, "Stop at a file that cannot be read, instead of reporting and skipping it.")
    knn_train: str | None = option(
        None, "Labelled clips for a kNN probe during training: csv with columns file and label. Needs --knn_test."
    )
    knn_test: str | None = option(None, "Labelled clips that the kNN probe classifies: csv as for --knn_train.")
    knn_steps: int = option(1000, "Optimizer steps between two kNN probes.")

    def __post_init__(self):
        if not self.streaming:
            refuse_without_effect(self, ["shuffle_buffer"], "without streaming")
        if not self.knn_train:
            refuse_without_effect(self, ["knn_test", "knn_steps"], "without knn_train")
        elif not self.knn_test:
            raise ValueError("knn_train needs knn_test, the clips to classify")


@dataclass
class ModelArguments:
    model_name_or_path: str | None = option(
        None,
        "Checkpoint to start a new run from (default: random initialization): an ASiT encoder (new heads; the teacher "
        "is a copy), an ASiT pretraining checkpoint (heads, teacher and centers are kept) or an image ViT such as "
        "DeiT or DINOv2 (as an encoder; patches of DINOv2 become 16 x 16). An ASiT keeps its position embeddings for "
        "any --global_seconds. To continue an interrupted run, use --resume_from_checkpoint True instead.",
    )
    size: str | None = option(
        None, "Model size when training from random initialization (default: base).", choices=list(SIZES)
    )
    global_loss_weight: float | None = option(
        None,
        f"Weight of the global loss, on the CLS token {by_preset(lambda p: p.config['global_loss_weight'])}.",
    )
    local_loss_weight: float | None = option(
        None, f"Weight of the local loss, on patches {by_preset(lambda p: p.config['local_loss_weight'])}."
    )
    reconstruction_loss_weight: float | None = option(
        None,
        f"Weight of the L1 loss of masked pixels {by_preset(lambda p: p.config['reconstruction_loss_weight'])}.",
    )
    local_loss_patches: str | None = option(
        None, "Patches that the local loss is averaged over (default: all).", choices=list(LOCAL_LOSS_PATCHES)
    )
    config_overrides: str | None = option(
        None, "Other fields of ASiTConfig, for example num_prototypes=4096,num_hidden_layers=6."
    )
    drop_path_rate: float = option(0.1, "Stochastic depth rate of the student.")
    attn_implementation: str = option(
        "sdpa", "Attention implementation of transformers: eager, sdpa, flash_attention_2, ..."
    )

    def __post_init__(self):
        if self.model_name_or_path:
            refuse_without_effect(self, ["size"], "with a checkpoint, which has its own size")


def check_options(model: ModelArguments, data: DataArguments, args: ASiTPreTrainingArguments) -> None:
    """Refuses options that have no effect because of an option in another group."""
    if not data.streaming:
        refuse_without_effect(args, ["steps_per_epoch"], "without streaming")
    if data.num_local_crops == 0 or (data.num_local_crops is None and not get_preset(args.preset).num_local_crops):
        refuse_without_effect(data, ["local_seconds"], "without local crops (num_local_crops)")
    elif model.global_loss_weight == 0:
        refuse_without_effect(data, ["num_local_crops"], "with global_loss_weight 0")


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
            raise ValueError(f"expected packed audio to be the only train_data, got {data.train_data}: pack all of it")
        if data.streaming:
            raise ValueError(f"--streaming does not work with packed audio, got {packed[0]}: remove it")
        pool = PackedAudio.load(packed[0], sampling_rate=sampling_rate)
        return PackedCrops(pool.repeat(parse_repeat(data.repeat)), **settings)
    if data.repeat:
        raise ValueError(
            f"expected packed audio with --repeat, got {data.train_data}: list data several times instead"
        )
    if parcels := [source for source in data.train_data if is_parcels(source)]:
        raise ValueError(
            f"expected decoded audio, got Opus parcels: run python -m asit_hf.data.parcels decode {parcels[0]} POOL"
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
        name = resolve_checkpoint(name)
        config = load_config(name)
        if is_pretraining_checkpoint(config):  # keeps its heads and loss weights
            if (config.num_patch_prototypes is None) != (fields["num_patch_prototypes"] is None):
                logger.warning("%s does not have the heads of the %s objective; it keeps its own", name, args.preset)
            fields = overrides
        config = load_config(name, **fields)
        return ASiTForPreTraining.from_pretrained(name, config=config, attn_implementation=model.attn_implementation)
    # frames of a crop in whole patches: 592 of the 598 of 6 s
    fields.setdefault("num_frames", (round(data.global_seconds * 100) - 2) // 16 * 16)
    if not name:
        config = ASiTConfig.from_size(model.size or "base", **fields)
        config._attn_implementation = model.attn_implementation
        return ASiTForPreTraining(config)
    encoder = encoder_from_vit(name, **fields)
    encoder.config._attn_implementation = model.attn_implementation
    return ASiTForPreTraining.from_encoder(encoder)


def is_asit(name_or_path: str) -> bool:
    """Whether a checkpoint is one of this package's."""
    return read_model_type(name_or_path) == ASiTConfig.model_type


def parse_repeat(items: list[str]) -> dict[str, int]:
    """Numbers from `PART=TIMES` items."""
    pairs = [item.rpartition("=") for item in items]
    if wrong := [item for item, (part, _, times) in zip(items, pairs) if not (part and times.isdecimal())]:
        raise ValueError(f"expected --repeat PART=TIMES ... with whole numbers, got {wrong}")
    if len({part for part, *_ in pairs}) < len(pairs):
        raise ValueError(f"expected --repeat PART=TIMES once for each part, got {' '.join(items)}")
    return {part: int(times) for part, _, times in pairs}


def parse_overrides(text: str | None) -> dict:
    """Fields of the configuration from `name=value,name=value`."""
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    for name, _, value in pairs:
        if name not in ASiTConfig.__dataclass_fields__ or not value:
            raise ValueError(f"expected --config_overrides FIELD=VALUE,... with fields of ASiTConfig, got {name!r}")
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def build_feature_extractor(model: ModelArguments, data: DataArguments, num_mel_bins: int) -> ASiTFeatureExtractor:
    """The extractor of an ASiT checkpoint, or a new one, with the options of the command line."""
    chosen = {name: getattr(data, name) for name in ("sampling_rate", "mean", "std")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if model.model_name_or_path and is_asit(model.model_name_or_path):
        return load_feature_extractor(model.model_name_or_path, **chosen)
    return ASiTFeatureExtractor(num_mel_bins=num_mel_bins, **chosen)


def build_knn_probe(data: DataArguments, trainer: ASiTPreTrainer) -> KnnProbeCallback:
    train = load_labelled(data.knn_train)
    check_classes(train, data.knn_train)
    test = load_labelled(data.knn_test, names=label_names(train))
    rate = trainer.processing_class.sampling_rate
    return KnnProbeCallback(trainer, LabelledClips(train, rate), LabelledClips(test, rate), data.knn_steps)


def main(arguments: list[str] | None = None) -> ASiTPreTrainer:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    groups = (ModelArguments, DataArguments, CardArguments, ASiTPreTrainingArguments)
    model_args, data_args, card_args, args = parse_arguments(groups, arguments)
    start_run(args)

    check_options(model_args, data_args, args)
    model = build_model(model_args, data_args, args)
    feature_extractor = build_feature_extractor(model_args, data_args, model.config.num_mel_bins)
    num_local_crops = data_args.num_local_crops
    if num_local_crops is None:  # they are part of the global loss only
        num_local_crops = get_preset(args.preset).num_local_crops if model.config.global_loss_weight else 0
    dataset = build_dataset(data_args, args, feature_extractor.sampling_rate, num_local_crops)
    trainer = ASiTPreTrainer(model=model, args=args, train_dataset=dataset, processing_class=feature_extractor)
    checkpoint, finished = checkpoint_to_resume(args), finished_run(args)
    if data_args.knn_train:
        trainer.add_callback(build_knn_probe(data_args, trainer))
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.terminated:
        logger.warning(f"terminated at step {trainer.state.global_step}: continue with --resume_from_checkpoint True")
        sys.exit(128 + signal.SIGTERM)
    if checkpoint and finished and finished.global_step == trainer.state.global_step:
        logger.warning(f"the run was complete at step {trainer.state.global_step}: its files stay unchanged")
    else:
        trainer.save_model()
        if trainer.is_world_process_zero():
            sources = None if data_args.streaming else dataset.sources
            describe_run(trainer, ["examples/run_pretraining.py", *arguments], card_args, sources)
        trainer.save_state()  # last: `finished_run` takes it as the sign that the other files are complete
    if args.push_to_hub:
        trainer.push_to_hub()
    return trainer


if __name__ == "__main__":
    run_script(main)
