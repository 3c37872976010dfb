"""What a pretrained model restores of a corrupted clip."""

import torch

from ..evaluation.attention import one_clip
from .masking import GMML, corrupt, draw_keys
from .modeling import ASiTForPreTraining


@torch.inference_mode()
def reconstruct(
    model: ASiTForPreTraining, input_values: torch.Tensor, gmml: GMML | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """
    Corrupts one clip as in pretraining and lets the student restore it.

    Args:
        model ([`ASiTForPreTraining`]).
        input_values (`torch.Tensor` of shape `(frames, mel)` or `(1, frames, mel)`): one clip, as the feature
            extractor gives it.
        gmml ([`GMML`], *optional*): the corruption, by default that of `GMML()`. One clip alone has no other one to
            take pixels from, so they are set to zero.
        seed (`int`, defaults to 0): decides the mask.

    Returns:
        What [`~asit_hf.plotting.plot_reconstruction`] draws: `clean`, `corrupted`, `mask` and `reconstruction`, all of
        shape `(frames, mel)` on the processor, without the last frames short of a patch.
    """
    if not isinstance(model, ASiTForPreTraining):
        raise TypeError(f"expected an ASiTForPreTraining, which has a reconstruction head, got {type(model).__name__}")
    if not model.config.reconstruction_loss_weight > 0:
        raise ValueError("expected a model pretrained to reconstruct, got reconstruction_loss_weight 0")
    clip = one_clip(input_values)
    patch = model.config.patch_size
    if len(clip) < patch:
        raise ValueError(f"expected at least {patch} frames, one patch, got {len(clip)}")
    clean = clip[: len(clip) // patch * patch].to(model.device, model.dtype)
    keys = draw_keys(1, torch.Generator().manual_seed(seed))
    corrupted, mask = corrupt(clean[None, None], keys, seed, gmml or GMML())
    was_training = model.training
    model.eval()
    tokens = model.asit(corrupted[0]).last_hidden_state
    reconstruction = model.heads.reconstruction(tokens[:, 1:])[0]
    model.train(was_training)
    views = {"clean": clean, "corrupted": corrupted[0, 0], "mask": mask[0, 0], "reconstruction": reconstruction}
    return {name: values.cpu() for name, values in views.items()}
