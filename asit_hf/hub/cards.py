"""Model cards, made from what is known of a run."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_asit import ASiTConfig
from ..data.audio import AudioReadError, audio_info
from ..data.packed import PackedAudio
from ..feature_extraction_asit import ASiTFeatureExtractor
from ..loading import load_config, load_feature_extractor
from .run_record import is_number, read_run, record_run

if TYPE_CHECKING:  # it takes a second to import, and more than inference has
    from transformers import Trainer

CARD_NAME = "README.md"
_UNKNOWN = "Unknown: it was not recorded."


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
    widget: Sequence[Mapping[str, str]] = (),
    emissions: float | None = None,
) -> Path:
    """
    Writes `README.md`, a Hub model card, into the folder of a saved ASiT model; what is neither given nor recorded in
    its `run.json` (see [`record_run`]) it calls unknown.

    Args:
        folder: holds `config.json` and `preprocessor_config.json`.
        name (`str`, *optional*): the model's name on the Hub, which the examples load; by default the folder's.
        license (`str`, *optional*): of the weights, as the Hub abbreviates it (`"cc-by-4.0"`).
        datasets (`Sequence[str]`): Hub names of the training data.
        training_data (`str`, *optional*): what it was trained on: hours, sources, licenses.
        recipe (`Mapping[str, Any]`, *optional*): hyperparameters by name.
        results (`Sequence[Mapping[str, Any]]`): rows with `task`, `dataset`, `metric`, `value`, `command`, and where
            a metric comes more than once its `metric_name`, such as `"accuracy, linear probe"`; numbers also go to the
            card's metadata.
        limitations (`str`, *optional*): what the model should not be trusted with.
        base_model (`str`, *optional*): Hub name of the encoder it was finetuned from.
        widget (`Sequence[Mapping[str, str]]`): sounds for the page of a classifier, `{"example_title", "src"}` with a
            URL, or the name of a file in the repository.
        emissions (`float`, *optional*): grams of CO2 that the training gave off.

    Returns:
        `Path`: of the card.

    Raises:
        `FileNotFoundError`: no `config.json` or `preprocessor_config.json`.
        `ValueError`: another type of model, or a row of `results` that lacks a field.
    """
    folder = Path(folder)
    config = load_config(folder)
    extractor = load_feature_extractor(folder)
    name = name or folder.resolve().name
    run = read_run(folder)
    training_data = training_data or run.get("training_data")
    recipe = {**(run.get("recipe") or {}), **(recipe or {})}
    results = [*(run.get("results") or ()), *(results or ())]
    classifies = any("Classification" in architecture for architecture in config.architectures or [])
    training_type = "fine-tuning" if classifies else "pre-training"
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="audio-classification" if classifies else "feature-extraction",
        tags=["asit", "audio", "self-supervised-learning", "spectrogram"],
        license=license,
        datasets=list(datasets) or None,
        base_model=base_model,
        widget=[dict(one) for one in widget] or None,
        co2_eq_emissions=None if emissions is None else {"emissions": emissions, "training_type": training_type},
        model_name=name.split("/")[-1],
        eval_results=_metadata_of(results) or None,
    )
    sections = {
        "What it is": _description(config, extractor, classifies),
        "Use": _usage(name, config, extractor),
        "Training data": "\n\n".join(filter(None, [training_data or _UNKNOWN, _license(license)])),
        "Training recipe": _table(["setting", "value"], list(recipe.items())) if recipe else _UNKNOWN,
        "Measured results": _results(results),
        "Limits": limitations or _limits(config),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n# {name.split('/')[-1]}\n\n{body}\n")
    path = folder / CARD_NAME
    card.save(path)
    return path


def _metadata_of(results: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """The rows whose value is a number, as the Hub wants them."""
    return [
        EvalResult(
            task_type=str(row["task"]).replace(" ", "-"),
            dataset_type=str(row["dataset"]).replace(" ", "-"),
            dataset_name=str(row["dataset"]),
            metric_type=str(row["metric"]),
            metric_name=row.get("metric_name"),
            metric_value=row["value"],
        )
        for row in results
        if is_number(row.get("value")) and {"task", "dataset", "metric"} <= set(row)
    ]


def _description(config: ASiTConfig, extractor: ASiTFeatureExtractor, classifies: bool) -> str:
    kind = f"A classifier of {config.num_labels} labels on an" if classifies else "An"
    lines = [
        f"{kind} [ASiT](https://arxiv.org/abs/2211.13189) encoder, a vision transformer on log-mel spectrograms. ASiT "
        "encoders are pretrained without labels, by masked reconstruction and self-distillation.",
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} heads, "
        f"{config.patch_size} x {config.patch_size} patches; input: mono audio at {extractor.sampling_rate} Hz, "
        f"{extractor.num_mel_bins} mel bins, normalized with mean {extractor.mean} and standard deviation "
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


def _license(license: str | None) -> str | None:
    if license is not None:
        return None
    return "The license of the weights is unknown: it depends on that of the training data."


def _results(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "None recorded."
    columns = ["task", "dataset", "metric", "value", "command"]
    for row in results:
        if set(row) - {"metric_name"} != set(columns):
            raise ValueError(f"a result needs the fields {columns}, got {sorted(row)}")
    named = [{**row, "metric": row.get("metric_name") or row["metric"]} for row in results]
    return _table(columns, [[row[column] for column in columns] for row in named])


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _limits(config: ASiTConfig) -> str:
    return (
        f"Position embeddings were learned on clips of {config.num_frames / 100:.2f} s; other lengths resize them. "
        "Nothing is known of how it does on audio unlike its training data, and its biases were not studied."
    )


# Of a Trainer's run folder: paths of this machine, a token (both in Trainer's pickled arguments), and what no user of
# the model needs. A checkpoint that `hub_strategy` pushes keeps its state, from which training goes on.
PRIVATE_FILES = (
    "training_args.bin",
    "/trainer_state.json",
    "/bad_files.jsonl*",
    "/predictions.csv",
    "/events.tsv",
    "/epoch-*/",
    "/unfinished/",
)


# Of more files the hours are not counted: each is opened for it.
MAX_COUNTED_FILES = 20000


@dataclass
class CardArguments:
    """What only a person knows of a model, as options of a script."""

    card_license: str | None = field(default=None, metadata={"help": "Of the weights, as the Hub has it: cc-by-4.0."})
    card_datasets: list[str] = field(default_factory=list, metadata={"help": "Hub names of the training data."})
    card_training_data: str | None = field(
        default=None, metadata={"help": "The training data in words: sources, licenses. By default clips and hours."}
    )
    card_limitations: str | None = field(default=None, metadata={"help": "What the model is not to be trusted with."})
    card_widget: list[str] = field(
        default_factory=list, metadata={"help": "Sounds for the model's page: URLs, or files of its repository."}
    )
    card_emissions: float | None = field(default=None, metadata={"help": "Grams of CO2 that the training gave off."})

    def facts(self) -> dict[str, Any]:
        """As arguments of [`write_model_card`]."""
        facts = {name.removeprefix("card_"): value for name, value in vars(self).items()}
        return facts | {"widget": [{"example_title": Path(src).stem, "src": src} for src in self.card_widget]}


class PushMixin:
    """
    For a Trainer, which would push a card of its own, and files of this machine: the card that is there stays, or ours
    is written; `PRIVATE_FILES` stay here, by a `.gitignore`, which the Hub heeds.
    """

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        super().init_hf_repo(*args, **kwargs)
        ignored = Path(self.args.output_dir, ".gitignore")
        if self.is_world_process_zero() and not ignored.exists():
            ignored.parent.mkdir(parents=True, exist_ok=True)
            ignored.write_text("\n".join(PRIVATE_FILES) + "\n")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if self.model.config.model_type != "asit":
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero() and not Path(self.args.output_dir, CARD_NAME).is_file():
            write_model_card(self.args.output_dir, name=self.args.hub_model_id)


def describe_run(
    trainer: "Trainer",
    command: Sequence[str],
    card: CardArguments,
    sources: Sequence | None = None,
    results: Iterable[tuple[str, str, float]] = (),
    base_model: str | None = None,
    **facts: Any,
) -> None:
    """
    Writes `run.json` and the card of the model that a trainer has trained and saved.

    Args:
        trainer ([`~transformers.Trainer`]): of an ASiT model; its `processing_class` is the feature extractor.
        sources (`Sequence`, *optional*): the training clips, see [`~asit_hf.data.audio.AudioReader`]; `None`: a
            stream.
        command, results: see [`record_run`].
        base_model (`str`, *optional*): what it was finetuned from; a folder of this machine is not told.
        facts: further arguments of [`write_model_card`].
    """
    from ..utils.time_budget import STATE_KEY

    args, state = trainer.args, trainer.state
    recipe = {
        "optimizer steps": state.global_step,
        "epochs": round(state.epoch or 0, 2),
        "clips a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning rate": args.learning_rate,
        "weight decay": args.weight_decay,
        "seed": args.seed,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
    }
    seconds = sum(row.get("train_runtime", 0.0) for row in state.log_history)
    if getattr(args, "max_minutes", None) is not None:  # known over resumes too
        seconds = state.stateful_callbacks[STATE_KEY]["seconds"]
    clips = None if sources is None else len(sources)
    hours = None if sources is None else _total_hours(sources)
    rate = trainer.processing_class.sampling_rate
    record_run(args.output_dir, command, recipe, seconds, clips, hours, rate, results)
    base_model = None if base_model is None or os.path.exists(base_model) else base_model
    write_model_card(args.output_dir, name=args.hub_model_id, base_model=base_model, **card.facts(), **facts)


def _total_hours(sources: Sequence) -> float | None:
    """Of all clips that can be read, from their headers; `None` where they are too many to open."""
    if isinstance(sources, PackedAudio):
        return sources.hours
    if len(sources) > MAX_COUNTED_FILES:
        return None
    return sum(_seconds(source) for source in sources) / 3600


def _seconds(source: Any) -> float:
    """Of a clip or a data set's row of it; 0 where it cannot be read."""
    if isinstance(source, dict) and "audio" in source:
        source = source["audio"]
    try:
        return audio_info(source).duration
    except AudioReadError:
        return 0.0
