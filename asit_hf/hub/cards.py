"""Model cards, written from a saved model and the record of its training run."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.hf_argparser import HfArg

from ..configuration_asit import ASiTConfig
from ..data.audio import AudioReadError, audio_info
from ..data.packed import PackedAudio
from ..feature_extraction_asit import ASiTFeatureExtractor
from ..loading import load_config, load_feature_extractor
from .run_record import is_number, read_run, record_run

if TYPE_CHECKING:  # slow to import, and needs the train extra
    from transformers import Trainer

CARD_NAME = "README.md"
_UNKNOWN = "Unknown: it was not recorded."
_UNKNOWN_LICENSE = "The license of the weights is unknown; it depends on the license of the training data."
_LIMITATIONS = (
    "Position embeddings were learned on clips of {seconds:.2f} s and are resized for other lengths. The model was "
    "not evaluated on audio unlike its training data, and its biases were not studied."
)
_POOLING = {
    "cls": "CLS token",
    "mean": "mean of the patch tokens",
    "cls_mean": "CLS token and mean of the patch tokens",
}
# (name, part of it): the part follows punctuation, or begins with the name of a split; a scheme is left out
_DATASET_NAME = re.compile(
    r"(?:\w+://(?:datasets/)?)?(.*?)(?:(?:\s*[,;:(]+\s*|\s+(?=(?:folds?|splits?|train|test|eval|validation)\b))(.*))?",
    re.DOTALL | re.IGNORECASE,
)
_NOTES = {
    "ece_percent": "expected calibration error in percent, 15 bins of equal width.",
    "in_sample_temperature": "the temperature that minimizes the negative log-likelihood of the evaluation clips "
    "themselves.",
    "nll": "mean negative log-likelihood of the labels.",
    "temperature": "the number by which the logits are divided, in the weights of the classifier; `..._before` are "
    "values without it. Those of the clips on which it was fitted are optimistic.",
}


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
    Writes `README.md`, a Hub model card, into the folder of a saved ASiT model. Facts that are neither given nor
    recorded in the folder's `run.json` (see [`record_run`]) are stated as unknown.

    Args:
        folder: holds `config.json` and `preprocessor_config.json`.
        name: Hub name, which the card's example loads; by default the folder's name.
        license: license of the weights as the Hub abbreviates it (`"cc-by-4.0"`).
        datasets, training_data: Hub names and description (hours, sources, licenses) of the training data.
        recipe: hyperparameters by name, added to those recorded.
        results: rows with `task`, `dataset`, `metric`, `value`, `command`, and for a metric with several rows its
            `metric_name`, such as `"accuracy, linear probe"`; added to those recorded. Numbers also go to the card's
            metadata.
        limitations: known limitations of the model.
        base_model: Hub name of the encoder it was finetuned from.
        widget: example sounds for a classifier's page, `{"example_title", "src"}` with a URL or the name of a file in
            the repository.
        emissions: CO2 emissions of the training in grams.

    Returns:
        `Path`: the card.

    Raises:
        FileNotFoundError: no `config.json` or `preprocessor_config.json`.
        ValueError: another type of model, or a row of `results` that lacks a field.
    """
    folder = Path(folder)
    config = load_config(folder)
    extractor = load_feature_extractor(folder)
    name = name or folder.resolve().name
    run = read_run(folder)
    license = license or run.get("license")
    training_data = training_data or run.get("training_data")
    limitations = limitations or run.get("limitations")
    recipe = {**(run.get("recipe") or {}), **(recipe or {})}
    results = [*(run.get("results") or ()), *(results or ())]
    classifies = any("Classification" in architecture for architecture in config.architectures or [])
    training_type = "fine-tuning" if classifies else "pre-training"
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="audio-classification" if classifies else "feature-extraction",
        tags=[
            "asit",
            "audio",
            "self-supervised-learning",
            "spectrogram",
            *([] if classifies else ["sentence-transformers"]),
        ],
        license=license,
        datasets=list(datasets) or None,
        base_model=base_model,
        widget=[dict(one) for one in widget] or None,
        co2_eq_emissions=None if emissions is None else {"emissions": emissions, "training_type": training_type},
        model_name=name.split("/")[-1],
        eval_results=_metadata_of(results) or None,
    )
    sections = {
        "Model description": _description(config, extractor, classifies),
        "Usage": _usage(name, config, extractor),
        "Training data": (training_data or _UNKNOWN) + ("" if license else f"\n\n{_UNKNOWN_LICENSE}"),
        "Training recipe": _table(["setting", "value"], list(recipe.items())) if recipe else _UNKNOWN,
        "Measured results": _results(results),
        "Limitations": limitations or _LIMITATIONS.format(seconds=config.num_frames / 100),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n# {name.split('/')[-1]}\n\n{body}\n")
    path = folder / CARD_NAME
    card.save(path)
    return path


def _metadata_of(results: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """The rows whose value is a number, in the form of the Hub's metadata."""
    return [
        EvalResult(
            task_type=str(row["task"]).replace(" ", "-"),
            **_dataset_of(str(row["dataset"])),
            metric_type=str(row["metric"]),
            metric_name=row.get("metric_name"),
            metric_value=row["value"],
        )
        for row in results
        if is_number(row.get("value")) and {"task", "dataset", "metric"} <= set(row)
    ]


def _dataset_of(name: str) -> dict[str, str | None]:
    """
    A data set's fields in the Hub's metadata. Its type is spelled like a Hub name: "ESC-50, folds 1-4" has the type
    `esc50` and the configuration "folds 1-4". Results of one type and configuration share a name.
    """
    name_only, config = _DATASET_NAME.fullmatch(name.strip()).groups()
    words = re.sub(r"(?<=[^\W\d_])-(?=\d)", "", name_only.lower())
    slug = re.sub(r"[^\w./]+", "-", words).strip("-./")
    config = None if config is None else config.rstrip(") ")
    return {"dataset_type": slug or "unknown", "dataset_name": name, "dataset_config": config or None}


def _description(config: ASiTConfig, extractor: ASiTFeatureExtractor, classifies: bool) -> str:
    kind = f"A classifier with {config.num_labels} labels, built on an" if classifies else "An"
    lines = [
        f"{kind} [ASiT](https://arxiv.org/abs/2211.13189) encoder, a vision transformer for log-mel spectrograms. "
        "ASiT encoders are pretrained without labels, by masked reconstruction and self-distillation.",
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} heads, "
        f"{config.patch_size} x {config.patch_size} patches; input: mono audio at {extractor.sampling_rate} Hz, "
        f"{extractor.num_mel_bins} mel bins, normalized with mean {extractor.mean} and standard deviation "
        f"{extractor.std}.",
    ]
    if classifies and config.num_labels <= 100:
        lines.append("Labels: " + ", ".join(str(config.id2label[index]) for index in range(config.num_labels)) + ".")
    return "\n\n".join(lines)


def _usage(name: str, config: ASiTConfig, extractor: ASiTFeatureExtractor) -> str:
    text = _ENCODER_USAGE
    if "ASiTForAudioClassification" in (config.architectures or []):
        text = _CLASSIFIER_USAGE
    values = {"RATE": extractor.sampling_rate, "SIZE": config.pooled_size, "WIDTH": config.hidden_size}
    # the name last: it may contain another placeholder
    for placeholder, value in {**values, "POOLING": _POOLING[config.pooling_mode], "NAME": name}.items():
        text = text.replace(placeholder, str(value))
    return text


_CLASSIFIER_USAGE = """\
```python
import numpy as np
from transformers import pipeline

classifier = pipeline("audio-classification", model="NAME", trust_remote_code=True)
waveform = np.zeros(RATE, dtype=np.float32)  # your audio: mono, RATE Hz, in [-1, 1]
print(classifier(waveform, top_k=3))
```

`trust_remote_code` loads the model code that is stored with the weights. After `pip install asit-hf` and `import \
asit_hf`, `trust_remote_code` is not needed, and the pipeline accepts files of any sampling rate and length."""
_ENCODER_USAGE = """\
```python
import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModel

feature_extractor = AutoFeatureExtractor.from_pretrained("NAME", trust_remote_code=True)
model = AutoModel.from_pretrained("NAME", trust_remote_code=True).eval()
waveform = np.zeros(RATE, dtype=np.float32)  # your audio: mono, RATE Hz, in [-1, 1]
inputs = feature_extractor(waveform, sampling_rate=RATE, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
print(outputs.pooler_output.shape)  # (1, SIZE), the clip's embedding: POOLING
print(outputs.last_hidden_state.shape)  # (1, 1 + patches, WIDTH): CLS token, then one token per patch
```

`trust_remote_code` loads the model code that is stored with the weights. After `pip install asit-hf` and `import \
asit_hf`, `trust_remote_code` is not needed.

With sentence-transformers 5.4 or later (`pip install sentence-transformers soundfile soxr`), files and waveforms may \
have any sampling rate and length:

```python
from sentence_transformers import SentenceTransformer

encoder = SentenceTransformer("NAME", trust_remote_code=True)
embeddings = encoder.encode(["dog.wav", "rain.mp3"])  # or {"array": waveform, "sampling_rate": rate}
print(embeddings.shape)  # (2, SIZE)
print(encoder.similarity(embeddings, embeddings))
```"""


def _results(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "None recorded."
    columns = ["task", "dataset", "metric", "value", "command"]
    for row in results:
        if set(row) - {"metric_name"} != set(columns):
            raise ValueError(f"expected a result with the fields {columns}, got {sorted(row)}")
    named = [{**row, "metric": row.get("metric_name") or row["metric"]} for row in results]
    table = _table(columns, [[row[column] for column in columns] for row in named])
    notes = [f"`{metric}`: {note}" for metric, note in _NOTES.items() if metric in {row["metric"] for row in results}]
    return "\n\n".join([table, *notes])


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


# With more training files, their hours are not counted: that opens every file.
MAX_COUNTED_FILES = 20000


@dataclass
class CardArguments:
    """Facts for a model card that no run can record, as options of a script."""

    card_license: str | None = HfArg(default=None, help="License of the weights as the Hub spells it (cc-by-4.0).")
    card_datasets: list[str] = HfArg(default_factory=list, help="Hub names of the training data.")
    card_training_data: str | None = HfArg(default=None, help="Training data in words; default: clips and hours.")
    card_limitations: str | None = HfArg(default=None, help="Known limitations of the model.")
    card_widget: list[str] = HfArg(default_factory=list, help="Example sounds: URLs, or files in the repository.")
    card_emissions: float | None = HfArg(default=None, help="CO2 emissions of the training in grams.")

    def facts(self) -> dict[str, Any]:
        """The options as arguments of [`write_model_card`]."""
        facts = {name.removeprefix("card_"): value for name, value in vars(self).items()}
        return facts | {"widget": [{"example_title": Path(src).stem, "src": src} for src in self.card_widget]}


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
    Writes `run.json` and the model card beside the model that a trainer has trained and saved.

    Args:
        trainer: trained an ASiT model; its `processing_class` is the feature extractor.
        command, results: as in [`record_run`].
        card: facts for the card.
        sources: the training clips, as for [`~asit_hf.data.audio.AudioReader`]; `None` for a stream.
        base_model: Hub name or folder of the encoder it was finetuned from; the name of a local folder is not written.
        facts: further arguments of [`write_model_card`].
    """
    from ..utils.time_budget import STATE_KEY

    args, state = trainer.args, trainer.state
    recipe = {
        "optimizer steps": state.global_step,
        "epochs": round(state.epoch or 0, 2),
        "batch size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning rate": args.learning_rate,
        "weight decay": args.weight_decay,
        "seed": args.seed,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
    }
    if (scale := getattr(args, "encoder_learning_rate_scale", None)) not in (None, 1):
        recipe["learning rate of the encoder"] = scale * args.learning_rate
    seconds = sum(row.get("train_runtime", 0.0) for row in state.log_history)
    if getattr(args, "max_minutes", None) is not None:  # counts the time before a resume too
        seconds = state.stateful_callbacks[STATE_KEY]["seconds"]
    clips, hours = (None, None) if sources is None else (len(sources), _total_hours(sources))
    rate = trainer.processing_class.sampling_rate
    record_run(args.output_dir, command, recipe, seconds, clips, hours, rate, results)
    base_model = None if base_model is None or os.path.exists(base_model) else base_model
    write_model_card(args.output_dir, name=args.hub_model_id, base_model=base_model, **card.facts(), **facts)


def _total_hours(sources: Sequence) -> float | None:
    """Hours of all readable clips, from their headers; `None` if there are more than `MAX_COUNTED_FILES`."""
    if isinstance(sources, PackedAudio):
        return sources.hours
    if len(sources) > MAX_COUNTED_FILES:
        return None
    seconds = 0.0
    for source in sources:
        with suppress(AudioReadError):
            is_row = isinstance(source, dict) and "audio" in source
            seconds += audio_info(source["audio"] if is_row else source).duration
    return seconds / 3600
