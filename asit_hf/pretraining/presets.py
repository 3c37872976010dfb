"""Settings in which the authors' two public releases differ; what they share is a default elsewhere."""

from dataclasses import dataclass
from typing import Any

from ..configuration_asit import ASiTConfig
from .masking import GMML


@dataclass(frozen=True)
class Preset:
    """
    The defaults of one release.

    Args:
        config (`dict`): fields of [`ASiTConfig`].
        gmml ([`GMML`]): the corruption.
        num_local_crops (`int`): short clean crops per clip, for the student only.
        roll_probability (`float`): probability of a circular shift of the waveform before cropping.
        warmup_teacher_temperature_epochs (`int`): epochs over which the teacher temperature rises.
        freeze_last_layer_epochs (`int`): first epochs, in which the prototypes are not updated.
    """

    config: dict[str, Any]
    gmml: GMML
    num_local_crops: int
    roll_probability: float
    warmup_teacher_temperature_epochs: int
    freeze_last_layer_epochs: int


PRESETS = {
    "2024": Preset(
        config={
            "num_patch_prototypes": None,
            "reconstruction_hidden_size": None,
            "reconstruction_bottleneck_size": None,
            "global_loss_weight": 0.5,
            "local_loss_weight": 0.5,
            "reconstruction_loss_weight": 1.0,
        },
        gmml=GMML(mask_ratio=(0.5, 0.5)),
        num_local_crops=4,
        roll_probability=0.0,
        warmup_teacher_temperature_epochs=5,
        freeze_last_layer_epochs=1,
    ),
    "2023": Preset(
        config={
            "num_patch_prototypes": 1024,
            "reconstruction_hidden_size": 768,
            "reconstruction_bottleneck_size": 128,
            "global_loss_weight": 1.0,
            "local_loss_weight": 1.0,
            "reconstruction_loss_weight": 2.0,
        },
        gmml=GMML(mask_ratio=(0.5, 0.7)),
        num_local_crops=0,
        roll_probability=0.5,
        warmup_teacher_temperature_epochs=30,
        freeze_last_layer_epochs=0,
    ),
}


def get_preset(name: str) -> Preset:
    """The preset `"2024"` or `"2023"`."""
    if name not in PRESETS:
        raise ValueError(f"expected preset to be one of {', '.join(sorted(PRESETS))}, got {name!r}")
    return PRESETS[name]


def differences_from_preset(config: ASiTConfig, name: str) -> dict[str, tuple[Any, Any]]:
    """Fields in which a configuration differs from a preset: name to (the configuration's value, the preset's)."""
    return {
        field: (getattr(config, field), value)
        for field, value in get_preset(name).config.items()
        if getattr(config, field) != value
    }
