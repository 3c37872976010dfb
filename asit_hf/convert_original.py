"""
Converts checkpoints of the ASiT authors to this package's format.

    python -m asit_hf.convert_original --checkpoint checkpoint.pth --output_dir asit-base

reads a training checkpoint of the 2023 or 2024 release, or a bare backbone such as `ASIT_ssl.pt`, with any key
prefixes, and writes an `ASiTModel` with its feature extractor and a model card. `--pretraining` writes student,
teacher, heads and centers instead, so that pretraining can be continued. Sizes are inferred from the tensors, and
every unused key is reported.

Only tensors and plain containers are read; a file that would run code is refused.
"""

import argparse
import hashlib
import os
import pickle
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .configuration_asit import ASiTConfig
from .feature_extraction_asit import ASiTFeatureExtractor
from .hub.cards import write_model_card
from .hub.export import check_replaceable
from .hub.run_record import is_number
from .loading import ENCODERS
from .modeling_asit import ASiTModel
from .pretraining.initialization import resize_positions
from .pretraining.modeling import ASiTForPreTraining
from .pretraining.presets import get_preset
from .utils.files import whole_folder

ARCHITECTURES = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12}
PATCHES = "patch_embed.proj.weight"
# Our names and the authors', replaced in this order. The authors keep query, key and value in one tensor.
ENCODER_NAMES = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("layers.", "blocks."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".attention.q_proj.", ".attn.qkv."),
    (".attention.k_proj.", ".attn.qkv."),
    (".attention.v_proj.", ".attn.qkv."),
    (".attention.o_proj.", ".attn.proj."),
    ("layernorm.", "norm."),
)
HEAD_NAMES = (
    ("distillation.fc1.", "head.mlp.0."),
    ("distillation.fc2.", "head.mlp.2."),
    ("distillation.fc3.", "head.mlp.4."),
    ("distillation.cls_prototypes.", "head.last_layer."),
    ("reconstruction.fc1.", "head_recons.mlp.0."),
    ("reconstruction.fc2.", "head_recons.mlp.2."),
    ("reconstruction.fc3.", "head_recons.mlp.4."),
    ("reconstruction.projection.", "head_recons.convTrans."),
)
NAMES = {
    None: ENCODER_NAMES,
    "2024": (*ENCODER_NAMES, *HEAD_NAMES),
    "2023": (
        *ENCODER_NAMES,
        *HEAD_NAMES,
        ("head.mlp.", "head_cls.mlp."),
        ("head.last_layer.", "head_cls.cls_layer."),
        ("distillation.patch_prototypes.", "head_cls.data_layer."),
    ),
}
CENTERS = {
    "2023": {"cls_center.center": "loss_cls.center", "patch_center.center": "loss_data.center"},
    "2024": {"cls_center.center": "CLS_PATCH_loss.center", "patch_center.center": "CLS_PATCH_loss.center2"},
}
HEAD_WIDTHS = {
    "distillation_hidden_size": "distillation.fc1.weight",
    "distillation_bottleneck_size": "distillation.fc3.weight",
    "num_prototypes": "distillation.cls_prototypes.weight_v",
    "num_patch_prototypes": "distillation.patch_prototypes.weight_v",
    "reconstruction_hidden_size": "reconstruction.fc1.weight",
    "reconstruction_bottleneck_size": "reconstruction.fc3.weight",
}
# The run options that the model card lists; paths and host names are private.
HYPERPARAMETERS = """
epochs batch_size lr min_lr warmup_epochs weight_decay weight_decay_end clip_grad drop_path_rate freeze_last_layer
momentum_teacher warmup_teacher_temp teacher_temp warmup_teacher_temp_epochs drop_perc drop_replace num_crops_local
fromINet
"""


@dataclass(frozen=True)
class Conversion:
    """
    Report of a conversion: the configuration and the feature extractor that were written, and

    - `release` (`str`, *optional*): `"2023"` or `"2024"`, inferred from the heads; `None` for a file without heads.
    - `written` (`str`): which of the file's weights were written.
    - `decisions` (`list[str]`): settings that the tensors do not determine, each with its origin.
    - `unused` (`list[str]`): keys of the file that were not written; a completely unused dictionary is one key.
    """

    config: ASiTConfig
    feature_extractor: ASiTFeatureExtractor
    release: str | None
    written: str
    decisions: list[str]
    unused: list[str]

    def __str__(self) -> str:
        config, (time_patches, mel_patches) = self.config, self.config.position_grid
        origin = f"a checkpoint of the {self.release} release" if self.release else "a backbone without heads"
        return "\n".join(
            [
                f"found {origin}: width {config.hidden_size}, {config.num_hidden_layers} layers, MLP "
                f"{config.intermediate_size}, patches {config.patch_size} x {config.patch_size}",
                *self.decisions,
                f"positions: {time_patches} x {mel_patches} (time x mel), {config.num_frames} frames",
                f"written: {self.written}",
                *(f"not used: {key}" for key in self.unused),
            ]
        )


