"""Reconstruction of a corrupted clip by a pretrained model."""

import torch

from .masking import GMML, corrupt, draw_keys
from .modeling import ASiTForPreTraining


@torch.inference_mode()
def reconstruct(
    model: ASiTForPreTraining, input_values: torch.Tensor, gmml: GMML | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """
    Corrupts one clip as in pretraining and reconstructs it with the student.

    Args:
        model ([`ASiTForPreTraining`]): the pretrained model.
        input_values (`torch.Tensor` of shape `(frames, mel)` or `(1, frames, mel)`): output of the feature extractor
            for one clip.
        gmml ([`GMML`], *optional*): parameters of the corruption. Pixels are never replaced by another clip's.
        seed (`int`, defaults to 0): seed of the mask.

    Returns:
        The arguments of [`~asit_hf.plotting.plot_reconstruction`]: `clean`, `corrupted`, `mask` and `reconstruction`,
        all of shape `(frames, mel)` on the CPU, without trailing frames that do not fill a patch.
    """
    if not isinstance(model, ASiTForPreTraining):
        raise TypeError(f"expected an ASiTForPreTraining with its reconstruction head, got {type(model).__name__}")
    if not model.config.reconstruction_loss_weight > 0:
        raise ValueError("expected a model pretrained with the reconstruction loss, got reconstruction_loss_weight 0")
    clip, patch = input_values.squeeze(0) if input_values.dim() == 3 else input_values, model.config.patch_size
    if clip.dim() != 2:
        raise ValueError(f"expected one clip of shape (frames, mel), got {tuple(input_values.shape)}")
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
