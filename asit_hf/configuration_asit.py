"""ASiT model configuration, and the code files that let a saved folder load without this package."""

import json
import shutil
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    logging,
)

logger = logging.get_logger(__name__)

# Saved with every model, so that it loads with `trust_remote_code=True` where the package is not installed.
HUB_FILES = ("configuration_asit.py", "fbank_asit.py", "feature_extraction_asit.py", "modeling_asit.py")
AUTO_MAP = {
    "AutoConfig": "configuration_asit.ASiTConfig",
    "AutoFeatureExtractor": "feature_extraction_asit.ASiTFeatureExtractor",
    "AutoProcessor": "feature_extraction_asit.ASiTFeatureExtractor",
    "AutoModel": "modeling_asit.ASiTModel",
    "AutoModelForAudioClassification": "modeling_asit.ASiTForAudioClassification",
    "AutoModelForAudioFrameClassification": "modeling_asit.ASiTForAudioFrameClassification",
}

# Renames a pretraining checkpoint's teacher to a plain encoder, and its student to names that are not loaded.
TEACHER_KEYS = {r"^asit\.": "student.", r"^teacher\.asit\.": "asit."}
SENTENCE_TRANSFORMERS_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")

SIZES = {
    "tiny": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
POOLING_MODES = ("cls", "mean", "cls_mean")
LOCAL_LOSS_PATCHES = ("all", "corrupted")
POSITIVE_FIELDS = (
    *("hidden_size", "num_attention_heads", "intermediate_size", "patch_size", "student_temperature"),
    *("distillation_hidden_size", "distillation_bottleneck_size", "num_prototypes"),
)


def copy_hub_files(folder: str | PathLike) -> None:
    """Copies the Hub files beside this one to `folder`."""
    source, target = Path(__file__).parent, Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name in HUB_FILES:
        if (source / name).is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)


def sentence_transformers_files(architectures: list[str] | None) -> dict[str, str]:
    """
    Contents of the files with which sentence-transformers embeds audio with a saved model by `ASiTModel.embed`, by
    name. Of a pretraining checkpoint it loads the teacher, which `AutoModel` does not.
    """
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": {"audio": {"method": "embed", "method_output_name": "pooler_output"}},
        "module_output_name": "sentence_embedding",
        "processing_kwargs": {"audio": {"resample": True}},
    }
    if architectures == ["ASiTForPreTraining"]:
        transformer["model_kwargs"] = {"key_mapping": TEACHER_KEYS}
    model = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}
    contents = ([module], transformer, model)
    return {name: json.dumps(one, indent=2) + "\n" for name, one in zip(SENTENCE_TRANSFORMERS_FILES, contents)}


def write_sentence_transformers_files(folder: str | PathLike, architectures: list[str] | None) -> None:
    """
    Writes these files to `folder`, but keeps those that differ, which may have prompts or further modules. The folder
    of an `ExportedModel` of Transformers, whose graph sentence-transformers cannot load, gets none.
    """
    if Path(folder, "export.json").is_file():
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    ours = [sentence_transformers_files(kind) for kind in (None, ["ASiTForPreTraining"])]
    for name, content in sentence_transformers_files(architectures).items():
        file, known = Path(folder, name), [files[name].split() for files in ours]
        # sentence-transformers writes the same settings with another indentation
        if not file.is_file() or file.read_text(encoding="utf-8").split() in known:
            file.write_text(content, encoding="utf-8")