def convert(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    encoder: Literal["teacher", "student"] | None = None,
    pretraining: bool = False,
    num_attention_heads: int | None = None,
    num_mel_bins: int | None = None,
    sampling_rate: int | None = None,
    position_grid: tuple[int, int] | None = None,
    num_frames: int | None = None,
    overwrite: bool = False,
) -> Conversion:
    """
    Converts an official checkpoint to a folder that `from_pretrained` loads.

    Args:
        checkpoint: the file to convert.
        output_dir: written completely or not at all. An earlier export of an encoder there is replaced.
        encoder (`str`, *optional*): which encoder of a training checkpoint; default: teacher.
        pretraining (`bool`, defaults to `False`): whether to write student, teacher, heads and centers, as an
            [`ASiTForPreTraining`].
        num_attention_heads (`int`, *optional*): number of attention heads, which the tensors do not determine;
            default: that of the file's `args.arch` if it divides the width, else width / 64.
        num_mel_bins (`int`, *optional*): default: the file's `args.num_mel_bins`, else 128.
        sampling_rate (`int`, *optional*): rate in Hz; default: the file's `args.sample_rate`, else 16000. The 2023
            release has no such option: its filter bank is for 32000 Hz, so 32000 reproduces its input.
        position_grid (`tuple[int, int]`, *optional*): time and mel patches of the grid as which the weights were
            trained to read their positions, if it is not the file's own. PretrainedSED reads the 37 x 8 grid of
            `ASIT_weak_1.pt` and `ASIT_strong_1.pt` as `(8, 37)` at all lengths but 592; the files do not record that.
        num_frames (`int`, *optional*): with `position_grid`, the length that positions are resized to and stored for,
            cut to whole patches; the converted model is correct at this length only.
        overwrite (`bool`, defaults to `False`): whether to replace any other content of `output_dir`.

    Raises:
        FileNotFoundError: no such file.
        FileExistsError: `output_dir` holds something other than an earlier export.
        ValueError: the file cannot be read safely or is not an ASiT, or options contradict each other or the file.
    """
    if pretraining and (encoder is not None or position_grid is not None):
        raise ValueError("pretraining keeps both encoders and their grid: set neither encoder nor position_grid")
    if (position_grid is None) != (num_frames is None):
        raise ValueError(f"expected position_grid and num_frames together, got {position_grid} and {num_frames}")
    checkpoint, output_dir = Path(checkpoint), Path(output_dir).resolve()
    check_replaceable(output_dir, checkpoint.resolve(), overwrite)
    content = _read_checkpoint(checkpoint)
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    tensors = _flatten(content)
    backbones = _find_backbones(tensors)
    chosen = encoder or ("backbone" if list(backbones) == ["backbone"] else "teacher")
    if chosen not in backbones:
        raise ValueError(f"expected a file with a {chosen}, got {' and '.join(sorted(backbones))}")
    prefix = backbones[chosen]
    root = prefix.removesuffix("backbone.")
    release = _release(tensors, root) if root != prefix else None

    config, decisions = _infer_config(tensors, prefix, args, num_attention_heads, num_mel_bins)
    if release is not None:
        config.update(_head_fields(tensors, root, release))
    if pretraining:
        model, places = ASiTForPreTraining(config), _training_places(backbones, release, checkpoint)
        written = "student, teacher, heads and centers"
    else:
        model, places = ASiTModel(config), {"": prefix}
        written = f"the encoder {prefix}*" if prefix else "the encoder"
    state, used = _rename(model.state_dict(), places, release, tensors)
    if position_grid is not None:
        if num_frames < config.patch_size:
            raise ValueError(f"num_frames must be at least one patch of {config.patch_size}, got {num_frames}")
        config.num_frames = num_frames // config.patch_size * config.patch_size
        model, name = ASiTModel(config), "embeddings.position_embeddings"
        state[name] = resize_positions(state[name], position_grid, config.position_grid)
        decisions.append(f"positions were read as {position_grid[0]} x {position_grid[1]} (--position_grid)")
    model.load_state_dict(state)

    extractor = _feature_extractor(args, config.num_mel_bins, sampling_rate, decisions)
    conversion = Conversion(config, extractor, release, written, decisions, _unused(content, used))
    facts = _card_facts(checkpoint, content, args, conversion)
    if position_grid is not None:
        facts["limitations"] = (
            f"Trained to read its position embeddings as a grid of {position_grid[0]} x {position_grid[1]} patches. "
            f"They are stored resized for {config.num_frames} frames, and the model is correct at that length only."
        )
    with whole_folder(output_dir) as folder:
        model.save_pretrained(folder)
        extractor.save_pretrained(folder)
        write_model_card(folder, **facts)
    return conversion


class _NumPyNumber:
    """Placeholder for NumPy numbers, such as the authors' learning rates, so that NumPy itself is not called."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_SAFE_GLOBALS = [
    argparse.Namespace,
    (_NumPyNumber, "numpy.dtype"),
    (_NumPyNumber, "numpy.core.multiarray.scalar"),
    (_NumPyNumber, "numpy._core.multiarray.scalar"),
]


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a PyTorch file of tensors, plain containers and `argparse.Namespace`, without running code from it."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_SAFE_GLOBALS):
            warnings.simplefilter("ignore")  # about pickle protocols; the error below replaces them
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it contains {named[1]}" if named else "it was not written by torch.save"
        raise ValueError(
            f"{path}: expected only tensors, plain containers and argparse.Namespace, but {reason}; refused as unsafe"
        ) from error
    except Exception as error:  # damaged pickles raise many types
        reason = str(error).splitlines() or [""]
        raise ValueError(f"{path} is not a complete PyTorch file: {type(error).__name__}: {reason[0]}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(content).__name__}")
    return dict(content)


def _flatten(content: Mapping, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested dictionaries, with keys joined by dots."""
    tensors = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            tensors.update(_flatten(value, f"{prefix}{key}."))
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_meta:
                raise ValueError(f"{prefix}{key} must be a dense tensor, got {value.layout} on {value.device}")
            tensors[f"{prefix}{key}"] = value
    return tensors