def read_adapter(folder: str | PathLike | None) -> dict[str, Any] | None:
    """
    The settings of an adapter of peft in a local folder without the weights of a model, otherwise `None`. Raises
    `ValueError` if they name no base model.
    """
    folder = Path(folder or "")
    file = folder / "adapter_config.json"
    if not file.is_file() or (folder / SAFE_WEIGHTS_NAME).is_file() or (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return None
    adapter = json.loads(file.read_text(encoding="utf-8"))
    if not adapter.get("base_model_name_or_path"):
        raise ValueError(
            f"{file}: expected base_model_name_or_path, the folder or Hub name of the base model, got none"
        )
    return adapter


def _count_classes(folder: Path) -> int | None:
    """Number of classes of a classifier that was trained and saved with an adapter."""
    from transformers.modeling_utils import load_state_dict

    names = (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    weights = {} if file is None else load_state_dict(str(file))
    return next((len(weight) for name, weight in weights.items() if name.endswith("classifier.weight")), None)


class SavesHubFiles:
    """For a configuration or feature extractor."""

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Saves the settings with the full `auto_map`, and the code files that it names."""
        self.auto_map = dict(AUTO_MAP)
        copy_hub_files(save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _get_files_timestamps(self, working_dir: str | PathLike) -> dict[str, float]:
        # a push uploads files without a timestamp, and these files are written before it takes them
        written = {*HUB_FILES, *SENTENCE_TRANSFORMERS_FILES}
        return {k: v for k, v in super()._get_files_timestamps(working_dir).items() if k not in written}


@strict
class ASiTConfig(SavesHubFiles, PreTrainedConfig):
    r"""
    Configuration of the ASiT models ([arXiv 2211.13189](https://arxiv.org/abs/2211.13189)). The defaults are the base
    size and the objective of the official 2024 release. `ASiTConfig.from_size("tiny")` gives a named size.

    Args:
        hidden_size (`int`, defaults to 768): width of the encoder.
        num_hidden_layers (`int`, defaults to 12): number of transformer layers.
        num_attention_heads (`int`, defaults to 12): attention heads per layer.
        intermediate_size (`int`, defaults to 3072): hidden width of each layer's MLP.
        hidden_act (`str`, defaults to `"gelu"`): activation of the MLPs.
        hidden_dropout_prob (`float`, defaults to 0.0): dropout on the embeddings and on both branches of every layer.
        attention_probs_dropout_prob (`float`, defaults to 0.0): dropout on the attention weights.
        drop_path_rate (`float`, defaults to 0.0): stochastic depth rate of the last layer, growing linearly from 0.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial weights.
        layer_norm_eps (`float`, defaults to 1e-6): epsilon of the layer norms.
        qkv_bias (`bool`, defaults to `True`): whether queries, keys and values have a bias.
        patch_size (`int`, defaults to 16): side of the square patches, in frames and mel bins.
        num_mel_bins (`int`, defaults to 128): number of mel bins of the input.
        num_frames (`int`, defaults to 592): frames at which positions are learned; other lengths resize them.
        pooling_mode (`str`, defaults to `"cls"`): pooled output: the `"cls"` token, the `"mean"` of the patch
            tokens, or `"cls_mean"`, both concatenated.
        distillation_hidden_size (`int`, defaults to 2048): hidden width of the distillation head's MLP.
        distillation_bottleneck_size (`int`, defaults to 256): output width of that MLP, and of the prototypes.
        num_prototypes (`int`, defaults to 8192): number of prototypes for the CLS token, and for patches if shared.
        num_patch_prototypes (`int`, *optional*): number of separate prototypes for patches, with gains frozen at 1
            (2023: 1024). `None` shares those of the CLS token (2024).
        reconstruction_hidden_size (`int`, *optional*): hidden width of the reconstruction head's MLP; `None` is
            `hidden_size`.
        reconstruction_bottleneck_size (`int`, *optional*): output width of that MLP; `None` is `hidden_size`.
        student_temperature (`float`, defaults to 0.1): temperature of the student's softmax.
        global_loss_weight (`float`, defaults to 0.5): weight of the global (CLS) loss (2023: 1).
        local_loss_weight (`float`, defaults to 0.5): weight of the local (patch) loss (2023: 1).
        reconstruction_loss_weight (`float`, defaults to 1.0): weight of the L1 reconstruction loss (2023: 2).
        local_loss_patches (`str`, defaults to `"all"`): patches over which the local loss is averaged: `"all"`
            (official), or `"corrupted"`, those with at least half of their pixels corrupted.

    ```python
    >>> from asit_hf import ASiTConfig, ASiTModel

    >>> model = ASiTModel(ASiTConfig.from_size("tiny"))
    ```"""

    model_type = "asit"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    patch_size: int = 16
    num_mel_bins: int = 128
    num_frames: int = 592
    pooling_mode: str = "cls"

    distillation_hidden_size: int = 2048
    distillation_bottleneck_size: int = 256
    num_prototypes: int = 8192
    num_patch_prototypes: int | None = None
    reconstruction_hidden_size: int | None = None
    reconstruction_bottleneck_size: int | None = None
    student_temperature: float | int = 0.1
    global_loss_weight: float | int = 0.5
    local_loss_weight: float | int = 0.5
    reconstruction_loss_weight: float | int = 1.0
    local_loss_patches: str = "all"

    def __post_init__(self, **kwargs: Any) -> None:
        # transformers keeps unknown fields, which also hold the user's own data; a misspelled one has no effect
        for name in (name for name in kwargs if not hasattr(type(self), name)):
            if close := get_close_matches(name, self.__dataclass_fields__, n=1, cutoff=0.8):
                logger.warning_once(f"ASiTConfig has no field {name}, which has no effect: did you mean {close[0]}?")
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raises `ValueError` for values that do not give a model."""
        for name in POSITIVE_FIELDS:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("global_loss_weight", "local_loss_weight", "reconstruction_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            got = f"{self.hidden_size} and {self.num_attention_heads}"
            raise ValueError(f"hidden_size must be a multiple of num_attention_heads, got {got}")
        for name in ("num_frames", "num_mel_bins"):
            if getattr(self, name) < self.patch_size:
                raise ValueError(f"{name} must be at least patch_size {self.patch_size}, got {getattr(self, name)}")
        if self.num_mel_bins % self.patch_size:
            got = f"{self.num_mel_bins} and {self.patch_size}"
            raise ValueError(f"num_mel_bins must be a multiple of patch_size, got {got}")
        for name, allowed in {"pooling_mode": POOLING_MODES, "local_loss_patches": LOCAL_LOSS_PATCHES}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {self.drop_path_rate}")

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As in Transformers, with the code files and those of sentence-transformers."""
        write_sentence_transformers_files(save_directory, self.architectures)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | PathLike, **kwargs: Any) -> tuple[dict, dict]:
        """
        As in Transformers. A local adapter of peft has the `config.json` saved beside it, otherwise that of its base
        model, with the number of classes of the adapter's classifier.
        """
        adapter, folder = read_adapter(pretrained_model_name_or_path), Path(pretrained_model_name_or_path)
        if adapter is None:
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        own = (folder / CONFIG_NAME).is_file()
        path = folder if own else adapter["base_model_name_or_path"]
        fields, unused = super().get_config_dict(path, **kwargs)
        num_classes = _count_classes(folder)
        if (name := (adapter.get("auto_mapping") or {}).get("base_model_class")) is not None:
            fields["architectures"] = [name]
        elif num_classes is not None and "Classification" not in str(fields.get("architectures")):
            fields["architectures"] = ["ASiTForAudioClassification"]
        if not own and num_classes is not None:
            names = fields.get("id2label") or {}
            if len(names) != num_classes:
                fields = {name: value for name, value in fields.items() if name not in ("id2label", "label2id")}
                names = {index: f"LABEL_{index}" for index in range(num_classes)}
                fields |= {"id2label": names, "label2id": {name: index for index, name in names.items()}}
            if all(str(name).startswith("LABEL_") for name in names.values()):
                logger.warning(
                    f"{folder}: the names of its {num_classes} classes are not known; "
                    "model.get_base_model().config.save_pretrained(folder) saves them beside the adapter"
                )
        return fields, unused

    @classmethod
    def from_size(cls, size: str, **kwargs: Any) -> "ASiTConfig":
        """Configuration of size `"tiny"`, `"small"` or `"base"`; `kwargs` override its fields."""
        if size not in SIZES:
            raise ValueError(f"size must be one of {sorted(SIZES)}, got {size!r}")
        return cls(**{**SIZES[size], **kwargs})

    @property
    def position_grid(self) -> tuple[int, int]:
        """`(time_patches, mel_patches)` at which the position embeddings are learned."""
        return self.num_frames // self.patch_size, self.num_mel_bins // self.patch_size

    @property
    def pooled_size(self) -> int:
        """Width of the pooled output."""
        return 2 * self.hidden_size if self.pooling_mode == "cls_mean" else self.hidden_size

    @property
    def projection_dim(self) -> int:
        """Width of an embedding, by the name under which sentence-transformers looks for it."""
        return self.pooled_size


__all__ = ["ASiTConfig"]