def _find_backbones(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Key prefixes of the backbones by role: `"student"`, `"teacher"`, or `"backbone"` if the prefix names neither."""
    backbones: dict[str, str] = {}
    for key in tensors:
        if key != PATCHES and not key.endswith("." + PATCHES):
            continue
        prefix = key.removesuffix(PATCHES)
        role = next((part for part in prefix.split(".") if part in ("student", "teacher")), "backbone")
        if role in backbones:
            raise ValueError(f"expected one {role}, got two: {backbones[role]}{PATCHES} and {key}")
        backbones[role] = prefix
    if not backbones:
        keys = ": " + ", ".join([*list(tensors)[:3], "..."]) if tensors else ""
        raise ValueError(
            f"expected an ASiT backbone with a tensor {PATCHES}, under any prefix, got {len(tensors)} tensors{keys}"
        )
    return backbones


def _release(tensors: dict[str, torch.Tensor], root: str) -> str | None:
    if f"{root}head_cls.cls_layer.weight_v" in tensors:
        return "2023"
    return "2024" if f"{root}head.last_layer.weight_v" in tensors else None


def _infer_config(
    tensors: dict[str, torch.Tensor],
    prefix: str,
    args: dict[str, Any],
    num_attention_heads: int | None,
    num_mel_bins: int | None,
) -> tuple[ASiTConfig, list[str]]:
    """The configuration inferred from a backbone's shapes, and the origin of what they do not determine."""
    patches = tensors[prefix + PATCHES]
    if patches.dim() != 4 or patches.shape[1] != 1 or patches.shape[2] != patches.shape[3]:
        raise ValueError(
            f"{prefix}{PATCHES} must be (width, 1, patch, patch), one channel and square, got {tuple(patches.shape)}"
        )
    hidden_size, patch_size = patches.shape[0], patches.shape[2]
    positions = _tensor(tensors, f"{prefix}pos_embed", 3).shape[1] - 1
    bins, bins_origin = _setting(num_mel_bins, "num_mel_bins", args, "num_mel_bins", 128)
    mel_patches = bins // patch_size
    if mel_patches < 1 or bins % patch_size or positions < 1 or positions % mel_patches:
        raise ValueError(
            f"{positions} patch positions do not fit {bins} mel bins ({bins_origin}) in patches of {patch_size}; "
            "set --num_mel_bins"
        )
    heads, heads_origin = _num_heads(hidden_size, args, num_attention_heads)
    config = ASiTConfig(
        hidden_size=hidden_size,
        num_hidden_layers=_depth(tensors, prefix),
        num_attention_heads=heads,
        intermediate_size=_tensor(tensors, f"{prefix}blocks.0.mlp.fc1.weight", 2).shape[0],
        qkv_bias=any(key.startswith(prefix) and key.endswith(".attn.qkv.bias") for key in tensors),
        patch_size=patch_size,
        num_mel_bins=bins,
        num_frames=positions // mel_patches * patch_size,
    )
    return config, [f"attention heads: {heads} ({heads_origin})", f"mel bins: {bins} ({bins_origin})"]


def _num_heads(hidden_size: int, args: dict[str, Any], asked: int | None) -> tuple[int, str]:
    if asked is not None:
        if asked < 1 or hidden_size % asked:
            raise ValueError(f"num_attention_heads must divide the width {hidden_size}, got {asked}")
        return asked, "--num_attention_heads"
    arch = args.get("arch")
    for name, heads in ARCHITECTURES.items():
        if isinstance(arch, str) and arch.startswith(name) and hidden_size % heads == 0:
            return heads, f"args.arch {arch}"
    if hidden_size % 64:
        raise ValueError(
            f"unknown number of attention heads: width {hidden_size} is no multiple of 64; set --num_attention_heads"
        )
    return hidden_size // 64, "width / 64"


def _depth(tensors: dict[str, torch.Tensor], prefix: str) -> int:
    blocks = (re.match(r"blocks\.(\d+)\.", key.removeprefix(prefix)) for key in tensors if key.startswith(prefix))
    indices = sorted({int(block[1]) for block in blocks if block})
    if not indices or indices != list(range(len(indices))):
        raise ValueError(f"expected {prefix}blocks.0, .1, ... without a gap, got {indices}")
    return len(indices)


def _head_fields(tensors: dict[str, torch.Tensor], root: str, release: str) -> dict[str, Any]:
    """The fields of a release's preset, with the sizes of this file's heads."""
    fields = dict(get_preset(release).config)
    for field, name in HEAD_WIDTHS.items():
        key = root + _official_name(name, release)
        if key in tensors and tensors[key].dim() == 2:
            fields[field] = tensors[key].shape[0]
    return fields


def _training_places(backbones: dict[str, str], release: str | None, checkpoint: Path) -> dict[str, str]:
    """The file's key prefix for each name prefix of an [`ASiTForPreTraining`]."""
    if release is None or not {"student", "teacher"} <= backbones.keys():
        raise ValueError(
            f"{checkpoint}: expected student and teacher with heads, to continue pretraining; convert the encoder "
            "without --pretraining, and run_pretraining.py can start from it with new heads"
        )
    places = dict(CENTERS[release])
    for part, prefix in (("", backbones["student"]), ("teacher.", backbones["teacher"])):
        places[f"{part}asit."] = prefix
        places[f"{part}heads."] = prefix.removesuffix("backbone.")
    return places


def _rename(
    expected: dict[str, torch.Tensor], places: dict[str, str], release: str | None, tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The `expected` weights under our names, in float32, and the file's keys that they come from."""
    state, used = {}, set()
    for name, like in expected.items():
        part = next(part for part in places if name.startswith(part))
        key = places[part] + _official_name(name.removeprefix(part), release)
        projection = re.search(r"\.([qkv])_proj\.", name)
        shape = (3 * like.shape[0], *like.shape[1:]) if projection else tuple(like.shape)
        value = _tensor(tensors, key)
        if name in CENTERS["2024"]:
            value = value.flatten()
        if value.shape != shape or not value.is_floating_point():
            raise ValueError(
                f"{key} must be floating point of shape {shape}, got {value.dtype} of shape {tuple(value.shape)}"
            )
        if not value.isfinite().all():
            raise ValueError(f"{key} must be finite, got NaN or infinity")
        if projection:
            value = value.chunk(3)["qkv".index(projection[1])]
        state[name] = value.detach().float()
        used.add(key)
    return state, used


def _official_name(name: str, release: str | None) -> str:
    for ours, theirs in NAMES[release]:
        name = name.replace(ours, theirs)
    return name


def _feature_extractor(
    args: Mapping[str, Any], num_mel_bins: int, sampling_rate: int | None, decisions: list[str]
) -> ASiTFeatureExtractor:
    """The feature extractor of the training; adds the origin of its settings to `decisions`."""
    rate, origin = _setting(sampling_rate, "sampling_rate", args, "sample_rate", 16000)
    statistics = {name: args[f"data_{name}"] for name in ("mean", "std") if is_number(args.get(f"data_{name}"))}
    extractor = ASiTFeatureExtractor(sampling_rate=rate, num_mel_bins=num_mel_bins, **statistics)
    whose = "args" if statistics else "AudioSet's, assumed"
    decisions.append(
        f"sampling rate: {rate} Hz ({origin}); mean {extractor.mean}, standard deviation {extractor.std} ({whose})"
    )
    return extractor


def _unused(content: Mapping, used: set[str], prefix: str = "") -> list[str]:
    names = []
    for key, value in content.items():
        path = f"{prefix}{key}"
        if path in used or path in ("args", "epoch"):
            continue
        if isinstance(value, Mapping) and any(name.startswith(f"{path}.") for name in used):
            names += _unused(value, used, f"{path}.")
        else:
            names.append(path)
    return names


def _card_facts(
    checkpoint: Path, content: dict[str, Any], args: dict[str, Any], conversion: Conversion
) -> dict[str, Any]:
    with checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    numbers = {"epochs completed": content.get("epoch"), **{name: args.get(name) for name in HYPERPARAMETERS.split()}}
    recipe = {
        "weights": conversion.written,
        "SHA-256 of the file": digest,
        "release": conversion.release,
        **{name: value for name, value in numbers.items() if is_number(value)},
        "settings not in the tensors": "; ".join(conversion.decisions),
    }
    return {
        "license": "unknown",
        "training_data": f"Converted from `{checkpoint.name}`, weights in the format of ASiT's authors. **Their "
        "license is unknown**: the authors' code and weights carry none. The file does not name the training data.",
        "recipe": {name: value for name, value in recipe.items() if value is not None},
    }


def _tensor(tensors: dict[str, torch.Tensor], key: str, dim: int | None = None) -> torch.Tensor:
    if key not in tensors:
        raise ValueError(f"expected an ASiT checkpoint with a tensor {key}, which is missing")
    if dim is not None and tensors[key].dim() != dim:
        raise ValueError(f"{key} must have {dim} dimensions, got shape {tuple(tensors[key].shape)}")
    return tensors[key]


def _setting(option: int | None, name: str, args: Mapping, key: str, default: int) -> tuple[int, str]:
    """A positive integer from an option, else from the file's args, else the default; and which of them it is."""
    for value, origin in ((option, f"--{name}"), (args.get(key), f"args.{key}")):
        if value is None:
            continue
        if not is_number(value) or value < 1 or value != int(value):
            raise ValueError(f"{origin} must be a positive integer, got {value!r}; set --{name}")
        return int(value), origin
    return default, "assumed"


def _grid(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected a grid of time x mel like 8x37, got {text!r}")
    return int(match[1]), int(match[2])


def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m asit_hf.convert_original", description=__doc__, formatter_class=raw)
    parser.add_argument("--checkpoint", required=True, help="file of the ASiT authors")
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--encoder", choices=ENCODERS, help="encoder of a training checkpoint (default: teacher)")
    parser.add_argument("--pretraining", action="store_true", help="write student, teacher, heads and centers")
    parser.add_argument("--num_attention_heads", type=int, help="default: from the file's args.arch, else width / 64")
    parser.add_argument("--num_mel_bins", type=int, help="mel bins (default: from the file's args, else 128)")
    rate_help = "rate in Hz (default: from the file's args, else 16000); the 2023 release configured 32000"
    parser.add_argument("--sampling_rate", type=int, help=rate_help)
    grid_help = "time x mel patches that positions were read as: 8x37 for ASIT_weak_1.pt, ASIT_strong_1.pt"
    parser.add_argument("--position_grid", type=_grid, metavar="TxF", help=f"{grid_help}; needs --num_frames")
    frames_help = "with --position_grid: the only length at which the model is correct, in frames of 10 ms"
    parser.add_argument("--num_frames", type=int, help=f"{frames_help} (992 for 10 s)")
    parser.add_argument("--overwrite", action="store_true", help="replace any content of output_dir")
    args = parser.parse_args(arguments)
    try:
        conversion = convert(**vars(args))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(conversion)
    print(f"{args.output_dir}: the license of these weights is unknown")
    return 0


if __name__ == "__main__":
    sys.exit(main())
